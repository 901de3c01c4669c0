"""Recirculation (Hinton and McClelland 1988, "Learning representations by recirculation"): an
autoencoder of one hidden layer that learns without back-propagation.

Activity goes round a closed loop. At time 0 the visible units hold the sample; at 1 the hidden
units see it; at 2 the visible units hold a mixture of the sample and its reconstruction; at 3 the
hidden units see that. Every weight changes by its input's activity times how much its unit's
activity changed. Where the weights are symmetric and the mixture stays close to the sample, this
is 1 - lambda times the gradient of the reconstruction's negative log-likelihood.

Deviations: encoder and decoder begin as transposes of each other, which the paper leaves to weight
decay; any of the project's optimizers applies the updates. Hidden units are not mixed: that would
multiply their update by 1 - lambda.

Axes: b samples, c channels, *size sides, d hidden units, v visible units.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.autoencoder import Reconstruction
from maepretrain.models.autoencoders.coders import Coder, Dense


class Recirculation(nn.Module):
    """Learns a coder of one layer by local updates.

    Initial values: the coder's, then the decoder's weights are set to the encoder's, transposed.

    Args:
        coder: Dense of one layer of sigmoid units, not tied; visible units are linear (gaussian)
            or logistic (bernoulli, values in 0..1).
        regression: lambda, the share of the sample in the mixture at time 2 (the paper's .75).

    Raises:
        ValueError: another coder, or a regression outside [0, 1).
    """

    def __init__(self, coder: Coder, regression: float = 0.75) -> None:
        super().__init__()
        self.coder = coder
        hidden, visible = _the_loop(coder)
        if not 0 <= regression < 1:
            raise ValueError(f"regression {regression} must be in [0, 1)")
        self.regression = regression
        with torch.no_grad():
            visible.weight.copy_(hidden.weight.T)

    def forward(self, batch: Batch) -> Batch:
        """One pass round the loop.

        Args:
            batch: `input`, normalised (b, c, *size).

        Returns:
            `loss`, whose value is the mean error of a value's reconstruction and whose gradient is
            the local updates' direction.
        """
        x = batch["input"]
        updates = self.updates(x)
        with torch.no_grad():
            error = self.coder.error(self.coder.encode(x), x)
        return {"loss": error + (updates - updates.detach())}

    def updates(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, ""]:
        """Cross-entropies (or half squared errors) whose inputs and targets are all constants, so
        that their negative gradient is, of a sample,

            dW_vh = y_h(1) [y_v(0) - y_v(2)] and dW_hv = y_v(2) [y_h(1) - y_h(3)],

        the paper's two rules; biases belong to units that are always 1. Mean over samples.
        """
        visible0 = x.flatten(1)
        share = 1 - self.regression
        with torch.no_grad():
            hidden1 = self.coder.encode(x)
            reconstruction = self.coder.mean(hidden1).flatten(1)
            visible2 = self.regression * visible0 + share * reconstruction
        # y(0) - y(2) = share (y(0) - reconstruction), the delta rule's error.
        visible = share * self.coder.nll(hidden1, x).mean()
        logits3 = _the_loop(self.coder)[0](visible2)
        hidden = F.binary_cross_entropy_with_logits(logits3, hidden1, reduction="none")
        return visible + hidden.sum(1).mean()

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The hidden units' activity, in 0..1."""
        return self.coder.encode(images)

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes."""
        return self.coder.mean(code)

    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> Reconstruction:
        """The visible units that the hidden ones compute, not mixed."""
        return Reconstruction(images, self.coder.mean(self.coder.encode(images)))

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        return self.coder.layers()

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        return self.coder.summary() | {
            "recirculation": f"local updates, regression {self.regression:g}"
        }


def _the_loop(coder: Coder) -> tuple[nn.Linear, nn.Linear]:
    """The layers to the hidden and back to the visible units.

    Raises:
        ValueError: a coder that is no such loop.
    """
    fits = (
        isinstance(coder, Dense)
        and len(coder.encoder) == 1
        and not coder.tied
        and isinstance(coder.code_activation, nn.Sigmoid)
        and coder.likelihood.kind != "categorical"
    )
    if not fits:
        raise ValueError(
            "recirculation needs a Dense coder of one layer with sigmoid codes, not tied, gaussian "
            f"or bernoulli, not {coder.summary()['coder']}"
        )
    assert isinstance(coder, Dense)
    hidden = coder.encoder[0]
    visible = coder.decoder[0]
    assert isinstance(hidden, nn.Linear) and isinstance(visible, nn.Linear)
    return hidden, visible
