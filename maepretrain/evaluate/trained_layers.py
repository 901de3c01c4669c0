"""Choice of the encoder's layers that are trained: none, the last blocks, or all."""

from torch import nn

from maepretrain.evaluate.classifier_head import ClassifierHead
from maepretrain.models.protocol import Layered, require


def choose_layers(
    model: nn.Module, head: ClassifierHead, trained_blocks: int
) -> list[list[nn.Parameter]]:
    """Freeze all parameters but those of the trained layers.

    Args:
        model: the encoder.
        head: decides whether the encoder's final norm is used.
        trained_blocks: as of `Classifier`.

    Returns:
        The encoder's layers from input to output, trained or not; none for a frozen encoder.

    Raises:
        ValueError: as of `Classifier`.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if trained_blocks == 0:
        return []
    if head.kind == "batchnorm":
        raise ValueError('head "batchnorm" is for a frozen encoder: set trained_blocks to 0')
    layers = require(model, Layered, "has no layers(): it cannot be fine-tuned").layers()
    blocks = len(layers) - 2  # the embedding before, the norm after
    if not -1 <= trained_blocks <= blocks:
        raise ValueError(f"trained_blocks {trained_blocks} must be -1 (all) to {blocks}")
    trained = layers if trained_blocks == -1 else layers[-1 - trained_blocks :]
    if head.kind == "fc_norm":  # takes the place of the final norm
        trained = trained[:-1]
    for layer in trained:
        for parameter in layer:
            parameter.requires_grad_()
    return layers
