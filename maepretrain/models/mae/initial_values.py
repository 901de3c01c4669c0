"""Beginning of a model: initial values as in the official code, arguments that are kept."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn


def initialise(model: nn.Module, projection: nn.Conv2d | nn.Linear, tokens: list[Any]) -> None:
    """Set linears and the patch projection to xavier-uniform values, biases to 0, tokens to
    N(0, .02) draws, LayerNorm to 1 and 0.

    Args:
        model: the whole model.
        projection: the convolution of its patches.
        tokens: class, register and mask tokens, where there are such.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    weight = projection.weight
    bias = projection.bias
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
    if bias is not None:  # ViTs with a norm before their blocks have none
        nn.init.zeros_(bias)
    for token in tokens:
        if token is not None:
            nn.init.normal_(token, std=0.02)


def keeps_arguments(constructor: Callable[..., None]) -> Callable[..., None]:
    """A constructor that keeps its arguments, defaults too, as the dictionary `arguments`: an
    exported file has them beside the weights, and they make the same model again."""
    signature = inspect.signature(constructor)

    @wraps(constructor)
    def keeping(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        constructor(self, *args, **kwargs)
        _, *named = bound.arguments.items()
        self.arguments = dict(named)

    return keeping
