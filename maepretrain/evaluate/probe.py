"""Linear probe of frozen features: multinomial logistic regression on standardised features
(scikit-learn's)."""

import warnings

import numpy as np
from jaxtyping import Float, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

STRENGTHS = (0.003, 0.03, 0.3, 3.0)
# The penalty is chosen on at most this many samples, a fifth of them held out.
CHOOSE_ON = 10_000


def linear_probe(
    train: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    test: Float[Tensor, "t d"],
    truth: Int64[Tensor, "t"],
    strength: float | None = None,
    max_iterations: int = 1000,
) -> float:
    """Accuracy on the test set of a linear classifier fitted on the training set.

    Args:
        train: features to fit on; they give mean and standard deviation too.
        labels: their classes.
        test: held-out features, used once.
        truth: their classes.
        strength: scikit-learn's C; None picks one of STRENGTHS on a held-out fifth of the
            *training* set.
        max_iterations: of L-BFGS.

    Raises:
        ValueError: only one class to tell apart.
    """
    if len(labels.unique()) < 2:
        raise ValueError(f"a probe needs two classes or more; all labels are {int(labels[0])}")
    mean, std = train.mean(0), train.std(0)
    # A feature that is constant but for rounding must not be blown up to noise.
    std = std.clamp_min(1e-3 * float(std.max()) + 1e-12)
    x, y = ((train - mean) / std).numpy(), labels.numpy()
    if strength is None:
        strength = _choose(x, y, max_iterations)
    model = _fit(x, y, strength, max_iterations)
    return float(model.score(((test - mean) / std).numpy(), truth.numpy()))


def _choose(x: np.ndarray, y: np.ndarray, max_iterations: int) -> float:
    shuffled = np.random.default_rng(0).permutation(len(x))[:CHOOSE_ON]
    held_out, fitted = np.split(shuffled, [len(shuffled) // 5])
    if len(np.unique(y[fitted])) < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    scores = [
        _fit(x[fitted], y[fitted], c, max_iterations).score(x[held_out], y[held_out])
        for c in STRENGTHS
    ]
    return STRENGTHS[int(np.argmax(scores))]


def _fit(x: np.ndarray, y: np.ndarray, strength: float, max_iterations: int) -> LogisticRegression:
    with warnings.catch_warnings():
        # Where the budget of iterations ends is part of the recipe.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=max_iterations, tol=1e-3).fit(x, y)
