"""The labelled training samples of every seed, and the test samples."""

import torch

from maepretrain.data.module import ShardData
from maepretrain.data.shards.index import summary
from maepretrain.evaluate.labels import choose_labels, count_classes
from maepretrain.ranks import say


class LabelledSets:
    """The labelled training samples of every seed, and the test samples.

    Samples with a wrong label are left out: what would be read in their place is counted already.

    Args:
        data: labelled shards; `val` is the test set.
        fraction: class-balanced share of the training labels.
        per_class: as many training labels of every class.
        seed: the first seed.
        seeds: how many; each has its own choice of labels.
        purpose: the evaluation that needs labels, for messages.

    Raises:
        ValueError: no test shards, no labels, labels of the test set that training does not know,
            no seeds.
    """

    def __init__(
        self,
        data: ShardData,
        fraction: float,
        per_class: int | None,
        seed: int,
        seeds: int,
        purpose: str = "a probe",
    ) -> None:
        if seeds < 1:
            raise ValueError(f"seeds {seeds} must be at least 1")
        if data.val_index is None:
            raise ValueError("there are no held-out shards to test on: set --data.val")
        labels = data.index.require_labels(purpose)
        truth = data.val_index.require_labels(purpose)
        tested = (truth >= 0).nonzero().flatten()
        if not len(tested):
            raise ValueError("no test sample has a label >= 0")
        self.classes = count_classes(labels, truth)
        self.seeds = range(seed, seed + seeds)
        chosen = [choose_labels(labels, fraction, per_class, one) for one in self.seeds]
        # The samples of all seeds are encoded once.
        union = torch.cat(chosen).unique()
        self.choices = [torch.searchsorted(union, one) for one in chosen]
        self.train = data.index.choose(union)
        self.test = data.val_index.choose(tested)
        wrong_train = int((labels < 0).sum())
        wrong_test = len(truth) - len(tested)
        if wrong_train or wrong_test:
            say(
                f"left out      {wrong_train} training and {wrong_test} test samples of wrong label"
            )
        self.described = {
            "train": summary(data.index.shards),
            "labelled": len(chosen[0]),
            "label_fraction": fraction,
            "labels_per_class": per_class,
            "test": summary(data.val_index.shards),
            "tested": len(tested),
        }
