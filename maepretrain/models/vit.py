"""What a masked autoencoder needs of a plain ViT: one from timm, its layers, patches cut out and
put back, fixed positions.

Axes: b images, c channels, h w pixels, n patches, k some of them, v values of a patch, d features,
p patch side.
"""

from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float, Int64
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def create_encoder(
    name: str, image_size: int | tuple[int, int], channels: int, **overrides: Any
) -> VisionTransformer:
    """A timm VisionTransformer without head or pooling, its norm after the last block kept.

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
            **overrides,
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


def gather_patches(
    images: Float[Tensor, "b c h w"],
    ids: Int64[Tensor, "b k"],
    grid: tuple[int, int],
    order: Literal["cpp", "ppc"],
) -> Float[Tensor, "b k v"]:
    """The pixels of chosen patches: (c, p, p) as the patch projection reads them, or (p, p, c) as
    the target is ordered."""
    b, c, h, w = images.shape
    rows, columns = grid
    blocks = images.reshape(b, c, rows, h // rows, columns, w // columns)
    blocks = blocks.permute((0, 2, 4, 1, 3, 5) if order == "cpp" else (0, 2, 4, 3, 5, 1))
    which = torch.arange(b, device=ids.device)[:, None]
    return blocks[which, ids // columns, ids % columns].flatten(2)


def unpatchify(
    patches: Float[Tensor, "b n v"], grid: tuple[int, int], channels: int
) -> Float[Tensor, "b c h w"]:
    """Images from all patches in (p, p, c) order."""
    b, _, v = patches.shape
    rows, columns = grid
    p = round((v // channels) ** 0.5)
    blocks = patches.reshape(b, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return blocks.reshape(b, channels, rows * p, columns * p)


def sincos_positions(width: int, grid: tuple[int, int], prefix: int) -> Float[Tensor, "1 n d"]:
    """Fixed 2-D sin-cos positions, zero for prefix tokens; the first half of the features encodes
    the column.

    Raises:
        ValueError: a width that is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {width}")
    rows, columns = grid
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = []
    for coordinate in (column, row):  # the official code puts w before h
        angle = coordinate.flatten()[:, None] * frequency
        halves += [angle.sin(), angle.cos()]
    positions = torch.cat(halves, 1).float()
    return torch.cat([torch.zeros(prefix, width), positions])[None]
