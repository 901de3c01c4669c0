"""Pixels: decode to uint8, crop and resize with antialiased bicubic, flip. All choices come from given uniform numbers."""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_image

# RandomResizedCrop tries this often to fit a crop into the image before it falls back to a centre crop.
ATTEMPTS = 10
UNIFORMS = 4 * ATTEMPTS + 1


def decode(data: bytes, channels: int) -> UInt8[Tensor, "c h w"]:
    """Decode an encoded image to uint8 with 1 (gray) or 3 (RGB) channels.

    torchvision reads JPEG and PNG; PIL reads the rest (CMYK, 16-bit, WebP, ...).

    Raises:
        ValueError: bytes that are no image, or another number of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"images decode to 1 or 3 channels, not {channels}")
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
        if image.dtype == torch.uint8:
            return image
    except RuntimeError:
        pass
    return _decode_with_pil(data, channels)


def _decode_with_pil(data: bytes, channels: int) -> UInt8[Tensor, "c h w"]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if (
                image.mode.startswith("I;16") or image.mode == "I"
            ):  # 16-bit gray, which convert() clips
                image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).astype(np.uint8))
            array = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode the image: {error}") from error
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1)


@dataclass(frozen=True)
class Augment:
    """Random resized crop and horizontal flip (Szegedy et al. 2015, as in torchvision).

    Args:
        height: output rows.
        width: output columns.
        scale: area of the crop as a share of the image, drawn uniformly; None resizes the whole image.
        ratio: aspect ratio of the crop, drawn log-uniformly.
        flip: probability of a horizontal flip.
    """

    height: int
    width: int
    scale: tuple[float, float] | None = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(
        self, image: UInt8[Tensor, "c h w"], u: Float[Tensor, "u"]
    ) -> UInt8[Tensor, "c h2 w2"]:
        """The augmented image; `u` holds the uniform numbers that decide."""
        if self.scale is not None:
            top, left, height, width = self._box(image.shape[1], image.shape[2], u.tolist())
            image = image[:, top : top + height, left : left + width]
        image = resize(image, self.height, self.width)
        return image.flip(2) if self.flip and float(u[-1]) < self.flip else image

    def _box(self, h: int, w: int, u: list[float]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the crop: the first of ten tries that fits, else the centre."""
        assert self.scale is not None
        low, high = (math.log(r) for r in self.ratio)
        for i in range(0, 4 * ATTEMPTS, 4):
            area = h * w * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[i])
            ratio = math.exp(low + (high - low) * u[i + 1])
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= w and 0 < height <= h:
                top, left = int(u[i + 2] * (h - height + 1)), int(u[i + 3] * (w - width + 1))
                return top, left, height, width
        width = min(w, round(h * self.ratio[1]))
        height = min(h, round(w / self.ratio[0]))
        return (h - height) // 2, (w - width) // 2, height, width


@dataclass(frozen=True)
class CentreCrop:
    """Evaluation: resize so that a centre crop of `share` of the image's fitting area gives (height, width).

    224 with share 0.875 is the usual 256-then-224. Images that already have the size stay as they are.
    """

    height: int
    width: int
    share: float = 0.875

    def __call__(self, image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "c h2 w2"]:
        _, h, w = image.shape
        if (h, w) == (self.height, self.width):
            return image
        scale = min(h / self.height, w / self.width) * self.share
        height, width = min(h, round(self.height * scale)), min(w, round(self.width * scale))
        top, left = (h - height) // 2, (w - width) // 2
        return resize(image[:, top : top + height, left : left + width], self.height, self.width)


def resize(image: UInt8[Tensor, "c h w"], height: int, width: int) -> UInt8[Tensor, "c h2 w2"]:
    """Antialiased bicubic in uint8, as PIL's; the image itself where it already has the size."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
