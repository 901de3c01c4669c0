"""Adversarial autoencoder (Makhzani, Shlens, Jaitly, Goodfellow and Frey 2016, arXiv 1511.05644).

A discriminator tells codes of samples from draws of a prior, and the encoder learns to fool it
beside reconstructing: the codes of all samples together (the aggregated posterior) become the
prior, so that what is drawn from the prior decodes to something. With `classes`, the decoder is
given the class and the code is left with the style (section 4.2, "Supervised adversarial
autoencoders"); the face-ageing CAAE (Zhang, Song and Qi 2017) is this conditional kin with ages for
classes, a uniform prior and a second discriminator, of pictures.

Deviations: the paper steps twice a batch, with two optimizers; here each player's loss treats the
other as a constant, so that their sum and one optimizer make both updates, at once. (Reversing the
discriminator's gradient where it enters the encoder would do so too, but that gradient fades where
the discriminator wins.) The encoder is deterministic.

NOTE both players move at once: Adam's first beta should be .5. With .9 codes of digits stayed far
from the prior (energy distance .5, not .01).

Axes: b samples, c channels, *size sides, d numbers of the code, k classes.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.autoencoder import Reconstruction
from maepretrain.models.autoencoders.coders import Coder
from maepretrain.randomness import normal, uniform


class ConditionalReconstruction(NamedTuple):
    """Rows of a picture of a model with classes; all (b, c, *size)."""

    original: Float[Tensor, "b c *size"]
    reconstruction: Float[Tensor, "b c *size"]
    next_class: Float[Tensor, "b c *size"]


class Adversarial(nn.Module):
    """An autoencoder whose codes are distributed as a prior.

    Initial values: the coder's; the discriminator's xavier-uniform weights and zero biases.

    Args:
        coder: Dense or Convolutional with code_activation none (or tanh, for a uniform prior).
        prior: "gaussian", N(0, 1) for each number of the code; "uniform" in -1..1.
        weight: of the encoder's loss in the game; 0 is a plain autoencoder.
        discriminator: widths of the discriminator's hidden layers.
        classes: 0, or how many; then the last `classes` of the coder's numbers carry the label to
            the decoder, one-hot, and the rest are the code.
        seed: seed of the prior's draws.

    Raises:
        ValueError: a code that cannot reach the prior's values, no room for code and classes, a
            negative weight, an empty discriminator.
    """

    def __init__(
        self,
        coder: Coder,
        prior: Literal["gaussian", "uniform"] = "gaussian",
        weight: float = 0.03,
        discriminator: tuple[int, ...] = (128, 128),
        classes: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_reach(coder, prior)
        if classes < 0 or coder.width <= classes:
            raise ValueError(f"a code of {coder.width} has no room beside {classes} classes")
        if weight < 0 or not discriminator or min(discriminator) < 1:
            raise ValueError(
                f"weight {weight} must be at least 0 and the discriminator's widths "
                f"{list(discriminator)} one or more, each at least 1"
            )
        self.coder = coder
        self.prior = prior
        self.weight = weight
        self.seed = seed
        self.classes = classes
        self.width = coder.width - classes
        self.discriminator = _mlp([self.width, *discriminator, 1])

    @property
    def needs_labels(self) -> bool:
        """True if `forward` reads `label`."""
        return self.classes > 0

    def forward(self, batch: Batch) -> Batch:
        """Both players' updates.

        Args:
            batch: `input`, normalised (b, c, *size); `position`, int64 (b,); with classes `label`,
                int64 (b,).

        Returns:
            `loss`, whose value is the mean error of a value and whose gradient is that of the error
            for encoder and decoder, of the game for encoder and discriminator; `discriminator`, its
            loss, 2 log 2 where it cannot tell; `fooled`, the share of codes that it takes for
            draws of the prior.
        """
        x = batch["input"]
        code = self.encode(x)
        error = self.coder.error(self._with_class(code, batch.get("label")), x)
        discriminator, encoder, fooled = self.game(code, self.draw(batch["position"]))
        game = discriminator + self.weight * encoder
        return {
            "loss": error + (game - game.detach()),
            "discriminator": discriminator.detach(),
            "fooled": fooled,
        }

    def game(
        self, code: Float[Tensor, "b d"], drawn: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        """Each player's loss, of which the other's parameters are constants, mean over samples: the
        discriminator's -log D(drawn) - log(1 - D(code)) (Goodfellow et al. 2014, equation 1, with
        the other sign) and the encoder's -log D(code) (their section 3: it does not fade where the
        discriminator wins). And the share of codes with D > 1/2."""
        real = self.discriminator(drawn)
        fake = self.discriminator(code.detach())
        constants = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        seen = functional_call(self.discriminator, constants, (code,))
        discriminator = (F.softplus(-real) + F.softplus(fake)).mean()
        return discriminator, F.softplus(-seen).mean(), (fake > 0).float().mean()

    def draw(self, position: Int64[Tensor, "b"], seed: int | None = None) -> Float[Tensor, "b d"]:
        """A draw of the prior for each position, from (seed, position) alone; null takes the
        model's seed."""
        seed = self.seed if seed is None else seed
        if self.prior == "gaussian":
            return normal(seed, "prior", position, self.width)
        return 2 * uniform(seed, "prior", position, self.width) - 1

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Float[Tensor, "n c *size"]:
        """n draws of the prior, decoded; with classes, the i-th of class i modulo their number."""
        number = torch.arange(n, device=next(self.parameters()).device)
        label = number % self.classes if self.classes else None
        return self.coder.mean(self._with_class(self.draw(number, seed), label))

    def _with_class(
        self, code: Float[Tensor, "b d"], label: Int64[Tensor, "b"] | None
    ) -> Float[Tensor, "b e"]:
        """The decoder's input: the code, and the class one-hot.

        Raises:
            ValueError: a class that is missing or out of range.
        """
        if not self.classes:
            return code
        if label is None or int(label.min()) < 0 or int(label.max()) >= self.classes:
            found = "none" if label is None else f"{int(label.min())}..{int(label.max())}"
            raise ValueError(f"labels must be in 0..{self.classes - 1}, found are {found}")
        return torch.cat([code, F.one_hot(label, self.classes).to(code.dtype)], 1)

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The code, without the class."""
        return self.coder.encode(images)[:, : self.width]

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes.

        Raises:
            ValueError: a model with classes, whose codes hold the style only.
        """
        if self.classes:
            raise ValueError(
                f"a code of this Adversarial tells the style only: its decoder needs one of "
                f"{self.classes} classes beside it"
            )
        return self.coder.mean(code)

    def classify(self, images: Float[Tensor, "b c *size"]) -> Int64[Tensor, "b"]:
        """The class under which each image's code decodes best."""
        code = self.encode(images)
        nll = []
        for k in range(self.classes):
            label = torch.full((len(images),), k, device=images.device)
            nll.append(self.coder.nll(self._with_class(code, label), images))
        return torch.stack(nll, 1).argmin(1)

    def reconstruct(
        self, images: Float[Tensor, "b c *size"]
    ) -> Reconstruction | ConditionalReconstruction:
        """The input decoded from its code; with classes, under the best class and the one after."""
        code = self.encode(images)
        if not self.classes:
            return Reconstruction(images, self.coder.mean(code))
        best = self.classify(images)
        own, other = (
            self.coder.mean(self._with_class(code, label))
            for label in (best, (best + 1) % self.classes)
        )
        return ConditionalReconstruction(images, own, other)

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        return self.coder.layers()

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        numbers = sum(p.numel() for p in self.discriminator.parameters())
        classes = f", decoder given one of {self.classes} classes" if self.classes else ""
        return self.coder.summary() | {
            "adversary": f"{self.prior} prior of {self.width}, weight {self.weight:g}, "
            f"{numbers:,} parameters{classes}"
        }


def _check_reach(coder: Coder, prior: str) -> None:
    """Refuse a code that cannot take the prior's values."""
    allowed = (nn.Identity, nn.Tanh) if prior == "uniform" else (nn.Identity,)
    activation = getattr(coder, "code_activation", None)
    if not isinstance(activation, allowed):
        names = " or ".join(kind.__name__ for kind in allowed)
        raise ValueError(
            f"codes after {type(activation).__name__} cannot take a {prior} prior's values: "
            f"code_activation must be {names} (Identity is none)"
        )


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layer = nn.Linear(i, o)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
