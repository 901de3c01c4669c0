"""`maepretrain denoise`: what a pretrained autoencoder expects behind noisy images.

A denoising autoencoder was trained for it (Vincent et al. 2008); others decode the code of what
they are given, which takes it to what they can draw.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from maepretrain.apply.inputs import Given, Pretrained, parse_application, read_images
from maepretrain.apply.reconstruct import check_picture, draw, psnr
from maepretrain.data.module import ShardData
from maepretrain.models.autoencoders.corruption import Corruption, Kind
from maepretrain.models.protocol import Decodes, Denoises, require
from maepretrain.ranks import say
from maepretrain.runs.results import print_columns


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
        corrupt: the images are clean: corrupt them first, and say how much of it is undone.
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
    given = read_images(images, data, n)
    seen = pretrained.see(given.inputs)
    rows, ratios = {}, {}
    if corrupt is not None:
        rows["original"] = pretrained.show(seen)
        seen = _corruption(pretrained, given, corrupt, amount, seed)(
            seen, torch.arange(len(seen), device=seen.device)
        )
    rows["given" if corrupt is None else "corrupted"] = noisy = pretrained.show(seen)
    rows["denoised"] = cleaned = pretrained.show(repair(seen))
    if corrupt is not None and noisy.ndim == 4:
        ratios = {k: psnr(x, rows["original"]) for k, x in (("before", noisy), ("after", cleaned))}
        _print(given.names, ratios)
    if out.suffix:
        draw(rows, given.names, out)
    else:
        _write(cleaned, given.names, out)
    return ratios


def _repair(pretrained: Pretrained) -> Callable[[Tensor], Tensor]:
    """From noisy to clean inputs.

    Raises:
        ValueError: the model decodes no codes.
    """
    if isinstance(pretrained.model, Denoises):
        return pretrained.model.denoise
    lacks = (
        "cannot denoise: it lacks a code to decode, and predicts only what it does not see "
        "(`maepretrain reconstruct` shows that)"
    )
    decode = require(pretrained.model, Decodes, lacks).decode
    say(f"model         {pretrained.name} is no denoiser: it decodes the code of what is given")
    return lambda x: decode(pretrained.model.encode(x))


def _corruption(
    pretrained: Pretrained, given: Given, kind: Kind, amount: float, seed: int
) -> Corruption:
    """Its salt and pepper are white and black."""
    zeros = torch.zeros(1, *given.inputs.shape[1:])
    low, high = (float(pretrained.see(x).mean()) for x in (zeros, zeros + 1))
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
