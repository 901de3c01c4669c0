"""`maepretrain reconstruct`: images and a pretrained model's reconstructions in one picture."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from maepretrain.apply.inputs import Pretrained, parse_application, read_images
from maepretrain.data.module import ShardData
from maepretrain.models.protocol import Masks, declared, require
from maepretrain.plots.images import reconstruction_grid
from maepretrain.ranks import say

# Letters of a name that fit above an image.
SHORT = 12


@torch.no_grad()
def reconstruct(
    encoder: str,
    data: ShardData,
    out: Path,
    images: list[str],
    n: int = 8,
    seed: int | None = None,
    mask_ratio: float | None = None,
) -> dict[str, float]:
    """Draw images, the part of them that the model saw, and its reconstruction; one row each.

    Args:
        encoder: a run folder of pretraining, or a file of weights that has the decoder.
        data: how images are shown to the model, and held-out shards.
        out: the picture, a .png.
        images: files, folders or keys of held-out samples; none takes the first held-out samples.
        n: at most so many images.
        seed: of masks and noise; default the model's own.
        mask_ratio: of a masked autoencoder, the share of patches hidden; default its own.

    Returns:
        Peak signal-to-noise ratio in dB of the reconstruction, of a masked autoencoder also of the
        picture with what it saw pasted in: means over the images. Empty for signals.

    Raises:
        ValueError: images or options that the model does not take.
    """
    check_picture(out)
    pretrained = Pretrained(encoder, data, seed)
    if mask_ratio is not None:
        refusal = "hides none of its input: --mask_ratio is for masked autoencoders"
        require(pretrained.model, Masks, refusal).hide(mask_ratio)
    inputs = read_images(images, data, n)
    reconstructed = pretrained.model.reconstruct(pretrained.see(inputs.values))
    if declared(pretrained.model, "norm_pix"):
        say("predictions   are of contrast: each patch's mean and deviation are the original's")
    rows = {name: pretrained.show(row) for name, row in reconstructed._asdict().items()}
    draw(rows, inputs.names, out)
    figures = {}
    if rows["original"].ndim == 4:
        for name in ("reconstruction", "pasted"):
            if name in rows:
                figures[name] = float(psnr(rows[name], rows["original"]).mean())
                mean = f"{figures[name]:.2f} dB, mean of {len(inputs.names)} images"
                say(f"PSNR          of the {name} {mean}")
    return figures


def draw(rows: dict[str, Float[Tensor, "n c *size"]], names: list[str], out: Path) -> None:
    """Draw rows of pictures, with the name of each above it where there is room."""
    titles = [kind.replace("_", " ") for kind in rows]
    columns = names if max(map(len, names)) <= SHORT else None
    reconstruction_grid(list(rows.values()), titles, out, columns)
    say(f"picture       {out}")


def psnr(images: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio of each image in dB: -10 log10 of the mean squared error of
    pixels in 0..1."""
    return -10 * (images - truth).square().flatten(1).mean(1).log10()


def check_picture(out: Path) -> None:
    """Refuse a picture of another kind before any work.

    Raises:
        ValueError: it does not end in .png.
    """
    if out.suffix != ".png":
        raise ValueError(f"--out {out} must end in .png")


def reconstruct_command(argv: list[str]) -> int:
    """The verb `reconstruct`."""
    reconstruct(**parse_application("reconstruct", reconstruct, argv))
    return 0
