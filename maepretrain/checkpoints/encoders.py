"""Encoders for evaluation: of a run, of a file, of timm, at the image size of the data.

Every encoder has `encode(images, pool="mean" | "cls" | "tokens")`. A ViT has also
`features(images, blocks)`, `layers()`, `depth`, `width` and `prefix`, as MaskedAutoencoder
documents them; `require_blocks` refuses an encoder that has not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from maepretrain.checkpoints.fragments import is_checkpoint
from maepretrain.checkpoints.hugging_face import from_hugging_face, hugging_face_arguments
from maepretrain.checkpoints.official import load_official, official_model
from maepretrain.checkpoints.run_config import (
    images_of,
    locate,
    read_mapping,
    read_model_config,
    run_of,
)
from maepretrain.checkpoints.timm_models import timm_encoder
from maepretrain.checkpoints.weights import load_exactly, read_file, read_state, read_weights
from maepretrain.data.module import ShardData
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.models.protocol import Blocks, Reconstructs, Resizes, declared
from maepretrain.ranks import say

Weights = dict[str, Tensor]
Shape = tuple[int, ...]


def load_encoder(spec: str, data: ShardData | None = None) -> nn.Module:
    """The pretrained encoder of a name, for images as `data` gives them.

    Args:
        spec: a RUN folder of pretraining or fine-tuning (weights of its last.ckpt, averaged ones
            where it kept them); one of its checkpoints (of any strategy); a consolidated file in
            the run's folder or one folder below; a folder or file of `maepretrain export`; an
            official MAE .pth; a Hugging Face ViTMAE folder; timm:NAME (timm's weights where they
            are on this machine, otherwise random, which is printed) or timm:NAME?pretrained (timm's
            weights, downloaded if need be).
        data: has channels and image size. Positions are interpolated to another size, and timm
            adapts the first layer of its models to other channels. None leaves the encoder's own
            size.

    Raises:
        ValueError: nothing of that name, weights of another model, channels or a size that the
            encoder does not take.
    """
    return _loaded(spec, data)[0]


def load_autoencoder(spec: str, data: ShardData | None = None) -> nn.Module:
    """The whole pretrained model of a name, whose decoder belongs to its encoder.

    Raises:
        ValueError: as of `load_encoder`; an encoder alone, or one that was fine-tuned.
    """
    run = run_of(spec)
    if run is not None:
        config = read_mapping(run / "config.yaml")
        if "model" not in config:
            raise ValueError(
                f"{run} was fine-tuned to classify and has no decoder of its own: name the "
                f"pretraining run ({config.get('encoder')})"
            )
    model, decoder = _loaded(spec, data)
    if not decoder or not isinstance(model, Reconstructs):
        raise ValueError(f"{spec} is an encoder alone: this needs a model with its decoder")
    return model


def _loaded(spec: str, data: ShardData | None) -> tuple[nn.Module, bool]:
    """The model, and whether more than its encoder was loaded."""
    shape = None if data is None else data.shape
    source = _find(spec, shape)
    if data is not None:
        _warn_of_other_normalisation(source, data, spec)
    model = source.make()
    whole = False
    if source.weights is not None:
        whole = _load(model, source.weights(), spec)
    return _resized(model, source.shape, shape), whole


def fresh_encoder(spec: str, data: ShardData | None, seed: int) -> nn.Module:
    """The same architecture at random initial values; positions are those of a new model.

    Raises:
        ValueError: as of `load_encoder`.
    """
    shape = None if data is None else data.shape
    source = _find(spec, shape, random=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = source.make()
    made_for = model.image_shape if isinstance(model, Resizes) else None
    model = _resized(model, source.shape, shape)
    if isinstance(model, Resizes) and model.image_shape != made_for:
        model.renew_positions()
    return model


def require_blocks(encoder: nn.Module, purpose: str) -> None:
    """Refuse an encoder without `features()` and `layers()`.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(encoder, Blocks):
        raise ValueError(f"{purpose} needs a ViT; {type(encoder).__name__} has no blocks of tokens")


@dataclass(frozen=True)
class _Source:
    """An encoder that is there but not made yet.

    Args:
        make: makes it at random initial values.
        shape: (c, h, w) of the images that it takes as made; None where the model itself knows.
        weights: reads its weights; None where `make` has loaded them, or there are none.
        normalisation: mean and std of the data that it was trained on, where that is known.
    """

    make: Callable[[], nn.Module]
    shape: Shape | None = None
    weights: Callable[[], Weights] | None = None
    normalisation: tuple[list[float], list[float]] | None = None


def _warn_of_other_normalisation(source: _Source, data: ShardData, spec: str) -> None:
    """Print where images would look other to the encoder than those that it was trained on."""
    here = list(data.mean), list(data.std)
    if source.normalisation is not None and source.normalisation != here:
        mean, std = source.normalisation
        say(
            f"WARNING       {spec} was trained on data of mean {mean} and std {std}; here they are "
            f"{here[0]} and {here[1]}"
        )


