"""Pictures of a classification's errors: confusion matrix and most confused images."""

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from maepretrain.data.module import ShardData
from maepretrain.data.samples import ShardIndex
from maepretrain.data.shards.index import class_names
from maepretrain.plots.confusion import confusion_matrix, most_confused

# Test images that are drawn as confused most.
CONFUSED = 24


def draw_confusion(
    folder: Path,
    evaluator: str,
    data: ShardData,
    test: ShardIndex,
    truth: Int64[Tensor, "n"],
    predicted: Int64[Tensor, "n"],
    confidence: Float[Tensor, "n"],
    classes: int,
) -> list[Path]:
    """Draw the confusion matrix and, of images, those that were confused most.

    Args:
        folder: of the pictures.
        evaluator: the first word of their names.
        data: reads the images.
        test: the test samples.
        truth: their classes.
        predicted: the predicted classes.
        confidence: the probabilities of the predictions.
        classes: how many there are.

    Returns:
        The PNG files.
    """
    names = class_names(test.shards)
    matrix = folder / f"{evaluator}-confusion.png"
    confusion_matrix(truth, predicted, classes, matrix, names)
    wrong = (predicted != truth).nonzero().flatten()
    if not len(wrong) or len(data.shape) != 3:
        return [matrix]
    wrong = wrong[confidence[wrong].argsort(descending=True)][:CONFUSED]
    read = data.evaluation(test, labelled=True).__getitems__(wrong.tolist())
    images = folder / f"{evaluator}-most-confused.png"
    most_confused(
        list(to_unit_range(read["input"])),
        truth[wrong].tolist(),
        predicted[wrong].tolist(),
        confidence[wrong].tolist(),
        images,
        names,
    )
    return [matrix, images]


def to_unit_range(images: Tensor) -> Float[Tensor, "b c h w"]:
    """Pixels in 0..1: uint8 divided by 255, others cut."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
