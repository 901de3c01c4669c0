"""Scores of predicted classes, and their spread over seeds."""

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

# Being among the first five means little with fewer classes.
TOP5_FROM = 6


def scores(
    predicted: Shaped[Tensor, "n *c"], truth: Int64[Tensor, "n"], classes: int
) -> dict[str, float]:
    """`top1`, `top5` (of logits with 6 classes or more), `mean_per_class` (mean recall of the
    classes that the truth holds) and `n`.

    Args:
        predicted: logits (n, classes), or predicted classes (n,).
        truth: the right classes.
        classes: how many there are.

    Raises:
        ValueError: no samples, or a truth outside 0..classes-1.
    """
    if not len(truth) or not 0 <= int(truth.min()) <= int(truth.max()) < classes:
        raise ValueError(f"scores need truths in 0..{classes - 1}, one sample or more")
    first = predicted.argmax(1) if predicted.ndim == 2 else predicted
    right = first == truth
    recall = truth[right].bincount(minlength=classes) / truth.bincount(minlength=classes)
    result = {"top1": float(right.double().mean())}
    if predicted.ndim == 2 and classes >= TOP5_FROM:
        five = predicted.topk(5, dim=1).indices
        result["top5"] = float((five == truth[:, None]).any(1).double().mean())
    return result | {"mean_per_class": float(recall.nanmean()), "n": len(truth)}


def spread(seeds: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over seeds, and `NAME_std`, the sample standard deviation, where there
    are several."""
    result: dict[str, float] = {}
    for name in seeds[0]:
        values = torch.tensor([float(seed[name]) for seed in seeds], dtype=torch.float64)
        result[name] = float(values.mean())
        if len(seeds) > 1 and name != "n":
            result[f"{name}_std"] = float(values.std())
    result["n"] = seeds[0]["n"]
    return result
