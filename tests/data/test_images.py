"""Decoding and cropping against PIL and torchvision's transforms on PIL images; arrays against
numpy."""

import io
import math
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from PIL import ExifTags, Image, ImageFilter, ImageOps
from scipy.stats import chisquare, ks_2samp
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from maepretrain.data.decode import as_image, as_signal, decode, decode_array
from maepretrain.data.transforms import UNIFORMS, Augment, CentreCrop, SignalCrop, resize
from maepretrain.randomness import uniform

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]


def encoded(image: Image.Image, form: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def by_pil(data: bytes, mode: str) -> np.ndarray:
    """(h, w, c) as PIL decodes and converts."""
    with Image.open(io.BytesIO(data)) as image:
        array = np.array(image.convert(mode))
    return array.reshape(*array.shape[:2], -1)


def pixels(image: torch.Tensor) -> np.ndarray:
    """(h, w, c) of ours."""
    return image.permute(1, 2, 0).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return -10 * math.log10(max(1e-12, np.mean((a / 255.0 - b / 255.0) ** 2)))


def gradients(mode: str) -> Image.Image:
    x = np.linspace(0, 255, 48)
    red, green = np.broadcast_arrays(x[None], x[:, None])
    image = np.stack([red, green, (red + green) / 2], -1).round().astype(np.uint8)
    return Image.fromarray(image).convert(mode)


FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "JPEG": ("RGB", "JPEG", {}),
    "gray JPEG": ("L", "JPEG", {}),
    "CMYK JPEG": ("CMYK", "JPEG", {"quality": 95}),
    "PNG": ("RGB", "PNG", {}),
    "gray PNG": ("L", "PNG", {}),
    "1-bit PNG": ("1", "PNG", {}),
    "palette PNG": ("P", "PNG", {}),
    "4-bit palette PNG": ("P", "PNG", {"bits": 4}),
    "transparent palette PNG": ("P", "PNG", {"transparency": 3}),
    "PNG with a transparent colour": ("RGB", "PNG", {"transparency": (0, 0, 0)}),
    "gray PNG with alpha": ("LA", "PNG", {}),
    "WebP": ("RGB", "WEBP", {"lossless": True}),
    "lossy WebP": ("RGB", "WEBP", {}),
    "WebP with alpha": ("RGBA", "WEBP", {"lossless": True}),
    "BMP": ("RGB", "BMP", {}),
    "PPM": ("RGB", "PPM", {}),
    "PGM": ("L", "PPM", {}),
    "GIF": ("P", "GIF", {}),
    "TIFF": ("RGB", "TIFF", {}),
    "CMYK TIFF": ("CMYK", "TIFF", {}),
}


MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_decodes_what_pil_decodes(name: str, channels: int):
    mode, form, settings = FORMATS[name]
    data = encoded(gradients(mode), form, **settings)
    ours, truth = pixels(decode(data, channels)), by_pil(data, MODES[channels])
    assert ours.shape == truth.shape == (48, 48, channels)
    difference = np.abs(ours.astype(int) - truth)
    # Gray is a weighted sum, which libpng and libjpeg round otherwise than PIL; RGB is exact.
    assert difference[..., 0].max() <= (1 if channels <= 2 else 0)
    assert not difference[..., 1:].any()


def test_alpha_is_kept_where_it_is_asked_for():
    random = np.random.default_rng(0)
    rgba = random.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    gray_alpha = random.integers(0, 256, (20, 30, 2), dtype=np.uint8)
    for form, settings in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        data = encoded(Image.fromarray(rgba), form, **settings)
        np.testing.assert_array_equal(pixels(decode(data, 4)), rgba)
        np.testing.assert_array_equal(pixels(decode(data, 2))[..., 1], rgba[..., 3])
    data = encoded(Image.fromarray(gray_alpha), "PNG")
    np.testing.assert_array_equal(pixels(decode(data, 2)), gray_alpha)
    np.testing.assert_array_equal(pixels(decode(data, 4)), gray_alpha[..., [0, 0, 0, 1]])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "PPM"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_alpha_of_an_image_without_it_is_opaque(form: str, mode: str):
    data = encoded(gradients(mode), form)
    for channels in (2, 4):
        image = decode(data, channels)
        assert (image[-1] == 255).all()
        difference = image[:-1].int() - decode(data, channels - 1).int()
        assert difference.abs().max() <= (channels == 2)  # as above


def test_alpha_is_dropped_whatever_it_says():
    rgba = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    data = encoded(Image.fromarray(rgba), "PNG")
    np.testing.assert_array_equal(pixels(decode(data, 3)), rgba[..., :3])


