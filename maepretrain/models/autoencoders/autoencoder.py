"""The autoencoder: encode, decode, compare (Rumelhart, Hinton and Williams 1986; Bourlard and Kamp
1988).

With a linear coder and the squared error it spans the principal subspace (Baldi and Hornik 1989);
undercomplete, overcomplete, deep, tied and convolutional ones differ in their coder only.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.coders import Coder


class Reconstruction(NamedTuple):
    """Rows of a picture, in the (normalised) values of the input; all (b, c, *size)."""

    original: Float[Tensor, "b c *size"]
    reconstruction: Float[Tensor, "b c *size"]


class Autoencoder(nn.Module):
    """Minimises the error of what is decoded from the code.

    Args:
        coder: Dense or Convolutional.
    """

    def __init__(self, coder: Coder) -> None:
        super().__init__()
        self.coder = coder

    def forward(self, batch: Batch) -> Batch:
        """The loss: mean over samples and values of -log p(x | code), for a Gaussian decoder the
        mean squared error.

        Args:
            batch: `input`, normalised (b, c, *size).
        """
        x = batch["input"]
        return {"loss": self.coder.error(self.coder.encode(x), x)}

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The code."""
        return self.coder.encode(images)

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes."""
        return self.coder.mean(code)

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> Reconstruction:
        """The original, and the input decoded from its code."""
        return Reconstruction(images, self.coder.mean(self.coder.encode(images)))

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        return self.coder.layers()

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        return self.coder.summary()
