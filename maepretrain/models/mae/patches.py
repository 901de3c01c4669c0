"""Patches: cut out of images, put back, normalised (He et al. 2021, section 3, "Reconstruction
target").

Axes: b images, c channels, h w pixels, n patches, k some of them, v = p x p x c values of a patch.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class MaskedReconstruction(NamedTuple):
    """Rows of a picture, in the (normalised) pixel values of the input."""

    original: Float[Tensor, "b c h w"]
    masked: Float[Tensor, "b c h w"]
    reconstruction: Float[Tensor, "b c h w"]
    pasted: Float[Tensor, "b c h w"]


def grid_of(
    images: Float[Tensor, "b c h w"], image_shape: tuple[int, ...], p: int
) -> tuple[int, int]:
    """Rows and columns of patches of images.

    Args:
        images: of the size that the model was made for, or smaller.
        image_shape: (c, h, w) that the model was made for.
        p: patch side.

    Raises:
        ValueError: other channels, larger images, or sides that p does not divide.
    """
    c, h, w = images.shape[1:]
    channels, height, width = image_shape
    if c != channels or h > height or w > width or h % p or w % p:
        raise ValueError(f"images are {(c, h, w)}, the model takes {image_shape}")
    return h // p, w // p


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


def normalised(patches: Float[Tensor, "b k v"]) -> Float[Tensor, "b k v"]:
    """Each patch by its own mean and variance."""
    return (patches - patches.mean(-1, keepdim=True)) / _deviation(patches)


def _deviation(patches: Float[Tensor, "b k v"]) -> Float[Tensor, "b k 1"]:
    return (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def pictures(
    images: Float[Tensor, "b c h w"],
    prediction: Float[Tensor, "b n v"],
    keep: Int64[Tensor, "b k"],
    masked: Int64[Tensor, "b m"],
    grid: tuple[int, int],
    norm_pix: bool,
) -> MaskedReconstruction:
    """Original, masked, predicted, and predicted with the visible patches pasted in.

    Args:
        images: the original.
        prediction: of all patches, the visible ones first.
        keep: numbers of the visible patches.
        masked: numbers of the others.
        grid: rows and columns of patches.
        norm_pix: the prediction is of normalised patches, which is undone.
    """
    b, n, v = prediction.shape
    place = torch.cat([keep, masked], 1).argsort(1)
    prediction = prediction.gather(1, place[..., None].expand(-1, -1, v))
    patches = gather_patches(
        images, torch.arange(n, device=images.device).expand(b, -1), grid, "ppc"
    )
    if norm_pix:
        prediction = prediction * _deviation(patches) + patches.mean(-1, keepdim=True)
    hidden = torch.ones(b, n, 1, device=images.device).scatter(1, keep[..., None], 0.0)
    visible = patches * (1 - hidden)
    c = images.shape[1]
    return MaskedReconstruction(
        original=images,
        masked=unpatchify(visible, grid, c),
        reconstruction=unpatchify(prediction, grid, c),
        pasted=unpatchify(visible + prediction * hidden, grid, c),
    )
