"""Models of timm as encoders."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maepretrain.models.vit import check_blocks, vit_layers


class TimmEncoder(nn.Module):
    """A timm model as an encoder; without `features` where it is no plain VisionTransformer.

    Args:
        model: any timm model without a classifier.
    """

    # Runs on a divided memory too (ZeRO, FSDP2).
    shardable = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = model

    def encode(
        self, images: Float[Tensor, "b c h w"], pool: Literal["cls", "mean", "tokens"] = "mean"
    ) -> Tensor:
        """Features of images: (b, d), or all places, (b, n, d), with pool="tokens".

        Raises:
            ValueError: pool="cls" without a class token.
        """
        encoder = cast(Any, self.encoder)
        if pool == "cls" and getattr(encoder, "cls_token", None) is None:
            raise ValueError('this encoder has no class token: use pool "mean"')
        tokens = encoder.forward_features(images)
        if tokens.ndim == 4:  # the map of a network without tokens
            last = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
            tokens = tokens.flatten(1, 2) if last else tokens.flatten(2).mT
        if pool == "cls":
            return tokens[:, 0]
        places = tokens[:, getattr(encoder, "num_prefix_tokens", 0) :]
        if pool == "tokens":
            return places
        # ViTs that were trained on the mean have their norm after it.
        return getattr(encoder, "fc_norm", nn.Identity())(places.mean(1))

    @property
    def width(self) -> int:
        """Features of an image."""
        return cast(Any, self.encoder).num_features


class TimmViT(TimmEncoder):
    """A plain VisionTransformer of timm, with what MaskedAutoencoder offers of its encoder."""

    encoder: VisionTransformer

    def features(
        self, images: Float[Tensor, "b c h w"], blocks: Sequence[int]
    ) -> list[Float[Tensor, "b t d"]]:
        """What the given blocks put out, before the norm; all tokens, prefix tokens first.

        Raises:
            ValueError: a block that the encoder does not have.
        """
        check_blocks(blocks, self.depth)
        wanted = [block % self.depth for block in blocks]
        found = cast(Any, self.encoder).forward_intermediates(
            images,
            indices=sorted(set(wanted)),
            return_prefix_tokens=self.prefix > 0,
            output_fmt="NLC",
            intermediates_only=True,
        )
        whole = [torch.cat([x[1], x[0]], 1) if self.prefix else x for x in found]
        outputs = dict(zip(sorted(set(wanted)), whole, strict=True))
        return [outputs[number] for number in wanted]

    def layers(self) -> list[list[nn.Parameter]]:
        """Parameters from input to output: embedding and tokens, each block, norm."""
        return vit_layers(self.encoder)

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return len(self.encoder.blocks)

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.encoder.num_prefix_tokens
