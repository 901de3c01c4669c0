"""Weights from files, without running code from them: safetensors, or torch's restricted unpickler.

The layouts that the files may have are those of a run, of `official.py` and of `hugging_face.py`.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from maepretrain.checkpoints.fragments import is_checkpoint
from maepretrain.checkpoints.packing import COMPRESSED_KEY, OWN_KEY, unpack
from maepretrain.checkpoints.saved import Saved


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file: safetensors, an official .pth, a run's .ckpt (a folder where a
    strategy divided it), or a plain state dict.

    A run's checkpoint gives its model's weights under the model's own names.

    Raises:
        ValueError: no such file, no weights in it, or one that would have to be unpickled.
    """
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a file, and the arguments of their MaskedAutoencoder, which files of
    `maepretrain export` carry.

    Raises:
        ValueError: as of `read_weights`.
    """
    state, arguments = read_state(path)
    # What else Lightning's module holds (normalisation, a classifier) is not the model's.
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = name.removeprefix("_forward_module.")
        if bare.startswith("model."):
            weights[bare.removeprefix("model.")] = tensor
    return weights or state, arguments


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """As `read_file`, with all that a run's checkpoint holds, under the names of its module.

    Raises:
        ValueError: as of `read_weights`.
    """
    if not path.is_file() and not is_checkpoint(path):
        raise ValueError(f"weights {path}: there is no such file")
    if is_checkpoint(path):
        return Saved(path).weights(), None
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    if not isinstance(content, dict):
        content = {}
    arguments = content.pop(OWN_KEY, None)
    weights = content
    for key in ("state_dict", "model"):  # of Lightning, of official files
        if isinstance(content.get(key), dict):
            weights = content[key]
            break
    if not weights or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"weights {path}: this file holds no state dict of tensors")
    return weights, arguments if isinstance(arguments, dict) else None


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        content: dict[str, Any] = load_file(path)
        if COMPRESSED_KEY in metadata:
            content = dict(unpack(content, metadata))
        if OWN_KEY in metadata:
            content[OWN_KEY] = json.loads(metadata[OWN_KEY])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights {path}: no safetensors file ({error})") from error
    return content


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


@torch.no_grad()
def load_exactly(own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Copy weights into a model's own tensors, all of them or none.

    Raises:
        ValueError: names or shapes that are not exactly the model's.
    """
    other_shapes: set[str] = set()
    for name in own.keys() & weights.keys():
        theirs = tuple(weights[name].shape)
        ours = tuple(own[name].shape)
        if theirs != ours:
            other_shapes.add(f"{name} {theirs} for {ours}")
    problems = {
        "missing": own.keys() - weights.keys(),
        "unknown": weights.keys() - own.keys(),
        "of another shape": other_shapes,
    }
    lines = [f"{len(names)} {kind}: {_first(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ValueError(f"weights do not fit the model ({'; '.join(lines)})")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def _first(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
