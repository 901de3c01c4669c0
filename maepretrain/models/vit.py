"""timm's plain VisionTransformer: made, embedded, run block by block, pooled.

timm's private names are used here alone: `_pos_embed`, which adds positions and prefix tokens.

Axes: b images, c channels, h w pixels, n patches, k some of them, v values of a
patch, t tokens, d features, p patch side.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import timm
import torch
from jaxtyping import Float
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Pool = Literal["cls", "mean", "tokens"]


def create_encoder(
    name: str, image_size: int | tuple[int, int], channels: int, **overrides: Any
) -> VisionTransformer:
    """A timm VisionTransformer without head or pooling, its norm after the last block kept.

    Args:
        name: of timm.
        image_size: side, or (height, width).
        channels: of the images.
        overrides: arguments of timm's VisionTransformer; None leaves the encoder's own.

    Raises:
        ValueError: an unknown name, another kind of model, or an image size that the patch size
            does not divide.
    """
    try:
        encoder = timm.create_model(
            name,
            img_size=image_size,
            in_chans=channels,
            num_classes=0,
            global_pool="",  # no attention pooling either: it would never get a gradient
            fc_norm=False,
            **{key: value for key, value in overrides.items() if value is not None},
        )
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"timm cannot make encoder {name}: {error}") from error
    # A hybrid, whose patches are made by convolutions, is a VisionTransformer as well.
    if (
        type(encoder) is not VisionTransformer
        or type(encoder.patch_embed) is not PatchEmbed
        or encoder.pos_embed is None
    ):
        raise ValueError(f"encoder {name} is no plain timm VisionTransformer with positions")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_divides(size, encoder.patch_embed.proj.kernel_size[0])
    return encoder


def check_divides(image_size: tuple[int, int], p: int) -> None:
    """Refuse images that patches do not fill.

    Raises:
        ValueError: a side that the patch size does not divide.
    """
    h, w = image_size
    if h % p or w % p:
        raise ValueError(f"image size {h}x{w} must be divisible by patch size {p}")


def vit_layers(encoder: VisionTransformer) -> list[list[nn.Parameter]]:
    """The parameters of a ViT from input to output: embedding and tokens, each block, norm."""
    blocks = [list(block.parameters()) for block in encoder.blocks]
    last = [*encoder.norm.parameters(), *encoder.fc_norm.parameters()]
    later = {id(p) for group in [*blocks, last] for p in group}
    return [[p for p in encoder.parameters() if id(p) not in later], *blocks, last]


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Refuse numbers of blocks that an encoder does not have.

    Raises:
        ValueError: one outside -depth..depth - 1.
    """
    for block in blocks:
        if not -depth <= block < depth:
            raise ValueError(f"block {block} is none of the encoder's {depth} (0 is the first)")


def run_block(block: nn.Module, *arguments: Any, recompute: bool) -> Float[Tensor, "b t d"]:
    """The output of a block; with `recompute`, one that keeps its inputs alone for the backward."""
    if recompute and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(block, *arguments, use_reentrant=False))
    return block(*arguments)


def project_patches(
    encoder: VisionTransformer, pixels: Float[Tensor, "b k v"]
) -> Float[Tensor, "b k d"]:
    """The patch projection, a strided convolution over a whole image, of some patches alone; their
    pixels in the order (c, p, p)."""
    projection = encoder.patch_embed.proj
    tokens = F.linear(pixels, projection.weight.flatten(1), projection.bias)
    return encoder.patch_embed.norm(tokens)


def embed_images(
    encoder: VisionTransformer, images: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b t d"]:
    """The input of the first block: prefix tokens and all patches, with positions."""
    tokens = encoder.patch_drop(encoder._pos_embed(encoder.patch_embed(images)))
    return encoder.norm_pre(tokens)


def block_outputs(
    encoder: VisionTransformer,
    tokens: Float[Tensor, "b t d"],
    blocks: Sequence[int],
    recompute: bool,
) -> list[Float[Tensor, "b t d"]]:
    """Outputs of these blocks, before the final norm.

    Args:
        encoder: its blocks are run.
        tokens: of `embed_images`.
        blocks: 0 is the first, -1 the last.
        recompute: compute blocks again in the backward pass.

    Raises:
        ValueError: a block that the encoder does not have.
    """
    depth = len(encoder.blocks)
    check_blocks(blocks, depth)
    wanted = [block % depth for block in blocks]
    outputs = {}
    for number, block in enumerate(encoder.blocks[: max(wanted, default=-1) + 1]):
        tokens = run_block(block, tokens, recompute=recompute)
        if number in wanted:
            outputs[number] = tokens
    return [outputs[number] for number in wanted]


def check_pool(pool: Pool, has_class_token: bool) -> None:
    """Refuse a class token that is not there.

    Raises:
        ValueError: pool="cls" without a class token.
    """
    if pool == "cls" and not has_class_token:
        raise ValueError('this encoder has no class token: use pool "mean"')


def prepend_prefix(
    encoder: VisionTransformer, tokens: Float[Tensor, "b n d"], positions: Float[Tensor, "s d"]
) -> Float[Tensor, "b t d"]:
    """Class and register tokens with their positions, if they have any, before the others."""
    both = (encoder.cls_token, encoder.reg_token)
    prefix: list[Tensor] = [token for token in both if token is not None]
    if not prefix:
        return tokens
    first = torch.cat(prefix, 1)
    if len(positions):
        first = first + positions
    return torch.cat([first.expand(len(tokens), -1, -1), tokens], 1)