def test_gray_of_rgb_and_rgb_of_gray():
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    gray = pixels(decode(encoded(Image.fromarray(rgb), "PNG"), 1))[..., 0]
    # ITU-R 601: the luma of JPEG and of PIL; libpng rounds its weights and truncates.
    assert np.abs(gray - rgb @ np.array([0.299, 0.587, 0.114])).max() < 1.1
    back = pixels(decode(encoded(Image.fromarray(gray), "PNG"), 3))
    np.testing.assert_array_equal(back, np.stack([gray] * 3, -1))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_gray_keeps_its_high_byte(form: str, channels: int):
    values = np.random.default_rng(0).integers(0, 1 << 16, (20, 30), dtype=np.uint16)
    ours = pixels(decode(encoded(Image.fromarray(values), form), channels))
    np.testing.assert_array_equal(ours, np.stack([values >> 8] * channels, -1))


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png(width: int, height: int, form: bytes, rows: bytes, between: bytes = b"") -> bytes:
    """A PNG by hand (its specification, 5 and 11); `form` is depth, colour, 0, 0, interlace."""
    head = chunk(b"IHDR", struct.pack(">II", width, height) + form)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + between + pixels + chunk(b"IEND", b"")


def test_16_bit_colour_png():
    """PIL writes none."""
    values = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = png(30, 20, bytes([16, 2, 0, 0, 0]), rows)
    np.testing.assert_array_equal(pixels(decode(data, 3)), values >> 8)


GRAY, ROWS = (
    bytes([8, 0, 0, 0, 0]),
    b"".join(bytes([0, *range(10 * i, 10 * i + 8)]) for i in range(6)),
)
SOUND = png(8, 6, GRAY, ROWS)
UNSOUND = {
    "too few rows": png(8, 6, GRAY, ROWS[:-9]),
    "half a row": png(8, 6, GRAY, ROWS[:-4]),
    "too many rows": png(8, 6, GRAY, ROWS + ROWS),
    "an unknown filter": png(8, 6, GRAY, ROWS[:9] + b"\x09" + ROWS[10:]),
    "no width": png(0, 6, GRAY, b"\0" * 6),
    "no height": png(8, 0, GRAY, b""),
    "a width beyond libpng's limit": png(2_000_000, 1, GRAY, bytes(2_000_001)),
    "an unknown colour type": png(8, 6, bytes([8, 1, 0, 0, 0]), ROWS),
    "an unknown depth": png(8, 6, bytes([7, 0, 0, 0, 0]), ROWS),
    "an unknown interlace": png(8, 6, bytes([8, 0, 0, 0, 9]), ROWS),
    "interlaced": png(8, 6, bytes([8, 0, 0, 0, 1]), ROWS),
    "a palette that is missing": png(8, 6, bytes([8, 3, 0, 0, 0]), ROWS),
    "an unknown critical chunk": png(8, 6, GRAY, ROWS, chunk(b"ABCD", b"")),
    "two heads": png(8, 6, GRAY, ROWS, chunk(b"IHDR", struct.pack(">II", 8, 6) + GRAY)),
    "a short head": SOUND[:8] + chunk(b"IHDR", b"\0\0\0\x08") + SOUND[33:],
    "no pixels": SOUND[:33] + chunk(b"IEND", b""),
    "no head": SOUND[:8] + SOUND[33:],
    "no end": SOUND[:-12],
    "a wrong checksum of the head": SOUND[:30] + bytes([SOUND[30] ^ 1]) + SOUND[31:],
    "a wrong checksum of the pixels": SOUND[:-14] + bytes([SOUND[-14] ^ 1]) + SOUND[-13:],
    "a wrong checksum of the end": SOUND[:-1] + bytes([SOUND[-1] ^ 1]),
    "no zlib stream": SOUND[:33] + chunk(b"IDAT", b"no zlib") + chunk(b"IEND", b""),
    "half a zlib stream": SOUND[:33] + chunk(b"IDAT", zlib.compress(ROWS)[:20]) + SOUND[-12:],
    "only a signature": SOUND[:8],
}


@pytest.mark.parametrize("data", UNSOUND.values(), ids=UNSOUND.keys())
def test_no_png_ends_the_process(data: bytes):
    """torchvision's reader does on many of these, though most checksums are right."""
    try:
        ours = pixels(decode(data, 1))
    except ValueError as error:
        assert str(error).startswith("cannot decode the image")
    else:
        np.testing.assert_array_equal(ours, by_pil(data, "L"))


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (200, 100)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_png_of_any_filter_and_chunks(size: tuple[int, int], mode: str):
    """Noise and gradients take other filters; a large file has many chunks."""
    noise = Image.effect_noise(size, 100).convert(mode)
    for image in (noise, gradients(mode).resize(size)):
        for settings in ({}, {"optimize": True}, {"compress_level": 0}):
            data = encoded(image, "PNG", **settings)
            truth = np.asarray(image).reshape(size[1], size[0], -1)
            np.testing.assert_array_equal(pixels(decode(data, len(mode))), truth)


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


