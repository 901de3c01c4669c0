"""Models of timm as encoders."""

from typing import Any, cast

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maepretrain.models.plain_vit import PlainViT
from maepretrain.models.vit import Pool, check_pool


class TimmViT(PlainViT):
    """A plain VisionTransformer of timm.

    Args:
        model: without a classifier or attention pooling.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.encoder = model


class TimmEncoder(nn.Module):
    """Any other model of timm: its output, or the places of its last map, but no blocks.

    Args:
        model: any timm model without a classifier.
    """

    # Tested on a divided memory (ZeRO, FSDP2).
    shardable = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = model

    def encode(self, images: Float[Tensor, "b c h w"], pool: Pool = "mean") -> Tensor:
        """Features of images: (b, d), or all places, (b, n, d), with pool="tokens".

        Raises:
            ValueError: pool="cls" without a class token.
        """
        # Networks of timm differ in what they have.
        encoder = cast(Any, self.encoder)
        check_pool(pool, getattr(encoder, "cls_token", None) is not None)
        tokens = encoder.forward_features(images)
        if tokens.ndim == 4:  # the map of a network without tokens
            channels_last = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
            tokens = tokens.flatten(1, 2) if channels_last else tokens.flatten(2).mT
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
