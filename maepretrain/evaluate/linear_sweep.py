"""Choice of a linear probe: a sweep of learning rates and penalties, ranked on held-out samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from maepretrain.evaluate.linear_heads import (
    BatchedAdam,
    HeadSetting,
    LinearHeads,
    ReadRows,
    moments,
    predictions,
)
from maepretrain.evaluate.progress import tracked
from maepretrain.randomness import permutation

# The end of a grid deserves a warning where its loss is lower than its neighbour's by this share.
CLEARLY_LOWER = 0.02


@dataclass(frozen=True)
class ScoredHead:
    """A feature set, a learning rate and a penalty, with figures on held-out samples."""

    feature_set: str
    lr: float
    penalty: float
    accuracy: float
    loss: float


class LinearSweep:
    """Settings with which the heads of a linear probe are trained and chosen.

    Args:
        lrs: learning rates of Adam.
        penalties: on half the squared weights beside the sum of the samples' losses: 1 / C of
            scikit-learn's LogisticRegression. Each feature set has a head for each learning rate
            and penalty.
        epochs: passes over the features.
        min_steps: where few samples make few steps an epoch, there are more epochs.
        batch: features of a step, the same for every head. Default 256 to 1024, a fiftieth of the
            set, or all of a smaller one.
        choose_on: share of every class of the training set that is held out to choose the head on;
            another share in turn until `choose_on_samples` were held out or every one was. The head
            that is chosen is trained again on the whole training set.
        choose_on_samples: how many held-out samples are enough; 1 for a single split.
    """

    def __init__(
        self,
        lrs: tuple[float, ...] = (0.03, 0.1, 0.3),
        penalties: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0),
        epochs: int = 20,
        min_steps: int = 500,
        batch: int | None = None,
        choose_on: float = 0.1,
        choose_on_samples: int = 500,
    ) -> None:
        too_few = min(epochs, min_steps) < 1 or (batch is not None and batch < 1)
        if not lrs or min(lrs) <= 0 or too_few:
            raise ValueError(
                f"a sweep needs learning rates above 0 (lrs {list(lrs)}), epochs {epochs}, "
                f"min_steps {min_steps} and batch {batch} of at least 1"
            )
        if not penalties or min(penalties) < 0:
            raise ValueError(f"penalties {list(penalties)} must be 0 or more")
        if choose_on_samples < 1:
            raise ValueError(f"choose_on_samples {choose_on_samples} must be at least 1")
        self.lrs = tuple(sorted(lrs))
        self.penalties = tuple(sorted(penalties))
        self.epochs = epochs
        self.min_steps = min_steps
        self.batch = batch
        self.choose_on = choose_on
        self.choose_on_samples = choose_on_samples

    @property
    def settings(self) -> tuple[HeadSetting, ...]:
        """(learning rate, penalty) of each head of a feature set."""
        return tuple(product(self.lrs, self.penalties))

    def length(self, n: int) -> tuple[int, int]:
        """(batch, steps) for n samples.

        Raises:
            ValueError: a batch larger than the set.
        """
        batch = min(n, 1024, max(256, n // 50)) if self.batch is None else self.batch
        if batch > n:
            raise ValueError(f"batch {batch} is larger than the {n} samples to fit on")
        steps_per_epoch = math.ceil(n / batch)
        return batch, max(self.min_steps, self.epochs * steps_per_epoch)

    @torch.no_grad()
    def fit(
        self,
        rows: ReadRows,
        widths: dict[str, int],
        labels: Int64[Tensor, "n"],
        classes: int,
        seed: int = 0,
        settings: tuple[HeadSetting, ...] | None = None,
        device: torch.device | str = "cpu",
        task: str = "",
    ) -> LinearHeads:
        """Train a head for each feature set and setting on rows 0..n-1.

        Args:
            rows: reads features by their numbers.
            widths: features of each set, in the order of the columns.
            labels: of the rows.
            classes: how many there are.
            seed: of the order of the mini-batches.
            settings: others than the sweep's.
            device: where the heads are.
            task: the name of the training, for the progress bar.
        """
        n = len(labels)
        batch, steps = self.length(n)
        steps_per_epoch = math.ceil(n / batch)
        mean, std = moments(rows, n)
        settings = settings or self.settings
        heads = LinearHeads(widths, classes, settings, mean.to(device), std.to(device))
        adam = BatchedAdam(heads, n)
        order = torch.empty(0, dtype=torch.int64)
        for step in tracked(range(steps), steps, task):
            epoch, i = divmod(step, steps_per_epoch)
            if i == 0:
                order = permutation(seed, "probe", n, epoch)
            numbers = order[i * batch : (i + 1) * batch]
            gradients = heads.gradients(rows(numbers).to(device), labels[numbers].to(device))
            adam.step(gradients, (1 + math.cos(math.pi * step / steps)) / 2)
        return heads

    def rank(
        self, heads: LinearHeads, rows: ReadRows, labels: Int64[Tensor, "n"]
    ) -> list[ScoredHead]:
        """All heads with their accuracy and mean loss on rows 0..n-1, the best first."""
        n = len(labels)
        correct = {name: torch.zeros(len(heads.settings)) for name in heads.widths}
        loss = {name: torch.zeros(len(heads.settings)) for name in heads.widths}
        for numbers, logits in predictions(heads, rows, n):
            for name, y in logits.items():
                truth = labels[numbers][:, None].expand(-1, len(heads.settings)).to(y.device)
                correct[name] += (y.argmax(2) == truth).sum(0).cpu()
                loss[name] += F.cross_entropy(y.mT, truth, reduction="none").sum(0).cpu()
        scored = []
        for name in heads.widths:
            for i, (lr, penalty) in enumerate(heads.settings):
                accuracy = float(correct[name][i]) / n
                scored.append(ScoredHead(name, lr, penalty, accuracy, float(loss[name][i]) / n))
        return ranked(scored)

    def edges(self, ranking: list[ScoredHead]) -> list[str]:
        """Warnings for values at an end of their grid that should be widened.

        There is one where the end gave a lower loss and a better accuracy than the best head of the
        next value inside.

        Args:
            ranking: all heads, the best first.
        """
        best = ranking[0]
        warnings = []
        by_lr = [(head.lr, head) for head in ranking]
        if _widen(self.lrs, by_lr):
            warnings.append(f"lr {best.lr:g} lies on the edge of the grid: widen --sweep.lrs")
        by_penalty = [(head.penalty, head) for head in ranking]
        if _widen(self.penalties, by_penalty):
            warnings.append(
                f"penalty {best.penalty:g} lies on the edge of the grid: widen --sweep.penalties"
            )
        return warnings


def _widen(grid: tuple[float, ...], ranking: list[tuple[float, ScoredHead]]) -> bool:
    """The best value is an end of the grid, and clearly better than the next one inside."""
    value, best = ranking[0]
    if len(grid) < 2 or value not in (grid[0], grid[-1]):
        return False
    inside = grid[1] if value == grid[0] else grid[-2]
    next_best = next(head for other, head in ranking if other == inside)
    lower = best.loss < (1 - CLEARLY_LOWER) * next_best.loss
    return lower and best.accuracy > next_best.accuracy


def mean_over_folds(folds: Sequence[tuple[int, list[ScoredHead]]]) -> list[ScoredHead]:
    """All heads with accuracy and mean loss over the held-out samples of all folds, the best first.

    Args:
        folds: how many samples were held out, and all heads with their figures on these.
    """
    n = sum(held_out for held_out, _ in folds)
    accuracy: dict[tuple[str, float, float], float] = {}
    loss: dict[tuple[str, float, float], float] = {}
    for held_out, heads in folds:
        for head in heads:
            key = (head.feature_set, head.lr, head.penalty)
            accuracy[key] = accuracy.get(key, 0.0) + head.accuracy * held_out / n
            loss[key] = loss.get(key, 0.0) + head.loss * held_out / n
    return ranked([ScoredHead(*key, accuracy[key], loss[key]) for key in accuracy])


def ranked(heads: list[ScoredHead]) -> list[ScoredHead]:
    """The lowest loss first, of equal ones the best accuracy.

    Not the accuracy first: on the few held-out samples of a small set it is too coarse to choose by
    (measured on halves of the digits, four of them: .2 points of test accuracy lost).
    """
    return sorted(heads, key=lambda head: (head.loss, -head.accuracy))


def linear_probe(
    train: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    test: Float[Tensor, "t d"],
    truth: Int64[Tensor, "t"],
    setting: HeadSetting = (0.1, 1.0),
    sweep: LinearSweep | None = None,
) -> float:
    """Accuracy on the test set of one head of a fixed setting, fitted on the training set.

    Args:
        train: features to fit on; they give mean and standard deviation too.
        labels: their classes.
        test: held-out features, used once.
        truth: their classes.
        setting: learning rate and penalty; nothing is chosen.
        sweep: length of the training.
    """
    sweep = sweep or LinearSweep()
    widths = {"features": train.shape[1]}
    classes = int(max(labels.max(), truth.max())) + 1
    heads = sweep.fit(lambda i: train[i], widths, labels, classes, settings=(setting,))
    return sweep.rank(heads, lambda i: test[i], truth)[0].accuracy
