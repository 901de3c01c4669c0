"""Evaluation against scikit-learn, brute force and counting by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from maepretrain.data.module import ShardData
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.finetune import choose_fraction
from maepretrain.evaluate.knn import knn_accuracy, knn_predict
from maepretrain.evaluate.probe import linear_probe
from maepretrain.evaluate.table import pixels
from maepretrain.quickstart import digits

Run = Callable[..., int]


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (n,), generator=generator)
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 1.2 * torch.randn(n, 16, generator=generator), labels


@pytest.mark.parametrize("chunk", [7, 1024])
def test_knn_equals_scikit_learns(chunk: int) -> None:
    (bank, labels), (query, truth) = blobs(300, 1), blobs(100, 2)
    unit = [F.normalize(x, dim=1).numpy() for x in (bank, query)]
    # cosine = 1 - squared distance / 2 on the sphere
    weights: Any = lambda d: np.exp((1 - d**2 / 2) / 0.07)  # noqa: E731
    brute = KNeighborsClassifier(9, weights=weights, algorithm="brute").fit(unit[0], labels)
    predicted = knn_predict(query, bank, labels, k=9, chunk=chunk)
    assert predicted.tolist() == brute.predict(unit[1]).tolist()
    assert knn_accuracy(query, truth, bank, labels, k=9) == pytest.approx(
        brute.score(unit[1], truth)
    )


def test_knn_needs_as_many_samples_as_neighbours() -> None:
    bank, labels = blobs(10, 1)
    with pytest.raises(ValueError, match="k 20 needs a bank of at least k samples, not 10"):
        knn_predict(bank, bank, labels, k=20)


def test_probe_equals_scikit_learns_pipeline() -> None:
    (train, labels), (test, truth) = blobs(400, 1), blobs(300, 2)
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=0.3, max_iter=1000).fit(scaler.transform(train), labels)
    theirs = model.score(scaler.transform(test), truth)
    assert linear_probe(train, labels, test, truth, strength=0.3) == pytest.approx(
        theirs, abs=0.007
    )


def test_probe_of_shuffled_labels_is_chance_and_of_labels_themselves_perfect() -> None:
    train, labels = blobs(400, 1)
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(train[:300], shuffled[:300], train[300:], shuffled[300:]) < 0.35
    assert linear_probe(F.one_hot(labels).float(), labels, F.one_hot(labels).float(), labels) == 1.0


def test_probe_needs_two_classes() -> None:
    train, labels = blobs(40, 1)
    with pytest.raises(ValueError, match="two classes or more; all labels are 3"):
        linear_probe(train, torch.full_like(labels, 3), train, labels)


def test_embedding_keeps_order_and_takes_every_sample_once(shards: Path) -> None:
    data = ShardData(f"{shards}/train-*.tar", global_batch=24, image_size=8, channels=1, scale=None,
                     val_share=1.0, mean=(0.0,), std=(1.0,))  # fmt: skip
    features, labels = embed(pixels, data.evaluation(data.index), batch=32)
    train, _ = digits()
    # Keys are the numbers of the digits, so each row is known.
    names = data.evaluation(data.index).names(list(range(len(labels))))
    numbers = [int(key) for _, key in names]
    assert sorted(numbers) == list(range(150))
    expected = torch.from_numpy(train.images[numbers]).flatten(1).float() / 255
    assert torch.equal(features, expected)
    assert labels.tolist() == train.labels[numbers].tolist()


def test_a_fraction_of_the_labels_is_balanced_and_seeded() -> None:
    labels = torch.arange(10).repeat_interleave(torch.tensor([100] * 9 + [3]))
    chosen = choose_fraction(labels, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [10] * 9 + [1]
    assert torch.equal(chosen, choose_fraction(labels, 0.1, seed=0))
    assert not torch.equal(chosen, choose_fraction(labels, 0.1, seed=1))
    with pytest.raises(ValueError, match=r"label_fraction 0.0 must be in \(0, 1\]"):
        choose_fraction(labels, 0.0, seed=0)


def test_finetuning_a_run_beats_chance_and_says_so(
    tmp_path: Path, shards: Path, pretrain_tiny: Run, run_cli: Run
) -> None:
    assert pretrain_tiny(tmp_path / "run", "--trainer.max_epochs", 5) == 0
    options = ["-c", "eval/finetune_fashion_mnist", "--encoder", tmp_path / "run"]
    options += ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    options += [
        "--data.image_size",
        16,
        "--data.scale",
        "null",
        "--data.flip",
        0,
        "--data.num_workers",
        0,
    ]
    options += ["--data.global_batch", 25, "--optim.base_lr", 0.1, "--trainer.max_epochs", 30]
    assert run_cli("finetune", *options, "--run", tmp_path / "tuned") == 0
    result = json.loads((tmp_path / "tuned" / "results.json").read_text())
    assert result["accuracy"] > 0.4  # 50 images, chance .1
    assert result["labels"] == 150
    few = ["-c", "eval/from_scratch", "--label_fraction", 0.5, "--trainer.max_epochs", 1]
    assert run_cli("finetune", *options, *few, "--run", tmp_path / "few") == 0
    assert json.loads((tmp_path / "few" / "results.json").read_text())["labels"] == 75


def test_probe_table(
    tmp_path: Path, pretrain_tiny: Run, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_tiny(tmp_path / "run", "--trainer.max_steps", 2) == 0
    assert run_cli("probe", "--encoder", tmp_path / "run", "--baselines", "--k", 5) == 0
    results = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert list(results) == ["pretrained", "random encoder", "raw pixels", "PCA-64"]
    assert results["raw pixels"]["probe"] > 0.8
    assert "50 held-out images" in capsys.readouterr().out
    # Fewer labels than the batch of the pretraining.
    assert run_cli("probe", "--encoder", tmp_path / "run", "--label_fraction", 0.1, "--k", 3) == 0
    assert "50 held-out images, 14 labelled" in capsys.readouterr().out
