"""Transforms of pixels and signals: crop, resize with antialiased bicubic, flip.

Images are (c, h, w), uint8 or float32; signals (c, t). All choices come from given uniform numbers.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float, Real, Shaped
from torch import Tensor
from torch.nn import functional as F

# RandomResizedCrop tries this often to fit a crop into the image before it takes one at the centre.
ATTEMPTS = 10
UNIFORMS = 4 * ATTEMPTS + 1


@dataclass(frozen=True)
class Augment:
    """Random resized crop and horizontal flip (Szegedy et al. 2015, as in torchvision).

    Args:
        height: output rows.
        width: output columns.
        scale: area of the crop as a share of the image, drawn uniformly; None takes all of it.
        ratio: aspect ratio of the crop, drawn log-uniformly.
        flip: probability of a horizontal flip.

    Raises:
        ValueError: a share, ratio or probability out of range.
    """

    height: int
    width: int
    scale: tuple[float, float] | None = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        _check_size(self.height, self.width)
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} must be two shares with 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} must be two numbers with 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip {self.flip} must be a probability, 0 to 1")

    def __call__(
        self, image: Real[Tensor, "c h w"], u: Float[Tensor, "u"]
    ) -> Real[Tensor, "c h2 w2"]:
        """The augmented image, uint8 or float32 as given; `u` in [0, 1) decides, `UNIFORMS` long.

        Any number of channels.
        """
        numbers = u.tolist()
        top, left, height, width = self.box(image.shape[1], image.shape[2], numbers)
        image = image[:, top : top + height, left : left + width]
        image = resize(image, self.height, self.width)
        return image.flip(2) if numbers[-1] < self.flip else image

    def box(self, h: int, w: int, u: list[float]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the crop: the first try that fits, or the centre."""
        if self.scale is None:
            return 0, 0, h, w
        low, high = (math.log(r) for r in self.ratio)
        for i in range(0, 4 * ATTEMPTS, 4):
            area = h * w * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[i])
            ratio = math.exp(low + (high - low) * u[i + 1])
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= w and 0 < height <= h:
                top, left = int(u[i + 2] * (h - height + 1)), int(u[i + 3] * (w - width + 1))
                return top, left, height, width
        width = min(w, max(1, round(h * self.ratio[1])))
        height = min(h, max(1, round(w / self.ratio[0])))
        return (h - height) // 2, (w - width) // 2, height, width


@dataclass(frozen=True)
class CentreCrop:
    """Evaluation: a centre crop of the output's shape, resized to (height, width).

    It has `share` of the sides of the largest crop of that shape: 224 with share 0.875 is the usual
    256-then-224. An image that already has the size stays as it is. uint8 or float32, any channels.

    Raises:
        ValueError: a share that is not in (0, 1].
    """

    height: int
    width: int
    share: float = 0.875

    def __post_init__(self) -> None:
        _check_size(self.height, self.width)
        if not 0 < self.share <= 1:
            raise ValueError(f"the share {self.share} of a centre crop must be in (0, 1]")

    def __call__(self, image: Real[Tensor, "c h w"]) -> Real[Tensor, "c h2 w2"]:
        _, h, w = image.shape
        if (h, w) == (self.height, self.width):
            return image
        scale = min(h / self.height, w / self.width) * self.share
        height = min(h, max(1, round(self.height * scale)))
        width = min(w, max(1, round(self.width * scale)))
        top, left = (h - height) // 2, (w - width) // 2
        return resize(image[:, top : top + height, left : left + width], self.height, self.width)


@dataclass(frozen=True)
class SignalCrop:
    """A stretch of `length` steps of a signal: at random in training, the centre in evaluation.

    Raises:
        ValueError: a length below 1.
    """

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"the length {self.length} of a crop must be at least 1")

    def __call__(
        self, signal: Shaped[Tensor, "c t"], u: Float[Tensor, "u"] | None = None
    ) -> Shaped[Tensor, "c length"]:
        """The crop, a view of any dtype; u[0] in [0, 1) decides where, None takes the centre.

        Raises:
            ValueError: a signal shorter than the crop.
        """
        starts = signal.shape[1] - self.length + 1
        if starts < 1:
            raise ValueError(f"a signal of {signal.shape[1]} steps is shorter than {self.length}")
        # In Python's float64: in float32 a product beyond 2**24 can round up to `starts`.
        start = (starts - 1) // 2 if u is None else int(float(u[0]) * starts)
        return signal[:, start : start + self.length]


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"image size {height}x{width} must be at least 1x1")


def resize(image: Real[Tensor, "c h w"], height: int, width: int) -> Real[Tensor, "c h2 w2"]:
    """Antialiased bicubic as PIL's; the image itself where it already has the size.

    uint8 is rounded and clamped; float32 overshoots at edges as bicubic weights do.
    """
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
