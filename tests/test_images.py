"""Decoding and cropping against PIL and torchvision's transforms on PIL images."""

import io
import math
import struct
import zlib
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from maepretrain.data.images import UNIFORMS, Augment, CentreCrop, decode, resize
from maepretrain.randomness import uniform

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]
JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {"quality": 90},
    "4:4:4": {"quality": 95, "subsampling": 0},
    "4:2:2": {"quality": 85, "subsampling": 1},
    "progressive": {"quality": 90, "progressive": True},
    "coarse": {"quality": 20},
}


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_decodes_what_pil_decodes(name: str, channels: int):
    mode, form, settings = FORMATS[name]
    data = encoded(gradients(mode), form, **settings)
    ours, truth = pixels(decode(data, channels)), by_pil(data, "L" if channels == 1 else "RGB")
    assert ours.shape == truth.shape == (48, 48, channels)
    # Gray is a weighted sum, which libpng and libjpeg round otherwise than PIL; RGB is exact.
    assert np.abs(ours.astype(int) - truth).max() <= (1 if channels == 1 else 0)


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


def test_orientation_tags_are_ignored_as_pil_does():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = encoded(gradients("RGB").crop((0, 0, 48, 30)), "JPEG", exif=exif)
    assert decode(data, 3).shape == (3, 30, 48)


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
    for channels in (1, 3):
        with pytest.raises(ValueError, match="cannot decode the image"):
            decode(data, channels)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channels_are_refused(channels: int):
    with pytest.raises(ValueError, match=f"1 or 3 channels, not {channels}"):
        decode(encoded(gradients("RGB"), "PNG"), channels)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"])
def test_flipped_bytes_give_an_image_or_a_value_error(form: str):
    whole = encoded(gradients("RGB"), form)
    random = np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 3):
            data[place] = random.integers(256)
        try:
            assert decode(bytes(data), 3).shape[0] == 3
        except ValueError as error:
            assert str(error).startswith("cannot decode the image")


def resized_crop(image: Image.Image, box: Any, size: tuple[int, int]) -> Any:
    top, left, height, width = box
    picture, bicubic = cast(Any, image), InterpolationMode.BICUBIC
    return TF.resized_crop(picture, top, left, height, width, list(size), bicubic)


def pil_pipeline(data: bytes, box: tuple[int, int, int, int], flip: bool, side: int) -> np.ndarray:
    """torchvision on a PIL image, as the official MAE code loads its pictures."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = resized_crop(image, box, (side, side))
    return np.asarray(TF.horizontal_flip(image) if flip else image)


@pytest.mark.parametrize("photo", range(len(PHOTOS)))
@pytest.mark.parametrize("name", [*JPEGS, "gray", "tiny"])
def test_pixels_are_those_of_torchvisions_pil_pipeline(name: str, photo: int):
    image = PHOTOS[photo].convert("L") if name == "gray" else PHOTOS[photo]
    image = image.resize((37, 25)) if name == "tiny" else image
    data = encoded(image, "JPEG", **JPEGS.get(name, {}))
    augment = Augment(96, 96)
    decibels = []
    for u in uniform(photo, "crop", torch.arange(8), UNIFORMS):
        box = augment.box(image.height, image.width, u.tolist())
        truth = pil_pipeline(data, box, bool(u[-1] < 0.5), 96)
        decibels.append(psnr(pixels(augment(decode(data, 3), u)), truth))
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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("h", "w"), [(7, 5), (28, 28), (300, 200)])
def test_resize_is_pils(channels: int, h: int, w: int):
    rough = torch.randint(0, 256, (channels, 60, 90), dtype=torch.uint8)
    image = Image.fromarray(pixels(rough).squeeze())
    truth = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC)).reshape(h, w, channels)
    # PIL rounds its weights otherwise, which pure noise shows.
    assert np.abs(pixels(resize(rough, h, w)).astype(int) - truth).max() <= 2


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
