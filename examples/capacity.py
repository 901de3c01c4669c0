"""Five small experiments on the capacity of autoencoders: a minute on one free core,
`python examples/capacity.py` (Goodfellow et al. 2016, chapter 14).

Each function trains what it needs and returns figures; tests hold them to what is claimed.
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_sample_image
from sklearn.linear_model import LogisticRegression
from small import digit_images, fit
from torch import Tensor, nn
from torch.func import jacrev, vmap

from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.coders import Dense
from maepretrain.models.autoencoders.contractive import Contractive
from maepretrain.models.autoencoders.sparse import Sparse


@torch.no_grad()
def error(model: nn.Module, images: Tensor) -> float:
    """Mean squared error of a value of the reconstructions."""
    rows = model.reconstruct(images)  # pyright: ignore[reportCallIssue]
    return float((rows.reconstruction - rows.original).square().mean())


def data_specific() -> dict[str, float]:
    """A model knows the data that it has seen: of digits, and of patches of a photograph, each
    reconstructs the other's worse than the other does."""
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).float().mean(2) / 255
    patches = photograph[:400, :640].unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 1, 8, 8)
    patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))]
    sets = {"digits": digit_images(), "patches": (patches[:1400], patches[1400:1760])}
    errors = {}
    for seen, (train, _) in sets.items():
        torch.manual_seed(0)
        model = Autoencoder(Dense(8, 1, [64, 12], "relu", "none"))
        fit(model, train, 150, 5e-3)
        for shown, (_, test) in sets.items():
            errors[f"trained on {seen}, shown {shown}"] = error(model, test)
    return errors


def copying() -> dict[str, float]:
    """An overcomplete code without a penalty copies its input, digits or noise; with an l1 penalty
    it cannot, and few of its numbers are active."""
    train, test = digit_images()
    noise = torch.rand(test.shape, generator=torch.Generator().manual_seed(0))
    figures = {}
    for name in ("undercomplete", "overcomplete", "overcomplete and sparse"):
        torch.manual_seed(0)
        width = 16 if name == "undercomplete" else 128
        coder = Dense(8, 1, [width])
        model = Sparse(coder, "l1", 3e-3) if "sparse" in name else Autoencoder(coder)
        fit(model, train, 400, 5e-3)
        figures[f"{name}, digits"] = error(model, test)
        figures[f"{name}, noise"] = error(model, noise)
        figures[f"{name}, active"] = float((model.encode(test) > 0.01).float().mean())
    return figures


def memorising() -> dict[str, float]:
    """A code of one number can stand for the index of the sample if encoder and decoder are
    powerful: six digits come back nearly exact, and nothing is learnt of the others (section
    14.1)."""
    train, test = digit_images()
    few = train[:6]
    torch.manual_seed(0)
    deep = Autoencoder(Dense(8, 1, [128, 64, 1], "gelu", "none"))
    fit(deep, few, 400, 3e-3, batch=6)
    torch.manual_seed(0)
    linear = Autoencoder(Dense(8, 1, [1], "none"))
    fit(linear, few, 300, 1e-2, batch=6)
    return {
        "deep, the six": error(deep, few),
        "linear, the six": error(linear, few),
        "mean of the six, the six": float((few - few.mean(0)).square().mean()),
        "deep, others": error(deep, test),
        "mean image, others": float((test - train.mean(0)).square().mean()),
    }


def exclusive_or() -> dict[str, float]:
    """Four clouds whose classes no line separates; in a code of more numbers than the input has,
    one does."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 2, (600, 2), generator=generator)
    points = 2.0 * corner - 1 + 0.2 * torch.randn(600, 2, generator=generator)
    labels = (corner[:, 0] ^ corner[:, 1]).numpy()

    def separated(features: np.ndarray) -> float:
        probe = LogisticRegression(C=100, max_iter=2000).fit(features[:400], labels[:400])
        return float(probe.score(features[400:], labels[400:]))

    accuracy = {"points": separated(points.numpy())}
    for width in (1, 16):
        torch.manual_seed(0)
        model = Autoencoder(Dense([2], 1, [width], "tanh"))
        fit(model, points[:400, None], 200, 2e-2)
        accuracy[f"code of {width}"] = separated(model.encode(points[:, None]).detach().numpy())
    return accuracy


def contraction() -> dict[str, float]:
    """On a circle in the plane a contracting code changes along the circle and hardly off it: the
    ratio of the squared derivatives, with and without the penalty (Rifai et al. 2011)."""
    angle = torch.arange(0, 200) * (2 * torch.pi / 200)
    circle = torch.stack([angle.cos(), angle.sin()], 1)[:, None]
    along = torch.stack([-angle.sin(), angle.cos()], 1)
    figures = {}
    for name, weight in (("no penalty", 0.0), ("contractive", 0.05)):
        torch.manual_seed(0)
        model = Contractive(Dense([2], 1, [64, 8], "tanh", tied=True), weight, "hutchinson")
        fit(model, circle, 400, 1e-2)
        on = sensitivity(model, circle, along)
        off = sensitivity(model, circle, circle[:, 0])
        figures[f"{name}, along / off"] = float(on / off)
        figures[f"{name}, error"] = error(model, circle)
    return figures


def sensitivity(model: Contractive, points: Tensor, directions: Tensor) -> Tensor:
    """Mean squared derivative of the code in these directions, one for each point."""

    def code(point: Tensor) -> Tensor:
        return model.encode(point[None])[0]

    jacobians = vmap(jacrev(code))(points).flatten(2)  # (points, code, 2)
    return (jacobians @ directions[..., None]).square().sum((1, 2)).mean().detach()


EXPERIMENTS: tuple[Callable[[], dict[str, float]], ...] = (
    data_specific,
    copying,
    memorising,
    exclusive_or,
    contraction,
)


def main() -> None:
    """Print the figures of all experiments."""
    torch.set_num_threads(1)
    for experiment in EXPERIMENTS:
        print(f"\n{' '.join((experiment.__doc__ or '').split())}")
        for name, figure in experiment().items():
            print(f"    {name:<36} {figure:.4f}")


if __name__ == "__main__":
    main()
