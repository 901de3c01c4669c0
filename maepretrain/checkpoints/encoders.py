"""Encoders for evaluation: of a run, of a file, of timm, at the image size of the data.

What `load_encoder` returns has `encode(images, pool="mean" | "cls" | "tokens")`. A ViT has also
`features(images, blocks)`, `layers()`, `depth`, `width` and `prefix`, as MaskedAutoencoder
documents them; `require_blocks` refuses an encoder that has not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maepretrain.checkpoints.run_config import locate, read_mapping, read_model_config, run_of
from maepretrain.checkpoints.sharded import is_checkpoint
from maepretrain.checkpoints.weights import (
    from_hugging_face,
    hugging_face_arguments,
    load_exactly,
    load_official,
    official_model,
    read_file,
    read_state,
    read_weights,
)
from maepretrain.data.module import ShardData
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.models.timm_encoder import TimmEncoder, TimmViT
from maepretrain.ranks import say

Weights = dict[str, Tensor]


def load_encoder(spec: str, data: ShardData | None = None) -> nn.Module:
    """The pretrained encoder that `spec` names, for images as `data` gives them.

    Args:
        spec: a RUN folder of pretraining or fine-tuning (weights of its last.ckpt, averaged ones
            where it kept them); one of its checkpoints (of any engine); a consolidated file in the
            run's folder or one folder below; what `maepretrain export` wrote, as folder or file; an
            official MAE .pth; a Hugging Face ViTMAE folder; timm:NAME
            (timm's weights where they are on this machine, otherwise random, which is said) or
            timm:NAME?pretrained (timm's weights, downloaded if need be).
        data: tells channels and image size. Positions are interpolated to another size, and timm
            adapts the first layer of its models to other channels. None leaves the encoder's own
            size.

    Raises:
        ValueError: nothing of that name, weights of another model, channels or a size that the
            encoder does not take.
    """
    return _loaded(spec, data)[0]


def load_autoencoder(spec: str, data: ShardData | None = None) -> nn.Module:
    """The whole pretrained model that `spec` names, whose decoder belongs to its encoder.

    Raises:
        ValueError: as of `load_encoder`; an encoder alone, or one that was fine-tuned.
    """
    run = run_of(spec)
    if run is not None and "model" not in (config := read_mapping(run / "config.yaml")):
        raise ValueError(
            f"{run} was fine-tuned to classify and has no decoder of its own: name the pretraining "
            f"run ({config.get('encoder')})"
        )
    model, decoder = _loaded(spec, data)
    if not decoder or not hasattr(model, "reconstruct"):
        raise ValueError(f"{spec} is an encoder alone: this needs a model with its decoder")
    return model


def _loaded(spec: str, data: ShardData | None) -> tuple[nn.Module, bool]:
    """The model, and whether more than its encoder was loaded."""
    found = _find(spec, data)
    if data is not None:
        _compare_normalisation(found, data, spec)
    model = found.make()
    whole = found.weights is not None and _load(model, found.weights(), spec)
    return _fit(model, found, data), whole


def fresh_encoder(spec: str, data: ShardData | None, seed: int) -> nn.Module:
    """The same architecture at random initial values; positions are those of a new model.

    Raises:
        ValueError: as of `load_encoder`.
    """
    found = _find(spec, data, random=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = found.make()
    size = getattr(model, "grid", None)
    model = _fit(model, found, data)
    if isinstance(model, MaskedAutoencoder) and model.grid != size:
        model.renew_positions()
    return model


def require_blocks(encoder: nn.Module, purpose: str) -> None:
    """Refuse an encoder without `features()` and `layers()`.

    Raises:
        ValueError: it has none.
    """
    if not hasattr(encoder, "features") or not hasattr(encoder, "layers"):
        raise ValueError(
            f"{purpose} needs a ViT; "
            f"{type(getattr(encoder, 'encoder', encoder)).__name__} has no blocks of tokens"
        )


@dataclass(frozen=True)
class _Images:
    """What an encoder asks of its data: the shape (c, h, w) of the images."""

    shape: tuple[int, ...]
    channels: int


@dataclass(frozen=True)
class _Found:
    """An encoder that is there but not made yet.

    Args:
        make: makes it at random initial values.
        shape: (c, h, w) of the images that `make`'s takes; None where it tells itself.
        weights: reads its weights; None where `make` has loaded them, or there are none.
        normalisation: mean and std of the data that it was trained on, where that is known.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None
    weights: Callable[[], Weights] | None = None
    normalisation: tuple[list[float], list[float]] | None = None


def _compare_normalisation(found: _Found, data: ShardData, spec: str) -> None:
    """Say where images would look other to the encoder than those that it was trained on."""
    given = list(data.mean), list(data.std)
    if found.normalisation is not None and found.normalisation != given:
        mean, std = found.normalisation
        say(
            f"WARNING       {spec} was trained on data of mean {mean} and std {std}; here they are "
            f"{given[0]} and {given[1]}"
        )


def _find(spec: str, data: ShardData | _Images | None, random: bool = False) -> _Found:
    if spec.startswith("timm:"):
        return _Found(lambda: _timm(spec.removeprefix("timm:"), data, random))
    path = locate(spec)
    if path.is_file() or is_checkpoint(path):
        return _of_file(path)
    return _of_run(path, path / "checkpoints" / "last.ckpt")


def _of_file(path: Path) -> _Found:
    weights, arguments = read_file(path)
    arguments = arguments or hugging_face_arguments(path.parent / "config.json")
    if arguments is not None:
        return _Found(lambda: _masked_autoencoder(arguments, path), None, lambda: weights)
    run = run_of(str(path))
    if run is not None:
        return _of_run(run, path)
    try:
        return _Found(lambda: official_model(weights), None, lambda: weights)
    except ValueError as error:
        raise ValueError(f"encoder {path}: {error}") from error


def _of_run(run: Path, file: Path) -> _Found:
    """The model of a pretraining run, or the encoder of a fine-tuning run, whose architecture is
    that of the encoder it began with."""
    config = read_mapping(run / "config.yaml")
    if "model" not in config and "encoder" not in config:
        raise ValueError(
            f"{run} is no pretraining run, nor a fine-tuning one: its config.yaml has neither "
            "model nor encoder"
        )
    try:
        sizes = config["data"]
        side = sizes["image_size"]
        shape = (sizes["channels"], *([side, side] if isinstance(side, int) else side))
        normalisation = list(sizes["mean"]), list(sizes["std"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run}: its config.yaml does not say what its images are") from error
    if "model" in config:
        parser, section = read_model_config(run)
        return _Found(
            lambda: parser.instantiate(section).model,
            shape,
            lambda: read_weights(file),
            normalisation,
        )
    data = _Images(shape, shape[0])
    try:
        origin = _find(str(config["encoder"]), data, random=True)
    except ValueError as error:
        raise ValueError(f"{run} was fine-tuned from {config['encoder']}: {error}") from error
    return _Found(
        lambda: _fit(origin.make(), origin, data), shape, lambda: _tuned(file), normalisation
    )


def _tuned(file: Path) -> Weights:
    """The encoder in a checkpoint of fine-tuning: the average of its weights where there is one."""
    prefix = "ema.module.model."
    state, _ = read_state(file)
    averaged = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return averaged or read_weights(file)


def _masked_autoencoder(arguments: dict[str, Any], path: Path) -> MaskedAutoencoder:
    """From what a file says of itself: arguments of this class and of no other."""
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
    """Copy the weights into the model; whether they were more than an encoder's."""
    try:
        if {"vit.embeddings.cls_token", "embeddings.cls_token"} & weights.keys():
            weights = from_hugging_face(weights)
        if isinstance(model, MaskedAutoencoder) and not any(
            k.startswith("encoder.") for k in weights
        ):
            return load_official(model, weights) == "encoder and decoder"
        load_exactly(model.state_dict(), weights)
        return True
    except ValueError as error:
        raise ValueError(f"encoder {spec}: {error}") from error


def _fit(model: nn.Module, found: _Found, data: ShardData | _Images | None) -> nn.Module:
    """The model for images of the data's size.

    Raises:
        ValueError: other channels, or a size that it cannot be made to take.
    """
    shape = found.shape
    if isinstance(model, MaskedAutoencoder):
        shape = (model.channels, *model.encoder.patch_embed.img_size)
    if data is None or shape is None or shape == data.shape:
        return model
    if shape[0] != data.channels:
        raise ValueError(
            f"the encoder takes images of {shape[0]} channels; data.channels is {data.channels}"
        )
    if not isinstance(model, MaskedAutoencoder) or len(data.shape) != 3:
        raise ValueError(
            f"the encoder takes inputs of size {list(shape[1:])}, not {list(data.shape[1:])}: "
            "set data.image_size"
        )
    height, width = data.shape[1:]
    model.resize((height, width))
    return model


def _timm(name: str, data: ShardData | _Images | None, random: bool) -> nn.Module:
    name, _, query = name.partition("?")
    if query not in ("", "pretrained"):
        raise ValueError(f"timm:{name}?{query}: what may follow a name is ?pretrained")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name}")
    if data is not None and len(data.shape) != 3:
        raise ValueError(f"timm:{name} takes images, not signals of size {list(data.shape[1:])}")
    size = {} if data is None else {"img_size": data.shape[1:]}
    arguments: dict[str, Any] = {"num_classes": 0}
    arguments |= {} if data is None else {"in_chans": data.channels}
    if not random:
        arguments |= _timm_weights(name, download=query == "pretrained")
    try:
        try:
            model = timm.create_model(name, **size, **arguments)
        except TypeError:  # convolutional networks take any size
            model = timm.create_model(name, **arguments)
    except Exception as error:  # files, hubs and sizes fail in any way
        images = "" if data is None else f" for images {data.shape}"
        raise ValueError(f"timm cannot make {name}{images}: {error}") from error
    if type(model) is not VisionTransformer or model.pos_embed is None:
        return TimmEncoder(model)
    model.attn_pool = None  # pooling is ours: its parameters would never get a gradient
    return TimmViT(model)


def _timm_weights(name: str, download: bool) -> dict[str, Any]:
    """The arguments that give timm's own weights, or none where they are not on this machine."""
    if download:
        return {"pretrained": True}
    config = timm.get_pretrained_cfg(name)
    repository = config.hf_hub_id if config else None
    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, file) if repository else None
        if isinstance(cached, str):
            say(f"encoder       {name} with the weights of {repository}")
            return {"pretrained": True, "pretrained_cfg_overlay": {"file": cached}}
    say(
        f"encoder       {name} at RANDOM initial values: its weights are not on this machine; "
        f"timm:{name}?pretrained downloads them"
    )
    return {}
