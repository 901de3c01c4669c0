"""Pictures of what small autoencoders learn of the geometry of real digits: half a minute on one
free core, `python examples/geometry.py [FOLDER]`."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.evaluate.geometry import (
    across,
    decoder_tangents,
    encoder_tangents,
    flat_map,
    interpolate,
    sensitivity,
    vector_field,
)
from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.coders import Dense
from maepretrain.models.autoencoders.contractive import Contractive
from maepretrain.models.autoencoders.denoising import Denoising
from maepretrain.plots.geometry import draw_field, draw_lines, draw_maps, draw_rows
from maepretrain.workflows.quickstart import digits


def main(folder: Path) -> None:
    """Draw all pictures into a folder and print where they lie."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, test = digits()
    images = torch.from_numpy(train.images).float()[:, None] / 255
    held_out = torch.from_numpy(test.images).float()[:, None] / 255
    labels = torch.as_tensor(test.labels).long()
    announce(*translation(folder, held_out[0]))
    announce(*tangents(folder, images, held_out))
    announce(*field(folder))
    announce(*insensitivity(folder, images, held_out))
    announce(*maps(folder, images, held_out, labels))
    announce(*path(folder, images, held_out, labels))


def announce(picture: Path, finding: str) -> None:
    """Print where a picture lies and what it shows."""
    print(f"{picture}: {finding}", flush=True)


def fit(model: nn.Module, samples: Tensor, steps: int, lr: float = 3e-3, batch: int = 128) -> None:
    """Adam, batches with replacement, the learning rate falling to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(samples), (batch,))
        position = torch.arange(step * batch, (step + 1) * batch)
        optimizer.zero_grad()
        model({"input": samples[chosen], "position": position})["loss"].backward()
        optimizer.step()
    model.eval()


def shifted(image: Tensor, pixels: Tensor) -> Tensor:
    """An image (1, h, w) in a frame of twice its size, blurred, moved to the right by so many
    pixels each, whole or not: (n, 1, 2h, 2w). A shift is a phase of the Fourier transform."""
    _, h, w = image.shape
    framed = F.pad(image, (w // 2, w // 2, h // 2, h // 2))[None]
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(binomial, binomial)[None, None]
    waves = torch.fft.rfft(F.conv2d(framed, kernel, padding=2))
    phase = torch.exp(-2j * torch.pi * torch.arange(w + 1) / (2 * w) * pixels[:, None])
    return torch.fft.irfft(waves * phase[:, None, None], n=2 * w)


def translation(folder: Path, digit: Tensor) -> tuple[Path, str]:
    """One digit that moves is a curve: the decoder's tangent beside what a small shift changes."""
    manifold = shifted(digit, torch.linspace(-3, 3, 601))
    model = Autoencoder(Dense(16, 1, [128, 1], activation="tanh", code_activation="none"))
    fit(model, manifold, 1200)
    at = torch.linspace(-2, 2, 8)
    learnt, _ = decoder_tangents(model.coder.mean, model.encode(shifted(digit, at)).detach(), 1)
    learnt = learnt[:, 0]
    truth = (shifted(digit, at + 0.1) - shifted(digit, at - 0.1)) / 0.2
    cosine = F.cosine_similarity(learnt.flatten(1), truth.flatten(1))
    where = folder / "translation.png"
    rows = {"finite difference": truth, "tangent": learnt * cosine.sign().view(-1, 1, 1, 1)}
    draw_rows(where, rows, symmetric=True)
    return where, f"|cosine| of the first tangent and a shift {float(cosine.abs().mean()):.3f}"


def tangents(folder: Path, images: Tensor, held_out: Tensor) -> tuple[Path, str]:
    """The directions that change the code of a contractive encoder most, of eight digits."""
    coder = Dense(8, 1, [64], activation="sigmoid", tied=True, likelihood="bernoulli")
    model = Contractive(coder, 1e-2, "closed")
    fit(model, images, 800)
    directions, values = encoder_tangents(model.encode, held_out[:8], 64)
    rows = {f"tangent {i + 1}": directions[:, i] for i in range(4)}
    where = folder / "tangents.png"
    draw_rows(where, rows, symmetric=True)
    draw_rows(folder / "tangents-digits.png", {"digit": held_out[:8]}, symmetric=False)
    share = (values.square().cumsum(1) / values.square().sum(1, keepdim=True)).mean(0)
    return where, f"16 of 64 directions hold {float(share[15]):.0%} of the squared Jacobian"


