"""Helmholtz machine with wake-sleep learning (Hinton, Dayan, Frey and Neal 1995, "The wake-sleep
algorithm for unsupervised neural networks", Science 268; Dayan, Hinton, Neal and Zemel 1995).

Two networks of binary units: recognition q(h | x) upwards and generation p(x, h) downwards. Awake,
samples are recognised, and generation learns to produce what recognition saw; asleep, the machine
dreams, and recognition learns to see what generation dreamt. All updates are local delta rules.

Deviations: any of the project's optimizers applies the updates; pixels between 0 and 1 are
probabilities of binary pixels, drawn anew from (seed, position); initial weights are not zero.

Axes: b samples, c channels, *size sides, v visible units, d units of the top layer, n units of any
layer, s importance samples. States of a machine are a list: visible units, first layer, ..., top.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.autoencoder import Reconstruction
from maepretrain.randomness import uniform

States = list[Tensor]


class Helmholtz(nn.Module):
    """Layers of stochastic binary units, recognised and generated.

    Initial values: xavier-uniform weights, zero biases.

    Args:
        image_size: side of the square images, or [height, width].
        channels: of the input.
        widths: units of the hidden layers, the top last.
        seed: seed of all states.

    Raises:
        ValueError: no widths, or one below 1.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 28,
        channels: int = 1,
        widths: Sequence[int] = (200, 64),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths {list(widths)} must be one layer or more, each at least 1")
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.shape = (channels, *sides)
        self.widths = tuple(widths)
        self.seed = seed
        sizes = [math.prod(self.shape), *widths]
        self.recognition = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.generation = nn.ModuleList(nn.Linear(o, i) for i, o in pairwise(sizes))
        self.top = nn.Parameter(torch.zeros(sizes[-1]))
        for layer in (*self.recognition, *self.generation):
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, batch: Batch) -> Batch:
        """One wake and one sleep phase.

        Args:
            batch: `input`, values in 0..1 (b, c, *size); `position`, int64 (b,).

        Returns:
            `loss`, whose value is the bound E_q[log q(h | x) - log p(x, h)] >= -log p(x) in nats
            and whose gradient is the delta rules' direction; `dream`, -log q of what was dreamt.
        """
        position = batch["position"]
        awake = self.recognise(self.binarise(batch["input"], position), position)
        generation = self.generation_nll(awake).mean()
        recognition = self.recognition_nll(self.dream(position)).mean()
        with torch.no_grad():
            bound = generation - self.recognition_nll(awake).mean()
        # States are constants: each term moves one of the two networks only.
        updates = generation + recognition
        return {"loss": bound + (updates - updates.detach()), "dream": recognition.detach()}

    def binarise(
        self, x: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b v"]:
        """Binary pixels, drawn with the probabilities x.

        Raises:
            ValueError: inputs of another size or outside 0..1.
        """
        flat = self._flat(x)
        return (uniform(self.seed, "binarise", position, flat.shape[1]) < flat).to(flat.dtype)

    def _flat(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b v"]:
        if x.shape[1:] != self.shape:
            raise ValueError(f"inputs are {tuple(x.shape[1:])}, the model takes {self.shape}")
        # NOTE on a GPU this waits for the device.
        low = float(x.min())
        high = float(x.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"a Helmholtz machine needs values in 0..1, not {low:.3g}..{high:.3g}: "
                "set data.mean to 0 and data.std to 1"
            )
        return x.flatten(1)

    @torch.no_grad()
    def recognise(
        self, visible: Float[Tensor, "b v"], position: Int64[Tensor, "b"], stream: str = "wake"
    ) -> States:
        """States drawn from q(h | visible), from (seed, stream, position) alone."""
        states = [visible]
        for number, layer in enumerate(self.recognition):
            states.append(self._draw(layer(states[-1]), position, f"{stream} {number}"))
        return states

    @torch.no_grad()
    def dream(self, position: Int64[Tensor, "b"], stream: str = "sleep") -> States:
        """States drawn from p(x, h), from (seed, stream, position) alone."""
        top = self.top.expand(len(position), -1)
        states = [self._draw(top, position, f"{stream} top")]
        for number, layer in reversed(list(enumerate(self.generation))):
            states.insert(0, self._draw(layer(states[0]), position, f"{stream} {number}"))
        return states

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Float[Tensor, "n c *size"]:
        """Probabilities of the pixels of n dreams, given the layer above them."""
        number = torch.arange(n, device=self.top.device)
        above = self.dream(number, f"sample {seed}")[1]
        return self.generation[0](above).sigmoid().unflatten(1, self.shape)

    def _draw(
        self, logits: Float[Tensor, "b n"], position: Int64[Tensor, "b"], stream: str
    ) -> Float[Tensor, "b n"]:
        u = uniform(self.seed, stream, position, logits.shape[1])
        return (u < logits.sigmoid()).to(logits.dtype)

    def generation_nll(self, states: States) -> Float[Tensor, "b"]:
        """-log p(x, h) in nats. Its negative gradient is the wake phase's delta rule, of a sample
        dG = h_above (h_below - p_below) for the weights from a layer to the one below it."""
        nll = _nll(self.top.expand_as(states[-1]), states[-1])
        for layer, below, above in zip(self.generation, states, states[1:], strict=False):
            nll = nll + _nll(layer(above), below)
        return nll

    def recognition_nll(self, states: States) -> Float[Tensor, "b"]:
        """-log q(h | x) in nats. Its negative gradient is the sleep phase's delta rule,
        dR = h_below (h_above - q_above)."""
        nll = torch.zeros(len(states[0]), device=states[0].device)
        for layer, below, above in zip(self.recognition, states, states[1:], strict=False):
            nll = nll + _nll(layer(below), above)
        return nll

    @torch.no_grad()
    def log_likelihood(
        self, x: Float[Tensor, "b c *size"], samples: int = 100
    ) -> Float[Tensor, "b"]:
        """log p(x) in nats, estimated by importance sampling: the log of the mean of
        p(x, h) / q(h | x) over states h drawn from q. Never above log p(x) in expectation.

        Args:
            x: binary pixels.
            samples: s, states drawn of each sample; the memory grows with it.

        Raises:
            ValueError: pixels between 0 and 1, or fewer than one sample.
        """
        visible = self._flat(x)
        if samples < 1 or not bool(((visible == 0) | (visible == 1)).all()):
            raise ValueError(f"log p(x) needs binary pixels and samples {samples} of at least 1")
        number = torch.arange(len(x) * samples, device=x.device)
        states = self.recognise(visible.repeat_interleave(samples, 0), number, "importance")
        weights = self.recognition_nll(states) - self.generation_nll(states)  # (b s,)
        return weights.view(len(x), samples).logsumexp(1) - math.log(samples)

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """Probabilities of the top layer's units, each layer reading those below it."""
        y = self._flat(images)
        for layer in self.recognition:
            y = layer(y).sigmoid()
        return y

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """Probabilities of the pixels, each layer reading those above it."""
        y = code
        for layer in reversed(self.generation):
            y = layer(y).sigmoid()
        return y.unflatten(1, self.shape)

    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> Reconstruction:
        """Up and down again, in probabilities."""
        return Reconstruction(images, self.decode(self.encode(images)))

    def layers(self) -> list[list[nn.Parameter]]:
        """The recognition network's parameters from input to output, and an empty group in the
        place of a norm."""
        return [*(list(layer.parameters()) for layer in self.recognition), []]

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        up = sum(p.numel() for p in self.recognition.parameters())
        down = sum(p.numel() for p in self.generation.parameters()) + self.top.numel()
        return {
            "machine": f"{math.prod(self.shape):,} visible units, hidden {list(self.widths)}",
            "parameters": f"recognition {up:,}, generation {down:,}",
        }


def _nll(logits: Float[Tensor, "b n"], states: Float[Tensor, "b n"]) -> Float[Tensor, "b"]:
    """-log probability of independent binary units in nats."""
    return F.binary_cross_entropy_with_logits(logits, states, reduction="none").sum(1)
