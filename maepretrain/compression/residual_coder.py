"""A recurrent coder of residuals into bits (Toderici et al. 2016, "Variable rate image compression
with recurrent neural networks", arXiv 1511.06085, and 2017, "Full resolution image compression with
recurrent neural networks", arXiv 1608.05148): one model for all rates.

Each iteration encodes what is still missing of the image into bits, and decodes them; encoder and
decoder remember earlier iterations. A file holds as many iterations as were asked for.

    b_t = B(E_t(g_t r_{t-1})),  x_t = x_{t-1} + D_t(b_t) / g_t,  r_t = x - x_t,  r_0 = x

(2017, equations 1 and 2, the additive kind; its "residual scaling" has the gains g_t). The
binariser draws +1 with probability (1 + y) / 2 in training, passes its gradient straight through,
and takes the sign otherwise (2016, section 3.2). The loss is the mean |r_t| over the iterations
(2017, equation 3).

Deviations: stride 8, fewer and narrower layers, GRUs (the 2017 paper tries them beside LSTMs); one
learnt probability for each bit of each iteration, at all places, in the place of BinaryRNN; a
learnt gain for each iteration, where the paper estimates one for each patch.

Axes: b images, c channels, h w sides, t iterations, k bits of an iteration, i j sides of the code.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.compression.autoencoder import check_shape, padded
from maepretrain.compression.refinement import ConvGRU, initialise
from maepretrain.data.batch import Batch
from maepretrain.randomness import uniform

# Of what is missing, from one iteration to the next, before training.
GAIN = 1.25
# Of each recurrent layer; None before the first iteration.
States = list[Tensor | None]


class Reconstruction(NamedTuple):
    """Rows of a picture: after one iteration, and after all; all (b, c, h, w)."""

    original: Float[Tensor, "b c h w"]
    first: Float[Tensor, "b c h w"]
    reconstruction: Float[Tensor, "b c h w"]


class Encoder(nn.Module):
    """A convolution and two recurrent layers, each of stride 2; it returns numbers in -1..1, from
    which the bits are drawn."""

    def __init__(self, channels: int, width: int, bits: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, 2, 1)
        self.cells = nn.ModuleList(ConvGRU(width, width, 3, 2) for _ in range(2))
        self.last = nn.Conv2d(width, bits, 1)

    def forward(
        self, residual: Float[Tensor, "b c h w"], states: States
    ) -> tuple[Float[Tensor, "b k i j"], States]:
        y, after = self.first(residual).tanh(), []
        for cell, state in zip(self.cells, states, strict=True):
            y = cell(y, state)
            after.append(y)
        return self.last(y).tanh(), after


class Decoder(nn.Module):
    """Recurrent layers, after each of which depth becomes space (2017, section 2)."""

    def __init__(self, channels: int, width: int, bits: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(bits, width, 1)
        inputs = (width, width // 4, width // 4)
        self.cells = nn.ModuleList(ConvGRU(i, width, 3) for i in inputs)
        self.last = nn.Conv2d(width // 4, channels, 3, 1, 1)

    def forward(
        self, bits: Float[Tensor, "b k i j"], states: States
    ) -> tuple[Float[Tensor, "b c h w"], States]:
        y, after = self.first(bits), []
        for cell, state in zip(self.cells, states, strict=True):
            after.append(cell(y, state))
            y = F.pixel_shuffle(after[-1], 2)
        return self.last(y), after


class ResidualCoder(nn.Module):
    """Minimises the mean absolute residual after each iteration.

    Initial values: xavier-uniform weights, zero biases; gains GAIN^t; all bits equally probable.

    Args:
        image_size: side of the square images, or [height, width], that `encode` makes features of;
            `symbols`, `decode_symbols` and `reconstruct` take any size.
        channels: of the images.
        width: channels of the layers, a multiple of 4.
        bits: k, bits of an iteration for each 8 x 8 pixels.
        iterations: t, the most that an image is coded in.
        seed: seed of the bits that are drawn.

    Raises:
        ValueError: another width, no bits, or not 1 to 255 iterations.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        width: int = 32,
        bits: int = 8,
        iterations: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width < 4 or width % 4 or bits < 1 or not 1 <= iterations <= 255:
            raise ValueError(
                f"width {width} must be a multiple of 4, bits {bits} at least 1, and iterations "
                f"{iterations} 1 to 255"
            )
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.shape: tuple[int, ...] = (channels, *sides)
        self.stride = 8
        self.bits = bits
        self.iterations = iterations
        self.seed = seed
        self.encoder = Encoder(channels, width, bits)
        self.decoder = Decoder(channels, width, bits)
        initialise(self)
        # What is missing gets smaller; without gains, later iterations made tiny models worse.
        self.log_gain = nn.Parameter(math.log(GAIN) * torch.arange(iterations).float())
        # Log-odds of a one.
        self.prior = nn.Parameter(torch.zeros(iterations, bits))

    def forward(self, batch: Batch) -> Batch:
        """The mean absolute residual, with bits drawn in training, by their signs otherwise.

        Args:
            batch: `input`, normalised (b, c, h, w); in training `position`, int64 (b,).

        Returns:
            `loss`: `residual`, the mean of |r_t|, plus `bpp`, bits per pixel of all iterations by
            the prior, whose gradient reaches the prior alone; `mse` after the last iteration.
        """
        x = batch["input"]
        position = batch["position"] if self.training else None
        bits, estimates = self._iterate(x, self.iterations, position)
        residual = torch.stack([(x - estimate).abs().mean() for estimate in estimates]).mean()
        ones = (torch.stack(bits, 1).detach() + 1) / 2  # (b, t, k, i, j)
        odds = self.prior[:, :, None, None].expand_as(ones)
        nats = F.binary_cross_entropy_with_logits(odds, ones, reduction="sum")
        bpp = nats / torch.tensor(2.0).log().item() / (x.shape[0] * x.shape[2] * x.shape[3])
        mse = F.mse_loss(estimates[-1].detach(), x)
        parts = {"residual": residual.detach(), "bpp": bpp.detach(), "mse": mse}
        return {"loss": residual + bpp} | parts

    def _iterate(
        self,
        images: Float[Tensor, "b c h w"],
        iterations: int,
        position: Int64[Tensor, "b"] | None = None,
    ) -> tuple[list[Float[Tensor, "b k i j"]], list[Float[Tensor, "b c h w"]]]:
        """Bits (-1 or 1) and reconstruction after each iteration; bits are drawn where positions
        are given."""
        h, w = images.shape[2:]
        x = padded(images, self.stride)
        estimate, bits, estimates = torch.zeros_like(x), [], []
        remembered: States = [None] * len(self.encoder.cells)
        known: States = [None] * len(self.decoder.cells)
        for t in range(iterations):
            gain = self.log_gain[t].exp()
            y, remembered = self.encoder(gain * (x - estimate), remembered)
            if position is None:
                drawn = sign(y)
            else:
                noise = uniform(self.seed, f"bits {t}", position, y[0].numel()).view_as(y)
                drawn = binarise(y, noise)
            bits.append(drawn)
            change, known = self.decoder(drawn, known)
            estimate = estimate + change / gain
            estimates.append(estimate[:, :, :h, :w])
        return bits, estimates

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The numbers whose signs are the first iteration's bits, as features.

        Raises:
            ValueError: images of another shape than the model was made for.
        """
        check_shape(images, self.shape)
        x = padded(images, self.stride)
        return self.encoder(x, [None] * len(self.encoder.cells))[0].flatten(1)

    @torch.no_grad()
    def symbols(
        self, images: Float[Tensor, "b c h w"], iterations: int
    ) -> Int64[Tensor, "b tk i j"]:
        """The bits, 0 or 1, those of the first iteration first."""
        bits, _ = self._iterate(images, iterations)
        return (torch.cat(bits, 1) > 0).long()

    @torch.no_grad()
    def probabilities(self, iterations: int) -> Float64[Tensor, "tk 2"]:
        """Probabilities of each bit's 0 and 1; on the CPU."""
        odds = self.prior[:iterations].flatten().cpu().double()
        return torch.stack([(-odds).sigmoid(), odds.sigmoid()], 1)

    def decode_symbols(self, symbols: Int64[Tensor, "b tk i j"]) -> Float[Tensor, "b c h w"]:
        """Images of whole strides from the bits of any number of iterations."""
        return self.steps(symbols)[-1]

    @torch.no_grad()
    def steps(self, symbols: Int64[Tensor, "b tk i j"]) -> list[Float[Tensor, "b c h w"]]:
        known: States = [None] * len(self.decoder.cells)
        estimates: list[Tensor] = []
        for t, bits in enumerate((2 * symbols - 1).float().split(self.bits, 1)):
            change, known = self.decoder(bits, known)
            change = change / self.log_gain[t].exp()
            estimates.append(estimates[-1] + change if estimates else change)
        return estimates

    def reconstruct(self, images: Float[Tensor, "b c h w"]) -> Reconstruction:
        """The images decoded from the bits of one iteration, and of all."""
        h, w = images.shape[2:]
        steps = self.steps(self.symbols(images, self.iterations))
        return Reconstruction(images, steps[0][:, :, :h, :w], steps[-1][:, :, :h, :w])

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        parts = [self.encoder.first, *self.encoder.cells, self.encoder.last]
        return [*(list(part.parameters()) for part in parts), []]

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        return {
            "compression": f"up to {self.iterations} iterations of {self.bits} bits for "
            f"{self.stride} x {self.stride} pixels",
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",
        }


def sign(y: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """1 where y is over 0, otherwise -1."""
    return (y > 0).to(y.dtype) * 2 - 1


def binarise(y: Float[Tensor, "*n"], noise: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """1 with probability (1 + y) / 2, otherwise -1; its derivative is 1 (2016, section 3.2).

    Args:
        y: in -1..1.
        noise: uniform in 0..1.
    """
    return y + (sign((1 + y) / 2 - noise) - y).detach()
