"""Files of the codec: the entropy coder against the entropy, bytes on disk against the model's
bits, and files that are damaged, foreign or another model's."""

import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio

from maepretrain.compression.codec import HEADER, Codec, psnr, read_symbols, write_symbols
from maepretrain.data.shards.sources import Arrays
from maepretrain.data.shards.write import write_shards
from maepretrain.parsing.configs import config_words

Run = Callable[..., int]
SIDES = (53, 70)


def test_symbols_come_back_at_the_length_of_their_entropy() -> None:
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(9, 0.5), size=3)
    drawn = [random.choice(9, (40, 60), p=row) for row in p]
    symbols = np.stack(drawn).astype(np.int64)
    payload = write_symbols(symbols, p)
    np.testing.assert_array_equal(read_symbols(payload, p, (40, 60)), symbols)
    bits = sum(-math.log2(p[k, s]) for k in range(3) for s in symbols[k].flat)
    assert bits - 1 <= 8 * len(payload) <= 1.002 * bits + 64


def test_symbols_that_the_prior_thinks_impossible_come_back() -> None:
    p = np.array([[1.0, 0.0, 0.0], [1e-300, 0.5, 0.5]])
    symbols = np.array([[[1, 0, 2]], [[0, 0, 1]]])
    np.testing.assert_array_equal(read_symbols(write_symbols(symbols, p), p, (1, 3)), symbols)


def test_psnr_is_scikit_images() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 256, (2, 3, 9, 7), dtype=np.uint8)
    expected = peak_signal_noise_ratio(a, b)
    assert psnr(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected)
    assert psnr(torch.from_numpy(a), torch.from_numpy(a)) == math.inf


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of no multiple of the stride."""
    path = tmp_path_factory.mktemp("picture") / "face.png"
    Image.fromarray(astronaut()[40 : 40 + SIDES[0], 190 : 190 + SIDES[1]]).save(path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few steps of each model, on pieces of a photograph."""
    from maepretrain.cli.main import main

    folder = tmp_path_factory.mktemp("runs")
    tiles = [
        astronaut()[i : i + 40, j : j + 40] for i in range(0, 450, 90) for j in range(0, 450, 90)
    ]
    write_shards(Arrays(np.stack(tiles), np.zeros(25, np.int64)), folder / "shards", "train")
    found = {}
    for name, config, *more in (
        ("plain", "data/photographs+recipe/compression", "--model.refinements", "0"),
        ("refined", "data/photographs+recipe/compression", "--model.refinements", "2"),
        ("residual", "data/photographs+recipe/compression_residual", "--model.iterations", "3"),
    ):
        found[name] = folder / name
        argv = ["pretrain", *config_words(config), "--run", str(found[name]), *more]
        argv += ["--data.train", f"{folder}/shards/train-*.tar", "--data.val", "null"]
        argv += ["--data.image_size", "32", "--model.width", "8", "--trainer.max_steps", "8"]
        assert main([*argv, "--data.global_batch", "8", "--optim.warmup_epochs", "0"]) == 0
    return found


@pytest.mark.parametrize("name", ["plain", "refined", "residual"])
def test_a_file_is_the_models_reconstruction(
    name: str, runs: dict[str, Path], picture: Path, tmp_path: Path, run_cli: Run
) -> None:
    out, back = tmp_path / "face.mae", tmp_path / "face.png"
    encoder = ("--encoder", runs[name])
    assert run_cli("codec", "encode", *encoder, picture, out) == 0
    assert run_cli("codec", "decode", *encoder, out, back) == 0
    codec = Codec.load(str(runs[name]))
    pixels = torch.from_numpy(np.asarray(Image.open(picture)).copy()).movedim(2, 0)
    shown = codec.model.reconstruct(codec.normalise(pixels[None])).reconstruction[0]  # type: ignore
    assert torch.equal(codec.decode(out.read_bytes()), shown)
    expected = codec.pixels(shown).movedim(0, 2).numpy()
    np.testing.assert_array_equal(np.asarray(Image.open(back)), expected)
    encoded = codec.encode(pixels)
    assert out.read_bytes() == encoded.data
    payload = 8 * (out.stat().st_size - HEADER.size - 4)
    assert encoded.estimated_bits - 1 <= payload <= 1.02 * encoded.estimated_bits + 64


