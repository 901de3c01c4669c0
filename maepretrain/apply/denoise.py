"""`maepretrain denoise`: the clean images that a pretrained autoencoder expects behind noisy ones.

A denoising autoencoder was trained for it (Vincent et al. 2008); others decode the code of the
noisy image, which leads to the images that they can draw.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from maepretrain.apply.inputs import Inputs, Pretrained, parse_application, read_images
from maepretrain.apply.reconstruct import check_picture, draw, psnr
from maepretrain.data.module import ShardData
from maepretrain.models.autoencoders.corruption import Corruption, Kind
from maepretrain.models.protocol import Decodes, Denoises, require
from maepretrain.ranks import say
from maepretrain.runs.tables import print_columns


@torch.no_grad()
def denoise(
    encoder: str,
    data: ShardData,
    out: Path,
    images: list[str],
    n: int | None = None,
    corrupt: Kind | None = None,
    amount: float = 0.3,
    seed: int = 0,
) -> dict[str, Float[Tensor, "b"]]:
    """Denoise images.

    Args:
        encoder: a run folder of pretraining, or a file of weights that has the decoder.
        data: how images are shown to the model, and held-out shards.
        out: a .png that shows images before and after, or a folder for one .png of each.
        images: files, folders or keys of held-out samples; none takes the first held-out samples.
        n: at most so many images; default 8 in a picture, all of them into a folder.
        corrupt: the images are clean: corrupt them first, and print how much of it is undone.
        amount: of that corruption, as `pretrain` takes it: a share, a standard deviation or a
            range.
        seed: of that corruption.

    Returns:
        With `corrupt`, the peak signal-to-noise ratio in dB of each image `before` and `after`.

    Raises:
        ValueError: a model that cannot, images that it does not take, a folder that has a picture
            of that name already.
    """
    if out.suffix:
        check_picture(out)
        n = n or 8
    pretrained = Pretrained(encoder, data)
    repair = _repair(pretrained)
    inputs = read_images(images, data, n)
    noisy = pretrained.see(inputs.values)
    rows: dict[str, Tensor] = {}
    ratios: dict[str, Tensor] = {}
    if corrupt is None:
        rows["given"] = pretrained.show(noisy)
    else:
        rows["original"] = pretrained.show(noisy)
        corruption = _corruption(pretrained, inputs, corrupt, amount, seed)
        noisy = corruption(noisy, torch.arange(len(noisy), device=noisy.device))
        rows["corrupted"] = pretrained.show(noisy)
    rows["denoised"] = pretrained.show(repair(noisy))
    if corrupt is not None and rows["original"].ndim == 4:
        ratios["before"] = psnr(rows["corrupted"], rows["original"])
        ratios["after"] = psnr(rows["denoised"], rows["original"])
        _print(inputs.names, ratios)
    if out.suffix:
        draw(rows, inputs.names, out)
    else:
        _write(rows["denoised"], inputs.names, out)
    return ratios


def _repair(pretrained: Pretrained) -> Callable[[Tensor], Tensor]:
    """A function from noisy to clean inputs.

    Raises:
        ValueError: the model decodes no codes.
    """
    if isinstance(pretrained.model, Denoises):
        return pretrained.model.denoise
    refusal = (
        "cannot denoise: it lacks a code to decode, and predicts only what it does not see "
        "(`maepretrain reconstruct` shows that)"
    )
    decode = require(pretrained.model, Decodes, refusal).decode
    say(f"model         {pretrained.name} is no denoiser: it decodes the code of what is given")
    return lambda x: decode(pretrained.model.encode(x))


def _corruption(
    pretrained: Pretrained, inputs: Inputs, kind: Kind, amount: float, seed: int
) -> Corruption:
    """The corruption, with white and black for salt and pepper."""
    black = torch.zeros(1, *inputs.values.shape[1:])
    low = float(pretrained.see(black).mean())
    high = float(pretrained.see(black + 1).mean())
    return Corruption(kind, amount, low, high, seed)


def _print(names: list[str], ratios: dict[str, Tensor]) -> None:
    rows = {
        name: {"before": float(ratios["before"][i]), "after": float(ratios["after"][i])}
        for i, name in enumerate(names)
    }
    rows |= {"mean": {key: float(ratio.mean()) for key, ratio in ratios.items()}}
    columns = {"before": "PSNR before", "after": "after, dB"}
    print_columns("image", columns, rows, lambda row, key: f"{row[key]:.2f}")


def _write(images: Float[Tensor, "b c h w"], names: list[str], folder: Path) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{tuple(images.shape[1:])} are no gray or RGB images: take --out a .png")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"two images would both be {folder / repeated[0]}.png: name one of them")
    paths = [folder / f"{name}.png" for name in names]
    there = [path for path in paths if path.exists()]
    if there:
        raise ValueError(f"{there[0]} is there already: name another folder with --out")
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image((image * 255).round().to(torch.uint8)).save(path)
    say(f"images        {len(paths):,} in {folder}")


def denoise_command(argv: list[str]) -> int:
    """The verb `denoise`."""
    denoise(**parse_application("denoise", denoise, argv))
    return 0
