"""Bytes to pixels: images, arrays and texts, decoded.

Images are (c, h, w), uint8 or float32; signals (c, t).
"""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import torch
import torchvision.io  # noqa: F401  registers torch.ops.image
from jaxtyping import Int64, Real, Shaped, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from maepretrain.data.arrays import read_array

# The token after the end of a text that is shorter than its window.
PADDING = 256

# torchvision reads JPEG in 2/3 of PIL's time and a small PNG in 1/2. Its operator is called without
# the Python wrapper, which warns that it will be removed one day: PIL then reads everything.
# NOTE: torchvision's PNG reader (0.29.1) ends the process (SIGSEGV) on most damaged files.
# NOTE: its EXIF reader takes the first APP1 segment of a JPEG only, and knows no XMP.
_FAST = getattr(torch.ops.image, "decode_image", None)
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_XMP = b"http://ns.adobe.com/xap/"

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
    """True for a small plain PNG, 8-bit gray or RGB, that leaves libpng nothing to fail on.

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