def _find(spec: str, shape: Shape | None, *, random: bool = False) -> _Source:
    """The encoder of that name; `shape` is that of the images, which timm's are made for."""
    if spec.startswith("timm:"):
        name = spec.removeprefix("timm:")
        return _Source(lambda: timm_encoder(name, shape, random=random))
    path = locate(spec)
    if path.is_file() or is_checkpoint(path):
        return _of_file(path)
    return _of_run(path, path / "checkpoints" / "last.ckpt")


def _of_file(path: Path) -> _Source:
    weights, arguments = read_file(path)
    arguments = arguments or hugging_face_arguments(path.parent / "config.json")
    if arguments is not None:
        return _Source(lambda: _masked_autoencoder(arguments, path), weights=lambda: weights)
    run = run_of(str(path))
    if run is not None:
        return _of_run(run, path)
    return _Source(lambda: official_model(weights), weights=lambda: weights)


def _of_run(run: Path, file: Path) -> _Source:
    """The model of a pretraining run, or the encoder of a fine-tuning run."""
    config = read_mapping(run / "config.yaml")
    if "model" not in config and "encoder" not in config:
        raise ValueError(
            f"{run} is no pretraining run, nor a fine-tuning one: its config.yaml has neither "
            "model nor encoder"
        )
    try:
        shape, normalisation = images_of(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run}: its config.yaml does not say what its images are") from error
    if "model" not in config:
        return _finetuned(run, str(config["encoder"]), file, shape, normalisation)
    parser, section = read_model_config(run)
    return _Source(
        lambda: parser.instantiate(section).model,
        shape=shape,
        weights=lambda: read_weights(file),
        normalisation=normalisation,
    )


def _finetuned(
    run: Path,
    pretrained: str,
    file: Path,
    shape: Shape,
    normalisation: tuple[list[float], list[float]],
) -> _Source:
    """The encoder of a fine-tuning run: the architecture is that of the one it began with."""
    try:
        origin = _find(pretrained, shape, random=True)
    except ValueError as error:
        raise ValueError(f"{run} was fine-tuned from {pretrained}: {error}") from error
    return _Source(
        lambda: _resized(origin.make(), origin.shape, shape),
        shape=shape,
        weights=lambda: _finetuned_weights(file),
        normalisation=normalisation,
    )


def _finetuned_weights(file: Path) -> Weights:
    """The encoder in a checkpoint of fine-tuning: the average of its weights where there is one."""
    prefix = "ema.module.model."
    state, _ = read_state(file)
    averaged = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return averaged or read_weights(file)


def _masked_autoencoder(arguments: dict[str, Any], path: Path) -> MaskedAutoencoder:
    """A model from the arguments in a file: of this class and of no other."""
    size = arguments.get("image_size", 224)
    # Other kinds of names make timm fetch things.
    if not timm.is_model(arguments.get("encoder", "vit_base_patch16_224")):
        raise ValueError(f"{path}: timm has no model {arguments['encoder']}")
    if isinstance(size, list):
        arguments = arguments | {"image_size": tuple(size)}
    try:
        return MaskedAutoencoder(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no MaskedAutoencoder: {error}") from error


def _load(model: nn.Module, weights: Weights, spec: str) -> bool:
    """Copy the weights into the model; return whether they were more than an encoder's."""
    try:
        if {"vit.embeddings.cls_token", "embeddings.cls_token"} & weights.keys():
            weights = from_hugging_face(weights)
        own_names = any(name.startswith("encoder.") for name in weights)
        if declared(model, "layout") == "mae" and not own_names:
            return load_official(cast(MaskedAutoencoder, model), weights) == "encoder and decoder"
        load_exactly(model.state_dict(), weights)
    except ValueError as error:
        raise ValueError(f"encoder {spec}: {error}") from error
    return True


def _resized(model: nn.Module, made_for: Shape | None, shape: Shape | None) -> nn.Module:
    """The model for images of a shape.

    Args:
        model: changed in place.
        made_for: shape of the images that it takes; None where the model itself knows.
        shape: of the images that it shall take; None leaves it as it is.

    Raises:
        ValueError: other channels, or a size that it cannot be made to take.
    """
    if isinstance(model, Resizes):
        made_for = model.image_shape
    if shape is None or made_for is None or made_for == shape:
        return model
    if made_for[0] != shape[0]:
        raise ValueError(
            f"the encoder takes images of {made_for[0]} channels; data.channels is {shape[0]}"
        )
    if not isinstance(model, Resizes) or len(shape) != 3:
        raise ValueError(
            f"the encoder takes inputs of size {list(made_for[1:])}, not {list(shape[1:])}: "
            "set data.image_size"
        )
    height, width = shape[1:]
    model.resize((height, width))
    return model