# What the tag says of the stored pixels (EXIF 2.32, 4.6.4 A), undone with numpy: (h, w, c).
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_turns_the_image_upright(orientation: int, form: str, channels: int):
    image = gradients("RGB").crop((0, 0, 48, 30))
    data = encoded(image, form, exif=tagged(orientation), lossless=True)
    stored, upright = pixels(decode(data, channels)), pixels(decode(data, channels, exif=True))
    assert stored.shape == (30, 48, channels)
    np.testing.assert_array_equal(upright, UPRIGHT[orientation](stored))
    with Image.open(io.BytesIO(data)) as opened:
        truth = np.asarray(ImageOps.exif_transpose(opened).convert(MODES[channels]))
    assert np.abs(upright.astype(int) - truth.reshape(upright.shape)).max() <= (channels <= 2)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_of_16_bit_gray(orientation: int):
    values = np.random.default_rng(0).integers(0, 1 << 16, (20, 30), dtype=np.uint16)
    data = encoded(Image.fromarray(values), "PNG", exif=tagged(orientation))
    truth = UPRIGHT[orientation](values >> 8)
    np.testing.assert_array_equal(pixels(decode(data, 1, exif=True))[..., 0], truth)


def test_a_tiff_is_always_upright():
    """PIL reads none otherwise."""
    image = gradients("RGB").crop((0, 0, 48, 30))
    data = encoded(image, "TIFF", exif=tagged(6))
    for exif in (False, True):
        np.testing.assert_array_equal(pixels(decode(data, 3, exif)), UPRIGHT[6](np.asarray(image)))


def segment(content: bytes) -> bytes:
    """An APP1 of a JPEG."""
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


XMP = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="8"/>'
EMPTY_XMP = b"http://ns.adobe.com/xap/1.0/\0<rdf:Description/>"
TAG = tagged(6).tobytes()  # "Exif", II or MM, 42, 8; one entry


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL says so
@pytest.mark.parametrize(
    ("segments", "orientation"),
    [
        ((TAG,), 6),
        ((TAG, XMP), 6),
        ((EMPTY_XMP, TAG), 6),
        ((XMP,), 8),
        ((EMPTY_XMP,), 1),
        ((tagged(0).tobytes(),), 1),
        ((tagged(9).tobytes(),), 1),
        ((b"Exif\0\0",), 1),
        ((b"Exif\0\0nonsense",), 1),
        ((TAG[:20],), 1),
        ((b"",), 1),
    ],
)
def test_orientation_in_any_segment_or_none(segments: tuple[bytes, ...], orientation: int):
    plain = encoded(gradients("RGB").crop((0, 0, 48, 30)), "JPEG")
    data = plain[:2] + b"".join(map(segment, segments)) + plain[2:]
    truth = UPRIGHT[orientation](pixels(decode(plain, 3)))
    for channels in (3, 4):  # torchvision's reader and PIL's
        np.testing.assert_array_equal(pixels(decode(data, channels, exif=True))[..., :3], truth)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL says so
def test_a_damaged_tag_in_a_png_is_ignored():
    for content in (b"", b"nonsense", b"II*\0\xff\xff\xff\xff", TAG[6:20]):
        data = png(8, 6, GRAY, ROWS, chunk(b"eXIf", content))
        np.testing.assert_array_equal(pixels(decode(data, 1, exif=True)), by_pil(SOUND, "L"))


