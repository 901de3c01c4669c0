"""Choices of labels: balanced, seeded, and refused in one line."""

import pytest
import torch

from maepretrain.evaluate.labels import choose_labels, count_classes, folds_for_choosing

UNEVEN = torch.arange(10).repeat_interleave(torch.tensor([100] * 9 + [3]))


def test_a_fraction_is_balanced_and_seeded() -> None:
    chosen = choose_labels(UNEVEN, 0.1)
    assert UNEVEN[chosen].bincount().tolist() == [10] * 9 + [1]
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, choose_labels(UNEVEN, 0.1, seed=0))
    assert not torch.equal(chosen, choose_labels(UNEVEN, 0.1, seed=1))
    assert set(chosen.tolist()) < set(choose_labels(UNEVEN, 0.2).tolist())


def test_so_many_of_a_class() -> None:
    chosen = choose_labels(UNEVEN, per_class=3)
    assert UNEVEN[chosen].bincount().tolist() == [3] * 10
    assert len(chosen.unique()) == 30


def test_samples_without_a_right_label_are_never_chosen() -> None:
    labels = torch.tensor([0, -1, 1, -2, 0, 1])
    assert choose_labels(labels).tolist() == [0, 2, 4, 5]
    assert set(choose_labels(labels, 0.5).tolist()) <= {0, 2, 4, 5}


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([0, 1], {"fraction": 0.0}, r"label_fraction 0.0 must be in \(0, 1\]"),
        ([0, 1], {"fraction": 1.5}, r"label_fraction 1.5 must be in \(0, 1\]"),
        ([0, 1], {"fraction": 0.5, "per_class": 1}, "either label_fraction or labels_per_class"),
        ([0, 1], {"per_class": 0}, "labels_per_class 0 must be at least 1"),
        ([0, 0, 1], {"per_class": 2}, "class 1 has 1 labelled samples, 2 are needed"),
        ([0, 0, 2], {"fraction": 0.5}, "class 1 has 0 labelled samples, 1 are needed"),
        ([-1, -1], {"fraction": 0.5}, "no sample has a label >= 0"),
    ],
)
def test_what_cannot_be_chosen_is_refused(labels: list[int], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_labels(torch.tensor(labels), **arguments)


def test_classes_are_counted_and_labels_out_of_range_refused() -> None:
    train = torch.tensor([0, 3, -2, 1])
    assert count_classes(train, torch.tensor([2, 3, -2])) == 4
    assert count_classes(train, classes=7) == 7
    for others, classes, message in (
        ([4], None, "test label 4 is out of range: the training labels end at 3"),
        ([0], 3, "training label 3 is out of range: 3 classes end at 2"),
        ([9], 7, "test label 9 is out of range: 7 classes end at 6"),
    ):
        with pytest.raises(ValueError, match=message):
            count_classes(train, torch.tensor(others), classes=classes)
    with pytest.raises(ValueError, match="two or more; all labels are 3"):
        count_classes(torch.tensor([3, 3, -1]))
    with pytest.raises(ValueError, match="no training sample has a label"):
        count_classes(torch.tensor([-1, -2]))


def test_the_folds_for_choosing_are_balanced_and_disjoint() -> None:
    folds = folds_for_choosing(UNEVEN, 0.1, enough=400)
    assert len(folds) == 5  # 91, 91, 91, 90, 90: the class of three gives one in turn
    for fitted, held in folds:
        assert torch.cat([fitted, held]).sort().values.tolist() == list(range(len(UNEVEN)))
        assert UNEVEN[held].bincount()[:9].tolist() == [10] * 9
    assert [int((UNEVEN[held] == 9).sum()) for _, held in folds] == [1, 1, 1, 0, 0]
    every = torch.cat([held for _, held in folds])
    assert len(every.unique()) == len(every)
    assert torch.equal(folds[1][1], folds_for_choosing(UNEVEN, 0.1, enough=400)[1][1])
    assert not torch.equal(folds[0][1], folds_for_choosing(UNEVEN, 0.1, seed=1)[0][1])


def test_enough_held_out_is_one_fold_and_few_samples_are_all_held_out() -> None:
    assert len(folds_for_choosing(UNEVEN.repeat(10), 0.1, enough=500)) == 1
    five = torch.arange(10).repeat_interleave(5)
    every = torch.cat([held for _, held in folds_for_choosing(five)])
    assert every.sort().values.tolist() == list(range(50))
    # A single sample of a class is always fitted on.
    for fitted, held in (folds := folds_for_choosing(torch.tensor([0, 1, 1]), 0.9)):
        assert 0 in fitted.tolist()
        assert len(held) == 1
    assert len(folds) == 2


def test_folds_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="no class has two labelled samples"):
        folds_for_choosing(torch.arange(5))
    with pytest.raises(ValueError, match=r"share 1\.0 to choose on must be between 0 and 1"):
        folds_for_choosing(UNEVEN, 1.0)
