"""`maepretrain embed`: files read back beside the encoder run by hand."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.transforms import resize
from maepretrain.plots.maps import embedding_map
from maepretrain.workflows.quickstart import digits

Run = Callable[..., int]


def by_hand(run: Path, keys: Any, pool: str, train: bool = False) -> np.ndarray:
    """Features of the digits of these numbers, without shards, loaders or normalisation of ours."""
    numbers = [int(key) for key in keys]
    images = torch.from_numpy(digits()[0 if train else 1].images[numbers])[:, None]
    enlarged = torch.stack([resize(image, 16, 16) for image in images])
    model: Any = load_encoder(str(run)).eval()
    with torch.no_grad():
        return model.encode((enlarged / 255 - 0.305) / 0.376, pool).numpy()


@pytest.mark.parametrize("pool", ["mean", "cls", "tokens"])
def test_a_file_holds_the_features_of_every_image_with_its_key(
    pool: str, tiny_run: Path, tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.npz"
    assert run_cli("embed", "--encoder", tiny_run, "--out", out, "--pool", pool, "--batch", 7) == 0
    file = np.load(out)
    shape = (50, 16, 32) if pool == "tokens" else (50, 32)
    assert file["features"].shape == shape and file["features"].dtype == np.float32
    assert sorted(int(key) for key in file["keys"]) == list(range(50))
    assert file["labels"].tolist() == digits()[1].labels[[int(k) for k in file["keys"]]].tolist()
    assert [Path(url).name for url in file["shards"]] == ["test-000000.tar"] * 43 + [
        "test-000001.tar"
    ] * 7
    expected = by_hand(tiny_run, file["keys"], pool)
    np.testing.assert_allclose(file["features"], expected, rtol=0, atol=1e-5)
    assert f"features {shape} float32 of 50 images in {out}" in capsys.readouterr().out


def test_the_training_split_in_half_precision(tiny_run: Path, tmp_path: Path, run_cli: Run) -> None:
    options = ["--encoder", tiny_run, "--out", tmp_path / "a.npz", "--split", "train", "--half"]
    assert run_cli("embed", *options, "--data.num_workers", 1) == 0
    file = np.load(tmp_path / "a.npz")
    assert file["features"].shape == (150, 32) and file["features"].dtype == np.float16
    expected = by_hand(tiny_run, file["keys"], "mean", train=True)
    np.testing.assert_allclose(file["features"], expected, rtol=1e-3, atol=1e-3)


def test_parquet(tiny_run: Path, tmp_path: Path, run_cli: Run) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for pool in ("mean", "tokens"):
        options = ["embed", "--encoder", tiny_run, "--pool", pool, "--out"]
        assert run_cli(*options, tmp_path / "a.npz") == 0
        assert run_cli(*options, tmp_path / "a.parquet") == 0
        file, table = np.load(tmp_path / "a.npz"), parquet.read_table(tmp_path / "a.parquet")
        for column, name in (("key", "keys"), ("shard", "shards"), ("label", "labels")):
            assert table[column].to_pylist() == file[name].tolist()
        assert table.schema.metadata[b"made"].decode() == str(file["made"])
        assert table["feature"].to_pylist() == file["features"].tolist()


def test_without_pyarrow_parquet_is_refused_before_work(
    tiny_run: Path,
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("maepretrain.apply.embeddings.find_spec", lambda _: None)
    assert run_cli("embed", "--encoder", tiny_run, "--out", tmp_path / "a.parquet") == 2
    assert "parquet needs `pip install pyarrow`" in capsys.readouterr().err


def test_an_unreadable_image_is_left_out(
    tiny_run: Path, tmp_path: Path, run_cli: Run, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "shards"
    damaged.mkdir()
    for path in shards.glob("test-*"):
        (damaged / path.name).write_bytes(path.read_bytes())
    tar = damaged / "test-000000.tar"
    content = bytearray(tar.read_bytes())
    begin = content.index(b"\x89PNG")
    content[begin + 8 : begin + 60] = bytes(52)
    tar.write_bytes(content)
    # Indexed anew: the file is another one.
    (damaged / "test-000000.tar.idx").unlink(missing_ok=True)
    assert run_cli("shards", "index", f"{damaged}/test-*.tar") == 0
    options = ["--encoder", tiny_run, "--out", tmp_path / "a.npz", "--batch", 1]
    assert run_cli("embed", *options, "--data.val", f"{damaged}/test-*.tar") == 0
    file = np.load(tmp_path / "a.npz")
    assert len(set(file["keys"].tolist())) == len(file["features"]) == len(file["labels"]) == 49
    expected = by_hand(tiny_run, file["keys"], "mean")
    np.testing.assert_allclose(file["features"], expected, rtol=0, atol=1e-5)
    assert "1 unreadable samples are left out" in capsys.readouterr().err


def test_other_encoders(
    shards: Path, tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    data += ["--data.image_size", 32, "--data.channels", 1, "--data.mean", "[0.3]"]
    data += ["--data.std", "[0.4]", "--out", tmp_path / "a.npz"]
    assert run_cli("embed", "--encoder", "timm:resnet10t", *data) == 0
    assert np.load(tmp_path / "a.npz")["features"].shape == (50, 512)
    assert run_cli("embed", "--encoder", "timm:resnet10t", *data, "--pool", "cls") == 2
    assert "no class token" in capsys.readouterr().err
    assert run_cli("embed", "--encoder", "timm:resnet10t", "--out", tmp_path / "a.npz") == 2
    assert "required: data.train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--out", "a.txt"], "--out a.txt must end in .npz or .parquet"),
        (["--out", "nowhere/a.npz"], "there is no folder nowhere"),
        (["--out", "a.npz", "--data.val", "null"], "data.val names no indexed shards"),
        (["--out", "a.npz", "--batch", "0"], "batch 0 must be at least 1"),
        (["--out", "a.npz", "--pool", "max"], "pool"),
        (["--out", "a.npz", "--map", "a.jpg"], "--map a.jpg must end in .png"),
        (["--out", "a.npz", "--map", "a.png", "--pool", "tokens"], "take pool mean or cls"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], rule: str, tiny_run: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("embed", "--encoder", tiny_run, *options) == 2
    error = capsys.readouterr().err
    assert rule in error and error.count("\n") == 1


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_of_the_features(
    method: str, tiny_run: Path, tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is drawn is tested with `embedding_map`; here that it is of these features."""
    out, mapped = tmp_path / "a.npz", tmp_path / "pictures/map.png"
    options = ["--encoder", tiny_run, "--out", out, "--map", mapped, "--map_method", method]
    assert run_cli("embed", *options) == 0
    assert f"map in {mapped}\n" in capsys.readouterr().out
    file = np.load(out)
    features, labels = torch.from_numpy(file["features"]), torch.from_numpy(file["labels"])
    embedding_map(features, labels, tmp_path / "theirs.png", method)  # type: ignore[arg-type]
    assert mapped.read_bytes() == (tmp_path / "theirs.png").read_bytes()


def test_a_map_of_images_without_labels_is_gray(
    tiny_run: Path, tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(digits()[1].images[:12]):
        Image.fromarray(image).save(folder / f"{i}.png")
    assert run_cli("shards", "write", folder, tmp_path / "shards") == 0
    options = ["--encoder", tiny_run, "--out", tmp_path / "a.npz", "--map", tmp_path / "map.png"]
    assert run_cli("embed", *options, "--data.val", f"{tmp_path}/shards/train-*.tar") == 0
    assert "; 12 images without label are gray" in capsys.readouterr().out
    colours = Image.open(tmp_path / "map.png").convert("RGB").getcolors(1 << 20) or []
    assert all(r == g == b for _, (r, g, b) in colours)  # type: ignore[misc]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tiny_run: Path, tmp_path: Path, run_cli: Run) -> None:
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    assert run_cli("embed", "--encoder", tiny_run, "--out", one) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "maepretrain", "embed", "--encoder", str(tiny_run), "--out", str(two)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    a, b = np.load(one), np.load(two)
    for name in ("keys", "labels", "shards"):
        assert a[name].tolist() == b[name].tolist()
    np.testing.assert_allclose(a["features"], b["features"], rtol=0, atol=1e-5)
