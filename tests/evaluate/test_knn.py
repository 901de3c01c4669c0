"""k-NN against scikit-learn's and brute force, in chunks of both sides."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from support.blobs import blobs
from torch.nn import functional as F

from maepretrain.evaluate.neighbours import (
    NeighbourSweep,
    knn_accuracy,
    knn_predict,
    nearest,
    vote,
)

Run = Callable[..., int]


def brute(k: int, temperature: float) -> KNeighborsClassifier:
    # cosine = 1 - squared distance / 2 on the sphere
    weights: Any = lambda d: np.exp((1 - d**2 / 2) / temperature)  # noqa: E731
    return KNeighborsClassifier(k, weights=weights, algorithm="brute")


def unit(x: torch.Tensor) -> np.ndarray:
    return F.normalize(x.double(), dim=1).numpy()


@pytest.mark.parametrize("chunk", [7, 1024])
def test_knn_equals_scikit_learns(chunk: int) -> None:
    (bank, labels), (query, truth) = blobs(300, 1), blobs(100, 2)
    theirs = brute(9, 0.07).fit(unit(bank), labels)
    predicted = knn_predict(query, bank, labels, k=9, chunk=chunk)
    assert predicted.tolist() == np.asarray(theirs.predict(unit(query))).tolist()
    assert knn_accuracy(query, truth, bank, labels, k=9) == pytest.approx(
        theirs.score(unit(query), truth)
    )


@pytest.mark.parametrize("chunk", [3, 50, 300])
def test_chunks_of_the_bank_change_nothing(chunk: int) -> None:
    (bank, _), (query, _) = blobs(300, 1), blobs(40, 2)
    cosine, numbers = nearest(query, bank.split(chunk), 20)
    similarity = torch.from_numpy(unit(query) @ unit(bank).T)
    every, order = similarity.sort(dim=1, descending=True)
    assert torch.equal(numbers, order[:, :20])
    assert torch.allclose(cosine.double(), every[:, :20], atol=1e-6)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.02), (20, 1.0)])
def test_leaving_one_out_equals_scikit_learns(k: int, temperature: float) -> None:
    bank, labels = blobs(120, 1)
    cosine, numbers = nearest(bank, bank.split(50), k, own=torch.arange(120))
    assert not (numbers == torch.arange(120)[:, None]).any()
    predicted = vote(cosine, labels[numbers], 5, k, temperature).argmax(1)
    theirs = cross_val_predict(brute(k, temperature), unit(bank), labels, cv=LeaveOneOut())
    assert predicted.tolist() == np.asarray(theirs).tolist()
    sweep = NeighbourSweep((1, k), (temperature, 5.0))
    fitting = sweep.fitting(120)
    counts = sweep.count_correct(cosine, labels[numbers], labels, 5, fitting)
    assert int(counts[fitting.index(k), 0]) == int((torch.from_numpy(theirs) == labels).sum())


def test_a_small_temperature_does_not_overflow() -> None:
    shares = vote(torch.tensor([[0.99, 0.98]]), torch.tensor([[1, 0]]), 2, 2, 0.001)
    assert shares.isfinite().all()
    assert shares[0, 1] > 0.99


def test_knn_needs_as_many_samples_as_neighbours() -> None:
    bank, labels = blobs(10, 1)
    with pytest.raises(ValueError, match="k 20 needs a bank of at least k samples, not 10"):
        knn_predict(bank, bank, labels, k=20)
    with pytest.raises(ValueError, match="k 10 needs a bank of at least k samples, not 9"):
        nearest(bank, [bank], 10, own=torch.arange(10))
    assert NeighbourSweep((1, 9, 10, 11)).fitting(10) == (1, 9)
    with pytest.raises(ValueError, match="k 5 needs more than 5 labelled samples"):
        NeighbourSweep((5, 9)).fitting(5)
    for arguments in ({"ks": (0,)}, {"ks": ()}, {"temperatures": (0.0,)}, {"choose_on": 0}):
        with pytest.raises(ValueError, match="k-NN needs ks"):
            NeighbourSweep(**arguments)  # type: ignore[arg-type]


def test_the_verb_equals_brute_force_on_the_same_features(
    tmp_path: Path,
    tiny_run: Path,
    shards: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Raw pixels, in the order of the shards: everything that the verb does, by scikit-learn."""
    from maepretrain.data.module import ShardData
    from maepretrain.data.settings import Crop
    from maepretrain.evaluate.feature_sets import pixels
    from maepretrain.evaluate.features import embed

    options = ["--neighbours.ks", "[1,3,200]", "--neighbours.temperatures", "[0.02,0.2]"]
    assert (
        run_cli(
            "knn", "--encoder", tiny_run, "--baselines", "--verbose", "--out", tmp_path, *options
        )
        == 0
    )
    found = json.loads((tmp_path / "results.json").read_text())["knn"]["rows"]
    data = ShardData(f"{shards}/train-*.tar", f"{shards}/test-*.tar", global_batch=24,
                     image_size=16, channels=1, mean=(0.0,), std=(1.0,),
                     crop=Crop(scale=None))  # fmt: skip
    assert data.val_index is not None
    bank, labels = embed(pixels, data.evaluation(data.index, labelled=True))
    query, truth = embed(pixels, data.evaluation(data.val_index, labelled=True))
    bank, query = unit(bank.half()), unit(query.half())
    right = {
        (k, t): np.equal(
            np.asarray(cross_val_predict(brute(k, t), bank, labels, cv=LeaveOneOut())),
            labels.numpy(),
        )
        for k in (1, 3)
        for t in (0.02, 0.2)
    }
    best = max(right, key=lambda setting: right[setting].mean())
    row = found["raw pixels"]
    chosen = row["chosen"][0]
    assert right[chosen["k"], chosen["temperature"]].mean() == right[best].mean()
    assert chosen["accuracy_choosing"] == pytest.approx(right[best].mean())
    classifier = brute(chosen["k"], chosen["temperature"]).fit(bank, labels)
    assert row["top1"] == pytest.approx(classifier.score(query, truth))
    assert "k-NN        k" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "knn-confusion.png").exists()


@pytest.mark.parametrize(("verb", "name"), [("knn", "k-NN"), ("probe", "a probe")])
def test_without_labels_the_verb_is_named(
    tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str], verb: str, name: str
) -> None:
    png = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(png, "PNG")
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(png.getvalue())
            tar.addfile(member, io.BytesIO(png.getvalue()))
    data = ["--data.train", tmp_path / "train-*.tar", "--data.val", tmp_path / "train-*.tar"]
    data += ["--data.image_size", 32, "--data.channels", 1, "--data.mean", "[0.3]"]
    data += ["--data.std", "[0.4]", "--out", tmp_path / "out"]
    assert run_cli(verb, "--encoder", "timm:test_vit", *data) == 2
    assert f"{name} needs a label for every sample" in capsys.readouterr().err
