"""Sparse autoencoders: few numbers of the code are active at a time, so that the code may be wider
than the input without the identity being learnt.

Three ways: an l1 penalty, the negative logarithm of a Laplace prior of the code (Goodfellow et al.
2016, equations 14.5 to 14.8); the KL divergence of each unit's mean activity from a target (Ng
2011, CS294A notes "Sparse autoencoder", section 3); only the k largest numbers of the code kept
(Makhzani and Frey 2013, arXiv 1312.5663, algorithm 1).

Deviations: errors are means over the values of an input, not sums, so that a weight is smaller by
the number of values. k-sparse features keep k numbers in use too, not alpha k. The mean activity is
of the whole global batch, whatever the number of processes.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.autoencoder import Reconstruction
from maepretrain.models.autoencoders.coders import Coder

Penalty = Literal["l1", "kl", "k"]


class Sparse(nn.Module):
    """An autoencoder whose code is mostly silent.

    NOTE l1 can be evaded by a small code and large weights of the decoder: keep some weight decay,
    or tie the weights.

    Args:
        coder: Dense or Convolutional; "kl" needs code_activation sigmoid, "k" is meant for none.
        penalty: "l1" adds weight x sum_j |h_j|; "kl" adds weight x sum_j KL(target || mean of h_j);
            "k" keeps the `active` largest h_j of a sample and sets the others to 0.
        weight: of l1 and kl.
        target: mean activity that kl asks for, in (0, 1).
        active: how many numbers k-sparse codes keep.

    Raises:
        ValueError: a negative weight, a target outside (0, 1), a code for kl that is not in (0, 1),
            fewer than 1 or more active numbers than the code has.
    """

    def __init__(
        self,
        coder: Coder,
        penalty: Penalty = "l1",
        weight: float = 1e-3,
        target: float = 0.05,
        active: int = 16,
    ) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight {weight} must not be negative")
        if not 0 < target < 1:
            raise ValueError(f"target {target} is a mean activity: it must be between 0 and 1")
        if penalty == "kl" and not isinstance(coder.code_activation, nn.Sigmoid):
            raise ValueError("penalty kl needs a code in 0..1: set code_activation to sigmoid")
        if penalty == "k" and not 1 <= active <= coder.width:
            raise ValueError(f"active {active} must be 1 to {coder.width}, the width of the code")
        self.coder = coder
        self.penalty = penalty
        self.weight = weight
        self.target = target
        self.active = active

    def forward(self, batch: Batch) -> Batch:
        """The loss: error plus penalty.

        Args:
            batch: `input`, normalised (b, c, *size).

        Returns:
            `loss`; `error`, that of the decoder; `activity`, the mean |h_j|; `active`, the share of
            the code that is not zero.
        """
        x = batch["input"]
        code = self.encode(x)
        error = self.coder.error(code, x)
        return {
            "loss": error + self._penalty(code),
            "error": error,
            "activity": code.abs().mean(),
            "active": (code != 0).float().mean(),
        }

    def _penalty(self, code: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        if self.penalty == "l1":
            return self.weight * code.abs().sum(1).mean()
        if self.penalty == "kl":
            return self.weight * kl_to_target(mean_activity(code), self.target).sum()
        return code.new_zeros(())

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The code; of k-sparse autoencoders with all but the k largest numbers at 0."""
        code = self.coder.encode(images)
        return keep_largest(code, self.active) if self.penalty == "k" else code

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes."""
        return self.coder.mean(code)

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> Reconstruction:
        """The original, and the input decoded from its code."""
        return Reconstruction(images, self.coder.mean(self.encode(images)))

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        return self.coder.layers()

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        how = {
            "l1": f"l1, weight {self.weight:g}",
            "kl": f"kl to a mean activity of {self.target:g}, weight {self.weight:g}",
            "k": f"the {self.active} largest of {self.coder.width} numbers",
        }
        return {"sparsity": how[self.penalty]} | self.coder.summary()


def kl_to_target(activity: Float[Tensor, "d"], target: float) -> Float[Tensor, "d"]:
    """KL(Bernoulli(target) || Bernoulli(activity)) in nats, of each unit; an activity of 0 or 1
    counts as one nearly so."""
    # Of float32's numbers below 1, the largest is 1 - 6e-8.
    activity = activity.float().clamp(1e-7, 1 - 1e-7)
    on = target * (target / activity).log()
    return on + (1 - target) * ((1 - target) / (1 - activity)).log()


def mean_activity(code: Float[Tensor, "b d"]) -> Float[Tensor, "d"]:
    """The mean of each unit over the batches of all processes, which are equally large.

    Its value is the global one, its gradient that of this process's own mean: the average of the
    processes' gradients, which DDP takes, is then the gradient of a loss of the global mean. NOTE
    micro-batches of an accumulated gradient each have a mean of their own.
    """
    mine = code.mean(0)
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return mine
    summed = mine.detach().clone()
    dist.all_reduce(summed)
    return mine + (summed / dist.get_world_size() - mine.detach())


def keep_largest(code: Float[Tensor, "b d"], k: int) -> Float[Tensor, "b d"]:
    """The k largest numbers of each code; the others are 0 and get no gradient."""
    largest = code.topk(k, dim=1).indices
    return code * torch.zeros_like(code).scatter(1, largest, 1.0)
