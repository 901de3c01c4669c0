"""An electrocardiogram through a convolutional autoencoder, after Yildirim, San Tan and Acharya
(2018, "An efficient compression of ECG signals using deep convolutional autoencoders").

    python examples/ecg.py [--file ecg.dat] [--out ecg] [--epochs 100]

Five minutes of one lead at 360 Hz: four to train on, the last one held out. Prints the compression
ratio and the percent root-mean-square difference (PRD; PRDN about the mean) of the held-out minute
beside those of PCA and of the discrete cosine transform. The ratio counts numbers, all of them
float32: nothing is quantised. Of the largest coefficients of the DCT it counts the places too.
One minute of one core; at 16 to 1 a PRD of 12.0, PCA 33.0, the first coefficients of the DCT 33.2.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.fft import dct, idct
from sklearn.decomposition import PCA

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.shards.sources import ImageFolder
from maepretrain.data.shards.write import write_shards
from maepretrain.plots.images import reconstruction_grid
from maepretrain.workflows.pretrain import pretrain_command

# Samples a second, samples of a window, numbers of its code.
RATE = 360
LENGTH = 512
KEPT = 32
HELD_OUT = 60 * RATE
# Of the first four minutes, as configs/data/ecg.yaml has them.
MEAN = -0.181
STD = 0.628
# Windows in the picture.
PICTURED = 4


def read_ecg(file: Path | None) -> np.ndarray:
    """Millivolts, from a given ecg.dat, through scipy.datasets, or from an old wheel of SciPy."""
    if file is None:
        try:
            from scipy.datasets import electrocardiogram

            return electrocardiogram()
        except (ImportError, OSError) as error:  # no pooch, no network
            print(f"not through scipy.datasets ({error}), but from the wheel of SciPy 1.11.4")
        return _from_wheel()
    with np.load(file) as stored:
        return (stored["ecg"].astype(int) - 1024) / 200.0


def _from_wheel() -> np.ndarray:
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", folder]
        subprocess.run([*command, "scipy==1.11.4"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return read_ecg(Path(archive.extract("scipy/misc/ecg.dat", folder)))


def split(ecg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The signal to train on, and the windows of the held-out last minute, (n, LENGTH)."""
    train = ecg[:-HELD_OUT]
    held_out = ecg[-HELD_OUT:]
    whole_windows = len(held_out) // LENGTH * LENGTH
    return train, held_out[:whole_windows].reshape(-1, LENGTH)


def write(train: np.ndarray, windows: np.ndarray, out: Path) -> None:
    """Shards of overlapping stretches, twice as long as a window, and of the held-out windows."""
    starts = range(0, len(train) - 2 * LENGTH + 1, LENGTH // 4)
    stretches = [train[start : start + 2 * LENGTH] for start in starts]
    for name, parts in (("train", stretches), ("test", windows)):
        folder = out / "arrays" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(parts):
            np.save(folder / f"{number:05d}.npy", part[None].astype(np.float32))
        write_shards(ImageFolder(folder), out / "shards", name)


def prd(x: np.ndarray, decoded: np.ndarray) -> tuple[float, float]:
    """PRD = 100 |x - decoded| / |x|, and PRDN = 100 |x - decoded| / |x - its mean|."""
    difference = np.linalg.norm(x - decoded)
    prd_of_signal = 100 * difference / np.linalg.norm(x)
    prd_about_mean = 100 * difference / np.linalg.norm(x - x.mean())
    return float(prd_of_signal), float(prd_about_mean)


def keep_first(x: np.ndarray, kept: int) -> np.ndarray:
    """The windows made of the first coefficients of their DCT."""
    coefficients = np.asarray(dct(x, norm="ortho", axis=1))
    coefficients[:, kept:] = 0
    return np.asarray(idct(coefficients, norm="ortho", axis=1))


def keep_largest(x: np.ndarray, kept: int) -> np.ndarray:
    """The windows made of the coefficients of their DCT that are largest in absolute value."""
    coefficients = np.asarray(dct(x, norm="ortho", axis=1))
    smallest = np.abs(coefficients).argsort(axis=1)[:, : x.shape[1] - kept]
    np.put_along_axis(coefficients, smallest, 0, axis=1)
    return np.asarray(idct(coefficients, norm="ortho", axis=1))


def baselines(train: np.ndarray, windows: np.ndarray) -> dict[str, tuple[int, np.ndarray]]:
    """Name -> numbers that it keeps of a window, and the windows made of them."""
    pca = PCA(KEPT).fit(np.lib.stride_tricks.sliding_window_view(train, LENGTH)[::16])
    return {
        "PCA": (KEPT, pca.inverse_transform(pca.transform(windows))),
        "DCT, first 32": (KEPT, keep_first(windows, KEPT)),
        "DCT, largest 16": (KEPT, keep_largest(windows, KEPT // 2)),
        "DCT, largest 32": (2 * KEPT, keep_largest(windows, KEPT)),
    }


@torch.no_grad()
def reconstruct(run: Path, windows: np.ndarray) -> tuple[int, np.ndarray]:
    """Numbers of a window's code, and the windows decoded from their codes."""
    model = cast(Any, load_encoder(str(run)).eval())
    x = torch.from_numpy((windows - MEAN) / STD).float()[:, None]
    decoded = model.reconstruct(x).reconstruction[:, 0].double().numpy()
    return model.encode(x).shape[1], decoded * STD + MEAN


def report(windows: np.ndarray, rows: dict[str, tuple[int, np.ndarray]], path: Path) -> None:
    """Print the table and draw the picture."""
    print("held-out minute   ratio    PRD   PRDN")
    for name, (kept, decoded) in rows.items():
        of_signal, about_mean = prd(windows, decoded)
        print(f"{name:<16} {windows.shape[1] / kept:6.1f} {of_signal:6.2f} {about_mean:6.2f}")
    signals = [windows, *(decoded for _, decoded in rows.values())]
    drawn = [torch.from_numpy(signal[:PICTURED]).float()[:, None] for signal in signals]
    reconstruction_grid(drawn, ["original", *rows], path)
    print(f"picture: {path}")


def main(argv: list[str] | None = None) -> int:
    """Train and print the table; 0 when the training came to its end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--file", type=Path, help="scipy's ecg.dat; default: download it")
    parser.add_argument(
        "--out", type=Path, default=Path("ecg"), help="folder of shards, run and picture"
    )
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args(argv)
    shards, run = options.out / "shards", options.out / "run"
    train, windows = split(read_ecg(options.file))
    write(train, windows, options.out)
    command = ["-c", "data/ecg", "-c", "recipe/ecg", "--run", str(run), "--overwrite"]
    command += ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    code = pretrain_command([*command, "--trainer.max_epochs", str(options.epochs)])
    if code:
        return code
    rows = {"autoencoder": reconstruct(run, windows)} | baselines(train, windows)
    report(windows, rows, options.out / "ecg.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
