"""The geometry of what an autoencoder learnt: tangents of the data's manifold, the denoiser's
vector field, the code's insensitivity, paths along the manifold, and flat maps beside the codes.

Functions of any `encode`, `decode` or `r(x)`: models are passed as what they compute. Papers:
tangents as singular vectors of the Jacobian (Rifai, Vincent, Muller, Glorot and Bengio 2011,
section 5); the field of a denoiser is the score (Alain and Bengio 2014, theorem 1).

Axes: b samples, c channels, *size sides, v = c x sides, d numbers of a code, k directions.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import MDS, Isomap
from torch import Tensor
from torch.func import jacrev, jvp, vmap

Map = Callable[[Tensor], Tensor]


def jacobian(function: Map, x: Float[Tensor, "b *size"]) -> Float[Tensor, "b o v"]:
    """d function(x) / dx of each sample, outputs and inputs flattened.

    Args:
        function: of a batch, each sample by itself.
        x: where.
    """

    def one(sample: Tensor) -> Tensor:
        return function(sample[None])[0].flatten()

    return vmap(jacrev(one))(x).flatten(2)


def encoder_tangents(
    encode: Map, x: Float[Tensor, "b *size"], k: int
) -> tuple[Float[Tensor, "b k *size"], Float[Tensor, "b k"]]:
    """The input directions to which the code is most sensitive: right singular vectors of
    d encode(x) / dx, orthonormal, and their singular values, the largest first.

    Raises:
        ValueError: k that a Jacobian of this size does not have.
    """
    jacobians = jacobian(encode, x)
    _check_rank(k, jacobians)
    _, values, directions = torch.linalg.svd(jacobians, full_matrices=False)
    return directions[:, :k].unflatten(2, x.shape[1:]), values[:, :k]


def decoder_tangents(
    decode: Map, code: Float[Tensor, "b d"], k: int
) -> tuple[Float[Tensor, "b k *size"], Float[Tensor, "b k"]]:
    """The output directions in which decode(code) moves most: left singular vectors of
    d decode(code) / dcode, orthonormal, and their singular values, the largest first. They span the
    tangent space of what the decoder can draw.

    Raises:
        ValueError: k that a Jacobian of this size does not have.
    """
    with torch.no_grad():
        shape = decode(code[:1]).shape[1:]
    jacobians = jacobian(decode, code)
    _check_rank(k, jacobians)
    directions, values, _ = torch.linalg.svd(jacobians, full_matrices=False)
    return directions[..., :k].mT.unflatten(2, shape), values[:, :k]


def _check_rank(k: int, jacobians: Float[Tensor, "b o v"]) -> None:
    rank = min(jacobians.shape[1:])
    if not 1 <= k <= rank:
        raise ValueError(f"{k} directions of a Jacobian that has 1 to {rank}")


def sensitivity(
    function: Map, x: Float[Tensor, "b *size"], direction: Float[Tensor, "b *size"]
) -> Float[Tensor, "b"]:
    """|J v|, how fast function(x) moves as x goes in a direction v, which is normalised first."""
    length = direction.flatten(1).norm(dim=1).clamp_min(1e-12)
    unit = direction / length.view(-1, *[1] * (x.ndim - 1))
    moved = jvp(function, (x,), (unit,))[1]
    return moved.flatten(1).norm(dim=1)


def across(
    direction: Float[Tensor, "b *size"], tangents: Float[Tensor, "b k *size"]
) -> Float[Tensor, "b *size"]:
    """The part of a direction across a manifold with these tangents (any basis of full rank)."""
    basis, _ = torch.linalg.qr(tangents.flatten(2).mT)  # (b, v, k), orthonormal
    flat = direction.flatten(1)[..., None]
    return (flat - basis @ (basis.mT @ flat)).squeeze(-1).view_as(direction)


@torch.no_grad()
def vector_field(reconstruct: Map, x: Float[Tensor, "b *size"]) -> Float[Tensor, "b *size"]:
    """r(x) - x: where a denoiser sends each point. Of one trained with Gaussian noise of a small
    standard deviation sigma it is sigma^2 times the score d log p(x) / dx (Alain and Bengio 2014,
    theorem 1)."""
    return reconstruct(x) - x


@torch.no_grad()
def interpolate(
    encode: Map, decode: Map, a: Float[Tensor, "*size"], b: Float[Tensor, "*size"], steps: int = 8
) -> tuple[Float[Tensor, "s *size"], Float[Tensor, "s *size"]]:
    """From one sample to another: decoded from the straight line between their codes, and blended
    value by value.

    Args:
        encode: samples to codes.
        decode: codes to samples.
        a: where it begins.
        b: where it ends.
        steps: s, samples on the way, both ends among them.

    Raises:
        ValueError: fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"a path has 2 steps or more, not {steps}")
    code_a, code_b = encode(torch.stack([a, b]))
    share = torch.linspace(0, 1, steps, device=a.device)
    along = decode(code_a + share[:, None] * (code_b - code_a))
    share = share.view(-1, *[1] * a.ndim)
    return along, a + share * (b - a)


@torch.no_grad()
def traverse(
    decode: Map, code: Float[Tensor, "d"], dimension: int, values: Float[Tensor, "s"]
) -> Float[Tensor, "s *size"]:
    """Samples decoded from a code with one of its numbers set to each of the values.

    Raises:
        ValueError: a dimension that the code does not have.
    """
    check_dimension(dimension, len(code))
    codes = code.repeat(len(values), 1)
    codes[:, dimension] = values
    return decode(codes)


def check_dimension(dimension: int, width: int) -> None:
    """Refuse a number that a code of this width does not have.

    Raises:
        ValueError: it is not in 0..width - 1.
    """
    if not 0 <= dimension < width:
        raise ValueError(f"dimension {dimension} must be 0 to {width - 1}")


def flat_map(
    x: Float[Tensor, "n v"], method: Literal["pca", "mds", "isomap"], neighbours: int = 10
) -> Float[Tensor, "n 2"]:
    """Points of a plane that keep what the method keeps; scikit-learn's.

    Args:
        x: samples or codes. MDS takes seconds from some hundreds on.
        method: "pca", the two directions of largest variance; "mds", all distances (Kruskal 1964);
            "isomap", distances along the neighbour graph (Tenenbaum, de Silva and Langford 2000).
        neighbours: of isomap's graph.
    """
    if method == "pca":
        maker = PCA(2, random_state=0)
    elif method == "mds":
        maker = MDS(2, n_init=1, init="random", random_state=0)
    else:
        maker = Isomap(n_components=2, n_neighbors=neighbours)
    points = maker.fit_transform(x.flatten(1).double().numpy())
    return torch.from_numpy(np.asarray(points)).float()
