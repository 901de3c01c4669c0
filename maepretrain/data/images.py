"""Pixels and signals: decode, crop, resize with antialiased bicubic, flip.

Images are (c, h, w), uint8 or float32; signals (c, t). All choices come from given uniform numbers.
"""

import io
import math
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.io  # noqa: F401  registers torch.ops.image
from jaxtyping import Float, Int64, Real, Shaped, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from maepretrain.data.arrays import read_array

# RandomResizedCrop tries this often to fit a crop into the image before it takes one at the centre.
ATTEMPTS = 10
UNIFORMS = 4 * ATTEMPTS + 1
# The token after the end of a text that is shorter than its window.
PADDING = 256

# torchvision reads JPEG in 2/3 of PIL's time and a small PNG in 1/2. Its operator is called without
# the Python wrapper, which warns that it will be removed one day: PIL then reads everything.
# NOTE: torchvision's PNG reader (0.29.1) ends the process (SIGSEGV) on most damaged files.
# NOTE: its EXIF reader takes the first APP1 segment of a JPEG only, and knows no XMP.
_FAST = getattr(torch.ops.image, "decode_image", None)
_JPEG, _PNG, _XMP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"http://ns.adobe.com/xap/"

# PIL's names; torchvision has these numbers too, but refuses alpha for JPEG.
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def decode(data: bytes, channels: int, exif: bool = False) -> UInt8[Tensor, "c h w"]:
    """Decode an encoded image to uint8: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha.

    Alpha is dropped by 1 and 3, and 255 in 2 and 4 where the image has none. 16-bit gray keeps its
    high byte.

    Args:
        data: the bytes of a JPEG, PNG, WebP or anything else that PIL reads.
        channels: 1 to 4.
        exif: turn the image upright as its orientation tag says; a damaged tag is ignored. TIFF is
            always turned, by PIL.

    Raises:
        ValueError: bytes that are no image, or another number of channels.
    """
    if channels not in _MODES:
        raise ValueError(f"images decode to 1, 2, 3 or 4 channels, not {channels}")
    fast = not (exif and _XMP in data) if data.startswith(_JPEG) else _is_sound_png(data)
    if _FAST is not None and fast:
        with suppress(RuntimeError):
            return _FAST(torch.frombuffer(bytearray(data), dtype=torch.uint8), channels, exif)
    return _decode_with_pil(data, channels, exif)


def _is_sound_png(data: bytes) -> bool:
    """Whether this is a small plain PNG, 8-bit gray or RGB, that leaves libpng nothing to fail on.

    It holds IHDR, IDAT and IEND only, their checksums are right and all its rows are there.
    """
    if not data.startswith(_PNG) or len(data) > 1 << 14:  # larger ones gain nothing
        return False
    try:
        chunks = _png_chunks(data)
        names = [name for name, _ in chunks]
        if (names[0], {*names[1:-1]}, names[-1]) != (b"IHDR", {b"IDAT"}, b"IEND"):
            return False
        width, height, *form = struct.unpack(">IIBBBBB", chunks[0][1])
        rows = zlib.decompress(b"".join(content for _, content in chunks[1:-1]))
    except (struct.error, zlib.error, ValueError, IndexError):
        return False
    stride = 1 + width * (3 if form[1] == 2 else 1)  # each row begins with the number of its filter
    plain = form in ([8, 0, 0, 0, 0], [8, 2, 0, 0, 0]) and width * height > 0
    return plain and len(rows) == height * stride and max(rows[::stride]) <= 4


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(name, content) of each chunk; ValueError for a wrong checksum, struct.error at a cut."""
    chunks, place = [], len(_PNG)
    while place < len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        end = place + 8 + size
        if struct.unpack_from(">I", data, end)[0] != zlib.crc32(data[place + 4 : end]):
            raise ValueError(f"checksum of {name}")
        chunks.append((name, data[place + 8 : end]))
        place = end + 4
    return chunks


def _decode_with_pil(data: bytes, channels: int, exif: bool) -> UInt8[Tensor, "c h w"]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # once it raised on damage, a second call gives what there is
            with suppress(Exception):
                if exif:
                    ImageOps.exif_transpose(image, in_place=True)
            array = np.array(eight_bit(image).convert(_MODES[channels]))
    except Exception as error:  # PIL's readers raise anything on damaged bytes
        message = str(error).partition(" <_io.BytesIO")[0]  # PIL names the buffer, by its address
        raise ValueError(f"cannot decode the image: {message}") from error
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1)


def eight_bit(image: Image.Image) -> Image.Image:
    """The image, or the high bytes of 16-bit gray, which PIL's convert() may clip to white.

    Raises:
        ValueError: float or 32-bit pixels, whose black and white nobody knows.
    """
    if image.mode != "I" and not image.mode.startswith(("I;16", "F")):
        return image
    pixels = np.asarray(image)
    if image.mode.startswith("F") or pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError(f"pixels of mode {image.mode} are not in the range of 8 or 16 bits")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def decode_array(data: bytes) -> Shaped[Tensor, "..."]:
    """The array of a `.npy` file: uint8 (also of booleans), int64 (other integers) or float32.

    Raises:
        ValueError: as `read_array`.
    """
    return torch.from_numpy(read_array(data))


def decode_text(data: bytes, length: int) -> Int64[Tensor, "t"]:
    """The bytes of a text as tokens 0..255, PADDING after its end up to `length` tokens.

    Raises:
        ValueError: an empty text.
    """
    if not data:
        raise ValueError("the text is empty")
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return F.pad(tokens, (0, max(0, length - len(tokens))), value=PADDING)


def as_image(array: Shaped[Tensor, "..."], channels: int) -> Real[Tensor, "c h w"]:
    """An array (h, w), (c, h, w) or, where its first axis is not `channels`, (h, w, c) as an image.

    uint8 stays, integers (int64, as 16-bit pixels are read) become float32.

    Raises:
        ValueError: another shape.
    """
    image = array[None] if array.ndim == 2 else array
    if image.ndim == 3 and image.shape[0] != channels:
        image = image.permute(2, 0, 1)
    if image.ndim != 3 or image.shape[0] != channels:
        raise ValueError(f"shape {tuple(array.shape)} is no image of {channels} channels")
    return image.float() if image.dtype == torch.int64 else image


def as_signal(array: Shaped[Tensor, "..."], channels: int) -> Shaped[Tensor, "c t"]:
    """An array (t,), (c, t) or, where its first axis is not `channels`, (t, c) as a signal.

    The dtype stays: int64 holds tokens.

    Raises:
        ValueError: another shape.
    """
    signal = array[None] if array.ndim == 1 else array
    if signal.ndim == 2 and signal.shape[0] != channels:
        signal = signal.T
    if signal.ndim != 2 or signal.shape[0] != channels:
        raise ValueError(f"shape {tuple(array.shape)} is no signal of {channels} channels")
    return signal


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
