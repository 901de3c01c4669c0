"""Generative stochastic network (Bengio, Thibodeau-Laufer, Alain and Yosinski 2014, arXiv
1306.1091), trained by walkback (Bengio, Yao, Alain and Vincent 2013, arXiv 1305.6663, algorithm 1).

A chain corrupts x, codes it, adds noise to the code, decodes a distribution and draws the next x of
it. Walkback runs that chain for some steps from each training sample and asks for the sample back
at each of them, so that the chain learns to leave what lies off the data. Where it has learnt that,
the chain's stationary distribution estimates that of the data (theorem 1): running it is sampling.

Deviations: one hidden layer of any coder, whose noise is added after its activation only; no
gradient goes from a step of the chain back to the one before; a Gaussian decoder's mean is taken as
the next x, not a draw of variance 1. All noise is a pure function of (seed, step, position of the
sample in the run).

Axes: b samples, s steps, c channels, *size sides, d numbers of the code.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.coders import Coder
from maepretrain.models.autoencoders.corruption import Corruption, Kind
from maepretrain.randomness import normal, uniform

# Steps of the chain from noise that a picture shows the end of.
PICTURED = 50


class ChainReconstruction(NamedTuple):
    """Rows of a picture, in the (normalised) values of the input; all (b, c, *size)."""

    original: Float[Tensor, "b c *size"]
    corrupted: Float[Tensor, "b c *size"]
    one_step: Float[Tensor, "b c *size"]
    reconstruction: Float[Tensor, "b c *size"]
    chain_sample: Float[Tensor, "b c *size"]


class GenerativeStochastic(nn.Module):
    """A Markov chain that is trained to come back to the data.

    Args:
        coder: Dense or Convolutional; bernoulli for values in 0..1, or gaussian.
        steps: of walkback; 1 is a denoising autoencoder with a noisy code.
        corruption: of the input at each step, as of Denoising.
        amount: of the corruption.
        low: pepper, in normalised values.
        high: salt, in normalised values.
        code_noise: standard deviation of the Gaussian noise added to the code.
        draw: a bernoulli decoder's next x is drawn; false takes its mean.
        seed: seed of the noise.

    Raises:
        ValueError: no steps, a negative code_noise, a categorical decoder.
    """

    def __init__(
        self,
        coder: Coder,
        steps: int = 4,
        corruption: Kind = "salt_and_pepper",
        amount: float = 0.4,
        low: float = 0.0,
        high: float = 1.0,
        code_noise: float = 0.5,
        draw: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps {steps} must be at least 1")
        if code_noise < 0:
            raise ValueError(f"code_noise {code_noise} must not be negative")
        if coder.likelihood.kind == "categorical":
            raise ValueError("the chain takes a bernoulli or gaussian decoder, not a categorical")
        self.coder = coder
        self.steps = steps
        self.code_noise = code_noise
        self.seed = seed
        self.corruption: tuple[Kind, float, float, float] = (corruption, amount, low, high)
        self.draw = draw

    def forward(self, batch: Batch) -> Batch:
        """The mean over the steps of the error of the sample, decoded at each of them.

        Args:
            batch: `input`, normalised (b, c, *size); `position`, int64 (b,).

        Returns:
            `loss`; `first_step` and `last_step`, the errors there.
        """
        x = batch["input"]
        position = batch["position"]
        walked = x
        errors = []
        for step in range(self.steps):
            code = self._noisy_code(walked, position, step, self.seed)
            errors.append(self.coder.error(code, x))
            with torch.no_grad():
                walked = self._next(self.coder.mean(code), position, step, self.seed)
        loss = torch.stack(errors).mean()
        return {
            "loss": loss,
            "first_step": errors[0].detach(),
            "last_step": errors[-1].detach(),
        }

    def _corrupt(
        self, x: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"], step: int, seed: int
    ) -> Float[Tensor, "b c *size"]:
        return Corruption(*self.corruption, seed=_of_step(seed, step))(x, position)

    def _noisy_code(
        self, x: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"], step: int, seed: int
    ) -> Float[Tensor, "b d"]:
        code = self.coder.encode(self._corrupt(x, position, step, seed))
        noise = normal(_of_step(seed, step), "code noise", position, code.shape[1])
        return code + self.code_noise * noise.to(code.dtype)

    def _next(
        self, mean: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"], step: int, seed: int
    ) -> Float[Tensor, "b c *size"]:
        if self.coder.likelihood.kind == "gaussian" or not self.draw:
            return mean
        u = uniform(_of_step(seed, step), "next input", position, mean[0].numel())
        return (u.view_as(mean) < mean).to(mean.dtype)

    @torch.no_grad()
    def chain(
        self, start: Float[Tensor, "b c *size"], steps: int, seed: int = 0
    ) -> Float[Tensor, "s b c *size"]:
        """The decoder's mean at each step of chains, one from each sample of `start`."""
        position = torch.arange(len(start), device=start.device)
        means = []
        x = start
        for step in range(steps):
            means.append(self.coder.mean(self._noisy_code(x, position, step, seed)))
            x = self._next(means[-1], position, step, seed)
        return torch.stack(means)

    def sample(self, n: int, steps: int = 100, seed: int = 0) -> Float[Tensor, "n c *size"]:
        """The ends of n chains of so many steps from noise: uniform in low..high."""
        _, _, low, high = self.corruption
        device = next(self.parameters()).device
        u = uniform(seed, "start", torch.arange(n, device=device), self.coder.values)
        return self.chain((low + (high - low) * u).unflatten(1, self.coder.shape), steps, seed)[-1]

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The code without noise."""
        return self.coder.encode(images)

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes."""
        return self.coder.mean(code)

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> ChainReconstruction:
        """One step of the chain from the images, what is decoded from their codes without noise,
        and samples of chains from noise."""
        position = torch.arange(len(images), device=images.device)
        corrupted = self._corrupt(images, position, 0, self.seed)
        stepped = self.chain(images, 1, self.seed)[0]
        decoded = self.coder.mean(self.encode(images))
        samples = self.sample(len(images), PICTURED, self.seed)
        return ChainReconstruction(images, corrupted, stepped, decoded, samples)

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        return self.coder.layers()

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        kind, amount, *_ = self.corruption
        walk = f"{self.steps} steps, {kind} {amount:g}, noise of the code {self.code_noise:g}"
        return {"walkback": walk, **self.coder.summary()}


def _of_step(seed: int, step: int) -> int:
    """A seed for each step, none of which another seed's step has (up to a million steps)."""
    return seed * 1_000_003 + step
