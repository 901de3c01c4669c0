"""Denoising autoencoder (Vincent, Larochelle, Bengio and Manzagol 2008; Vincent et al. 2010, JMLR
11, equation 6): the clean input is to be decoded from the code of a corrupted one.

Deviation: errors are means over the values of an input, not sums.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.coders import Coder
from maepretrain.models.autoencoders.corruption import Corruption, Kind


class DenoisedReconstruction(NamedTuple):
    """Rows of a picture, in the (normalised) values of the input; all (b, c, *size)."""

    original: Float[Tensor, "b c *size"]
    corrupted: Float[Tensor, "b c *size"]
    denoised: Float[Tensor, "b c *size"]
    reconstruction: Float[Tensor, "b c *size"]


class Denoising(nn.Module):
    """An autoencoder that repairs what was done to its input.

    Args:
        coder: Dense or Convolutional.
        corruption: masking, gaussian or salt_and_pepper noise, or of images also shuffle (pixels
            exchange places), geometric and colour; `Corruption` says what each does.
        amount: share of the values, standard deviation or range, as `Corruption` says.
        low: pepper, in normalised values.
        high: salt, in normalised values.
        seed: seed of the noise.

    Raises:
        ValueError: an amount that the corruption does not take.
    """

    # Tested on a divided memory (ZeRO, FSDP2).
    shardable = True

    def __init__(
        self,
        coder: Coder,
        corruption: Kind = "masking",
        amount: float = 0.3,
        low: float = 0.0,
        high: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.coder = coder
        self.corrupt = Corruption(corruption, amount, low, high, seed)

    def forward(self, batch: Batch) -> Batch:
        """The loss: the mean error of a clean value, decoded from the code of the corrupted input.

        Args:
            batch: `input`, normalised (b, c, *size); `position` (b,).

        Returns:
            `loss`; `corrupted_mse`, the mean squared error of the corrupted input itself.
        """
        x = batch["input"]
        corrupted = self.corrupt(x, batch["position"])
        return {
            "loss": self.coder.error(self.coder.encode(corrupted), x),
            "corrupted_mse": (corrupted - x).square().mean(),
        }

    @property
    def seed(self) -> int:
        """Of the corruption's noise."""
        return self.corrupt.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.corrupt.seed = seed

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The code of images as they are, not corrupted."""
        return self.coder.encode(images)

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes."""
        return self.coder.mean(code)

    @torch.no_grad()
    def denoise(self, corrupted: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        """The clean images that are expected behind corrupted ones."""
        return self.coder.mean(self.coder.encode(corrupted))

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> DenoisedReconstruction:
        """Original, corrupted as at positions 0, 1, ..., repaired, and decoded from the code of the
        clean original."""
        corrupted = self.corrupt(images, torch.arange(len(images), device=images.device))
        return DenoisedReconstruction(
            images, corrupted, self.denoise(corrupted), self.denoise(images)
        )

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        return self.coder.layers()

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        return {"corruption": f"{self.corrupt.kind}, {self.corrupt.amount:g}"} | (
            self.coder.summary()
        )
