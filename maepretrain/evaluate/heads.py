"""Linear probe of frozen features: softmax regression, many heads at once.

A head is a view of the features (a pooling of a block), a learning rate and a weight decay. The
heads of all views of one width take part in one batched matrix product; all see the same
mini-batches of features that were standardised by the mean and standard deviation of the samples
to fit on. That is the
BatchNorm without affine parameters of He et al. 2021 (appendix A.2), with its statistics taken of
the whole set. Deviations: AdamW in the place of LARS, no augmentation, zero initial values (the
problem is convex).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.evaluate.features import CHUNK
from maepretrain.randomness import permutation

# Numbers that are in memory at a time where all heads answer.
LOGITS = 1 << 26
# Rows of features by their numbers, all views side by side: (b, sum of widths).
Rows = Callable[[Tensor], Tensor]
Setting = tuple[float, float]


@dataclass(frozen=True)
class Head:
    """A view, a learning rate and a weight decay, with figures on the samples to choose on."""

    view: str
    lr: float
    weight_decay: float
    accuracy: float
    loss: float


class Heads(nn.Module):
    """Linear heads for every view and every setting, at zero.

    Args:
        widths: features of each view, in the order of the columns.
        classes: outputs of each head.
        settings: (learning rate, weight decay) of each head of a view.
        mean: of the features to fit on, all views side by side.
        std: of the same; a feature that is constant but for rounding is not blown up to noise.
    """

    def __init__(
        self,
        widths: dict[str, int],
        classes: int,
        settings: tuple[Setting, ...],
        mean: Float[Tensor, "d"],
        std: Float[Tensor, "d"],
    ) -> None:
        super().__init__()
        self.widths, self.classes, self.settings = widths, classes, settings
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.views = _by_width(widths)
        self.weight, self.bias = nn.ModuleList(), nn.ModuleList()
        for width, views in self.views.items():
            weights = [nn.Parameter(torch.zeros(len(views), width, classes)) for _ in settings]
            biases = [nn.Parameter(torch.zeros(len(views), 1, classes)) for _ in settings]
            self.weight.append(nn.ParameterList(weights))
            self.bias.append(nn.ParameterList(biases))

    def forward(self, rows: Float[Tensor, "b d"]) -> dict[str, Float[Tensor, "b l classes"]]:
        """Logits of each view's heads, in the order of `settings`."""
        standardised = (rows - cast(Tensor, self.mean)) / cast(Tensor, self.std)
        parts = dict(
            zip(self.widths, standardised.split(list(self.widths.values()), 1), strict=True)
        )
        logits = {}
        for views, weight, bias in zip(self.views.values(), self.weight, self.bias, strict=True):
            x = torch.stack([parts[view] for view in views])  # (v, b, width)
            w = torch.cat(list(cast(nn.ParameterList, weight)), 2)  # (v, width, l * classes)
            b = torch.cat(list(cast(nn.ParameterList, bias)), 2)
            y = torch.baddbmm(b, x, w).unflatten(2, (len(self.settings), self.classes))
            logits |= dict(zip(views, y, strict=True))
        return {view: logits[view] for view in self.widths}

    def groups(self) -> list[dict]:
        """Parameter groups, one for each setting and kind; biases do not decay."""
        groups = []
        for i, (lr, weight_decay) in enumerate(self.settings):
            for kind, decay in ((self.weight, weight_decay), (self.bias, 0.0)):
                params = [cast(nn.ParameterList, group)[i] for group in kind]
                groups.append({"params": params, "lr": lr, "weight_decay": decay})
        return groups


def _by_width(widths: dict[str, int]) -> dict[int, list[str]]:
    views: dict[int, list[str]] = {}
    for view, width in widths.items():
        views.setdefault(width, []).append(view)
    return views


