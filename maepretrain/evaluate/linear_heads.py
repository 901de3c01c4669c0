"""Linear probe of frozen features: softmax regression, many heads at once.

A head has a feature set (such as the mean tokens of a block), a learning rate and an L2 penalty.
The heads of all feature sets of one width are one tensor and take part in one batched matrix
product. All heads see the same mini-batches of features, which are standardised by the mean and
standard deviation of the samples to fit on. That is the BatchNorm without affine parameters of He
et al. 2021 (appendix A.2), with its statistics taken of the whole set. Deviations: Adam in the
place of LARS, no augmentation, zero initial values (the problem is convex), and a penalty, which
decides where samples are few.

The penalty is part of the loss, not a decay apart from it as AdamW has: only so does Adam come to
the one solution of the loss. AdamW follows the axes of the features, and drowns in those of noise
(50 digits, 64 principal components: .44 at best, .60 with the penalty and for scikit-learn).

Axes: f feature sets of one width, b samples, d features, s settings, k classes.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from maepretrain.evaluate.features import CHUNK

# Logits that are in memory at a time where all heads predict.
MAX_LOGITS = 1 << 26
# Adam's decays of the averages of the gradient and of its square.
BETA1 = 0.9
BETA2 = 0.999
# The smallest root of the squares' average.
EPS = 1e-8
# Rows of features by their numbers, all feature sets side by side: (b, sum of widths).
ReadRows = Callable[[Tensor], Tensor]
# Learning rate and penalty.
HeadSetting = tuple[float, float]


class LinearHeads:
    """Linear heads for every feature set and every setting, at zero.

    Args:
        widths: features of each set, in the order of the columns.
        classes: outputs of each head.
        settings: (learning rate, penalty) of each head of a feature set.
        mean: of the features to fit on, all sets side by side; the heads are on its device.
        std: of the same; a feature that is constant but for rounding is not blown up to noise.
    """

    def __init__(
        self,
        widths: dict[str, int],
        classes: int,
        settings: tuple[HeadSetting, ...],
        mean: Float[Tensor, "d"],
        std: Float[Tensor, "d"],
    ) -> None:
        self.widths = widths
        self.classes = classes
        self.settings = settings
        self.mean = mean
        self.std = std
        self.names_of_width = _by_width(widths)
        outputs = len(settings) * classes
        # Of each width (f, s * k, width) and (f, s * k, 1).
        self.weight = []
        self.bias = []
        for width, names in self.names_of_width.items():
            self.weight.append(mean.new_zeros(len(names), outputs, width))
            self.bias.append(mean.new_zeros(len(names), outputs, 1))

    def __call__(self, rows: Float[Tensor, "b d"]) -> dict[str, Float[Tensor, "b s k"]]:
        """Logits of each feature set's heads, in the order of `settings`."""
        logits = {}
        for names, (_, y) in zip(self.names_of_width.values(), self._forward(rows), strict=True):
            logits |= dict(zip(names, y.permute(0, 3, 1, 2), strict=True))
        return {name: logits[name] for name in self.widths}

    def gradients(
        self, rows: Float[Tensor, "b d"], truth: Int64[Tensor, "b"]
    ) -> list[tuple[Tensor, Tensor]]:
        """Gradients of each head's mean cross-entropy, for the weight and bias of each width."""
        gradients = []
        target = F.one_hot(truth, self.classes).T.to(self.mean.dtype)  # (k, b)
        for x, y in self._forward(rows):
            # d loss / d logits = probabilities - one-hot truth
            error = y.softmax(2).sub_(target).div_(len(truth)).flatten(1, 2)  # (f, s * k, b)
            gradients.append((error @ x, error.sum(2, keepdim=True)))
        return gradients

    def _forward(
        self, rows: Float[Tensor, "b d"]
    ) -> Iterator[tuple[Float[Tensor, "f b _"], Float[Tensor, "f s k b"]]]:
        """Standardised features and logits of each width.

        The samples come last: over ten classes side by side a softmax takes eight times as long.
        """
        standardised = rows.sub(self.mean).div_(self.std)
        columns = standardised.split(list(self.widths.values()), 1)
        named = dict(zip(self.widths, columns, strict=True))
        for names, w, b in zip(self.names_of_width.values(), self.weight, self.bias, strict=True):
            x = torch.stack([named[name] for name in names])
            y = torch.baddbmm(b, w, x.mT)
            yield x, y.unflatten(1, (len(self.settings), self.classes))


def _by_width(widths: dict[str, int]) -> dict[int, list[str]]:
    """Names of the feature sets of each width."""
    names: dict[int, list[str]] = {}
    for name, width in widths.items():
        names.setdefault(width, []).append(name)
    return names


class BatchedAdam:
    """torch.optim.Adam with a learning rate and a weight decay for every head of a tensor.

    Args:
        heads: their weights and biases are trained.
        samples: to fit on: the penalty is on the sum of their losses, the gradient of the mean.
    """

    def __init__(self, heads: LinearHeads, samples: int) -> None:
        settings = heads.mean.new_tensor(heads.settings).repeat_interleave(heads.classes, 0)
        self.lr = settings[:, :1]  # (s * k, 1)
        self.decay = settings[:, 1:] / samples
        self.heads = heads
        self.steps = 0
        self.weight_averages = [(torch.zeros_like(w), torch.zeros_like(w)) for w in heads.weight]
        self.bias_averages = [(torch.zeros_like(b), torch.zeros_like(b)) for b in heads.bias]

    def step(self, gradients: list[tuple[Tensor, Tensor]], schedule: float) -> None:
        """Take one step at this share of the learning rates; biases do not decay."""
        self.steps += 1
        for i, (weight_gradient, bias_gradient) in enumerate(gradients):
            weight = self.heads.weight[i]
            weight_gradient.addcmul_(weight, self.decay)
            self._update(weight, weight_gradient, *self.weight_averages[i], schedule)
            self._update(self.heads.bias[i], bias_gradient, *self.bias_averages[i], schedule)

    def _update(
        self, x: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, schedule: float
    ) -> None:
        mean.lerp_(gradient, 1 - BETA1)
        square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        root = square.sqrt().div_(math.sqrt(1 - BETA2**self.steps)).add_(EPS)
        x.addcdiv_(mean * self.lr, root, value=-schedule / (1 - BETA1**self.steps))


def predictions(
    heads: LinearHeads, rows: ReadRows, n: int
) -> Iterator[tuple[Tensor, dict[str, Float[Tensor, "b s k"]]]]:
    """(numbers, logits of each feature set) of rows 0..n-1, in chunks, on the heads' device."""
    device = heads.mean.device
    logits_of_row = len(heads.widths) * len(heads.settings) * heads.classes
    chunk = max(1, min(CHUNK, MAX_LOGITS // logits_of_row))
    for numbers in torch.arange(n).split(chunk):
        with torch.no_grad():
            logits = heads(rows(numbers).to(device))
        yield numbers, logits


def moments(rows: ReadRows, n: int) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """Mean and standard deviation of every feature over rows 0..n-1, in two passes of float64.

    A feature that is constant but for rounding (fp16 keeps 11 bits) gets a floor, a thousandth of
    the largest deviation.
    """
    chunks = torch.arange(n).split(CHUNK)
    mean = torch.stack([rows(c).double().sum(0) for c in chunks]).sum(0) / n
    squares = torch.stack([(rows(c).double() - mean).square().sum(0) for c in chunks]).sum(0)
    std = (squares / n).sqrt()
    floor = 1e-3 * float(std.max()) + 1e-12
    return mean.float(), std.clamp_min(floor).float()
