"""The configuration in a run folder, read back: from config.yaml to the model of the run.

The parser of `pretrain` uses `add_model` too, so that a run and its readers agree. Runs that
were made before modules moved name the classes by their old paths.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

from maepretrain.checkpoints.fragments import is_checkpoint
from maepretrain.models.autoencoders.adversarial import Adversarial
from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.contractive import Contractive
from maepretrain.models.autoencoders.denoising import Denoising
from maepretrain.models.autoencoders.generative_stochastic import GenerativeStochastic
from maepretrain.models.autoencoders.helmholtz import Helmholtz
from maepretrain.models.autoencoders.predictive_sparse import PredictiveSparse
from maepretrain.models.autoencoders.recirculation import Recirculation
from maepretrain.models.autoencoders.semantic_hashing import SemanticHashing
from maepretrain.models.autoencoders.sparse import Sparse
from maepretrain.models.autoencoders.stacked import Stacked
from maepretrain.models.autoencoders.variational import Variational
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.models.masked_tokens import MaskedTokens

# Classes that a configuration may name without their module.
MODELS: tuple[type[nn.Module], ...] = (
    MaskedAutoencoder,
    MaskedTokens,
    Autoencoder,
    Sparse,
    Denoising,
    Contractive,
    Variational,
    PredictiveSparse,
    Stacked,
    GenerativeStochastic,
    Recirculation,
    Helmholtz,
    Adversarial,
    SemanticHashing,
)
# Old class paths and the present ones; the first pattern that fits counts.
MOVED_CLASSES = (
    (r"maepretrain\.models\.mae\.(\w+)", r"maepretrain.models.mae.model.\1"),
    (r"maepretrain\.models\.compression\.(\w+)", r"maepretrain.compression.autoencoder.\1"),
    (r"maepretrain\.models\.residual_coder\.(\w+)", r"maepretrain.compression.residual_coder.\1"),
    (r"maepretrain\.models\.(\w+\.[A-Z]\w+)", r"maepretrain.models.autoencoders.\1"),
)
# Arguments of a model that other sections of the configuration have: (there, of the model).
LINKS = (
    ("data.image_size", "image_size"),
    ("data.channels", "channels"),
    ("seed", "seed"),
    ("seed", "layer.init_args.seed"),
    ("data.image_size", "coder.init_args.image_size"),
    ("data.channels", "coder.init_args.channels"),
)


def add_model(parser: ArgumentParser, models: tuple[type[nn.Module], ...] = MODELS) -> None:
    """The option `model`, a class and its arguments; the images are described once, under data.

    Args:
        parser: has `seed`, `data.image_size` and `data.channels`.
        models: named in the help; a class of the user's own is named with its module.
    """
    names = ", ".join(model.__name__ for model in models)
    text = f"the model: {names}, or the path of a class of your own; --model.X sets its arguments"
    parser.add_argument("--model", type=nn.Module, required=True, help=text)
    # For the help, and for errors that name the nearest class.
    cast(Any, parser).classes = {"model": {model.__name__: model for model in models}}
    cast(Any, parser).linked = tuple(target for _, target in LINKS)
    for source, target in LINKS:
        parser.link_arguments(source, f"model.init_args.{target}")


def read_model_config(run: Path) -> tuple[ArgumentParser, Namespace]:
    """The section `model` of a pretraining run, complete, and the parser that instantiates it.

    Raises:
        ValueError: a configuration of no such run.
    """
    config = read_mapping(run / "config.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data.image_size", type=Any)
    parser.add_argument("--data.channels", type=int)
    add_model(parser)
    data = config.get("data") or {}
    try:
        whole = parser.parse_object(
            {
                "seed": config.get("seed", 0),
                "data": {name: data[name] for name in ("image_size", "channels")},
                "model": with_present_paths(config["model"]),
            }
        )
        alone = ArgumentParser(exit_on_error=False)
        alone.add_argument("--model", type=nn.Module)
        return alone, alone.parse_object({"model": whole.model})
    except (ArgumentError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is no pretraining run: {error}") from error


def with_present_paths(section: Any) -> Any:
    """A section of the configuration with the present class paths."""
    if isinstance(section, list):
        return [with_present_paths(value) for value in section]
    if not isinstance(section, dict):
        return section
    inside = {key: with_present_paths(value) for key, value in section.items()}
    path = inside.get("class_path")
    if isinstance(path, str) and path.startswith("maepretrain."):
        inside["class_path"] = present_path(path)
    return inside


def present_path(class_path: str) -> str:
    """The path of a class of this package, from the path that it had when a run was made."""
    module = class_path.rpartition(".")[0]
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        spec = None
    is_module = spec is not None and spec.submodule_search_locations is None
    if is_module:
        return class_path
    for pattern, replacement in MOVED_CLASSES:
        match = re.fullmatch(pattern, class_path)
        if match:
            return match.expand(replacement)
    return class_path


def images_of(
    config: dict[str, Any],
) -> tuple[tuple[int, ...], tuple[list[float], list[float]]]:
    """The shape (c, h, w) of a run's images, and the mean and std of its data.

    Raises:
        KeyError, TypeError: a configuration without them.
    """
    data = config["data"]
    size = data["image_size"]
    if isinstance(size, int):
        size = [size, size]
    return (data["channels"], *size), (list(data["mean"]), list(data["std"]))


def run_of(spec: str) -> Path | None:
    """The run folder that an encoder belongs to: itself, or of a file in it or one folder below."""
    path = Path(spec)
    inside = path.is_file() or is_checkpoint(path)
    folders = [path.parent, path.parent.parent] if inside else [path]
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def locate(spec: str) -> Path:
    """A run folder, or a file of weights, which may be the only one in a folder.

    Raises:
        ValueError: nothing of the kind.
    """
    path = Path(spec)
    if path.is_file() or is_checkpoint(path) or (path / "config.yaml").is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"encoder {spec} is no run folder, no file, and no timm:NAME")
    files = [file for pattern in ("*.safetensors", "*.pth") for file in path.glob(pattern)]
    if len(files) != 1:
        raise ValueError(
            f"{path} is no run folder: it holds no config.yaml; nor is it an encoder's: it holds "
            f"{len(files)} files of weights"
        )
    return files[0]


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping; empty where it is none, which a parser will refuse."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
