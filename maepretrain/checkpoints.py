"""Weights from files, and the layout of the official MAE checkpoints in both directions.

Files are read without running code from them: safetensors, or torch's restricted unpickler. The
official repository (facebookresearch/mae) publishes `mae_pretrain_vit_*.pth` with the encoder alone
(150 tensors for ViT-B), `mae_pretrain_vit_*_full.pth` with the decoder (254) trained with norm_pix,
and `mae_visualize_*.pth` with a decoder of raw pixels, under cc-by-nc-4.0.
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from maepretrain.models.mae import MaskedAutoencoder

# Width, blocks, patch side: ViT-B, L and H of section 4. Every official decoder has 16 heads.
OFFICIAL_ENCODERS = {
    (768, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file: safetensors, an official .pth, a run's .ckpt, or a plain state dict.

    A run's checkpoint gives its model's weights under the model's own names.

    Raises:
        ValueError: no such file, no weights in it, or one that would have to be unpickled.
    """
    if not path.is_file():
        raise ValueError(f"weights {path}: there is no such file")
    loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    state = loaded if isinstance(loaded, dict) else {}
    of_lightning, official = state.get("state_dict"), state.get("model")
    weights = next(found for found in (of_lightning, official, state) if isinstance(found, dict))
    if not weights or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"weights {path}: this file holds no state dict of tensors")
    if weights is of_lightning:
        # What else Lightning's module holds (normalisation, metrics) is not the model's.
        ours = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
        return ours or weights
    return weights


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights {path}: no safetensors file ({error})") from error


def _load_torch(path: Path) -> Any:
    try:
        # Official training checkpoints hold their command line: attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes are read as instructions, and fail in any way
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it needs {wanted[1]}" if wanted else "it is no checkpoint or is damaged"
        raise ValueError(
            f"weights {path}: refused, since {reason}, and unpickling would run code from the "
            f"file; use safetensors or a file of tensors alone"
        ) from error


def official_weights(model: MaskedAutoencoder, decoder: bool = True) -> dict[str, Tensor]:
    """The model's weights under the official names; they share the model's memory."""
    return {
        name.removeprefix("encoder."): tensor
        for name, tensor in model.state_dict().items()
        if decoder or name.startswith("encoder.")
    }


def load_official(
    model: MaskedAutoencoder, weights: dict[str, Tensor]
) -> Literal["encoder", "encoder and decoder"]:
    """Load weights in the official layout, all or nothing; the decoder stays if they have none.

    Returns:
        What was loaded.

    Raises:
        ValueError: names or shapes that are not exactly the model's.
    """
    decoder = any(name.startswith("decoder_") for name in weights)
    own = official_weights(model, decoder)
    both = own.keys() & weights.keys()
    shapes = {name: (tuple(weights[name].shape), tuple(own[name].shape)) for name in both}
    problems = {
        "missing": own.keys() - weights.keys(),
        "unknown": weights.keys() - own.keys(),
        "of another shape": {
            f"{name} {theirs} for {ours}"
            for name, (theirs, ours) in shapes.items()
            if theirs != ours
        },
    }
    found = [f"{len(names)} {kind}: {_few(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"weights do not fit the model ({'; '.join(found)})")
    for name, tensor in own.items():
        tensor.copy_(weights[name])
    return "encoder and decoder" if decoder else "encoder"


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def official_model(weights: dict[str, Tensor], norm_pix: bool = True) -> MaskedAutoencoder:
    """The official model (ViT-B, L or H) that the weights' shapes tell, with these weights.

    Args:
        weights: in the official layout, with or without a decoder.
        norm_pix: what the decoder was trained for, which no shape tells.

    Raises:
        ValueError: weights of another model.
    """
    width, channels, patch, _ = _shape(weights, "patch_embed.proj.weight", 4)
    size = (width, _blocks(weights, "blocks."), patch)
    if size not in OFFICIAL_ENCODERS:
        raise ValueError(
            f"weights of width {size[0]}, depth {size[1]} and patch size {size[2]} are of no "
            f"official MAE: {', '.join(OFFICIAL_ENCODERS.values())}"
        )
    _, positions, _ = _shape(weights, "pos_embed", 3)
    decoder = {}
    if "decoder_embed.weight" in weights:
        decoder["decoder_width"] = _shape(weights, "decoder_embed.weight", 2)[0]
        decoder["decoder_depth"] = _blocks(weights, "decoder_blocks.")
    model = MaskedAutoencoder(
        OFFICIAL_ENCODERS[size],
        image_size=math.isqrt(positions - 1) * patch,
        channels=channels,
        decoder_heads=16,
        norm_pix=norm_pix,
        **decoder,
    )
    load_official(model, weights)
    return model


def _shape(weights: dict[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    if name not in weights or weights[name].ndim != axes:
        raise ValueError(f"weights are of no official MAE: no {name} with {axes} axes")
    return tuple(weights[name].shape)


def _blocks(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(prefix)})
