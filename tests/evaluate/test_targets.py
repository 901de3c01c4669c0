"""Multi-label and regression targets by key, against sums by hand."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maepretrain.data.module import ShardData
from maepretrain.evaluate.targets import Targets, Task

Run = Callable[..., int]


@pytest.fixture
def data(shards: Path) -> ShardData:
    return ShardData(
        f"{shards}/train-*.tar", f"{shards}/test-*.tar", *(24, 16, 1), mean=(0.3,), std=(0.4,)
    )


def write(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def keys(data: ShardData) -> list[tuple[str, int]]:
    """Key and label of every sample, training and held out."""
    found: dict[str, int] = {}
    for index in (data.index, data.val_index):
        assert index is not None
        names = [key for s in range(len(index.shards)) for key in index.columns(s).keys]
        found |= dict(zip(names, index.labels().tolist(), strict=True))
    return list(found.items())


def test_a_sample_points_to_its_own_row(tmp_path: Path, data: ShardData) -> None:
    index = data.index
    names = [key for s in range(len(index.shards)) for key in index.columns(s).keys]
    table = [[key, int(key), -1.5] for key in sorted(names, key=lambda k: int(k) * 7919 % 1009)]
    targets = Targets(write(tmp_path / "t.csv", table), "regression")
    rows = targets.rows[targets.of(index).labels()]
    assert rows.tolist() == [[float(key), -1.5] for key in names]
    # Through the loader, in the order of a run.
    data.index = targets.of(index)
    batch = data.training().__getitems__(list(range(40)))
    read = [key for _, key in data.training().names(list(range(40)))]
    assert targets.rows[batch["label"]][:, 0].tolist() == [float(key) for key in read]


def test_loss_and_mean_average_precision_by_hand(tmp_path: Path) -> None:
    table = [["a", 0, 2], ["b"], ["c", 2], ["d", 0]]
    targets = Targets(write(tmp_path / "t.csv", table), "multilabel", outputs=4)
    assert targets.rows.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    logits = torch.tensor([[2.0, 0, 3, 0], [1, 0, 2, 0], [0, 0, 1, 0], [-1, 0, 0, 0]])
    labels = torch.arange(4)
    p, y = logits.sigmoid(), targets.rows
    by_hand = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert torch.allclose(targets.loss(logits, labels), by_hand)
    # Class 0: right ones are first and last of four; class 2: first and third. 1 and 3 never occur.
    expected = ((1 + 2 / 4) / 2 + (1 + 2 / 3) / 2) / 2
    assert targets.scores(logits, labels) == {"mAP": pytest.approx(expected), "n": 4}


def test_r2_by_hand_and_standardised_on_the_training_set(tmp_path: Path, data: ShardData) -> None:
    table = [[key, 3 + 5 * label] for key, label in keys(data)]
    targets = Targets(write(tmp_path / "t.csv", table), "regression")
    index = targets.of(data.index)
    targets.standardise(index)
    train = targets.rows[index.labels()]
    assert float(train.mean()) == pytest.approx(0, abs=1e-6)
    assert float(train.std()) == pytest.approx(1)
    values = torch.tensor([[3.0 + 5 * label] for _, label in keys(data)])
    assert targets.mean == pytest.approx([float(values[: len(data.index)].mean())])
    assert targets.std == pytest.approx([float(values[: len(data.index)].std())])
    back = torch.tensor(targets.mean) + torch.tensor(targets.std) * targets.rows
    assert torch.allclose(back, values, atol=1e-4)
    labels = torch.arange(4)
    rows = targets.rows[labels]
    predicted = rows + torch.tensor([[0.5], [-0.5], [0.0], [0.0]])
    r2 = 1 - 0.5 / float((rows - rows.mean()).square().sum())
    assert targets.scores(predicted, labels) == {"r2": pytest.approx(r2, rel=1e-4), "n": 4}
    assert float(targets.loss(predicted, labels)) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("table", "task", "message"),
    [
        ([["a", 1], ["a", 2]], "regression", "2 samples, 1 different keys"),
        ([["a", 1], ["b", 2, 3]], "regression", "every sample needs 1 values"),
        ([["a", "x"]], "regression", "could not convert"),
        ([["a", "nan"]], "regression", "not finite"),
        ([["a", -1]], "multilabel", r"class numbers must be in 0..-1"),
        ([["a", -1], ["b", 3]], "multilabel", r"class numbers must be in 0..3"),
        ([["a"]], "multilabel", "one must occur"),
        ([["a", 1.5]], "multilabel", "invalid literal"),
        ([], "multilabel", "0 samples"),
    ],
)
def test_a_wrong_table_is_refused(
    tmp_path: Path, table: list[list[object]], task: Task, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Targets(write(tmp_path / "t.csv", table), task)


def test_missing_samples_are_named(tmp_path: Path, data: ShardData) -> None:
    first, *rest = [key for key, _ in keys(data)]
    targets = Targets(write(tmp_path / "t.csv", [[key, 1] for key in rest]), "regression")
    with pytest.raises(ValueError, match=f"1 samples are missing, such as {first}"):
        targets.of(data.index)


@pytest.mark.parametrize(
    ("task", "figure", "least"),
    # Digits as several classes: odd, above 4, divisible by 3. mAP of a constant: their share, .44.
    [("multilabel", "mAP", 0.6), ("regression", "r2", 0.1)],
)
def test_through_the_command_line(
    tmp_path: Path,
    shards: Path,
    data: ShardData,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
    task: Task,
    figure: str,
    least: float,
) -> None:
    rows: list[list[object]] = []
    for key, digit in keys(data):
        odd, large, third = digit % 2, digit > 4, digit % 3 == 0
        classes = [number for number, holds in enumerate((odd, large, third)) if holds]
        rows.append([key, *(classes if task == "multilabel" else [digit])])
    path = write(tmp_path / "t.csv", rows)
    argv = [
        "finetune",
        "-c",
        "data/fashion_mnist",
        "-c",
        "eval/finetune_small",
        "--scratch",
        "true",
        "--optim.layer_decay",
        "1.0",
    ]
    argv += [
        "--encoder",
        "timm:test_vit",
        "--run",
        str(tmp_path / "run"),
        "--data.crop.scale",
        "null",
    ]
    argv += ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    argv += ["--data.image_size", "32", "--data.crop.flip", "0", "--data.num_workers", "0"]
    argv += ["--task", task, "--targets", str(path), "--data.global_batch", "25"]
    assert run_cli(*argv, "--label_smoothing", 0.1) == 2
    assert f"{task} takes no label_smoothing" in capsys.readouterr().err
    assert run_cli(*argv, "--label_smoothing", 0, "--label_fraction", 0.5) == 2
    assert "a share of the labels is taken by class" in capsys.readouterr().err
    assert run_cli(*argv[:-6], "--task", task) == 2
    assert f"task {task} and targets None do not go together" in capsys.readouterr().err
    longer = ["--label_smoothing", 0, "--optim.base_lr", 0.02, "--trainer.max_epochs", 10]
    assert run_cli(*argv, *longer) == 0
    result = json.loads((tmp_path / "run/results.json").read_text())["finetune"]
    assert result["n"] == 50
    assert result[figure] > least
    assert ("target_mean" in result) is (task == "regression")
    if task == "regression":
        digits = torch.tensor([float(digit) for _, digit in keys(data)])[: len(data.index)]
        assert result["target_mean"] == pytest.approx([float(digits.mean())])
        assert result["target_std"] == pytest.approx([float(digits.std())])
    assert f"fine-tuned    {figure} {result[figure]:.4f} on 50" in capsys.readouterr().out
