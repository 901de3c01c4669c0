"""Labels of an evaluation: how many classes, which samples to label, which to choose settings on.

All choices are class-balanced and a pure function of the seed.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor

from maepretrain.randomness import permutation


def count_classes(
    train: Int64[Tensor, "n"], *others: Int64[Tensor, "_"], classes: int | None = None
) -> int:
    """Number of classes: those of the training labels, or `classes` where it is set.

    Labels below 0 (none, or a wrong one) do not count.

    Raises:
        ValueError: no label, only one class, more labels than `classes`, or a label in `others`
            (the test set) that lies beyond the training set's.
    """
    known = train[train >= 0]
    if not len(known):
        raise ValueError("no training sample has a label >= 0")
    present = known.unique()
    if len(present) < 2:
        raise ValueError(
            f"telling classes apart needs two or more; all labels are {int(present[0])}"
        )
    if classes is None:
        count = int(present[-1]) + 1
        rule = "the training labels end at"
    else:
        count = classes
        rule = f"{classes} classes end at"
    _check_range("training", train, count, rule)
    for labels in others:
        _check_range("test", labels, count, rule)
    return count


def _check_range(name: str, labels: Int64[Tensor, "n"], count: int, rule: str) -> None:
    if len(labels) and int(labels.max()) >= count:
        raise ValueError(f"{name} label {int(labels.max())} is out of range: {rule} {count - 1}")


def choose_labels(
    labels: Int64[Tensor, "n"],
    fraction: float = 1.0,
    per_class: int | None = None,
    seed: int = 0,
) -> Int64[Tensor, "m"]:
    """Numbers, ascending, of a class-balanced and seeded choice of the labelled samples.

    Args:
        labels: of all samples; those below 0 are never chosen.
        fraction: share of every class, at least one sample of it.
        per_class: as many samples of every class.
        seed: which samples; a smaller choice lies inside a larger one of the same seed.

    Raises:
        ValueError: both set, a fraction outside (0, 1], a class without samples or with fewer
            than `per_class`.
    """
    if per_class is not None and fraction != 1:
        raise ValueError("take either label_fraction or labels_per_class, not both")
    if not 0 < fraction <= 1:
        raise ValueError(f"label_fraction {fraction} must be in (0, 1]")
    if per_class is None and fraction == 1:
        return (labels >= 0).nonzero().flatten()
    if per_class is not None and per_class < 1:
        raise ValueError(f"labels_per_class {per_class} must be at least 1")
    counts = labels[labels >= 0].bincount()
    if not len(counts):
        raise ValueError("no sample has a label >= 0")
    needed = per_class or 1
    for label, count in enumerate(counts.tolist()):
        if count < needed:
            raise ValueError(f"class {label} has {count} labelled samples, {needed} are needed")

    def share(n: int) -> slice:
        return slice(per_class or max(1, round(fraction * n)))

    return _of_every_class(labels, seed, "labels", share)


def folds_for_choosing(
    labels: Int64[Tensor, "n"], share: float = 0.1, seed: int = 0, enough: int = 500
) -> list[tuple[Int64[Tensor, "f"], Int64[Tensor, "c"]]]:
    """Numbers to fit on and numbers to choose settings on: class-balanced validation splits of a
    training set whose second parts are disjoint.

    A class gives `share` of its samples to each, at least one where it has two; a single sample
    stays with those to fit on. There are as many splits as it takes until `enough` samples were
    held out, or every one was.

    Raises:
        ValueError: a share outside (0, 1), or no class that has two samples.
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share} to choose on must be between 0 and 1")
    folds: list[tuple[Tensor, Tensor]] = []
    while sum(len(held) for _, held in folds) < enough:
        fold = len(folds)

        def share_of_fold(n: int, fold: int = fold) -> slice:
            size = min(n - 1, max(1, round(share * n)))
            return slice(fold * size, (fold + 1) * size)

        chosen = _of_every_class(labels, seed, "choose", share_of_fold)
        if not len(chosen):
            break
        fitted = labels >= 0
        fitted[chosen] = False
        folds.append((fitted.nonzero().flatten(), chosen))
    if not folds:
        raise ValueError(
            "no class has two labelled samples: there is none to choose the settings on"
        )
    return folds


def _of_every_class(
    labels: Int64[Tensor, "n"], seed: int, stream: str, share: Callable[[int], slice]
) -> Int64[Tensor, "m"]:
    """Of every class with n samples the `share(n)` of their permutation."""
    chosen = [torch.empty(0, dtype=torch.int64)]
    for label in labels[labels >= 0].unique().tolist():
        numbers = (labels == label).nonzero().flatten()
        order = permutation(seed, stream, len(numbers), label)
        chosen.append(numbers[order[share(len(numbers))]])
    return torch.cat(chosen).sort().values