def test_an_animation_gives_its_first_frame():
    frames = [gradients("P"), gradients("P").transpose(Image.Transpose.ROTATE_90)]
    for form in ("GIF", "WEBP"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(pixels(decode(data, 3)), by_pil(data, "RGB"))


def float_tiff() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF")


def wide_tiff() -> bytes:
    return encoded(Image.fromarray(np.full((8, 8), 1 << 20, dtype=np.int32)), "TIFF")


BROKEN = {
    "nothing": b"",
    "text": b"<html>404 not found</html>",
    "the first bytes of a JPEG": b"\xff\xd8\xff\xe0",
    "half a JPEG": encoded(PHOTOS[0], "JPEG")[:20_000],
    "half a PNG": encoded(gradients("RGB"), "PNG")[:200],
    "half a WebP": encoded(gradients("RGB"), "WEBP")[:100],
    "a float TIFF": float_tiff(),
    "a 32-bit TIFF": wide_tiff(),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_image_is_a_value_error(data: bytes):
    for channels in MODES:
        for exif in (False, True):
            with pytest.raises(ValueError, match="cannot decode the image"):
                decode(data, channels, exif)


@pytest.mark.parametrize("channels", [-1, 0, 5])
def test_other_channels_are_refused(channels: int):
    with pytest.raises(ValueError, match=f"1, 2, 3 or 4 channels, not {channels}"):
        decode(encoded(gradients("RGB"), "PNG"), channels)


def is_image(data: bytes, channels: int, exif: bool) -> bool:
    try:
        assert decode(data, channels, exif).shape[0] == channels
    except ValueError as error:
        assert str(error).startswith("cannot decode the image")
        return False
    return True


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL says so
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"])
def test_flipped_bytes_give_an_image_or_a_value_error(form: str):
    whole = encoded(gradients("RGB"), form, exif=tagged(6))
    random = np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 3):
            data[place] = random.integers(256)
        is_image(bytes(data), 3, exif=True)
        # PIL gives what there is when it is asked again after an error, which must not pass.
        assert is_image(bytes(data), 4, exif=True) == is_image(bytes(data), 4, exif=False)


def resized_crop(image: Image.Image, box: Any, size: tuple[int, int]) -> Any:
    top, left, height, width = box
    picture, bicubic = cast(Any, image), InterpolationMode.BICUBIC
    return TF.resized_crop(picture, top, left, height, width, list(size), bicubic)


def pil_pipeline(image: Image.Image, box: Any, flip: bool, side: int) -> np.ndarray:
    """torchvision on a PIL image, as the official MAE code loads its pictures."""
    image = resized_crop(image, box, (side, side))
    return np.asarray(TF.horizontal_flip(cast(Any, image)) if flip else image)


def sixteen_bit(photo: Image.Image) -> bytes:
    """The gray photo in the high bytes, noise in the low ones."""
    high = np.asarray(photo.convert("L")).astype(np.uint16) << 8
    low = np.random.default_rng(0).integers(0, 256, high.shape, dtype=np.uint16)
    return encoded(Image.fromarray(high | low), "PNG")


PHOTO_FORMS: dict[str, Callable[[Image.Image], bytes]] = {
    "4:2:0": lambda photo: encoded(photo, "JPEG", quality=90),
    "4:4:4": lambda photo: encoded(photo, "JPEG", quality=95, subsampling=0),
    "4:2:2": lambda photo: encoded(photo, "JPEG", quality=85, subsampling=1),
    "progressive": lambda photo: encoded(photo, "JPEG", quality=90, progressive=True),
    "coarse": lambda photo: encoded(photo, "JPEG", quality=20),
    "gray": lambda photo: encoded(photo.convert("L"), "JPEG"),
    "CMYK": lambda photo: encoded(photo.convert("CMYK"), "JPEG"),
    "tiny": lambda photo: encoded(photo.resize((30, 20)), "JPEG"),
    "turned": lambda photo: encoded(photo, "JPEG", exif=tagged(6)),
    "turned PNG": lambda photo: encoded(photo, "PNG", exif=tagged(5)),
    "palette PNG": lambda photo: encoded(photo.quantize(64), "PNG"),
    "16-bit PNG": sixteen_bit,
    "lossy WebP": lambda photo: encoded(photo, "WEBP"),
}


@pytest.mark.parametrize("photo", range(len(PHOTOS)))
@pytest.mark.parametrize("name", PHOTO_FORMS)
def test_pixels_are_those_of_torchvisions_pil_pipeline(name: str, photo: int):
    data = PHOTO_FORMS[name](PHOTOS[photo])
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    if name == "16-bit PNG":  # which PIL clips to white
        image = PHOTOS[photo].convert("L").convert("RGB")
    augment, decibels = Augment(96, 96), []
    for u in uniform(photo, "crop", torch.arange(8), UNIFORMS):
        box = augment.box(image.height, image.width, u.tolist())
        truth = pil_pipeline(image, box, bool(u[-1] < 0.5), 96)
        decibels.append(psnr(pixels(augment(decode(data, 3, exif=True), u)), truth))
    assert np.median(decibels) >= 50
    assert min(decibels) >= 45


@pytest.mark.parametrize(("flip", "flipped"), [(0.0, 0), (0.5, 500), (0.1, 100), (1.0, 1000)])
def test_flips_as_often_as_asked(flip: float, flipped: int):
    image = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    augment = Augment(1, 2, scale=None, flip=flip)
    draws = [augment(image, u) for u in uniform(0, "crop", torch.arange(1000), UNIFORMS)]
    mirrored = sum(int(draw[0, 0, 0]) == 255 for draw in draws)
    assert abs(mirrored - flipped) <= 4 * math.sqrt(1000 * flip * (1 - flip))


@pytest.mark.parametrize(
    ("h", "w", "scale", "ratio"),
    [
        (200, 300, (0.2, 1.0), (3 / 4, 4 / 3)),
        (300, 200, (0.08, 1.0), (3 / 4, 4 / 3)),
        (100, 400, (0.5, 1.0), (3 / 4, 4 / 3)),  # nearly every crop falls back to the centre
        (28, 28, (0.2, 1.0), (1 / 2, 2.0)),
        (64, 64, (0.3, 0.3), (1.0, 1.0)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(h: int, w: int, scale: Any, ratio: Any):
    n = 1500
    numbers = uniform(0, "crop", torch.arange(n), UNIFORMS).tolist()
    augment = Augment(1, 1, scale, ratio)
    ours = np.array([augment.box(h, w, u) for u in numbers])
    torch.manual_seed(0)
    image = torch.empty(1, h, w)
    truth = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (h, w)).all()
    for name, measure in {
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "height": lambda box: box[:, 2],
        "width": lambda box: box[:, 3],
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
        "free rows above": lambda box: box[:, 0] / (h - box[:, 2] + 1),
        "rows against columns": lambda box: (
            box[:, 0] / (h - box[:, 2] + 1) - box[:, 1] / (w - box[:, 3] + 1)
        ),
    }.items():
        assert cast(Any, ks_2samp(measure(ours), measure(truth))).pvalue > 1e-3, name


@pytest.mark.parametrize(("h", "w"), [(1000, 10), (10, 1000), (50, 50)])
def test_a_crop_that_never_fits_is_torchvisions_centre(h: int, w: int):
    truth = RandomResizedCrop.get_params(torch.empty(1, h, w), [1.0, 1.0], [1.5, 1.6])
    assert Augment(1, 1, (1.0, 1.0), (1.5, 1.6)).box(h, w, [0.5] * UNIFORMS) == truth


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 100), (100, 1), (2, 3)])
def test_tiny_images_are_cropped(h: int, w: int):
    image = torch.arange(h * w, dtype=torch.uint8).reshape(1, h, w)
    for ratio in [(3 / 4, 4 / 3), (0.01, 0.02), (50.0, 100.0)]:
        for u in uniform(0, "crop", torch.arange(20), UNIFORMS):
            assert Augment(8, 8, ratio=ratio)(image, u).shape == (1, 8, 8)
    assert CentreCrop(224, 16)(image).shape == (1, 224, 16)
    assert CentreCrop(16, 224, share=0.1)(image).shape == (1, 16, 224)


