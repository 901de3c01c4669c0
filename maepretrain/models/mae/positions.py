"""Fixed 2-D sin-cos positions of patches, and positions for images of another size (He et al. 2021,
appendix A.1).

Axes: s prefix tokens (or none) and patches, d features.
"""

from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maepretrain.models.vit import check_divides


def sincos_positions(width: int, grid: tuple[int, int], prefix: int) -> Float[Tensor, "1 s d"]:
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


def fix(encoder: VisionTransformer, grid: tuple[int, int]) -> None:
    """Sin-cos positions in a buffer: timm's own are trained, the paper's are fixed."""
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    del encoder.pos_embed
    encoder.register_buffer("pos_embed", sincos_positions(encoder.embed_dim, grid, prefix))


def train(encoder: VisionTransformer) -> None:
    """Make fixed positions a Parameter."""
    positions = cast(Tensor, encoder.pos_embed)
    del encoder.pos_embed
    encoder.pos_embed = nn.Parameter(positions.clone())


def at_grid(
    positions: Float[Tensor, "1 s d"], made_for: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "s2 d"]:
    """Positions of the prefix tokens, if they have any, and of the patches of images of another
    size: sin-cos, as the model began with.

    Args:
        positions: of the model.
        made_for: rows and columns of patches that they are for.
        grid: those of the images.
    """
    if grid == made_for:
        return positions[0]
    prefix = positions.shape[1] - made_for[0] * made_for[1]
    return sincos_positions(positions.shape[2], grid, prefix)[0].to(positions)


def renew(tables: Iterable[Tensor], grid: tuple[int, int]) -> None:
    """Sin-cos positions in place of all others of this grid."""
    for positions in tables:
        prefix = positions.shape[1] - grid[0] * grid[1]
        positions.data = sincos_positions(positions.shape[2], grid, prefix)


@torch.no_grad()
def resize(
    encoder: VisionTransformer, tables: Iterable[Tensor], image_size: tuple[int, int]
) -> None:
    """Make an encoder take images of another size.

    Positions are interpolated (bicubic) and not made anew: what the blocks learnt to read is where
    a patch lies between the edges of the image. The official code does the same for fine-tuning.
    Those of prefix tokens stay.

    Args:
        encoder: its patch embedding takes the new size.
        tables: positions of the encoder and the decoder, (1, s, d) each.
        image_size: height and width.

    Raises:
        ValueError: a size that the patch size does not divide.
    """
    patch_embed = encoder.patch_embed
    check_divides(image_size, patch_embed.patch_size[0])
    rows, columns = patch_embed.grid_size
    patch_embed.set_input_size(image_size)
    for positions in tables:
        # The tensor keeps its kind: a fixed buffer, or a Parameter that is trained.
        positions.data = resample_abs_pos_embed(
            positions.data,
            list(patch_embed.grid_size),
            [rows, columns],
            positions.shape[1] - rows * columns,
            antialias=False,  # as the official code; in enlarging it makes a difference too
        )