class LinearSweep:
    """How the heads of a linear probe are trained and chosen.

    Args:
        lrs: learning rates of AdamW.
        weight_decays: of AdamW; biases do not decay. Each view has a head for each learning rate
            and weight decay.
        epochs: passes over the features.
        min_steps: where few samples make few steps an epoch, there are more epochs.
        batch: features of a step, the same for every head. Default 256, or all of a smaller set.
        choose_on: share of every class of the training set that is held out to choose the head on.
            The head that is chosen is trained again on the whole training set.
    """

    def __init__(
        self,
        lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        weight_decays: tuple[float, ...] = (0.0, 0.3),
        epochs: int = 30,
        min_steps: int = 500,
        batch: int | None = None,
        choose_on: float = 0.1,
    ) -> None:
        if not lrs or min(lrs) <= 0 or min(epochs, min_steps, 1 if batch is None else batch) < 1:
            raise ValueError(
                f"a sweep needs learning rates above 0 (lrs {list(lrs)}), epochs {epochs}, "
                f"min_steps {min_steps} and batch {batch} of at least 1"
            )
        if not weight_decays or min(weight_decays) < 0:
            raise ValueError(f"weight_decays {list(weight_decays)} must be 0 or more")
        self.lrs, self.weight_decays = tuple(sorted(lrs)), tuple(sorted(weight_decays))
        self.epochs, self.min_steps, self.batch = epochs, min_steps, batch
        self.choose_on = choose_on

    @property
    def settings(self) -> tuple[Setting, ...]:
        """(learning rate, weight decay) of each head of a view."""
        return tuple(product(self.lrs, self.weight_decays))

    def length(self, n: int) -> tuple[int, int]:
        """(batch, steps) for n samples.

        Raises:
            ValueError: a batch larger than the set.
        """
        batch = min(256, n) if self.batch is None else self.batch
        if batch > n:
            raise ValueError(f"batch {batch} is larger than the {n} samples to fit on")
        return batch, max(self.min_steps, self.epochs * -(-n // batch))

    def fit(
        self,
        rows: Rows,
        widths: dict[str, int],
        labels: Int64[Tensor, "n"],
        classes: int,
        seed: int = 0,
        settings: tuple[Setting, ...] | None = None,
        device: torch.device | str = "cpu",
    ) -> Heads:
        """Train a head for each view and setting on rows 0..n-1.

        Args:
            rows: the features by their numbers.
            widths: features of each view, in the order of the columns.
            labels: of the rows.
            classes: how many there are.
            seed: of the order of the mini-batches.
            settings: others than the sweep's.
            device: where the heads are.
        """
        n = len(labels)
        batch, steps = self.length(n)
        heads = Heads(widths, classes, settings or self.settings, *moments(rows, n)).to(device)
        optimizer = torch.optim.AdamW(heads.groups())
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
        )
        per_epoch = -(-n // batch)
        order = torch.empty(0, dtype=torch.int64)
        for step in range(steps):
            epoch, i = divmod(step, per_epoch)
            if i == 0:
                order = permutation(seed, "probe", n, epoch)
            numbers = order[i * batch : (i + 1) * batch]
            truth = labels[numbers].to(device)
            # Heads share no parameter: the sum of their losses trains each on its own.
            loss = sum_of_losses(heads(rows(numbers).to(device)), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
        return heads

    def rank(self, heads: Heads, rows: Rows, labels: Int64[Tensor, "n"]) -> list[Head]:
        """All heads with their accuracy and mean loss on rows 0..n-1, the best first."""
        right = {view: torch.zeros(len(heads.settings)) for view in heads.widths}
        loss = {view: torch.zeros(len(heads.settings)) for view in heads.widths}
        for numbers, logits in predictions(heads, rows, len(labels)):
            for view, y in logits.items():
                truth = labels[numbers][:, None].expand(-1, len(heads.settings)).to(y.device)
                right[view] += (y.argmax(2) == truth).sum(0).cpu()
                loss[view] += F.cross_entropy(y.mT, truth, reduction="none").sum(0).cpu()
        n = len(labels)
        found = [
            Head(view, *setting, float(right[view][i]) / n, float(loss[view][i]) / n)
            for view in heads.widths
            for i, setting in enumerate(heads.settings)
        ]
        return ranked(found)


def ranked(heads: list[Head]) -> list[Head]:
    """The lowest loss first, of equal ones the best accuracy.

    Not the accuracy first: on the few held-out samples of a small set it is too coarse to choose by
    (measured on halves of the digits, four of them: .2 points of test accuracy lost).
    """
    return sorted(heads, key=lambda head: (head.loss, -head.accuracy))


def sum_of_losses(logits: dict[str, Tensor], truth: Int64[Tensor, "b"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the samples, summed over all heads."""
    losses = []
    for y in logits.values():
        heads = y.shape[1]
        losses.append(F.cross_entropy(y.flatten(0, 1), truth.repeat_interleave(heads)) * heads)
    return torch.stack(losses).sum()


def predictions(
    heads: Heads, rows: Rows, n: int
) -> Iterator[tuple[Tensor, dict[str, Float[Tensor, "b l classes"]]]]:
    """(numbers, logits of each view) of rows 0..n-1, chunk by chunk, where the heads are."""
    device = cast(Tensor, heads.mean).device
    each = len(heads.widths) * len(heads.settings) * heads.classes
    for numbers in torch.arange(n).split(max(1, min(CHUNK, LOGITS // each))):
        with torch.no_grad():
            logits = heads(rows(numbers).to(device))
        yield numbers, logits


def moments(rows: Rows, n: int) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """Mean and standard deviation of every feature over rows 0..n-1, in two passes of float64.

    A feature that is constant but for rounding (fp16 keeps 11 bits) gets a floor, a thousandth of
    the largest deviation.
    """
    chunks = torch.arange(n).split(CHUNK)
    mean = torch.stack([rows(c).double().sum(0) for c in chunks]).sum(0) / n
    squares = torch.stack([(rows(c).double() - mean).square().sum(0) for c in chunks]).sum(0)
    std = (squares / n).sqrt()
    return mean.float(), std.clamp_min(1e-3 * float(std.max()) + 1e-12).float()


def linear_probe(
    train: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    test: Float[Tensor, "t d"],
    truth: Int64[Tensor, "t"],
    setting: Setting = (0.1, 0.3),
    sweep: LinearSweep | None = None,
) -> float:
    """Accuracy on the test set of one head of a given setting, fitted on the training set.

    Args:
        train: features to fit on; they give mean and standard deviation too.
        labels: their classes.
        test: held-out features, used once.
        truth: their classes.
        setting: learning rate and weight decay; nothing is chosen.
        sweep: length of the training.
    """
    sweep = sweep or LinearSweep()
    widths, classes = {"features": train.shape[1]}, int(max(labels.max(), truth.max())) + 1
    heads = sweep.fit(lambda i: train[i], widths, labels, classes, settings=(setting,))
    return sweep.rank(heads, lambda i: test[i], truth)[0].accuracy
