"""Variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114), beta-VAE (Higgins et al.
2017) and the importance-weighted bound (Burda, Grosse and Salakhutdinov 2016, arXiv 1509.00519).

p(z) = N(0, 1); p(x|z) is the coder's likelihood; q(z|x) = N(mean, variance), diagonal, whose mean
is the coder's code and whose log-variance is one more linear head on what the coder's last layer
reads. The loss is in nats per sample, summed over the values, as in the papers.

Deviation: the noise is a pure function of (seed, position of the sample in the run).

Axes: b samples, k draws of z for each of them, d numbers of the code, c channels, *size sides.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.coders import Coder
from maepretrain.randomness import normal


class VariationalReconstruction(NamedTuple):
    """Rows of a picture, in the (normalised) values of the input; all (b, c, *size)."""

    original: Float[Tensor, "b c *size"]
    reconstruction: Float[Tensor, "b c *size"]
    prior_sample: Float[Tensor, "b c *size"]


class Variational(nn.Module):
    """Minimises an upper bound of -log p(x).

    Initial values: those of the coder; the log-variance head zero, so that q(z|x) begins at
    variance 1.

    Args:
        coder: Dense or Convolutional, with code_activation none.
        beta: weight of the divergence from the prior; 1 is the bound of Kingma and Welling, more
            asks for independent dimensions at the cost of detail.
        draws: k, draws of z for each sample.
        importance_weighted: the bound of Burda et al., which k draws make tighter, instead of the
            mean of k bounds.
        seed: seed of the noise.

    Raises:
        ValueError: no draws, a negative beta, a beta other than 1 for the importance-weighted
            bound, a coder with an activation after its code.
    """

    def __init__(
        self,
        coder: Coder,
        beta: float = 1.0,
        draws: int = 1,
        importance_weighted: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws {draws} must be at least 1")
        if beta < 0 or (importance_weighted and beta != 1):
            raise ValueError(f"beta {beta} must be at least 0, and 1 if importance_weighted")
        if not isinstance(coder.code_activation, nn.Identity):
            raise ValueError("the code is a mean of any sign: set the coder's code_activation none")
        self.coder = coder
        self.beta = beta
        self.draws = draws
        self.seed = seed
        self.importance_weighted = importance_weighted
        self.log_variance = nn.Linear(coder.hidden_width, coder.width)
        nn.init.zeros_(self.log_variance.weight)
        nn.init.zeros_(self.log_variance.bias)

    def forward(self, batch: Batch) -> Batch:
        """The bound, in nats per sample.

        Args:
            batch: `input`, normalised (b, c, *size); `position`, int64 (b,).

        Returns:
            `loss`, mean over the samples of nll + beta kl, or of the importance-weighted bound;
            `nll`, the mean of -log p(x|z), and `kl`, that of KL(q(z|x) || p(z)).
        """
        x = batch["input"]
        mean, log_variance = self.posterior(x)
        z = self._draw(mean, log_variance, batch["position"])
        nll = self._nll(x, z)
        kl = divergence(mean, log_variance)
        if self.importance_weighted:
            bound = importance_bound(nll, z, mean, log_variance)
        else:
            bound = nll.mean(1) + self.beta * kl
        return {"loss": bound.mean(), "nll": nll.mean().detach(), "kl": kl.mean().detach()}

    def posterior(
        self, images: Float[Tensor, "b c *size"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Mean and log-variance of q(z|x)."""
        hidden = self.coder.hidden(images)
        return self.coder.code(hidden), self.log_variance(hidden)

    def _draw(
        self,
        mean: Float[Tensor, "b d"],
        log_variance: Float[Tensor, "b d"],
        position: Int64[Tensor, "b"],
    ) -> Float[Tensor, "b k d"]:
        """z = mean + deviation x noise (Kingma and Welling, section 2.4)."""
        d = mean.shape[1]
        noise = normal(self.seed, "reparameterisation", position, self.draws * d)
        deviation = (0.5 * log_variance).exp()
        return mean[:, None] + deviation[:, None] * noise.unflatten(1, (self.draws, d))

    def _nll(
        self, x: Float[Tensor, "b c *size"], z: Float[Tensor, "b k d"]
    ) -> Float[Tensor, "b k"]:
        b, k, _ = z.shape
        return self.coder.nll(z.flatten(0, 1), x.repeat_interleave(k, 0)).unflatten(0, (b, k))

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Float[Tensor, "n c *size"]:
        """The mean of p(x|z) for n draws of z from the prior."""
        z = normal(seed, "prior", torch.arange(n), self.coder.width)
        return self.coder.mean(z.to(self.log_variance.weight.device))

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The mean of q(z|x)."""
        return self.coder.encode(images)

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes."""
        return self.coder.mean(code)

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> VariationalReconstruction:
        """Inputs decoded from the mean codes, and as many samples of the model."""
        mean = self.coder.mean(self.coder.encode(images))
        return VariationalReconstruction(images, mean, self.sample(len(images), self.seed))

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output; `encode` does not use the log-variance."""
        return self.coder.layers()

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        kind = "importance-weighted bound" if self.importance_weighted else "bound"
        return {
            "objective": f"{kind}, beta {self.beta:g}, {self.draws} draws of z",
            **self.coder.summary(),
        }


def divergence(
    mean: Float[Tensor, "b d"], log_variance: Float[Tensor, "b d"]
) -> Float[Tensor, "b"]:
    """KL(N(mean, variance) || N(0, 1)) in nats (Kingma and Welling, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def importance_bound(
    nll: Float[Tensor, "b k"],
    z: Float[Tensor, "b k d"],
    mean: Float[Tensor, "b d"],
    log_variance: Float[Tensor, "b d"],
) -> Float[Tensor, "b"]:
    """-log 1/k sum_i p(x|z_i) p(z_i) / q(z_i|x) (Burda et al., equation 8).

    In expectation no less than -log p(x), and no more for more draws (their theorem 1).
    """
    log_variance = log_variance[:, None]
    # The logarithm of p(z) / q(z|x), whose 2 pi cancel.
    squares = (z - mean[:, None]).square() / log_variance.exp()
    log_ratio = 0.5 * (squares + log_variance - z.square()).sum(2)
    return math.log(z.shape[1]) - (log_ratio - nll).logsumexp(1)