def test_no_scale_resizes_all_of_the_image():
    data = encoded(PHOTOS[0], "PNG")
    ours = Augment(64, 80, scale=None, flip=0.0)(decode(data, 3), torch.zeros(UNIFORMS))
    assert psnr(pixels(ours), np.asarray(PHOTOS[0].resize((80, 64), Image.Resampling.BICUBIC))) > 50


def test_a_crop_of_the_whole_image_at_its_size_is_the_image():
    image = decode(encoded(PHOTOS[0], "PNG"), 3)
    augment = Augment(image.shape[1], image.shape[2], scale=None, flip=0.0)
    assert torch.equal(augment(image, torch.zeros(UNIFORMS)), image)


@pytest.mark.parametrize(
    ("size", "output", "share", "box"),
    [
        ((480, 640), (224, 224), 0.875, (30, 110, 420, 420)),
        ((640, 480), (224, 224), 0.875, (110, 30, 420, 420)),
        ((256, 256), (224, 224), 0.875, (16, 16, 224, 224)),
        ((100, 400), (50, 100), 1.0, (0, 100, 100, 200)),
        ((100, 100), (50, 100), 0.5, (37, 25, 25, 50)),
        ((30, 30), (60, 60), 1.0, (0, 0, 30, 30)),
    ],
)
def test_centre_crop_takes_the_expected_box(size: Any, output: Any, share: float, box: Any):
    photo = PHOTOS[0].resize(size[::-1])
    image = decode(encoded(photo, "PNG"), 3)
    truth = np.asarray(resized_crop(photo, box, output))
    assert psnr(pixels(CentreCrop(output[0], output[1], share)(image)), truth) >= 50


