"""`maepretrain generate sample | interpolate | traverse`: images that a model draws, the way from
one image to another through its code, and the effect of single numbers of a code."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from maepretrain.apply.inputs import Pretrained, parse_application, read_images
from maepretrain.apply.reconstruct import check_picture
from maepretrain.data.module import ShardData
from maepretrain.evaluate import geometry
from maepretrain.evaluate.features import embed
from maepretrain.models.protocol import Decodes, Samples, declared, require
from maepretrain.plots.images import reconstruction_grid, tiles
from maepretrain.ranks import say

# Held-out images on whose codes the spread of each number is measured.
MEASURED = 2000
SAMPLES = (
    "cannot be sampled: it lacks a distribution to draw from (Variational, Adversarial, "
    "GenerativeStochastic and Helmholtz have one)"
)
DECODES = "lacks decode(): none of its codes alone becomes an image"


@torch.no_grad()
def sample(
    encoder: str, data: ShardData, out: Path, n: int = 64, seed: int = 0
) -> Float[Tensor, "n c *size"]:
    """Draw images from a generative model.

    Args:
        encoder: a run folder of pretraining, or a file of weights that has the decoder.
        data: how images are shown to the model.
        out: the picture, a .png.
        n: how many; of a model with classes the columns are the classes.
        seed: of the draws.

    Returns:
        The samples: pixels in 0..1, or signals.

    Raises:
        ValueError: a model without a distribution to draw from.
    """
    check_picture(out)
    if n < 1:
        raise ValueError(f"n {n} must be at least 1")
    pretrained = Pretrained(encoder, data)
    drawn = pretrained.show(require(pretrained.model, Samples, SAMPLES).sample(n, seed=seed))
    if drawn.ndim == 3:
        reconstruction_grid([drawn], ["samples"], out)
    else:
        tiles(drawn, declared(pretrained.model, "classes") or round(n**0.5), out)
    say(f"samples       {n} of {pretrained.name}, seed {seed}")
    say(f"picture       {out}")
    return drawn


def interpolate(
    encoder: str, data: ShardData, out: Path, images: list[str], steps: int = 9
) -> tuple[Float[Tensor, "s c *size"], Float[Tensor, "s c *size"]]:
    """Draw the way from one image to another, through the code and blended pixel by pixel.

    Args:
        encoder: a run folder of pretraining, or a file of weights that has the decoder.
        data: how images are shown to the model, and held-out shards.
        out: the picture, a .png.
        images: two files or keys of held-out samples; none takes the first two held-out samples.
        steps: images on the way, both ends among them.

    Returns:
        Both ways: pixels in 0..1, or signals.

    Raises:
        ValueError: a model that decodes no codes, other than two images.
    """
    check_picture(out)
    pretrained = Pretrained(encoder, data)
    decode = require(pretrained.model, Decodes, DECODES).decode
    inputs = read_images(images, data, None if images else 2)
    if len(inputs.names) != 2:
        count = len(inputs.names)
        raise ValueError(f"a way goes from one image to another: --images names {count}")
    a, b = pretrained.see(inputs.values)
    ways = geometry.interpolate(pretrained.model.encode, decode, a, b, steps)
    along = pretrained.show(ways[0])
    blended = pretrained.show(ways[1])
    shares = [f"{100 * i / (steps - 1):.3g} %" for i in range(steps)]
    reconstruction_grid([along, blended], ["code", "pixels"], out, shares)
    say(f"way           from {inputs.names[0]} to {inputs.names[1]} in {steps} images")
    say(f"picture       {out}")
    return along, blended


@torch.no_grad()
def traverse(
    encoder: str,
    data: ShardData,
    out: Path,
    images: list[str],
    dimensions: list[int],
    span: float = 3.0,
    steps: int = 9,
) -> Float[Tensor, "k s c *size"]:
    """Draw an image with one number of its code changed at a time; a row for each number.

    Args:
        encoder: a run folder of pretraining, or a file of weights that has the decoder.
        data: how images are shown to the model, and held-out shards, on whose codes the spread of
            each number is measured.
        out: the picture, a .png.
        images: a file or key of a held-out sample; none takes the first held-out sample.
        dimensions: which numbers of the code; none takes the eight that vary most over held-out
            images.
        span: how far from a number's mean, in standard deviations.
        steps: values of each number.

    Returns:
        Pixels in 0..1, or signals.

    Raises:
        ValueError: a model that decodes no codes, no held-out shards, a dimension that the code
            does not have.
    """
    check_picture(out)
    if steps < 2 or span <= 0:
        raise ValueError(f"steps {steps} must be at least 2 and span {span} above 0")
    pretrained = Pretrained(encoder, data)
    decode = require(pretrained.model, Decodes, DECODES).decode
    inputs = read_images(images, data, None if images else 1)
    if len(inputs.names) != 1:
        raise ValueError(f"one image is varied: --images names {len(inputs.names)}")
    code = pretrained.model.encode(pretrained.see(inputs.values))[0]
    mean, std = _measure(pretrained, data)
    chosen = dimensions or std.argsort(descending=True)[:8].tolist()
    away = torch.linspace(-span, span, steps, device=code.device)
    rows = []
    for d in chosen:
        geometry.check_dimension(d, len(code))
        values = mean[d] + away * std[d]
        rows.append(pretrained.show(geometry.traverse(decode, code, d, values)))
    names = [f"{d}: {float(mean[d]):.2f} ± {float(std[d]):.2f}" for d in chosen]
    titles = [f"{a:+.3g} sd" if a else "mean" for a in away.tolist()]
    reconstruction_grid(rows, names, out, titles)
    say(f"varied        {inputs.names[0]}, numbers {', '.join(map(str, chosen))} of {len(code)}")
    say(f"picture       {out}")
    return torch.stack(rows)


def _measure(pretrained: Pretrained, data: ShardData) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each number of the codes of held-out images."""
    if data.val_index is None:
        raise ValueError("traverse measures codes of held-out images: name shards with --data.val")
    index = data.val_index.choose(torch.arange(min(MEASURED, len(data.val_index))))
    codes, _ = embed(lambda x: pretrained.model.encode(pretrained.see(x)), data.evaluation(index))
    std, mean = torch.std_mean(codes.to(pretrained.device), 0)
    return mean, std


def generate_command(kind: str, argv: list[str]) -> int:
    """The verbs `generate sample`, `generate interpolate` and `generate traverse`."""
    function = {"sample": sample, "interpolate": interpolate, "traverse": traverse}[kind]
    measures = kind == "traverse"
    function(**parse_application(f"generate {kind}", function, argv, measures=measures))
    return 0
