"""`maepretrain search`: neighbours beside scikit-learn's and NumPy's brute force."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import NearestNeighbors

from maepretrain.apply.search import data_of, read_index, read_rows, search
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.workflows.quickstart import digits

Run = Callable[..., int]


@pytest.fixture
def indexed(
    applied: Callable[..., Path], tmp_path: Path, run_cli: Run
) -> Callable[..., tuple[Path, Path]]:
    """A run of a config and the features of the held-out images in a file."""

    def make(name: str, *more: object) -> tuple[Path, Path]:
        run, index = applied(name), tmp_path / "features.npz"
        assert run_cli("embed", "--encoder", run, "--out", index, *more) == 0
        return run, index

    return make


@pytest.mark.parametrize("half", [False, True])
def test_cosine_neighbours_are_scikit_learns(
    half: bool, indexed: Callable[..., tuple[Path, Path]]
) -> None:
    _, index = indexed("data/fashion_mnist+recipe/variational", "--half", half)
    file = np.load(index)
    asked = [11, 0, 49]
    found = search(index, [str(file["keys"][i]) for i in asked], k=6)
    rows = file["features"].astype(np.float64)
    theirs = NearestNeighbors(metric="cosine", algorithm="brute").fit(rows)
    distances, numbers = theirs.kneighbors(rows[asked], 6)
    np.testing.assert_allclose(found.distances.numpy(), distances, atol=2e-3 if half else 1e-5)
    assert half or found.numbers.tolist() == numbers.tolist()
    assert found.numbers[:, 0].tolist() == asked  # the query comes first
    assert found.distances[:, 0].max() < (1e-4 if half else 1e-6) and found.distances.min() >= 0
    for i in range(3):
        chosen = found.numbers[i].numpy()
        assert found.keys[i] == file["keys"][chosen].tolist()
        assert found.labels[i] == digits()[1].labels[[int(k) for k in found.keys[i]]].tolist()


def test_hamming_neighbours_are_those_of_brute_force(
    indexed: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, index = indexed("data/fashion_mnist+recipe/semantic_hashing")
    file = np.load(index)
    found = search(index, [str(key) for key in file["keys"][[5, 30]]], k=20)
    images = torch.from_numpy(digits()[1].images[[int(k) for k in file["keys"]]])[:, None] / 255
    model: Any = load_encoder(str(run)).eval()
    bits = model.codes(images).numpy()
    apart = (bits[[5, 30], None] != bits[None]).sum(2)
    near = euclidean_distances(file["features"][[5, 30]], file["features"].astype(float))
    theirs = np.stack([np.lexsort(both)[:20] for both in zip(near, apart, strict=True)])
    assert found.numbers.tolist() == theirs.tolist()
    assert found.distances.tolist() == np.take_along_axis(apart, theirs, 1).tolist()
    assert apart.max() > 0 and found.distances[:, 0].tolist() == [0, 0]
    assert found.numbers[:, 0].tolist() == [5, 30]
    assert "hamming distance" in capsys.readouterr().out
    cosine = search(index, [str(file["keys"][5])], k=3, metric="cosine")
    assert cosine.distances.is_floating_point()


def test_a_file_finds_what_the_same_image_by_key_does(
    indexed: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, index = indexed("data/fashion_mnist+recipe/variational")
    key = str(np.load(index)["keys"][7])
    Image.fromarray(digits()[1].images[int(key)]).save(tmp_path / "query.png")
    both = search(index, [str(tmp_path / "query.png"), key], k=4)
    assert both.queries == ["query", key]
    assert both.keys[0] == both.keys[1] and both.keys[0][0] == key
    capsys.readouterr()
    out = tmp_path / "pictures/out.png"
    command = ["search", "--index", index, "--query", tmp_path / "query.png", key]
    assert run_cli(*command, "-k", 4, "--out", out) == 0
    said = capsys.readouterr().out
    label = digits()[1].labels[int(key)]
    assert f"1          {key}     {label}          0.0000 test-000000.tar" in said
    assert Image.open(out).size == (5 * 140, 2 * 170)


def test_images_of_the_index_are_read_from_its_shards(
    indexed: Callable[..., tuple[Path, Path]],
) -> None:
    _, index = indexed("data/fashion_mnist+recipe/variational")
    bank = read_index(index)
    images = read_rows([49, 3, 44], bank, data_of(bank))
    truth = digits()[1].images[[int(bank.keys[i]) for i in (49, 3, 44)]]
    assert np.array_equal(images[:, 0].numpy(), truth)


@pytest.mark.parametrize("more", [(), ("--half", True)])
def test_a_parquet_finds_what_the_npz_does(
    more: tuple[object, ...],
    indexed: Callable[..., tuple[Path, Path]],
    applied: Callable[..., Path],
    run_cli: Run,
) -> None:
    pytest.importorskip("pyarrow", reason="the extra `parquet` has it")
    _, index = indexed("data/fashion_mnist+recipe/variational", *more)
    table = index.with_suffix(".parquet")
    words = ["embed", "--encoder", applied("data/fashion_mnist+recipe/variational"), "--out", table]
    assert run_cli(*words, *more) == 0
    key = str(np.load(index)["keys"][7])
    one, other = search(index, [key]), search(table, [key])
    assert other.keys == one.keys and other.labels == one.labels
    assert torch.equal(other.numbers, one.numbers) and torch.equal(other.distances, one.distances)


def test_the_same_encoder_elsewhere_and_another_one(
    indexed: Callable[..., tuple[Path, Path]],
    applied: Callable[..., Path],
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, index = indexed("data/fashion_mnist+recipe/variational")
    shutil.copytree(run, tmp_path / "moved")
    command = ["search", "--index", index, "--query", np.load(index)["keys"][0]]
    assert run_cli(*command, "--encoder", tmp_path / "moved") == 0
    longer = applied("data/fashion_mnist+recipe/variational", "--optim.base_lr", "3e-2")
    for other, rule in (
        (longer, "apart; embed again"),
        (applied("data/fashion_mnist+recipe/denoising"), "features are 32 numbers, not 128"),
    ):
        capsys.readouterr()
        assert run_cli(*command, "--encoder", other) == 2
        error = capsys.readouterr().err
        assert f"was not made by {other}" in error and rule in error and error.count("\n") == 1


def test_mistakes_are_one_line(
    indexed: Callable[..., tuple[Path, Path]],
    applied: Callable[..., Path],
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, index = indexed("data/fashion_mnist+recipe/variational")
    key = np.load(index)["keys"][0]
    other = tmp_path / "other.npz"
    other.write_bytes(b"no features")
    old, tokens, lost, gone = (tmp_path / f"{name}.npz" for name in ("old", "tok", "lost", "gone"))
    table = tmp_path / "other.parquet"
    table.write_bytes(b"no features")
    columns, save = dict(np.load(index)), cast(Any, np.savez)
    save(old, **{name: x for name, x in columns.items() if name != "made"})
    save(tokens, **columns | {"features": np.zeros((50, 2, 3), np.float32)})
    save(lost, **columns | {"shards": np.array(["/nowhere/test-0.tar"] * 50)})
    save(gone, **columns | {"keys": np.array([f"k{i}" for i in range(50)])})
    for options, rule in (
        ([index, "--query", "nothing.png"], "query nothing.png is no file, no folder, and no key"),
        ([index, "--query", key, "-k", 51], "k 51 must be 1 to 50"),
        ([index, "--query", key, "--metric", "hamming"], "Variational has no binary codes"),
        ([index, "--query", key, "--out", "a.jpg"], "--out a.jpg must end in .png"),
        ([index, "--query", key, "--encoder", "nowhere"], "encoder nowhere is no run folder"),
        ([index], "required: query"),
        ([tmp_path / "missing.npz", "--query", key], "missing.npz"),
        ([other, "--query", key], "is no file of this version's `embed`"),
        ([old, "--query", key], "is no file of this version's `embed`"),
        ([table, "--query", key], "is no file of this version's `embed`"),
        ([tokens, "--query", key], "holds tokens"),
        ([lost, "--query", key], "/nowhere/test-0.tar"),
        ([gone, "--query", "k1"], "has no image k0 any more"),
    ):
        capsys.readouterr()
        assert run_cli("search", "--index", *options) == 2
        error = capsys.readouterr().err
        assert rule in error and error.count("\n") == 1, error
