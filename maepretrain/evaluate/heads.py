"""Linear probe of frozen features: softmax regression, many heads at once.

A head is a view of the features (a pooling of a block), a learning rate and an L2 penalty. The
heads of all views of one width are one tensor and take part in one batched matrix product; all see
the same mini-batches of features that were standardised by the mean and standard deviation of the
samples to fit on. That is the BatchNorm without affine parameters of He et al. 2021 (appendix A.2),
with its statistics taken of the whole set. Deviations: Adam in the place of LARS, no augmentation,
zero initial values (the problem is convex), and a penalty, which decides where samples are few.

The penalty is part of the loss, not a decay apart from it as AdamW has: only so does Adam come to
the one solution of the loss. AdamW follows the axes of the features, and drowns in those of noise
(50 digits, 64 principal components: .44 at best, .60 with the penalty and for scikit-learn).

Axes: v views of one width, b samples, d features, l settings, k classes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from maepretrain.evaluate.features import CHUNK
from maepretrain.randomness import permutation

# Numbers that are in memory at a time where all heads answer.
LOGITS = 1 << 26
# Adam's: averages of the gradient and of its square, and the smallest root of the latter.
BETAS, EPS = (0.9, 0.999), 1e-8
# The edge of a grid is worth a word where its loss is lower than its neighbour's by this share.
BETTER = 0.02
# Rows of features by their numbers, all views side by side: (b, sum of widths).
Rows = Callable[[Tensor], Tensor]
Setting = tuple[float, float]


@dataclass(frozen=True)
class Head:
    """A view, a learning rate and a penalty, with figures on the samples to choose on."""

    view: str
    lr: float
    penalty: float
    accuracy: float
    loss: float


class Heads:
    """Linear heads for every view and every setting, at zero.

    Args:
        widths: features of each view, in the order of the columns.
        classes: outputs of each head.
        settings: (learning rate, penalty) of each head of a view.
        mean: of the features to fit on, all views side by side; where it is, the heads are.
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
        self.widths, self.classes, self.settings = widths, classes, settings
        self.mean, self.std = mean, std
        self.views = _by_width(widths)
        outputs = len(settings) * classes
        # (v, l * k, width) and (v, l * k, 1) of each width
        self.weight = [mean.new_zeros(len(v), outputs, w) for w, v in self.views.items()]
        self.bias = [mean.new_zeros(len(v), outputs, 1) for v in self.views.values()]

    def __call__(self, rows: Float[Tensor, "b d"]) -> dict[str, Float[Tensor, "b l k"]]:
        """Logits of each view's heads, in the order of `settings`."""
        logits = {}
        for views, (_, y) in zip(self.views.values(), self._answers(rows), strict=True):
            logits |= dict(zip(views, y.permute(0, 3, 1, 2), strict=True))
        return {view: logits[view] for view in self.widths}

    def gradients(
        self, rows: Float[Tensor, "b d"], truth: Int64[Tensor, "b"]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of the mean cross-entropy of each head: for weights and biases of each width."""
        gradients, wanted = [], F.one_hot(truth, self.classes).T.to(self.mean.dtype)
        for x, y in self._answers(rows):
            # d loss / d logits = probabilities - one-hot truth
            error = y.softmax(2).sub_(wanted).div_(len(truth)).flatten(1, 2)  # (v, l * k, b)
            gradients.append((error @ x, error.sum(2, keepdim=True)))
        return gradients

    def _answers(
        self, rows: Float[Tensor, "b d"]
    ) -> Iterator[tuple[Float[Tensor, "v b _"], Float[Tensor, "v l k b"]]]:
        """Standardised features and logits of each width.

        The samples come last: over ten classes side by side a softmax takes eight times as long.
        """
        standardised = rows.sub(self.mean).div_(self.std)
        parts = standardised.split(list(self.widths.values()), 1)
        named = dict(zip(self.widths, parts, strict=True))
        for views, w, b in zip(self.views.values(), self.weight, self.bias, strict=True):
            x = torch.stack([named[view] for view in views])
            y = torch.baddbmm(b, w, x.mT)
            yield x, y.unflatten(1, (len(self.settings), self.classes))


def _by_width(widths: dict[str, int]) -> dict[int, list[str]]:
    views: dict[int, list[str]] = {}
    for view, width in widths.items():
        views.setdefault(width, []).append(view)
    return views


class _Adam:
    """torch.optim.Adam with a learning rate and a weight decay for every head of a tensor.

    Args:
        heads: whose weights and biases are trained.
        samples: to fit on: the penalty is on the sum of their losses, the gradient of the mean.
    """

    def __init__(self, heads: Heads, samples: int) -> None:
        settings = heads.mean.new_tensor(heads.settings).repeat_interleave(heads.classes, 0)
        self.lr, self.decay = settings[:, :1], settings[:, 1:] / samples  # (l * k, 1)
        self.heads, self.steps = heads, 0
        self.averages = [
            [(torch.zeros_like(x), torch.zeros_like(x)) for x in pair]
            for pair in zip(heads.weight, heads.bias, strict=True)
        ]

    def step(self, gradients: list[tuple[Tensor, Tensor]], schedule: float) -> None:
        """One step at this share of the learning rates; biases do not decay."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        for i, (weight, bias) in enumerate(zip(self.heads.weight, self.heads.bias, strict=True)):
            gradient = gradients[i][0].addcmul_(weight, self.decay), gradients[i][1]
            pairs = zip((weight, bias), gradient, self.averages[i], strict=True)
            for x, g, (mean, square) in pairs:
                mean.lerp_(g, 1 - BETAS[0])
                square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
                root = square.sqrt().div_(math.sqrt(second)).add_(EPS)
                x.addcdiv_(mean * self.lr, root, value=-schedule / first)


class LinearSweep:
    """How the heads of a linear probe are trained and chosen.

    Args:
        lrs: learning rates of Adam.
        penalties: on half the squared weights beside the sum of the samples' losses: 1 / C of
            scikit-learn's LogisticRegression. Each view has a head for each learning rate and
            penalty.
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
        if not lrs or min(lrs) <= 0 or min(epochs, min_steps, 1 if batch is None else batch) < 1:
            raise ValueError(
                f"a sweep needs learning rates above 0 (lrs {list(lrs)}), epochs {epochs}, "
                f"min_steps {min_steps} and batch {batch} of at least 1"
            )
        if not penalties or min(penalties) < 0:
            raise ValueError(f"penalties {list(penalties)} must be 0 or more")
        if choose_on_samples < 1:
            raise ValueError(f"choose_on_samples {choose_on_samples} must be at least 1")
        self.lrs, self.penalties = tuple(sorted(lrs)), tuple(sorted(penalties))
        self.epochs, self.min_steps, self.batch = epochs, min_steps, batch
        self.choose_on, self.choose_on_samples = choose_on, choose_on_samples

    @property
    def settings(self) -> tuple[Setting, ...]:
        """(learning rate, penalty) of each head of a view."""
        return tuple(product(self.lrs, self.penalties))

    def length(self, n: int) -> tuple[int, int]:
        """(batch, steps) for n samples.

        Raises:
            ValueError: a batch larger than the set.
        """
        batch = min(n, 1024, max(256, n // 50)) if self.batch is None else self.batch
        if batch > n:
            raise ValueError(f"batch {batch} is larger than the {n} samples to fit on")
        return batch, max(self.min_steps, self.epochs * -(-n // batch))

    @torch.no_grad()
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
        mean, std = (x.to(device) for x in moments(rows, n))
        heads = Heads(widths, classes, settings or self.settings, mean, std)
        adam, per_epoch = _Adam(heads, n), -(-n // batch)
        order = torch.empty(0, dtype=torch.int64)
        for step in range(steps):
            epoch, i = divmod(step, per_epoch)
            if i == 0:
                order = permutation(seed, "probe", n, epoch)
            numbers = order[i * batch : (i + 1) * batch]
            gradients = heads.gradients(rows(numbers).to(device), labels[numbers].to(device))
            adam.step(gradients, (1 + math.cos(math.pi * step / steps)) / 2)
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

    def edges(self, ranking: list[Head]) -> list[str]:
        """What to widen: a value at an end of the grid that gave a lower loss and a better accuracy
        than the best head of the next value inside.

        Args:
            ranking: all heads, the best first.
        """
        best, found = ranking[0], []
        for name, grid in (("lr", self.lrs), ("penalty", self.penalties)):
            value = getattr(best, name)
            if len(grid) < 2 or value not in (grid[0], grid[-1]):
                continue
            inside = grid[1] if value == grid[0] else grid[-2]
            next_best = next(head for head in ranking if getattr(head, name) == inside)
            lower = best.loss < (1 - BETTER) * next_best.loss
            if lower and best.accuracy > next_best.accuracy:
                option = "lrs" if name == "lr" else "penalties"
                found.append(
                    f"{name} {value:g} lies on the edge of the grid: widen --sweep.{option}"
                )
        return found


def pooled(folds: list[tuple[int, list[Head]]]) -> list[Head]:
    """All heads with accuracy and mean loss over the held-out samples of all folds, the best first.

    Args:
        folds: how many samples were held out, and all heads with their figures on these.
    """
    n = sum(held for held, _ in folds)
    sums: dict[tuple[str, float, float], list[float]] = {}
    for held, heads in folds:
        for head in heads:
            figures = sums.setdefault((head.view, head.lr, head.penalty), [0.0, 0.0])
            figures[0] += head.accuracy * held / n
            figures[1] += head.loss * held / n
    return ranked([Head(*which, *figures) for which, figures in sums.items()])


def ranked(heads: list[Head]) -> list[Head]:
    """The lowest loss first, of equal ones the best accuracy.

    Not the accuracy first: on the few held-out samples of a small set it is too coarse to choose by
    (measured on halves of the digits, four of them: .2 points of test accuracy lost).
    """
    return sorted(heads, key=lambda head: (head.loss, -head.accuracy))


def predictions(
    heads: Heads, rows: Rows, n: int
) -> Iterator[tuple[Tensor, dict[str, Float[Tensor, "b l k"]]]]:
    """(numbers, logits of each view) of rows 0..n-1, chunk by chunk, where the heads are."""
    device = heads.mean.device
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
    setting: Setting = (0.1, 1.0),
    sweep: LinearSweep | None = None,
) -> float:
    """Accuracy on the test set of one head of a given setting, fitted on the training set.

    Args:
        train: features to fit on; they give mean and standard deviation too.
        labels: their classes.
        test: held-out features, used once.
        truth: their classes.
        setting: learning rate and penalty; nothing is chosen.
        sweep: length of the training.
    """
    sweep = sweep or LinearSweep()
    widths, classes = {"features": train.shape[1]}, int(max(labels.max(), truth.max())) + 1
    heads = sweep.fit(lambda i: train[i], widths, labels, classes, settings=(setting,))
    return sweep.rank(heads, lambda i: test[i], truth)[0].accuracy
