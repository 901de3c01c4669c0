"""Predictive sparse decomposition (Kavukcuoglu, Ranzato and LeCun 2008, arXiv 1010.3467).

The energy of an input x and a code z (their equation 4) is

    E(x, z) = 1/2 |x - D z|^2 + penalty |z|_1 + proximity / 2 |z - f(x)|^2

with a dictionary D of columns of length 1 and a predictor f(x) = g tanh(W x + a). The code that
minimises it is inferred, then D, g, W and a take a step down the energy with the code held fixed.
What is kept as encoder is f, which needs no iterations.

Deviations: codes are inferred by FISTA (Beck and Teboulle 2009) instead of gradient descent, from
f(x) on; the squares are halved; columns are kept at length 1 by dividing by their length in the
forward pass, so that any optimizer will do.

Axes: b samples, c channels, *size sides, v = c x sides, d columns and numbers of the code.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.data.batch import Batch


class DictionaryReconstruction(NamedTuple):
    """Rows of a picture, in the (normalised) values of the input; all (b, c, *size)."""

    original: Float[Tensor, "b c *size"]
    inferred: Float[Tensor, "b c *size"]
    reconstruction: Float[Tensor, "b c *size"]


class PredictiveSparse(nn.Module):
    """Learns a dictionary for sparse codes, and a predictor of the codes.

    Initial values: columns of D evenly distributed over directions; W = D's transpose, a zero and g
    one, so that the first prediction is tanh of the correlations with the columns.

    Args:
        image_size: side of the square images, [height, width], or [length] of signals.
        channels: of the input.
        width: d, columns of the dictionary.
        penalty: of the absolute values of the code.
        proximity: of the code to its prediction.
        steps: of FISTA for each batch.

    Raises:
        ValueError: a width or steps below 1, a negative penalty, a proximity that is not positive.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 28,
        channels: int = 1,
        width: int = 256,
        penalty: float = 0.5,
        proximity: float = 1.0,
        steps: int = 50,
    ) -> None:
        super().__init__()
        if width < 1 or steps < 1:
            raise ValueError(f"width {width} and steps {steps} must be at least 1")
        if penalty < 0 or proximity <= 0:
            raise ValueError(f"penalty {penalty} and proximity {proximity} must be positive")
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.shape = (channels, *sides)
        self.penalty = penalty
        self.proximity = proximity
        self.steps = steps
        self.columns = nn.Parameter(F.normalize(torch.randn(math.prod(self.shape), width), dim=0))
        self.predictor = nn.Linear(math.prod(self.shape), width)
        with torch.no_grad():
            self.predictor.weight.copy_(self.columns.T)
            self.predictor.bias.zero_()
        self.gain = nn.Parameter(torch.ones(width))

    @property
    def dictionary(self) -> Float[Tensor, "v d"]:
        """D, its columns of length 1."""
        return F.normalize(self.columns, dim=0)

    def forward(self, batch: Batch) -> Batch:
        """The energy at the inferred codes.

        Args:
            batch: `input`, normalised (b, c, *size).

        Returns:
            `loss`, the mean energy of a sample; `error`, the mean squared error of a value decoded
            from the inferred code; `active`, the share of the code that is not 0; `prediction`, the
            squared distance of prediction and code over the code's square.
        """
        x = batch["input"].flatten(1)
        dictionary = self.dictionary
        predicted = self.encode(batch["input"])
        z = self._infer(x, dictionary.detach(), predicted.detach())
        residual = x - z @ dictionary.T
        distance = (z - predicted).square().sum(1)
        energy = 0.5 * residual.square().sum(1) + self.penalty * z.abs().sum(1)
        return {
            "loss": (energy + 0.5 * self.proximity * distance).mean(),
            "error": residual.detach().square().mean(),
            "active": (z != 0).float().mean(),
            "prediction": distance.detach().sum() / z.square().sum().clamp_min(1e-12),
        }

    def infer(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The codes of least energy."""
        predicted = self.encode(images).detach()
        return self._infer(images.flatten(1), self.dictionary.detach(), predicted)

    def _infer(
        self,
        x: Float[Tensor, "b v"],
        dictionary: Float[Tensor, "v d"],
        predicted: Float[Tensor, "b d"],
    ) -> Float[Tensor, "b d"]:
        with torch.autocast(x.device.type, enabled=False):
            return fista(x, dictionary, self.penalty, self.steps, self.proximity, predicted)

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The predicted code.

        Raises:
            ValueError: inputs of another size.
        """
        if images.shape[1:] != self.shape:
            raise ValueError(f"inputs are {tuple(images.shape[1:])}, the model takes {self.shape}")
        return self.gain * self.predictor(images.flatten(1)).tanh()

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """Sums of the dictionary's columns."""
        return (code @ self.dictionary.T).unflatten(1, self.shape)

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> DictionaryReconstruction:
        """Inputs decoded from the inferred code, and from the predicted one, which `encode`
        gives."""
        codes = self.infer(images), self.encode(images)
        return DictionaryReconstruction(images, *map(self.decode, codes))

    def layers(self) -> list[list[nn.Parameter]]:
        """The predictor's parameters."""
        return [[*self.predictor.parameters(), self.gain], []]

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        v, d = self.columns.shape
        return {
            "dictionary": f"{d:,} columns of {v:,} values, penalty {self.penalty:g}, "
            f"{self.steps} steps of FISTA",
            "parameters": f"predictor {v * d + 2 * d:,}, dictionary {v * d:,}",
        }


@torch.no_grad()
def fista(
    x: Float[Tensor, "b v"],
    dictionary: Float[Tensor, "v d"],
    penalty: float,
    steps: int,
    proximity: float = 0.0,
    predicted: Float[Tensor, "b d"] | None = None,
) -> Float[Tensor, "b d"]:
    """argmin over z of 1/2 |x - D z|^2 + penalty |z|_1 + proximity / 2 |z - predicted|^2.

    FISTA with constant step size (Beck and Teboulle 2009, equations 4.1 to 4.3), from `predicted`
    on, zero where there is none. The energy falls with the square of the number of steps. Every
    sample's code is its own: nothing of it depends on the batch.
    """
    x, d = x.to(dictionary.dtype), dictionary.shape[1]
    start = x.new_zeros(len(x), d) if predicted is None else predicted.to(x.dtype)
    gram = dictionary.T @ dictionary + proximity * torch.eye(d, dtype=x.dtype, device=x.device)
    linear = x @ dictionary + proximity * start
    # The largest curvature: a step of 1 / L never goes up.
    curvature = torch.linalg.eigvalsh(gram)[-1]
    z = start
    y = start
    t = 1.0
    for _ in range(steps):
        following = _shrink(y - (y @ gram - linear) / curvature, penalty / curvature)
        t, before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        y = following + (before - 1) / t * (following - z)
        z = following
    return z


def _shrink(z: Float[Tensor, "b d"], by: Float[Tensor, ""]) -> Float[Tensor, "b d"]:
    """Towards zero, and no further."""
    return z.sign() * (z.abs() - by).clamp_min(0)
