"""The example examples/compression.py: its measures against others', and no photograph twice."""

import io
import math
from pathlib import Path

import compression as example
import numpy as np
import pytest
from PIL import Image

P = example.Point


def test_no_photograph_is_in_both() -> None:
    train = example.TRAIN + example.TRAIN_GRAY
    assert len({*train, *example.HELD_OUT}) == len(train) + len(example.HELD_OUT)
    pixels = [example.photograph(name)[:300, :400] for name in (*train, *example.HELD_OUT)]
    for number, a in enumerate(pixels):
        assert a.dtype == np.uint8 and a.shape == (300, 400, 3)
        assert not any(np.array_equal(a, b) for b in pixels[:number])


def test_a_lead_is_read_off_the_logarithm_of_the_rate() -> None:
    curve = [P(0.1, 20, 0.8), P(0.4, 30, 0.9)]
    assert example.lead(P(0.2, 26, 0.9), curve) == pytest.approx(1)
    assert math.isnan(example.lead(P(0.5, 26, 0.9), curve))
    assert math.isnan(example.lead(P(0.05, 26, 0.9), curve))


def test_jpeg_is_measured_as_its_file() -> None:
    image = example.photograph("chelsea")
    size, decoded = example.through_pillow(image, "JPEG", 50)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50, optimize=True)
    assert size == len(buffer.getvalue())
    point = example.measure([image], lambda i: example.through_pillow(i, "JPEG", 50))
    assert point.bpp == pytest.approx(8 * size / (300 * 451))
    error = np.square(image.astype(float) - decoded).mean()
    assert point.psnr == pytest.approx(10 * math.log10(255**2 / error))
    worse = example.measure([image], lambda i: example.through_pillow(i, "JPEG", 5))
    assert worse.ms_ssim < point.ms_ssim < example.ms_ssim(image, image) == pytest.approx(1)


def test_the_table_and_picture_hold_every_point(tmp_path: Path) -> None:
    curves = {"ours": [P(0.2, 26, 0.9), P(9, 26, 0.9)], "JPEG": [P(0.1, 20, 0.8), P(0.4, 30, 0.9)]}
    lines = example.table(curves).splitlines()
    assert lines[2] == "| ours | 0.200 | 26.00 | 0.9000 | +1.00 |"
    assert "out of its range" in lines[3] and len(lines) == 6
    path = tmp_path / "drawn.png"
    example.draw(curves, path)
    assert np.asarray(Image.open(path)).std() > 5
