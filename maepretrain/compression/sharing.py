"""Weights that share a few values (Han, Mao and Dally 2016, arXiv 1510.00149, section 3): k-means
finds the values, and training goes on with them. Codebook entry 0 is zero, for pruned weights.

Axes: k codebook entries, c = k - 1 centroids.
"""

from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from maepretrain.checkpoints.packing import Shared


def share(layer: nn.Module, bits: int) -> None:
    """Cluster the weights of a layer that are not 0 by k-means, and train the centroids instead.

    Centroids begin at equal distances between the smallest and the largest weight, which keeps the
    few large ones (section 3.2). With the entry for 0 there are 2^bits at most.
    """
    weight = cast(Tensor, layer.weight).detach().cpu()
    kept = weight != 0
    values = weight[kept].numpy()
    index = torch.zeros(weight.shape, dtype=torch.int64)
    count = min(2**bits - 1, len(np.unique(values)))
    centroids = np.zeros(0, np.float32)
    if count:
        linear = np.linspace(values.min(), values.max(), count, dtype=np.float32)[:, None]
        clusters = KMeans(count, init=cast(Any, linear), n_init=cast(Any, 1), tol=0)
        index[kept] = torch.from_numpy(clusters.fit_predict(values[:, None]).astype(np.int64) + 1)
        centroids = clusters.cluster_centers_[:, 0].astype(np.float32)
    sharing = Sharing(index, torch.from_numpy(centroids))
    parametrize.register_parametrization(layer, "weight", sharing)


def unshare(layer: nn.Module) -> Shared:
    """Make the weight of a layer a parameter again.

    Returns:
        Its codebook and the entry of each weight.
    """
    sharing = cast(Any, layer).parametrizations.weight
    codebook = F.pad(sharing.original.detach().cpu(), (1, 0)).numpy()
    index = sharing[0].index.cpu().numpy()
    parametrize.remove_parametrizations(layer, "weight")
    return Shared(codebook, index)


class Sharing(nn.Module):
    """The parametrization of a weight by the centroids that its values share."""

    index: Tensor

    def __init__(self, index: Int64[Tensor, "*shape"], centroids: Float[Tensor, "c"]) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self._centroids = centroids

    def forward(self, centroids: Float[Tensor, "c"]) -> Float[Tensor, "*shape"]:
        codebook = F.pad(centroids, (1, 0))
        return cast(Tensor, _Lookup.apply(codebook, self.index))

    def right_inverse(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "c"]:
        """The parameter that is trained in the place of the weight."""
        return self._centroids.clone()


class _Lookup(torch.autograd.Function):
    """codebook[index], with the gradient of equation 3."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.entries = len(codebook)
        return codebook[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return centroid_gradient(gradients[0], ctx.saved_tensors[0], ctx.entries), None


def centroid_gradient(
    gradient: Float[Tensor, "*shape"], index: Int64[Tensor, "*shape"], entries: int
) -> Float[Tensor, "k"]:
    """The gradient of each codebook entry: the sum over the weights that share it (equation 3)."""
    zeros = gradient.new_zeros(entries)
    return zeros.index_add_(0, index.flatten(), gradient.flatten())
