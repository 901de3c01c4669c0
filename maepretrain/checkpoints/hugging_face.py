"""Hugging Face's ViTMAE: names of weights and config.json, in both directions."""

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from maepretrain.checkpoints.official import check_official
from maepretrain.models.mae.model import MaskedAutoencoder

# Names of the official layout and of Hugging Face's ViTMAE, in its files (transformers 4 and 5).
HUGGING_FACE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "blocks": "vit.encoder.layer",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_blocks": "decoder.decoder_layers",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}


HUGGING_FACE_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# Theirs has one matrix each where ours has one for all three.
QKV = ("query", "key", "value")
# Arguments of MaskedAutoencoder and keys of config.json.
HUGGING_FACE_ARGUMENTS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
    "encoder_width": "hidden_size",
    "encoder_depth": "num_hidden_layers",
    "encoder_heads": "num_attention_heads",
    "decoder_width": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_heads": "decoder_num_attention_heads",
    "mask_ratio": "mask_ratio",
    "norm_pix": "norm_pix_loss",
}
# transformers writes no value that is its default.
HUGGING_FACE_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}


def to_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the official layout under the names of Hugging Face's ViTMAEForPreTraining.

    Raises:
        ValueError: a weight that its model does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        in_block = re.fullmatch(r"(\w+)\.(\d+)\.(.+)\.(weight|bias)", name)
        if in_block and in_block[1] in HUGGING_FACE:
            renamed |= _block_to_hugging_face(name, tensor, in_block)
            continue
        stem, _, kind = name.rpartition(".")
        if name in HUGGING_FACE:
            renamed[HUGGING_FACE[name]] = tensor
        elif stem in HUGGING_FACE and kind in ("weight", "bias"):
            renamed[f"{HUGGING_FACE[stem]}.{kind}"] = tensor
        else:
            raise ValueError(f"Hugging Face's ViTMAE has no {name}")
    return renamed


def _block_to_hugging_face(name: str, tensor: Tensor, in_block: re.Match[str]) -> dict[str, Tensor]:
    """A weight of a block; `attn.qkv` becomes three."""
    stack, number, layer, kind = in_block.groups()
    block = f"{HUGGING_FACE[stack]}.{number}"
    if layer == "attn.qkv":
        thirds = zip(QKV, tensor.chunk(3), strict=True)
        return {
            f"{block}.attention.attention.{part}.{kind}": third.clone() for part, third in thirds
        }
    if layer not in HUGGING_FACE_BLOCK:
        raise ValueError(f"Hugging Face's ViTMAE has no {name}")
    return {f"{block}.{HUGGING_FACE_BLOCK[layer]}.{kind}": tensor}


def from_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Hugging Face ViTMAE file in the official layout; unknown names stay."""
    if "embeddings.cls_token" in weights:  # a ViTMAEModel alone
        weights = {f"vit.{name}": tensor for name, tensor in weights.items()}
    stacks = {theirs: ours for ours, theirs in HUGGING_FACE.items()}
    layers = {theirs: ours for ours, theirs in HUGGING_FACE_BLOCK.items()}
    official: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        # transformers 5.23 saves the decoder's blocks under a wrong name.
        name = name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
        stem, _, kind = name.rpartition(".")
        in_block = re.fullmatch(r"(vit\.encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)", stem)
        if in_block is None:
            official[_outside_of_blocks(name, stacks)] = tensor
            continue
        block = f"{stacks[in_block[1]]}.{in_block[2]}"
        layer = in_block[3]
        part = layer.removeprefix("attention.attention.")
        if part in QKV:
            thirds.setdefault(f"{block}.attn.qkv.{kind}", {})[part] = tensor
        else:
            official[f"{block}.{layers.get(layer, layer)}.{kind}"] = tensor
    for name, parts in thirds.items():
        official[name] = torch.cat([parts[part] for part in QKV if part in parts])
    return official


def _outside_of_blocks(name: str, official_names: dict[str, str]) -> str:
    stem, _, kind = name.rpartition(".")
    if name in official_names:
        return official_names[name]
    if stem in official_names:
        return f"{official_names[stem]}.{kind}"
    return name


def hugging_face_config(model: MaskedAutoencoder) -> dict[str, Any]:
    """config.json of a Hugging Face ViTMAE of the same architecture.

    Raises:
        ValueError: a model that its classes cannot express.
    """
    check_official(model, "Hugging Face's ViTMAE")
    encoder = model.encoder
    decoder = cast(Any, model.decoder_blocks)
    block = cast(Any, encoder.blocks[0])
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": encoder.patch_embed.img_size[0],
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm.eps,  # theirs is 1e-12
        "decoder_hidden_size": model.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(decoder),
        "decoder_num_attention_heads": decoder[0].attn.num_heads,
        "decoder_intermediate_size": decoder[0].mlp.fc1.out_features,
        "mask_ratio": model.masking.ratio,
        "norm_pix_loss": model.norm_pix,
    }


def hugging_face_arguments(path: Path) -> dict[str, Any] | None:
    """Arguments of MaskedAutoencoder from a Hugging Face config.json; None if it is no ViTMAE's.

    Its LayerNorm eps is left: 1e-12 stands in files of weights that were trained with ours, 1e-6.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or config.get("model_type") != "vit_mae":
        return None
    config = HUGGING_FACE_DEFAULTS | config
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        raise ValueError(f"{path}: intermediate_size must be 4 x hidden_size")
    return {name: config[theirs] for name, theirs in HUGGING_FACE_ARGUMENTS.items()}
