"""Feature sets: the features of an image that a probe can use, made in one reading of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor, nn

from maepretrain.data.module import ShardData
from maepretrain.data.normalise import Normalise
from maepretrain.evaluate.features import embed
from maepretrain.models.protocol import Blocks

BlockPool = Literal["mean", "cls", "last4"]
# The name of the feature set that holds the encoder's own output.
OUTPUT = "output"
# PCA is fitted on at most so many images, evenly spaced.
PCA_IMAGES = 10_000


@dataclass(frozen=True)
class FeatureSets:
    """From uint8 images to features under names.

    Args:
        encode: images (b, c, h, w) to features (b, d) of each name.
        widths: d of each name.
    """

    encode: Callable[[Tensor], dict[str, Tensor]]
    widths: dict[str, int]


def encoder_feature_sets(
    encoder: nn.Module,
    data: ShardData,
    device: torch.device,
    pools: Sequence[BlockPool] = (),
    blocks: Sequence[int] | None = None,
) -> FeatureSets:
    """`output`, the encoder's own output, and the outputs of blocks pooled.

    Args:
        encoder: has `encode`, and `features` and `depth` where it has blocks.
        data: has shape and normalisation.
        device: where the encoder runs.
        pools: "mean" of the patch tokens and "cls", the class token, of each block; "last4", the
            mean of the patch tokens of the last four blocks, side by side (Caron et al. 2021,
            arXiv 2104.14294, appendix F). What the encoder has not is left out.
        blocks: 0 is the first, -1 the last; None takes all.

    Raises:
        ValueError: a block that the encoder does not have.
    """
    model = cast(Any, encoder).eval().to(device)
    normalise = Normalise(data.mean, data.std).to(device)
    depth = model.depth if isinstance(model, Blocks) else 0
    chosen = range(depth) if blocks is None else [_checked(block, depth) for block in blocks]
    pooled = sorted(set(chosen)) if {"mean", "cls"} & set(pools) else []
    last = range(max(0, depth - 4), depth) if "last4" in pools else range(0)
    needed = sorted({*pooled, *last})

    def encode(images: Tensor) -> dict[str, Tensor]:
        x = normalise(images.to(device, non_blocking=True))
        features = {OUTPUT: model.encode(x)}
        if not needed:
            return features
        tokens = dict(zip(needed, model.features(x, needed), strict=True))
        means = {block: t[:, model.prefix :].mean(1) for block, t in tokens.items()}
        for block in pooled:
            if "mean" in pools:
                features[f"block {block} mean"] = means[block]
            if "cls" in pools and model.has_class_token:
                features[f"block {block} cls"] = tokens[block][:, 0]
        if last:
            features["last 4 mean"] = torch.cat([means[block] for block in last], 1)
        return features

    return _measured(encode, data)


def _checked(block: int, depth: int) -> int:
    if not -depth <= block < depth:
        raise ValueError(f"block {block} is none of the encoder's {depth}")
    return block % depth


def pixel_features(data: ShardData) -> FeatureSets:
    """Raw pixels as features."""
    return _measured(lambda images: {OUTPUT: pixels(images)}, data)


def pca_features(data: ShardData, components: int = 64) -> FeatureSets:
    """The first principal components of the pixels.

    They are fitted on the training images, labelled or not, which the encoder has seen too.
    """
    step = -(-len(data.index) // PCA_IMAGES)
    images = data.index.choose(torch.arange(0, len(data.index), step))
    x, _ = embed(pixels, data.evaluation(images), workers=data.num_workers)
    components = min(components, len(x) - 1, x.shape[1])
    pca = PCA(components, random_state=0).fit(x.numpy())

    def encode(images: Tensor) -> dict[str, Tensor]:
        return {OUTPUT: torch.from_numpy(pca.transform(pixels(images).numpy())).float()}

    return _measured(encode, data)


def pixels(images: Tensor) -> Float[Tensor, "b d"]:
    """Pixels in 0..1 as features; signals as they are."""
    values = images.flatten(1).float()
    return values / 255 if images.dtype == torch.uint8 else values


@torch.no_grad()
def _measured(encode: Callable[[Tensor], dict[str, Tensor]], data: ShardData) -> FeatureSets:
    """The feature sets with their widths, which one sample of the data shows."""
    sample = data.evaluation(data.index)[0]["input"]
    features = encode(sample[None])
    return FeatureSets(encode, {name: feature.shape[1] for name, feature in features.items()})
