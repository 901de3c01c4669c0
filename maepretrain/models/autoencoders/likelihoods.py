"""Decoders as distributions: what a decoder puts out are the parameters of p(x | code), and the
loss is its negative log-likelihood (Goodfellow et al. 2016, section 14.4).

Axes: b samples, v values of a sample (pixels x channels), q parameters of a value.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["gaussian", "bernoulli", "categorical"]


class Likelihood(nn.Module):
    """A distribution of every value, independent given the code.

    Args:
        kind: "gaussian" of variance 1, whose mean is put out: squared error; "bernoulli" for values
            in 0..1, whose logit is put out: binary cross-entropy, which takes grey values as the
            probability of a one; "categorical" for values in 0..1 that fall into `levels` bins of
            equal width, whose logits are put out: softmax.
        levels: bins of "categorical".

    Raises:
        ValueError: fewer than two levels.
    """

    def __init__(self, kind: Kind = "gaussian", levels: int = 16) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"a categorical decoder needs two levels or more, not {levels}")
        self.kind = kind
        self.levels = levels

    @property
    def parameters_per_value(self) -> int:
        """q: numbers that the decoder puts out for each value."""
        return self.levels if self.kind == "categorical" else 1

    def nll(
        self, parameters: Float[Tensor, "b v q"], x: Float[Tensor, "b v"]
    ) -> Float[Tensor, "b"]:
        """-log p(x | parameters) in nats, summed over the values of each sample.

        Raises:
            ValueError: values outside 0..1 where the distribution has none.
        """
        if self.kind == "gaussian":
            squares = (x - parameters[..., 0]).square().sum(1)
            return 0.5 * (squares + x.shape[1] * math.log(2 * math.pi))
        _check_unit(x, self.kind)
        if self.kind == "bernoulli":
            logits = parameters[..., 0]
            return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        return F.cross_entropy(parameters.mT, self._bins(x), reduction="none").sum(1)

    def error(
        self, parameters: Float[Tensor, "b v q"], x: Float[Tensor, "b v"]
    ) -> Float[Tensor, "b"]:
        """The loss of plain autoencoders, of each sample: the mean squared error (2 / v times the
        nll, less a constant), or the mean cross-entropy of a value in nats.

        Raises:
            ValueError: as of `nll`.
        """
        if self.kind == "gaussian":
            return (x - parameters[..., 0]).square().mean(1)
        return self.nll(parameters, x) / x.shape[1]

    def mean(self, parameters: Float[Tensor, "b v q"]) -> Float[Tensor, "b v"]:
        """The expected value; of a categorical one in the centres of the bins."""
        if self.kind == "gaussian":
            return parameters[..., 0]
        if self.kind == "bernoulli":
            return parameters[..., 0].sigmoid()
        bins = torch.arange(self.levels, device=parameters.device, dtype=parameters.dtype)
        return parameters.softmax(-1) @ ((bins + 0.5) / self.levels)

    def _bins(self, x: Tensor) -> Tensor:
        return (x * self.levels).long().clamp(max=self.levels - 1)


def _check_unit(x: Tensor, kind: str) -> None:
    # NOTE on a GPU this waits for the device; these are models of small images.
    low = float(x.min())
    high = float(x.max())
    if not 0 <= low <= high <= 1:  # NaN is none of them either
        raise ValueError(
            f"a {kind} decoder needs values in 0..1, not {low:.3g}..{high:.3g}: "
            "set data.mean to 0 and data.std to 1"
        )