def test_fewer_iterations_are_smaller_files(
    runs: dict[str, Path], picture: Path, tmp_path: Path, run_cli: Run
) -> None:
    sizes = []
    for iterations in (1, 2, 3):
        out = tmp_path / f"{iterations}.mae"
        given = ("--encoder", runs["residual"], "--iterations", iterations)
        assert run_cli("codec", "encode", *given, picture, out) == 0
        assert run_cli("codec", "decode", *given[:2], out, tmp_path / "back.png") == 0
        sizes.append(out.stat().st_size)
        assert Image.open(tmp_path / "back.png").size == SIDES[::-1]
    assert sizes[0] < sizes[1] < sizes[2]


def test_one_pixel_and_gray_pictures(runs: dict[str, Path], tmp_path: Path, run_cli: Run) -> None:
    Image.new("L", (1, 1), 77).save(tmp_path / "one.png")
    encoder = ("--encoder", runs["refined"])
    assert run_cli("codec", "encode", *encoder, tmp_path / "one.png", tmp_path / "one.mae") == 0
    assert run_cli("codec", "decode", *encoder, tmp_path / "one.mae", tmp_path / "back.png") == 0
    assert Image.open(tmp_path / "back.png").size == (1, 1)


def test_mistakes_are_one_line(
    runs: dict[str, Path],
    picture: Path,
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, bad, png = tmp_path / "whole.mae", tmp_path / "bad.mae", tmp_path / "out.png"
    plain = ("--encoder", runs["plain"])
    assert run_cli("codec", "encode", *plain, picture, whole) == 0
    data = whole.read_bytes()
    capsys.readouterr()

    def refused(*argv: object) -> str:
        assert run_cli("codec", *argv) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("maepretrain: error: ") and "\n" not in error
        assert not png.exists()
        return error

    for place in (8, 20, HEADER.size, len(data) - 1):  # a size, the model, checksum, payload
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        bad.write_bytes(flipped)
        assert f"{bad}: it is damaged" in refused("decode", *plain, bad, png)
    for content, why in (
        (picture.read_bytes(), "no file that maepretrain codec wrote"),
        (b"", "no file that maepretrain codec wrote"),
        (data[:20], "cut off"),
        (data[:-4], "bytes of payload, not"),
        (data + b"more", "bytes of payload, not"),
        (data[:4] + b"\x09" + data[5:], "of version 9"),
    ):
        bad.write_bytes(content)
        assert why in refused("decode", *plain, bad, png)
    for other in ("refined", "residual"):
        assert "another model" in refused("decode", "--encoder", runs[other], whole, png)
    assert ".png" in refused("decode", *plain, whole, tmp_path / "out.jpg")
    assert "there is no file" in refused("encode", *plain, tmp_path / "none.png", bad)
    assert "there is no folder" in refused("encode", *plain, picture, tmp_path / "no/x.mae")
    assert "would replace" in refused("encode", *plain, picture, picture)
    assert "whole.mae" in refused("encode", *plain, whole, bad)  # no image
    assert "iterations 2 must be 1 to 1" in refused(
        "encode", *plain, "--iterations", 2, picture, bad
    )
    assert "no run folder" in refused("encode", "--encoder", tmp_path / "none", picture, bad)
    assert "encode, decode" in refused("shrink")


def test_a_model_without_files_is_refused(
    pretrain_tiny: Run,
    picture: Path,
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pretrain_tiny(tmp_path / "mae", "--trainer.max_steps", 1) == 0
    given = ("--encoder", tmp_path / "mae", picture, tmp_path / "x.mae")
    assert run_cli("codec", "encode", *given) == 2
    assert "MaskedAutoencoder, which writes no files" in capsys.readouterr().err


def test_codec_without_constriction_names_the_extra(
    runs: dict[str, Path],
    picture: Path,
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    out = tmp_path / "x.mae"
    assert run_cli("codec", "encode", "--encoder", runs["plain"], picture, out) == 2
    error = capsys.readouterr().err.strip()
    assert "pip install 'maepretrain[compression]'" in error and "\n" not in error
    assert not out.exists()


def test_the_header_is_as_documented(
    runs: dict[str, Path], picture: Path, tmp_path: Path, run_cli: Run
) -> None:
    out = tmp_path / "x.mae"
    given = ("--encoder", runs["residual"], "--iterations", 2)
    assert run_cli("codec", "encode", *given, picture, out) == 0
    data = out.read_bytes()
    assert data[:4] == b"\x8fMAE" and list(data[4:7]) == [1, 2, 3]
    assert struct.unpack("<II", data[8:16]) == SIDES
    assert struct.unpack("<I", data[24:28]) == (len(data) - 32,)
