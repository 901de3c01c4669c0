"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, arXiv 1805.01978,
section 3.4): exact, in chunks of queries and of the bank."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

KS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.07, 0.2, 1.0)


def nearest(
    query: Float[Tensor, "q d"],
    bank: Iterable[Float[Tensor, "_ d"]],
    k: int,
    own: Int64[Tensor, "q"] | None = None,
) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Cosine and number of the k most similar samples of a bank, the most similar first.

    Args:
        query: features.
        bank: chunks of features, numbered through; only one of them is in memory.
        k: neighbours.
        own: the number of each query in the bank, which is left out; None where there is none.

    Raises:
        ValueError: a bank with fewer than k samples besides the query.
    """
    query = F.normalize(query, dim=1)
    best = torch.empty(len(query), 0, device=query.device)
    numbers = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    begin = 0
    for chunk in bank:
        cosine = query @ F.normalize(chunk.to(query.device), dim=1).T  # (q, chunk)
        if own is not None:
            inside = ((own >= begin) & (own < begin + len(chunk))).nonzero().flatten()
            cosine[inside, own[inside] - begin] = -torch.inf
        top, which = cosine.topk(min(k, len(chunk)), dim=1)
        best, order = torch.cat([best, top], 1).topk(min(k, best.shape[1] + top.shape[1]), dim=1)
        numbers = torch.cat([numbers, which + begin], 1).gather(1, order)
        begin += len(chunk)
    others = begin if own is None else begin - 1
    if others < k:
        raise ValueError(f"k-NN with k {k} needs a bank of at least k samples, not {others}")
    return best, numbers


def vote(
    cosine: Float[Tensor, "q k"],
    neighbours: Int64[Tensor, "q k"],
    classes: int,
    k: int,
    temperature: float,
) -> Float[Tensor, "q classes"]:
    """Each class's share of the votes exp(cosine / temperature) of the first k neighbours.

    Args:
        cosine: of all neighbours, the most similar first.
        neighbours: their labels.
        classes: how many there are.
        k: neighbours that vote.
        temperature: a small one lets the nearest decide.
    """
    # Relative to the nearest, whose weight is 1: exp(1 / .01) is beyond float32.
    weights = ((cosine[:, :k] - cosine[:, :1]) / temperature).exp()
    votes = torch.zeros(len(cosine), classes, device=cosine.device)
    votes.scatter_add_(1, neighbours[:, :k], weights)
    return votes / votes.sum(1, keepdim=True)


def knn_predict(
    query: Float[Tensor, "q d"],
    bank: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Int64[Tensor, "q"]:
    """The class of each query, by the votes of the k most similar samples of the bank.

    Raises:
        ValueError: a bank with fewer than k samples.
    """
    classes = int(labels.max()) + 1
    predicted = []
    for queries in query.split(chunk):
        cosine, numbers = nearest(queries, bank.split(chunk), k)
        predicted.append(vote(cosine, labels[numbers], classes, k, temperature).argmax(1))
    return torch.cat(predicted)


def knn_accuracy(
    query: Float[Tensor, "q d"],
    truth: Int64[Tensor, "q"],
    bank: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    k: int = 20,
) -> float:
    """Share of queries that k-NN classifies correctly."""
    return float((knn_predict(query, bank, labels, k) == truth).float().mean())


class NeighbourSweep:
    """Which k and temperatures k-NN tries, and how it chooses.

    Args:
        ks: neighbours that vote; those beyond the bank are left out.
        temperatures: of the votes' weights.
        choose_on: training samples on which both are chosen, each classified by all others
            (leave one out).
    """

    def __init__(
        self,
        ks: tuple[int, ...] = KS,
        temperatures: tuple[float, ...] = TEMPERATURES,
        choose_on: int = 10_000,
    ) -> None:
        if not ks or min(ks) < 1 or not temperatures or min(temperatures) <= 0 or choose_on < 1:
            raise ValueError(
                f"k-NN needs ks {list(ks)} and choose_on {choose_on} of at least 1 and "
                f"temperatures {list(temperatures)} above 0"
            )
        self.ks = tuple(sorted(ks))
        self.temperatures = tuple(sorted(temperatures))
        self.choose_on = choose_on

    def fitting(self, bank: int) -> tuple[int, ...]:
        """The ks for a bank of so many samples, one of which may be the query.

        Raises:
            ValueError: there is none.
        """
        fitting = tuple(k for k in self.ks if k < bank)
        if not fitting:
            raise ValueError(f"k-NN with k {self.ks[0]} needs more than {bank} labelled samples")
        return fitting

    def count_correct(
        self,
        cosine: Float[Tensor, "q k"],
        neighbours: Int64[Tensor, "q k"],
        truth: Int64[Tensor, "q"],
        classes: int,
        ks: tuple[int, ...],
    ) -> Int64[Tensor, "ks temperatures"]:
        """Correctly classified queries of each k and temperature."""
        counts = torch.zeros(len(ks), len(self.temperatures), dtype=torch.int64)
        for i, k in enumerate(ks):
            for j, temperature in enumerate(self.temperatures):
                predicted = vote(cosine, neighbours, classes, k, temperature).argmax(1)
                counts[i, j] = (predicted == truth).sum()
        return counts
