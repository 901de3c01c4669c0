"""Encoders of timm, by name."""

from typing import Any

import timm
from huggingface_hub import try_to_load_from_cache
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maepretrain.models.timm_encoder import TimmEncoder, TimmViT
from maepretrain.ranks import say, say_detail


def timm_encoder(spec: str, shape: tuple[int, ...] | None, *, random: bool) -> nn.Module:
    """An encoder of timm for images of a shape.

    Args:
        spec: NAME (timm's weights where they are on this machine, otherwise random, which is
            printed) or NAME?pretrained (timm's weights, downloaded if need be).
        shape: (c, h, w) of the images; timm adapts the first layer of its models. None leaves the
            model's own.
        random: leave the weights at random initial values.

    Raises:
        ValueError: no such model, or one that does not take such images.
    """
    name, _, query = spec.partition("?")
    if query not in ("", "pretrained"):
        raise ValueError(f"timm:{spec}: what may follow a name is ?pretrained")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name}")
    if shape is not None and len(shape) != 3:
        raise ValueError(f"timm:{name} takes images, not signals of size {list(shape[1:])}")
    arguments: dict[str, Any] = {"num_classes": 0}
    if shape is not None:
        arguments["in_chans"] = shape[0]
    if not random:
        arguments |= _pretrained_arguments(name, download=query == "pretrained")
    model = _create(name, shape, arguments)
    if type(model) is not VisionTransformer or model.pos_embed is None:
        return TimmEncoder(model)
    model.attn_pool = None  # pooling is ours: its parameters would never get a gradient
    return TimmViT(model)


def _create(name: str, shape: tuple[int, ...] | None, arguments: dict[str, Any]) -> nn.Module:
    size = {} if shape is None else {"img_size": shape[1:]}
    try:
        try:
            return timm.create_model(name, **size, **arguments)
        except TypeError:  # convolutional networks take any size
            return timm.create_model(name, **arguments)
    except Exception as error:  # files, hubs and sizes fail in any way
        images = "" if shape is None else f" for images {shape}"
        raise ValueError(f"timm cannot make {name}{images}: {error}") from error


def _pretrained_arguments(name: str, *, download: bool) -> dict[str, Any]:
    """The arguments that load timm's own weights; empty where they are not on this machine."""
    if download:
        return {"pretrained": True}
    config = timm.get_pretrained_cfg(name)
    repository = config.hf_hub_id if config else None
    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, file) if repository else None
        if isinstance(cached, str):
            say_detail(f"encoder       {name} with the weights of {repository}")
            return {"pretrained": True, "pretrained_cfg_overlay": {"file": cached}}
    say(
        f"encoder       {name} at RANDOM initial values: its weights are not on this machine; "
        f"timm:{name}?pretrained downloads them"
    )
    return {}
