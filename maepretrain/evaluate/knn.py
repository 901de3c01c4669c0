"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, arXiv 1805.01978,
section 3.4)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


def knn_predict(
    query: Float[Tensor, "q d"],
    bank: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Int64[Tensor, "q"]:
    """The class with the largest sum of exp(cosine / temperature) over the k most similar samples
    of the bank.

    Raises:
        ValueError: a bank with fewer than k samples.
    """
    if len(bank) < k:
        raise ValueError(f"k-NN with k {k} needs a bank of at least k samples, not {len(bank)}")
    classes = int(labels.max()) + 1
    bank = F.normalize(bank, dim=1)
    predictions = []
    for part in F.normalize(query, dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)  # (chunk, k)
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def knn_accuracy(
    query: Float[Tensor, "q d"],
    truth: Int64[Tensor, "q"],
    bank: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    k: int = 20,
) -> float:
    """Share of queries that k-NN classifies rightly."""
    return float((knn_predict(query, bank, labels, k) == truth).float().mean())
