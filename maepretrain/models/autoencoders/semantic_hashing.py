"""Semantic hashing (Salakhutdinov and Hinton 2009, "Semantic hashing", International Journal of
Approximate Reasoning 50): codes of bits, in which similar samples lie few flips apart.

Noise is added to what enters the code's sigmoids; to be heard through it, the encoder drives them
to 0 or 1. In evaluation the code is the bits.

Deviations: no pretraining by restricted Boltzmann machines; images and a Bernoulli or Gaussian
decoder in the place of word counts; the noise of a sample is drawn anew in each epoch, as a pure
function of (seed, position) (the paper keeps it for good).

Axes: b samples, c channels, *size sides, d bits; q queries, n samples of a bank, k neighbours.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.coders import Coder
from maepretrain.randomness import normal


class HashReconstruction(NamedTuple):
    """Rows of a picture; all (b, c, *size)."""

    original: Float[Tensor, "b c *size"]
    reconstruction: Float[Tensor, "b c *size"]
    from_bits: Float[Tensor, "b c *size"]


class SemanticHashing(nn.Module):
    """An autoencoder through binary codes.

    Args:
        coder: Dense or Convolutional with code_activation none: its code is the bits' logits.
        noise: standard deviation of what is added to the logits in training (the paper's 4).
        seed: seed of the noise.

    Raises:
        ValueError: a coder with an activation after the code, a negative noise.
    """

    def __init__(self, coder: Coder, noise: float = 4.0, seed: int = 0) -> None:
        super().__init__()
        activation = getattr(coder, "code_activation", None)
        if not isinstance(activation, nn.Identity):
            raise ValueError(
                f"the code must be logits, not after {type(activation).__name__}: "
                "set the coder's code_activation to none"
            )
        if noise < 0:
            raise ValueError(f"noise {noise} must be at least 0")
        self.coder = coder
        self.noise = noise
        self.seed = seed

    def forward(self, batch: Batch) -> Batch:
        """The error of what is decoded from noisy codes; in evaluation, from bits.

        Args:
            batch: `input`, normalised (b, c, *size); in training `position`, int64 (b,).

        Returns:
            `loss`; `undecided`, the mean of 4 p (1 - p), 0 where all codes are bits.
        """
        x = batch["input"]
        logits = self.coder.encode(x)
        if self.training:
            code = self.noisy(logits, batch["position"])
        else:
            code = (logits > 0).to(logits.dtype)
        p = logits.detach().sigmoid()
        return {"loss": self.coder.error(code, x), "undecided": (4 * p * (1 - p)).mean()}

    def noisy(
        self, logits: Float[Tensor, "b d"], position: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b d"]:
        """sigmoid(logits + noise), the noise from (seed, position) alone."""
        noise = normal(self.seed, "hash", position, logits.shape[1])
        return (logits + self.noise * noise).sigmoid()

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The bits' probabilities, without noise."""
        return self.coder.encode(images).sigmoid()

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes."""
        return self.coder.mean(code)

    def codes(self, images: Float[Tensor, "b c *size"]) -> Bool[Tensor, "b d"]:
        """The bits: probabilities above 1/2."""
        return self.coder.encode(images) > 0

    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> HashReconstruction:
        """Inputs decoded from the probabilities and from the bits."""
        p = self.encode(images)
        bits = (p > 0.5).to(p.dtype)
        return HashReconstruction(images, self.coder.mean(p), self.coder.mean(bits))

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        return self.coder.layers()

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        return self.coder.summary() | {
            "hashing": f"{self.coder.width} bits, noise {self.noise:g} before the sigmoids"
        }


def hamming(query: Bool[Tensor, "q d"], bank: Bool[Tensor, "n d"]) -> Int64[Tensor, "q n"]:
    """Number of bits that differ between each query and each sample of the bank."""
    a = query.float()
    b = bank.float()
    # Bits that are 1 on one side only; float32 counts exactly up to 2^24.
    return (a.sum(1)[:, None] + b.sum(1) - 2 * a @ b.T).long()


def nearest_codes(
    query: Bool[Tensor, "q d"], bank: Bool[Tensor, "n d"], k: int, chunk: int = 1024
) -> tuple[Int64[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Distance and number of the k samples with the fewest bits that differ, the nearest first;
    among equals the first in the bank.

    Raises:
        ValueError: k below 1, or a bank with fewer than k samples.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"retrieval of k {k} needs 1 <= k <= {len(bank)}, the bank's samples")
    distances = []
    numbers = []
    for part in query.split(chunk):
        ranked = hamming(part, bank).sort(dim=1, stable=True)
        distances.append(ranked.values[:, :k])
        numbers.append(ranked.indices[:, :k])
    return torch.cat(distances), torch.cat(numbers)


def precision_at(
    neighbours: Int64[Tensor, "q k"], truth: Int64[Tensor, "q"], labels: Int64[Tensor, "n"]
) -> float:
    """Share of the retrieved samples that are of the query's class.

    Args:
        neighbours: numbers of samples of the bank.
        truth: the queries' classes.
        labels: the bank's classes.
    """
    return float((labels[neighbours] == truth[:, None]).float().mean())
