"""The contract of a model: a batch in, a dictionary with `loss` out. The rest is optional.

A model is an `nn.Module` with plain arguments, wholly initialised in its constructor (never under
`zero.Init`). `Model` is all that pretraining asks: a user's own module with only `forward` trains.
Each further protocol below is one ability. A model has it by having its methods; nothing is
registered. Code outside the models asks `isinstance(model, Blocks)` where it can do without, and
`require(model, Blocks, ...)` where it cannot. Neither asks for the class of a model.

`declared(model, name)` reads what a model may state about itself as a plain class attribute.

Axes: b samples, c channels, *size sides, d features, n tokens, h w pixels.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maepretrain.data.batch import Batch

# What a model may declare, and what holds for one that does not.
DECLARATIONS: dict[str, Any] = {
    # Tested on a divided memory (ZeRO, FSDP2).
    "shardable": False,
    # `forward` reads `label`.
    "needs_labels": False,
    # The dtype of `input`, where it is not that of the data.
    "input_dtype": None,
    # "mae": parameters are named and shaped as in the official checkpoints of MAE.
    "layout": None,
    # Predictions are of patches normalised by their own mean and variance.
    "norm_pix": False,
    # Classes that `sample` draws in turn.
    "classes": 0,
    # Blocks are recomputed in the backward pass.
    "activation_checkpointing": False,
}
# Methods, besides forward, that compute with the parameters: FSDP2 gathers them for each.
ENTRY_POINTS = ("encode", "features", "reconstruct")


@runtime_checkable
class Model(Protocol):
    """All that pretraining needs of a model."""

    def forward(self, batch: Batch) -> Batch:
        """`loss`, a scalar to minimise, and other scalars to log."""
        ...


@runtime_checkable
class Encodes(Protocol):
    """Features of samples."""

    def encode(self, images: Tensor) -> Float[Tensor, "b d"]:
        """One vector for each sample."""
        ...


@runtime_checkable
class Layered(Encodes, Protocol):
    """An encoder with layers, in order: it can be fine-tuned."""

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output: embedding, each block, final norm (an
        empty list where there is none)."""
        ...


@runtime_checkable
class Blocks(Layered, Protocol):
    """An encoder of blocks of tokens, such as a ViT."""

    @property
    def depth(self) -> int:
        """Blocks."""
        ...

    @property
    def width(self) -> int:
        """Features of a token."""
        ...

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token, if there is one, and registers."""
        ...

    @property
    def has_class_token(self) -> bool:
        """The first token is a class token."""
        ...

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Float[Tensor, "b n d"]]:
        """Outputs of these blocks (0 is the first, -1 the last), before the final norm."""
        ...


@runtime_checkable
class Reconstructs(Protocol):
    """Predicts its inputs."""

    def reconstruct(self, images: Tensor) -> Any:
        """A named tuple of the rows of a picture, each (b, c, *size) in normalised values;
        `original` and `reconstruction` are among them."""
        ...


@runtime_checkable
class Decodes(Encodes, Protocol):
    """Maps codes back to inputs."""

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected inputs of codes."""
        ...


@runtime_checkable
class Denoises(Protocol):
    """Removes noise from inputs."""

    def denoise(self, images: Tensor) -> Tensor:
        """Clean inputs."""
        ...


@runtime_checkable
class Samples(Protocol):
    """A distribution over inputs."""

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n draws, (n, c, *size)."""
        ...


@runtime_checkable
class BinaryCodes(Encodes, Protocol):
    """Codes of bits; `encode` gives their probabilities."""

    def codes(self, images: Tensor) -> Bool[Tensor, "b d"]:
        """The bits."""
        ...


@runtime_checkable
class Resizes(Protocol):
    """Can be made to take images of another size."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(c, h, w) of the images that it takes now."""
        ...

    def resize(self, image_size: tuple[int, int]) -> None:
        """Take images of this size from now on."""
        ...

    def renew_positions(self) -> None:
        """Positions as a new model of this size has them."""
        ...


@runtime_checkable
class TakesSmaller(Protocol):
    """Trains on smaller images than it was made for."""

    def check_smaller(self, h: int, w: int) -> None:
        """Raise ValueError where the loss of images of this size cannot be computed."""
        ...


@runtime_checkable
class TrainsPositions(Protocol):
    """Has fixed positions that fine-tuning trains."""

    def train_positions(self) -> None:
        """Make the positions a Parameter."""
        ...


@runtime_checkable
class Masks(Protocol):
    """Hides a share of its inputs."""

    def hide(self, mask_ratio: float) -> None:
        """Hide this share from now on."""
        ...


@runtime_checkable
class Seeded(Protocol):
    """Draws masks or noise."""

    seed: int


@runtime_checkable
class Summarises(Protocol):
    """Describes itself."""

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step: a heading and its text."""
        ...


Ability = TypeVar("Ability")


def require(model: nn.Module, ability: type[Ability], refusal: str) -> Ability:
    """The model, which has this ability.

    Args:
        model: any model.
        ability: one of the protocols above.
        refusal: what follows the name of a model that lacks it: "has no layers()".

    Raises:
        ValueError: it lacks the ability.
    """
    if not isinstance(model, ability):
        raise ValueError(f"{type(model).__name__} {refusal}")
    return model


def declared(model: nn.Module, name: str) -> Any:
    """The value that the model declares under a name of DECLARATIONS, or the default."""
    return getattr(model, name, DECLARATIONS[name])


def entry_points(model: nn.Module) -> list[str]:
    """Names of the ENTRY_POINTS that the model has."""
    return [name for name in ENTRY_POINTS if callable(getattr(model, name, None))]


def as_taken(model: nn.Module, batch: Batch) -> Batch:
    """The batch, its `input` of the dtype that the model declares."""
    dtype = cast(torch.dtype, declared(model, "input_dtype") or batch["input"].dtype)
    return batch | {"input": batch["input"].to(dtype)}