def field(folder: Path) -> tuple[Path, str]:
    """A denoiser of points of a curve sends what lies beside it back."""
    t = torch.linspace(-3, 3, 2001)
    curve = torch.stack([t, t.sin()], 1)
    coder = Dense([1], 2, [64, 64], activation="tanh")
    model = Denoising(coder, "gaussian", 0.15)
    fit(model, curve[..., None], 1200)
    grid = torch.cartesian_prod(torch.linspace(-3.2, 3.2, 25), torch.linspace(-1.8, 1.8, 15))
    near = grid[torch.cdist(grid, curve).amin(1) < 0.6]
    arrows = vector_field(model.denoise, near[..., None]).squeeze(-1)
    back = curve[torch.cdist(near, curve).argmin(1)] - near
    beside = back.norm(dim=1) > 0.1
    cosine = F.cosine_similarity(arrows, back)[beside].mean()
    where = folder / "field.png"
    draw_field(where, near, arrows, curve[::20], "r(x) - x of a denoising autoencoder")
    return where, f"cosine of the arrows and the way to the curve {float(cosine):.3f}"


def insensitivity(folder: Path, images: Tensor, held_out: Tensor) -> tuple[Path, str]:
    """The code's sensitivity along the manifold and off it, by the weight of the penalty."""
    weights = torch.tensor([1e-4, 1e-3, 1e-2, 3e-2])
    ratios = []
    for weight in weights.tolist():
        torch.manual_seed(0)
        coder = Dense(8, 1, [64], activation="sigmoid", tied=True, likelihood="bernoulli")
        model = Contractive(coder, weight, "closed")
        fit(model, images, 600)
        ratios.append(along_and_across(model.encode, images, held_out))
    along, off = torch.tensor(ratios).T
    where = folder / "insensitivity.png"
    lines = {"along": along, "across": off, "along / across": along / off}
    draw_lines(where, lines, weights, ("weight of the contractive penalty", "|J v|"))
    first, *others = (f"{float(ratio):.2f}" for ratio in along / off)
    return where, f"along / across {first} at weight 1e-4, then {', '.join(others)}"


def along_and_across(
    encode: Callable[[Tensor], Tensor], images: Tensor, held_out: Tensor
) -> tuple[float, float]:
    """Mean sensitivity to the way to a near real digit, and to random ways off all near ones."""
    near = torch.cdist(held_out.flatten(1), images.flatten(1)).topk(10, largest=False).indices
    chords = images[near] - held_out[:, None]
    noise = across(torch.randn_like(held_out), chords)
    along = sensitivity(encode, held_out, chords[:, 0]).mean()
    return along.item(), sensitivity(encode, held_out, noise).mean().item()


def maps(folder: Path, images: Tensor, held_out: Tensor, labels: Tensor) -> tuple[Path, str]:
    """Digits laid flat by PCA, MDS and Isomap, and by a code of two numbers."""
    model = Autoencoder(Dense(8, 1, [256, 64, 2], code_activation="none"))
    fit(model, images, 1500)
    drawn = {
        "PCA": flat_map(held_out, "pca"),
        "MDS": flat_map(held_out, "mds"),
        "Isomap": flat_map(held_out, "isomap"),
        "code": model.encode(held_out).detach(),
    }
    where = folder / "maps.png"
    draw_maps(where, drawn, labels)
    accuracies = [f"{name} {leave_one_out(points, labels):.2f}" for name, points in drawn.items()]
    return where, f"k-NN among the held-out digits {', '.join(accuracies)}"


def leave_one_out(points: Tensor, labels: Tensor) -> float:
    """Share of the points whose five nearest others are mostly of their class."""
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    votes = labels[distance.topk(5, largest=False).indices].mode(1).values
    return float((votes == labels).float().mean())


def path(folder: Path, images: Tensor, held_out: Tensor, labels: Tensor) -> tuple[Path, str]:
    """From a 3 to an 8: along the manifold, and blended."""
    model = Denoising(Dense(8, 1, [256, 12], code_activation="none"), "gaussian", 0.15)
    fit(model, images, 1000)
    a, b = held_out[labels == 3][0], held_out[labels == 8][0]
    along, blended = interpolate(model.encode, model.coder.mean, a, b, steps=9)
    where = folder / "interpolation.png"
    rows = {"along the manifold": along.clamp(0, 1), "pixels blended": blended}
    draw_rows(where, rows, symmetric=False)
    middle = torch.stack([along[4], blended[4]]).flatten(1)
    nearest = torch.cdist(middle, images.flatten(1)).amin(1)
    along_distance, blended_distance = nearest.tolist()
    return (
        where,
        f"distance of the middle to the nearest real digit {along_distance:.2f}, "
        f"blended {blended_distance:.2f}",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "geometry"))