def test_centre_crop_is_the_usual_resize_then_crop():
    """256-then-224 resizes before it crops and so rounds otherwise: it shifts by half a pixel."""
    for photo in (photo.filter(ImageFilter.GaussianBlur(8)) for photo in PHOTOS):
        resized = TF.resize(cast(Any, photo), [256], InterpolationMode.BICUBIC)
        truth = np.asarray(TF.center_crop(resized, [224, 224]))
        ours = pixels(CentreCrop(224, 224)(decode(encoded(photo, "PNG"), 3)))
        assert psnr(ours[4:-4, 4:-4], truth[4:-4, 4:-4]) > 35


def test_centre_crop_leaves_images_that_fit():
    image = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    assert torch.equal(CentreCrop(28, 28)(image), image)


def each_band(image: torch.Tensor, act: Callable[[Image.Image], Any]) -> np.ndarray:
    """(c, h, w): what PIL makes of each channel by itself, in uint8 or (mode F) float32."""
    return np.stack([np.asarray(act(Image.fromarray(band))) for band in image.numpy()])


SIZES = [(7, 5), (28, 28), (60, 90), (300, 200)]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_resize_is_pils(channels: int, h: int, w: int):
    rough = torch.randint(0, 256, (channels, 60, 90), dtype=torch.uint8)
    truth = each_band(rough, lambda band: band.resize((w, h), Image.Resampling.BICUBIC))
    # PIL rounds its weights otherwise, which pure noise shows.
    assert np.abs(resize(rough, h, w).numpy().astype(int) - truth).max() <= 2


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_resize_of_floats_is_pils_and_is_not_clamped(channels: int, h: int, w: int):
    steps = (torch.rand(channels, 60, 90) > 0.5) * 60_000.0 - 30_000
    truth = each_band(steps, lambda band: band.resize((w, h), Image.Resampling.BICUBIC))
    ours = resize(steps, h, w)
    np.testing.assert_allclose(ours.numpy(), truth, rtol=0, atol=60_000 * 2e-5)
    if h > 60:
        assert ours.min() < -31_000 and ours.max() > 31_000  # bicubic overshoots


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [2, 4, 7])
@pytest.mark.parametrize("layout", ["c h w", "h w c"])
def test_crops_of_arrays_with_any_channels(dtype: torch.dtype, channels: int, layout: str):
    array = (torch.rand(channels, 50, 70) * 255).to(dtype)
    stored = array if layout == "c h w" else array.permute(1, 2, 0).contiguous()
    image, augment = as_image(stored, channels), Augment(24, 24)
    for u in uniform(0, "crop", torch.arange(6), UNIFORMS):
        box = augment.box(50, 70, u.tolist())
        ours = augment(image, u)
        truth = each_band(array, lambda band, b=box: resized_crop(band, b, (24, 24)))
        truth = truth[..., ::-1] if u[-1] < 0.5 else truth
        assert ours.dtype == dtype
        assert np.abs(ours.numpy().astype(float) - truth).max() <= (
            2 if ours.dtype.itemsize == 1 else 1e-3
        )
    centre = CentreCrop(24, 24, 1.0)(image)
    truth = each_band(array, lambda band: resized_crop(band, (0, 10, 50, 50), (24, 24)))
    assert centre.dtype == dtype and np.abs(centre.numpy().astype(float) - truth).max() <= 2


# Arrays.


