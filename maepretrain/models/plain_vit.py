"""A model around timm's plain VisionTransformer, to all that evaluates it: features and layers.

MaskedAutoencoder and TimmViT are two such models. They share this implementation, so that features
of blocks, pooling and layers mean the same for both.

Axes: b images, c channels, h w pixels, t tokens, n patches, d features.
"""

from collections.abc import Sequence

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maepretrain.models import vit


class PlainViT(nn.Module):
    """Holds `encoder`; abilities as `maepretrain.models.protocol.Blocks` documents them."""

    encoder: VisionTransformer
    # Tested on a divided memory (ZeRO, FSDP2).
    shardable = True
    # Blocks are recomputed in the backward pass.
    activation_checkpointing = False

    def encode(self, images: Float[Tensor, "b c h w"], pool: vit.Pool = "mean") -> Tensor:
        """Features of whole images after the encoder's norm: (b, d), or (b, n, d) patch tokens with
        pool="tokens".

        Raises:
            ValueError: images of another size, or pool="cls" without a class token.
        """
        vit.check_pool(pool, self.has_class_token)
        (tokens,) = self.features(images, [-1])
        tokens = self.encoder.norm(tokens)
        if pool == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.prefix :]
        # ViTs that were trained on the mean have their norm after it.
        return self.encoder.fc_norm(patches.mean(1)) if pool == "mean" else patches

    def features(
        self, images: Float[Tensor, "b c h w"], blocks: Sequence[int]
    ) -> list[Float[Tensor, "b t d"]]:
        """Outputs of these blocks for whole images, before the encoder's norm.

        Args:
            images: normalised.
            blocks: 0 is the first, -1 the last.

        Returns:
            For each of `blocks` all tokens: `prefix` tokens, the class token first, then patches.

        Raises:
            ValueError: images of another size, or a block that the encoder does not have.
        """
        self.check_size(images)
        tokens = vit.embed_images(self.encoder, images)
        return vit.block_outputs(
            self.encoder, tokens, blocks, recompute=self.activation_checkpointing
        )

    def check_size(self, images: Float[Tensor, "b c h w"]) -> None:
        """Refuse images of another size.

        Raises:
            ValueError: with both sizes.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images are {tuple(images.shape[1:])}, the model takes {self.image_shape}"
            )

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output: embedding and tokens, each block, norm."""
        return vit.vit_layers(self.encoder)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(c, h, w) of the images that the encoder takes."""
        patch_embed = self.encoder.patch_embed
        return (patch_embed.proj.weight.shape[1], *patch_embed.img_size)

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.image_shape[0]

    @property
    def patch_size(self) -> int:
        """Side of a patch."""
        return self.encoder.patch_embed.patch_size[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.encoder.patch_embed.grid_size

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return len(self.encoder.blocks)

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.encoder.embed_dim

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token, if there is one, and registers."""
        return self.encoder.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        """The first token is a class token."""
        return self.encoder.cls_token is not None
