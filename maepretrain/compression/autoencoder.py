"""Lossy image compression by a convolutional autoencoder whose codes are rounded to integers, which
an entropy coder writes with the probabilities of a learnt prior (Balle, Laparra and Simoncelli
2017, "End-to-end optimized image compression", arXiv 1611.01704).

The loss is rate + weight x distortion. In training uniform noise stands for rounding (Balle et al.,
section 3), or rounding passes its gradient straight through (Theis, Shi, Cunningham and Huszar
2017, "Lossy image compression with compressive autoencoders", arXiv 1703.00395, section 2.1); the
rate is that of the noisy code in both, an upper bound for Theis et al. (section 2.2).

Deviations: three stages of stride 2 and sub-pixel convolutions (Theis et al.) in the decoder; a
mixture of logistics as the prior of each channel, whose integral is in closed form, where Balle et
al. have piecewise linear densities and Theis et al. scale mixtures of Gaussians; the decoder may be
followed by refinement.py's, of which the rest learns nothing: its gradient ends at the code.

Axes: b images, c channels, h w sides, k channels of the code, i j sides of the code (h / p, w / p,
rounded up), s symbols that a number of the code can be, m components of the mixture.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.compression.refinement import Refinement, initialise
from maepretrain.data.batch import Batch
from maepretrain.randomness import uniform

# Numbers of the code lie in -LARGEST..LARGEST; each is a symbol, -LARGEST being symbol 0.
LARGEST = 127


class Reconstruction(NamedTuple):
    """Rows of a picture, in the (normalised) values of the input; all (b, c, h, w).

    `plain` is the decoder's without refinement; the same as `reconstruction` where there is none.
    """

    original: Float[Tensor, "b c h w"]
    plain: Float[Tensor, "b c h w"]
    reconstruction: Float[Tensor, "b c h w"]


class DivisiveNormalisation(nn.Module):
    """GDN: y_c = x_c / sqrt(beta_c + sum_d gamma_cd x_d^2) (Balle et al. 2017, section 2, with
    the exponents of their experiments); the inverse multiplies.

    Initial values: beta 1, gamma .1 on the diagonal. Both are kept positive as absolute values.

    Args:
        channels: of the input.
        inverse: multiply by the root, as decoders do.
    """

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(0.1 * torch.eye(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        kernel = self.gamma.abs()[:, :, None, None]
        norm = F.conv2d(x.square(), kernel, self.beta.abs() + 1e-6)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


class FactorisedPrior(nn.Module):
    """A distribution of each channel's numbers, the same at all places: a mixture of logistics.

    Initial values: equal shares, means spread over -1..1, scales 1.

    Args:
        channels: of the code.
        components: of the mixture.
    """

    def __init__(self, channels: int, components: int = 3) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(channels, components))
        self.mean = nn.Parameter(torch.linspace(-1, 1, components).repeat(channels, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, components))

    def bits(self, code: Float[Tensor, "b k i j"]) -> Float[Tensor, "b k i j"]:
        """-log2 of the probability of code - 1/2 .. code + 1/2, which is the density of the noisy
        code (Balle et al., equation 8), and of a rounded one its probability."""
        y = code.movedim(1, -1)[..., None]  # (b, i, j, k, 1)
        above = (y + 0.5 - self.mean) / self.log_scale.exp()
        below = (y - 0.5 - self.mean) / self.log_scale.exp()
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)): nothing cancels.
        width = torch.log(-torch.expm1(-(-self.log_scale).exp()))
        parts = F.logsigmoid(above) + F.logsigmoid(-below) + width + self.logits.log_softmax(1)
        return -parts.logsumexp(-1).movedim(-1, 1) / math.log(2)

    @torch.no_grad()
    def probabilities(self) -> Float64[Tensor, "k s"]:
        """Probabilities of each number -LARGEST..LARGEST, those beyond counted to the ends, for the
        entropy coder; on the CPU."""
        shares, mean = self.logits.cpu().double().softmax(1), self.mean.cpu().double()
        scale = self.log_scale.cpu().double().exp()
        edges = torch.arange(-LARGEST, LARGEST, dtype=torch.float64) + 0.5
        z = (edges[:, None, None] - mean) / scale
        below, above = ((shares * part.sigmoid()).sum(-1) for part in (z, -z))  # (s - 1, k)
        # Each difference on the side where the numbers are small, and nothing cancels.
        middle = torch.where(above[1:] < below[1:], above[:-1] - above[1:], below[1:] - below[:-1])
        return torch.cat([below[:1], middle, above[-1:]]).T.contiguous()


class Compression(nn.Module):
    """Minimises bits per pixel + weight x mean squared error.

    Initial values: xavier-uniform weights, zero biases; those of the parts.

    Args:
        image_size: side of the square images, or [height, width], that `encode` makes features of;
            `symbols`, `decode_symbols` and `reconstruct` take any size.
        channels: of the images.
        width: channels of the encoder's and decoder's layers.
        code: k, channels of the code.
        stages: of stride 2: a place of the code stands for 2^stages x 2^stages pixels.
        weight: of the mean squared error of normalised values against bits per pixel. More of it
            asks for better and larger files.
        quantisation: what stands for rounding in training: noise, or straight_through.
        refinements: steps of the iterative decoder; 0 for none.
        refinement_width: channels of its state.
        seed: seed of the noise.

    Raises:
        ValueError: a width, code or stage count below 1, or a weight that is not positive.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 64,
        channels: int = 3,
        width: int = 32,
        code: int = 24,
        stages: int = 3,
        weight: float = 100.0,
        quantisation: Literal["noise", "straight_through"] = "noise",
        refinements: int = 0,
        refinement_width: int = 48,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(width, code, stages) < 1 or not weight > 0:
            raise ValueError(
                f"width {width}, code {code} and stages {stages} must be at least 1, "
                f"and weight {weight} positive"
            )
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.shape: tuple[int, ...] = (channels, *sides)
        self.stride = 2**stages
        self.iterations = 1
        self.weight = weight
        self.quantisation = quantisation
        self.seed = seed
        sizes = [channels, *[width] * (stages - 1), code]
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for number, (i, o) in enumerate(pairwise(sizes)):
            last = number == stages - 1
            encoder += [nn.Conv2d(i, o, 5, 2, 2), *([] if last else [DivisiveNormalisation(o)])]
        for number, (i, o) in enumerate(pairwise(reversed(sizes))):
            last = number == stages - 1
            decoder += [nn.Conv2d(i, 4 * o, 3, 1, 1), nn.PixelShuffle(2)]
            decoder += [] if last else [DivisiveNormalisation(o, inverse=True)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        initialise(self)
        self.prior = FactorisedPrior(code)
        # After all the rest, whose initial values are the same with it and without.
        self.refinement = (
            Refinement(channels, code, self.stride, refinements, refinement_width)
            if refinements
            else None
        )

    def forward(self, batch: Batch) -> Batch:
        """Rate and distortion, of a noisy code in training and of the rounded one in evaluation.

        Args:
            batch: `input`, normalised (b, c, h, w); in training `position`, int64 (b,).

        Returns:
            `loss`, the sum of `bpp`, bits per pixel, and weight x `mse`; with refinement also
            weight x the mean error of its steps, whose last is `refined_mse`.
        """
        x = batch["input"]
        continuous = self.continuous(x)
        if self.training:
            noise = uniform(self.seed, "quantisation", batch["position"], continuous[0].numel())
            noisy = continuous + (noise - 0.5).view_as(continuous)
            straight = self.quantisation == "straight_through"
            code = round_straight_through(continuous) if straight else noisy
            rated = noisy
        else:
            code = quantised(continuous)
            rated = code
        h, w = x.shape[2:]
        plain = self.decoder(code)[:, :, :h, :w]
        bpp = self.prior.bits(rated).sum() / (len(x) * h * w)
        mse = F.mse_loss(plain, x)
        outputs = {"loss": bpp + self.weight * mse, "bpp": bpp.detach(), "mse": mse.detach()}
        if self.refinement is not None:
            steps = self.refinement(self.decoder(code).detach(), code.detach())
            errors = torch.stack([F.mse_loss(step[:, :, :h, :w], x) for step in steps])
            outputs["loss"] = outputs["loss"] + self.weight * errors.mean()
            outputs["refined_mse"] = errors[-1].detach()
        return outputs

    def continuous(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k i j"]:
        """The code before rounding, of images enlarged to whole strides by their last pixels."""
        return self.encoder(padded(images, self.stride))

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The code before rounding, as features.

        Raises:
            ValueError: images of another shape than the model was made for.
        """
        check_shape(images, self.shape)
        return self.continuous(images).flatten(1)

    @torch.no_grad()
    def symbols(
        self, images: Float[Tensor, "b c h w"], iterations: int = 1
    ) -> Int64[Tensor, "b k i j"]:
        """The numbers of the code as an entropy coder writes them, each in 0..s-1."""
        assert iterations == self.iterations, "this coder has one rate"
        return quantised(self.continuous(images)).long() + LARGEST

    def probabilities(self, iterations: int = 1) -> Float64[Tensor, "k s"]:
        """Probabilities of each channel's symbols."""
        return self.prior.probabilities()

    def decode_symbols(self, symbols: Int64[Tensor, "b k i j"]) -> Float[Tensor, "b c h w"]:
        """Images of whole strides; refined where the model refines."""
        return self.steps(symbols)[-1]

    @torch.no_grad()
    def steps(self, symbols: Int64[Tensor, "b k i j"]) -> list[Float[Tensor, "b c h w"]]:
        """The plain decoder's images, and those of each step of refinement."""
        code = (symbols - LARGEST).float()
        plain = self.decoder(code)
        return [plain, *(self.refinement(plain, code) if self.refinement is not None else [])]

    def reconstruct(self, images: Float[Tensor, "b c h w"]) -> Reconstruction:
        """The images decoded from the rounded code."""
        h, w = images.shape[2:]
        steps = self.steps(self.symbols(images))
        return Reconstruction(images, steps[0][:, :, :h, :w], steps[-1][:, :, :h, :w])

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        return [list(layer.parameters()) for layer in self.encoder] + [[]]

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        steps = 0 if self.refinement is None else self.refinement.steps
        return {
            "compression": f"{self.prior.mean.shape[0]} channels for {self.stride} x {self.stride} "
            f"pixels, weight {self.weight:g}, {self.quantisation}, {steps} steps of refinement",
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",
        }


def quantised(code: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The nearest number that has a symbol."""
    return code.round().clamp(-LARGEST, LARGEST)


def round_straight_through(code: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Rounded; its derivative is 1 (Theis et al. 2017, section 2.1)."""
    return code + (code.round() - code).detach()


def padded(images: Float[Tensor, "b c h w"], stride: int) -> Float[Tensor, "b c h2 w2"]:
    """Images with their last row and column repeated until both sides are multiples of `stride`."""
    h, w = images.shape[2:]
    return F.pad(images, (0, -w % stride, 0, -h % stride), mode="replicate")


def table_bits(
    symbols: Int64[Tensor, "b k i j"], probabilities: Float64[Tensor, "k s"]
) -> Float64[Tensor, "b"]:
    """-log2 of the probability of all symbols of each image: what an ideal entropy coder writes."""
    b, k, _, _ = symbols.shape
    logs = probabilities.log2().expand(b, -1, -1)
    return -logs.gather(2, symbols.cpu().view(b, k, -1)).sum((1, 2))


def check_shape(images: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse images of another shape than the model was made for.

    Raises:
        ValueError: they are.
    """
    if tuple(images.shape[1:]) != shape:
        raise ValueError(f"inputs are {tuple(images.shape[1:])}, the model takes {shape}")