def saved(array: Any, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    npy.write_array(buffer, np.asanyarray(array), version=version)
    return buffer.getvalue()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize(
    "dtype",
    [
        *("|u1", "|b1", "|i1", "<i2", ">i2", "<u2", ">u2", "<i4", "<u4", "<i8", ">i8", "<u8"),
        *("<f2", ">f2", "<f4", ">f4", "<f8", ">f8"),
    ],
)
def test_arrays_are_read_as_numpy_reads_them(dtype: str, shape: tuple[int, ...], order: Any):
    values = np.random.default_rng(0).integers(0 if "u" in dtype else -100, 100, shape)
    array = np.asarray(values / 8 if "f" in dtype else values).astype(dtype, order=order)
    ours = decode_array(saved(array))
    truth = np.load(io.BytesIO(saved(array)))
    wide = torch.float32 if "f" in dtype else torch.int64
    assert ours.dtype == (torch.uint8 if dtype in ("|u1", "|b1") else wide)
    assert ours.is_contiguous() and ours.shape == shape
    np.testing.assert_array_equal(ours.numpy(), truth)
    np.testing.assert_array_equal(truth, array)


def test_arrays_are_writable_and_of_either_version():
    for version in ((1, 0), (2, 0)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of memory that must not be written
            array = decode_array(saved(np.zeros((2, 3), np.uint8), version)).add_(1)
        assert array.tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("array", "extreme"),
    [
        (np.array([(1 << 63) - 1, -1 << 63]), None),
        (np.array([(1 << 63) - 1], np.uint64), None),
        (np.array([1e30, 1e-30]), None),
        (np.array([1 << 63], np.uint64), "integers beyond int64"),
        (np.array([1e300]), "NaN, infinity or numbers beyond float32"),
        (np.array([1.0, np.nan], np.float32), "NaN, infinity"),
        (np.array([[1.0], [-np.inf]], np.float16), "NaN, infinity"),
    ],
)
def test_numbers_out_of_range_are_refused(array: np.ndarray, extreme: str | None):
    if extreme is None:
        np.testing.assert_allclose(decode_array(saved(array)).numpy(), array, rtol=1e-6)
    else:
        with pytest.raises(ValueError, match=f"cannot read the array: it holds {extreme}"):
            decode_array(saved(array))


class Armed:
    """Unpickling it fails the test."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(3))
    return buffer.getvalue()


WHOLE = saved(np.arange(6, dtype=np.uint8).reshape(2, 3))


def header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + data


def array_header(descr: str, shape: str, data: bytes = b"") -> bytes:
    return header(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}", data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no header"),
        (b"<html>404 not found</html>", "no header"),
        (zipped(), "no header"),
        (pickle.dumps(Armed()), "no header"),
        (WHOLE[:9], "no header"),
        (WHOLE[:40], "no header"),
        (WHOLE[:6] + b"\3" + WHOLE[7:], "no header of a .npy file, version 1 or 2"),
        (header("nonsense"), "no header"),
        (header("(" * 5000), "no header"),
        (header("{'descr': '<f4', 'shape': (1,)}", bytes(4)), "no header"),
        (WHOLE[:-1], "it holds 5 bytes of data, its header says 6"),
        (WHOLE + b"x", "it holds 7 bytes of data, its header says 6"),
        (array_header("<f8", "(1 << 62,)"), "no header"),
        (array_header("<f8", f"({1 << 62}, 4)"), f"0 bytes of data, its header says {1 << 67}"),
        (array_header("|u1", f"({'1, ' * 99})", b"0"), "maximum supported dimension"),
        (array_header("<f4", "(-1, -2)", bytes(8)), r"shape \(-1, -2\) must have axes, each of at"),
        (saved(np.zeros((0, 3))), r"shape \(0, 3\) must have axes, each of at least 1"),
        (saved(np.float32(1)), r"shape \(\) must have axes"),
        (array_header("|O", "(1,)", pickle.dumps(Armed())), "dtype object is no boolean, integer"),
        (saved(np.zeros(2, np.complex64)), "dtype complex64 is no boolean, integer or float"),
        (saved(np.zeros(2, [("a", "f4"), ("b", "u1")])), "dtype .* is no boolean"),
        (saved(np.array(["a"])), "dtype <U1 is no boolean"),
        (saved(np.array(["2020-01-01"], "M8[D]")), "dtype datetime64.* is no boolean"),
        (saved(np.zeros(2, np.longdouble)), "dtype float128 is no boolean"),
    ],
)
def test_what_is_no_plain_array_is_a_value_error(data: bytes, message: str):
    with pytest.raises(ValueError, match=f"cannot read the array: .*{message}") as caught:
        decode_array(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_give_an_array_or_a_value_error():
    whole, random = saved(np.ones((4, 5), np.float32)), np.random.default_rng(0)
    for _ in range(500):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 2):
            data[place] = random.integers(256)
        try:
            assert decode_array(bytes(data)).dtype in (torch.float32, torch.int64, torch.uint8)
        except ValueError as error:
            assert str(error).startswith("cannot read the array")


@pytest.mark.parametrize(
    ("shape", "channels", "axes"),
    [
        ((5, 7), 1, (None, 0, 1)),
        ((1, 5, 7), 1, (0, 1, 2)),
        ((5, 7, 1), 1, (2, 0, 1)),
        ((3, 5, 7), 3, (0, 1, 2)),
        ((5, 7, 3), 3, (2, 0, 1)),
        ((3, 7, 3), 3, (0, 1, 2)),  # either would do: the first axis holds the channels
        ((5, 13, 13), 13, (2, 0, 1)),
        ((5, 7), 3, None),
        ((5, 7, 2), 3, None),
        ((5, 3, 7), 3, None),
        ((5,), 1, None),
        ((1, 1, 5, 7), 1, None),
    ],
)
def test_arrays_as_images(shape: tuple[int, ...], channels: int, axes: Any):
    for dtype in (torch.uint8, torch.float32):
        array = torch.arange(math.prod(shape)).to(dtype).reshape(shape)
        if axes is None:
            with pytest.raises(
                ValueError, match=rf"shape .{shape[0]},.* no image of {channels} ch"
            ):
                as_image(array, channels)
            continue
        truth = array.numpy()[None] if axes[0] is None else array.numpy().transpose(axes)
        ours = as_image(array, channels)
        np.testing.assert_array_equal(ours.numpy(), truth)
        assert ours.dtype == dtype and ours.shape[0] == channels


def test_16_bit_arrays_as_images_are_floats():
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 7), dtype=np.uint16)
    image = as_image(decode_array(saved(values)), 1)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image[0].numpy(), values)


@pytest.mark.parametrize(
    ("shape", "channels", "turned"),
    [
        ((9,), 1, False),
        ((1, 9), 1, False),
        ((9, 1), 1, True),
        ((2, 9), 2, False),
        ((9, 2), 2, True),
        ((2, 2), 2, False),
        ((9,), 2, None),
        ((9, 3), 2, None),
        ((1, 2, 9), 2, None),
    ],
)
def test_arrays_as_signals(shape: tuple[int, ...], channels: int, turned: bool | None):
    for dtype in (torch.uint8, torch.int64, torch.float32):
        array = torch.arange(math.prod(shape)).to(dtype).reshape(shape)
        if turned is None:
            with pytest.raises(ValueError, match=rf"shape .{shape[0]},.* signal of {channels} ch"):
                as_signal(array, channels)
            continue
        ours = as_signal(array, channels).numpy()
        truth = array.numpy().reshape(-1, channels).T if turned else array.numpy()
        np.testing.assert_array_equal(ours, truth.reshape(channels, -1))
        assert as_signal(array, channels).dtype == dtype


# Signals.


@pytest.mark.parametrize(("t", "length"), [(9, 4), (5, 5), (20, 1), (12, 11)])
def test_every_stretch_of_a_signal_is_equally_likely(t: int, length: int):
    signal = torch.arange(2 * t).reshape(2, t)
    crop, counts = SignalCrop(length), np.zeros(t - length + 1)
    for u in uniform(0, "crop", torch.arange(3000), 1):
        ours = crop(signal, u)
        start = int(ours[0, 0])
        assert torch.equal(ours, signal[:, start : start + length])
        counts[start] += 1
    if len(counts) > 1:
        assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("starts", [1, 2, 3, 7, 1000, (1 << 24) - 1, (1 << 24) + 3])
def test_the_last_stretch_ends_with_the_signal(starts: int):
    signal = torch.empty(1, starts + 4, dtype=torch.uint8)
    last = torch.tensor([1.0]).nextafter(torch.tensor([0.0]))
    crop = SignalCrop(5)(signal, last)
    assert crop.shape == (1, 5)
    # u has 24 bits: beyond, not every start can be drawn.
    assert crop.storage_offset() == starts - (1 if starts < 1 << 24 else 2)
    assert SignalCrop(5)(signal, torch.zeros(1)).storage_offset() == 0


@pytest.mark.parametrize(("t", "length", "start"), [(9, 5, 2), (10, 5, 2), (5, 5, 0), (6, 1, 2)])
def test_the_centre_of_a_signal(t: int, length: int, start: int):
    signal = torch.rand(3, t)
    assert torch.equal(SignalCrop(length)(signal), signal[:, start : start + length])


def test_signal_crop_refuses():
    with pytest.raises(ValueError, match="length 0 of a crop must be at least 1"):
        SignalCrop(0)
    for u in (None, torch.zeros(1)):
        with pytest.raises(ValueError, match="a signal of 4 steps is shorter than 5"):
            SignalCrop(5)(torch.zeros(1, 4), u)


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (0.5, 0.2)}, r"scale \(0.5, 0.2\) must be two shares"),
        ({"scale": (0.0, 1.0)}, "0 < low"),
        ({"scale": (0.2, 1.5)}, "high <= 1"),
        ({"ratio": (2.0, 1.0)}, r"ratio \(2.0, 1.0\) must be"),
        ({"ratio": (0.0, 1.0)}, "0 < low"),
        ({"flip": 1.5}, "flip 1.5 must be a probability"),
        ({"height": 0}, "image size 0x8 must be"),
    ],
)
def test_augment_refuses(settings: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"height": 8, "width": 8} | settings
    with pytest.raises(ValueError, match=message):
        Augment(**arguments)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1])
def test_centre_crop_refuses(share: float):
    with pytest.raises(ValueError, match="must be in"):
        CentreCrop(8, 8, share)
