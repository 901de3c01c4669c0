"""The example examples/ecg.py: its figures against numbers worked out by hand, and all of it on a
signal made of beats."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from maepretrain.parsing.configs import configs_folder

EXAMPLE = Path(__file__).parents[2] / "examples/ecg.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ecg", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ecg = _load()


def beats(seconds: int) -> np.ndarray:
    """Seventy beats a minute on a base that wanders."""
    t = np.arange(seconds * 360) / 360
    phase = (t * 70 / 60) % 1
    wave = np.exp(-(((phase - 0.4) / 0.02) ** 2)) + 0.2 * np.exp(-(((phase - 0.7) / 0.06) ** 2))
    return 1.2 * wave + 0.1 * np.sin(t) - 0.2


def test_prd_by_hand() -> None:
    """Of 1, 7, 5, 7 the squares are 1 + 49 + 25 + 49, about the mean 5 16 + 4 + 0 + 4."""
    x = np.array([[1.0, 7.0], [5.0, 7.0]])
    plain, normalised = ecg.prd(x, x + np.array([[2.0, 0.0], [0.0, 0.0]]))
    assert plain == pytest.approx(100 * 2 / np.sqrt(124))
    assert normalised == pytest.approx(100 * 2 / np.sqrt(24))
    assert ecg.prd(x, np.zeros((2, 2)))[0] == pytest.approx(100)
    assert ecg.prd(x, np.full((2, 2), 5.0))[1] == pytest.approx(100)
    assert ecg.prd(x, x) == (0.0, 0.0)


def test_windows_of_the_last_minute_are_held_out() -> None:
    signal = np.arange(70.0 * 360)
    train, windows = ecg.split(signal)
    np.testing.assert_array_equal(train, signal[: 10 * 360])
    assert windows.shape == (42, 512)
    np.testing.assert_array_equal(windows.ravel(), signal[10 * 360 : 10 * 360 + 42 * 512])


def test_cosines_that_are_kept() -> None:
    """Two cosines of the DCT-II: the slow one is the first that is kept, the other the largest,
    whatever its sign."""
    n = (np.arange(512) + 0.5) * np.pi / 512
    slow, quick = np.cos(3 * n), -5 * np.cos(200 * n)
    x = np.stack([slow + quick, 2 * slow])
    np.testing.assert_allclose(ecg.keep_first(x, 4), [slow, 2 * slow], atol=1e-12)
    np.testing.assert_allclose(ecg.keep_first(x, 3), np.zeros((2, 512)), atol=1e-12)
    np.testing.assert_allclose(ecg.keep_largest(x, 1), [quick, 2 * slow], atol=1e-12)
    np.testing.assert_allclose(ecg.keep_largest(x, 2), x, atol=1e-12)


def test_baselines_keep_as_many_numbers_as_they_say() -> None:
    """Orthogonal transforms: 32 of 512 coefficients of white noise hold 32 / 512 of its energy, the
    rest is the error; the largest hold more."""
    noise = np.random.default_rng(0).standard_normal(70 * 360)
    train, windows = ecg.split(noise)
    rows = ecg.baselines(train, windows)
    lost = {name: ecg.prd(windows, decoded)[0] / 100 for name, (_, decoded) in rows.items()}
    assert lost["DCT, first 32"] == pytest.approx(np.sqrt(1 - 32 / 512), abs=0.01)
    assert lost["PCA"] == pytest.approx(np.sqrt(1 - 32 / 512), abs=0.02)
    assert lost["DCT, largest 32"] < lost["DCT, largest 16"] < lost["DCT, first 32"]
    assert [512 / kept for kept, _ in rows.values()] == [16, 16, 16, 8]
    ((_, first), (_, largest)) = rows["DCT, first 32"], rows["DCT, largest 16"]
    assert np.linalg.matrix_rank(first) == 32 and np.linalg.matrix_rank(largest) > 32


def test_reads_the_file_as_scipy_does(tmp_path: Path) -> None:
    """`scipy.datasets.electrocardiogram`: 11 bits, 1024 is 0, 200 to the millivolt."""
    with (tmp_path / "ecg.dat").open("wb") as file:
        np.savez_compressed(file, ecg=np.array([1024, 1224, 924, 0], dtype=np.uint16))
    np.testing.assert_array_equal(ecg.read_ecg(tmp_path / "ecg.dat"), [0, 1, -0.5, -5.12])


def test_runs_to_its_end_on_made_beats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ecg, "HELD_OUT", 8 * 360)
    with (tmp_path / "ecg.dat").open("wb") as file:
        np.savez_compressed(file, ecg=np.round(beats(40) * 200 + 1024).astype(np.uint16))
    given = ["--file", str(tmp_path / "ecg.dat"), "--out", str(tmp_path), "--epochs", "8"]
    assert ecg.main(given) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("held-out minute") :].splitlines()
    rows = {line[:16].strip(): [float(word) for word in line[16:].split()] for line in lines[1:6]}
    assert list(rows) == [
        *("autoencoder", "PCA", "DCT, first 32", "DCT, largest 16", "DCT, largest 32")
    ]
    assert rows["autoencoder"][0] == 16
    assert rows["autoencoder"][1] < 80  # of a signal that it gives back as 0 it is 100
    picture = np.asarray(Image.open(tmp_path / "ecg.png"))
    assert picture.std() > 5


def test_normalisation_is_that_of_the_config() -> None:
    text = (configs_folder() / "data/ecg.yaml").read_text()
    assert f"mean: [{ecg.MEAN}]" in text and f"std: [{ecg.STD}]" in text
    assert f"image_size: [{ecg.LENGTH}]" in text


@pytest.mark.slow
def test_beats_the_transforms_on_the_real_electrocardiogram(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two minutes of one core."""
    try:
        signal = ecg.read_ecg(None)
    except Exception as error:
        pytest.skip(f"the electrocardiogram can not be had: {error}")
    assert signal.shape == (108000,)
    train, windows = ecg.split(signal)
    assert train.mean() == pytest.approx(ecg.MEAN, abs=1e-3)
    assert train.std() == pytest.approx(ecg.STD, abs=1e-3)
    with (tmp_path / "ecg.dat").open("wb") as file:
        np.savez_compressed(file, ecg=np.round(signal * 200 + 1024).astype(np.uint16))
    assert ecg.main(["--file", str(tmp_path / "ecg.dat"), "--out", str(tmp_path)]) == 0
    ours = ecg.prd(windows, ecg.reconstruct(tmp_path / "run", windows)[1])[0]
    theirs = {n: ecg.prd(windows, x)[0] for n, (k, x) in ecg.baselines(train, windows).items()}
    assert ours < 0.8 * min(theirs["PCA"], theirs["DCT, first 32"], theirs["DCT, largest 16"])
