"""Scores against scikit-learn's, their spread against the standard library's."""

import statistics

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from maepretrain.evaluate.scores import scores, spread


def answers(n: int = 200, classes: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), truth] += 1.0
    return logits, truth


def test_scores_equal_scikit_learns() -> None:
    logits, truth = answers()
    found = scores(logits, truth, 8)
    for k in (1, 5):
        assert found[f"top{k}"] == pytest.approx(top_k_accuracy_score(truth, logits, k=k))
    balanced = balanced_accuracy_score(truth, logits.argmax(1))
    assert found["mean_per_class"] == pytest.approx(balanced)
    assert found["n"] == 200
    first = scores(logits.argmax(1), truth, 8)
    assert first["top1"] == found["top1"]
    assert "top5" not in first


def test_classes_that_the_truth_lacks_do_not_count() -> None:
    found = scores(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 5)
    assert found == {"top1": pytest.approx(2 / 3), "mean_per_class": 0.75, "n": 3}


@pytest.mark.parametrize("truth", [[], [0, 5], [-1, 0]])
def test_truths_out_of_range_are_refused(truth: list[int]) -> None:
    labels = torch.tensor(truth, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"truths in 0\.\.4"):
        scores(labels, labels, 5)


def test_the_spread_is_the_sample_standard_deviation() -> None:
    tops = [0.5, 0.7, 0.9]
    found = spread([{"top1": top, "n": 10} for top in tops])
    assert found["top1"] == pytest.approx(statistics.mean(tops))
    assert found["top1_std"] == pytest.approx(statistics.stdev(tops))
    assert found["n"] == 10
    assert spread([{"top1": 0.5, "n": 10}]) == {"top1": 0.5, "n": 10}
