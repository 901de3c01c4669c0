"""Masking: which patches the encoder sees (He et al. 2021, section 3, "Masking").

Each patch gets noise, and the patches with the smallest noise stay visible. The kinds of masks
differ in their noise alone, which is a pure function of (seed, position of the sample in the run).

Axes: b images, n patches, k visible patches, m masked patches, u random numbers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from maepretrain.randomness import uniform

Grid = tuple[int, int]
Kind = Literal["random", "block", "grid"]
# Rectangles that a block mask draws; 32 cover more than any ratio in use.
BLOCKS_TRIED = 32


def random_noise(
    seed: int, position: Int64[Tensor, "b"], grid: Grid, number: int
) -> Float[Tensor, "b n"]:
    """Patches in random order.

    Args:
        seed: of the masks.
        position: of the samples in the run.
        grid: rows and columns of patches.
        number: of the mask among those of an image.
    """
    return uniform(seed, _stream("mask", number), position, grid[0] * grid[1])


def grid_noise(
    seed: int, position: Int64[Tensor, "b"], grid: Grid, number: int
) -> Float[Tensor, "b n"]:
    """The upper left patch of each 2 x 2 comes first."""
    u = random_noise(seed, position, grid, number)
    kept = torch.zeros(grid, device=u.device)
    kept[::2, ::2] = -1.0
    return kept.flatten() + u


def block_noise(
    seed: int, position: Int64[Tensor, "b"], grid: Grid, number: int
) -> Float[Tensor, "b n"]:
    """Patches of the first random rectangle come last, those of the second before them, ..."""
    u = random_noise(seed, position, grid, number)
    stream = _stream("mask blocks", number)
    return u + _first_block(uniform(seed, stream, position, 4 * BLOCKS_TRIED), grid)


def _stream(name: str, number: int) -> str:
    return f"{name} {number}" if number else name


def _first_block(u: Float[Tensor, "b u"], grid: Grid) -> Float[Tensor, "b n"]:
    """For each patch the number of the first random rectangle that covers it, counted down; 0 where
    none does.

    Rectangles as in BEiT (Bao et al. 2021, algorithm 1): aspect .3 to 1/.3, area from 1/12 of the
    patches to .4 of them.
    """
    rows, columns = grid
    share, aspect, top, left = u.view(len(u), BLOCKS_TRIED, 4).unbind(-1)  # (b, blocks)
    area = rows * columns * (1 / 12 + (0.4 - 1 / 12) * share)
    aspect = (0.3 ** (1 - 2 * aspect)).sqrt()
    height = (area.sqrt() * aspect).round().clamp(1, rows)
    width = (area.sqrt() / aspect).round().clamp(1, columns)
    top = (top * (rows - height + 1)).floor()[..., None]
    left = (left * (columns - width + 1)).floor()[..., None]
    row = torch.arange(rows, device=u.device)
    column = torch.arange(columns, device=u.device)
    in_rows = (row >= top) & (row < top + height[..., None])  # (b, blocks, rows)
    in_columns = (column >= left) & (column < left + width[..., None])
    covered = (in_rows[..., None] & in_columns[..., None, :]).flatten(2)  # (b, blocks, n)
    countdown = torch.arange(BLOCKS_TRIED, 0, -1, device=u.device)[:, None]
    return (covered * countdown).amax(1).float()


KINDS = {"random": random_noise, "block": block_noise, "grid": grid_noise}


@dataclass
class Masking:
    """The masks of a model.

    Args:
        kind: "random", "block" or "grid".
        ratio: share of patches hidden; int(n * (1 - ratio)) stay visible.
        predicted: share of the masked patches that are predicted.
        per_image: masks of each image.

    Raises:
        ValueError: values out of range, or a share of patches that are not in random order.
    """

    kind: Kind
    ratio: float
    predicted: float
    per_image: int

    def __post_init__(self) -> None:
        if self.per_image < 1 or not 0 < self.predicted <= 1:
            raise ValueError(
                f"masks_per_image {self.per_image} must be at least 1, reconstruct "
                f"{self.predicted} in (0, 1]"
            )
        if self.predicted < 1 and self.kind != "random":
            # The order of the others says where their rectangle or square is.
            raise ValueError(f"reconstruct {self.predicted} needs mask random, not {self.kind}")

    def noise(self, seed: int, position: Int64[Tensor, "b"], grid: Grid) -> Float[Tensor, "b2 n"]:
        """Noise whose smallest entries stay visible, one row for each mask of each image."""
        masks = [KINDS[self.kind](seed, position, grid, i) for i in range(self.per_image)]
        return torch.stack(masks, 1).flatten(0, 1)

    def split(
        self, noise: Float[Tensor, "b n"], grid: Grid
    ) -> tuple[Int64[Tensor, "b k"], Int64[Tensor, "b m"]]:
        """Numbers of the visible and the masked patches; stable, since fp32 noise has ties."""
        ids = torch.argsort(noise, dim=1, stable=True)
        visible = self.visible(grid)
        return ids[:, :visible], ids[:, visible:]

    def visible(self, grid: Grid) -> int:
        """Patches of a grid that stay visible.

        Raises:
            ValueError: a ratio that leaves nothing to see or to predict.
        """
        n = grid[0] * grid[1]
        visible = int(n * (1 - self.ratio))
        if not 0 < visible < n:
            raise ValueError(
                f"mask_ratio {self.ratio} leaves {visible} of {n} patches visible; at least "
                f"one must be visible and one masked"
            )
        return visible

    def predictions(self, grid: Grid) -> int:
        """Patches of a grid that are predicted."""
        masked = grid[0] * grid[1] - self.visible(grid)
        return max(1, round(self.predicted * masked))

    def check(self, grid: Grid) -> None:
        """Refuse a grid of patches that cannot be masked so.

        Raises:
            ValueError: as of `visible`; an odd grid or another ratio for mask grid.
        """
        self.visible(grid)
        if self.kind == "grid" and (self.ratio != 0.75 or grid[0] % 2 or grid[1] % 2):
            raise ValueError(
                f"mask grid keeps one patch of 2 x 2: it needs mask_ratio 0.75 (not {self.ratio}) "
                f"and an even patch grid (not {grid[0]}x{grid[1]})"
            )

    def describe(self, grid: Grid) -> str:
        """A line for the start of a run."""
        visible = self.visible(grid)
        n = grid[0] * grid[1]
        return f"{self.kind}, ratio {self.ratio}: {visible} of {n} patches visible"
