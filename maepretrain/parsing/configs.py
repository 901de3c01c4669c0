"""Configurations by name: the shipped ones, and files of the user."""

import shlex
from difflib import get_close_matches
from pathlib import Path

from maepretrain.parsing.errors import UserError
from maepretrain.parsing.moved_configs import MOVED_CONFIGS


def configs_folder() -> Path:
    """Folder of the shipped configurations: inside the wheel, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """A file as given, or a shipped configuration by name (`recipe/denoising`).

    Raises:
        UserError: neither exists; of a name of version 0.1, what says the same now.
    """
    file = Path(name)
    if file.is_file():
        return file
    short = name.removesuffix(".yaml")
    shipped = configs_folder() / f"{short}.yaml"
    if shipped.is_file() and not file.is_absolute() and ".." not in file.parts:
        return shipped
    if short in MOVED_CONFIGS:
        raise UserError(f"config {short} is now {shlex.join(config_words(MOVED_CONFIGS[short]))}")
    near = get_close_matches(short, shipped_configs(), n=1)
    hint = f": did you mean {near[0]}?" if near else "; see `maepretrain configs`"
    raise UserError(f"no config file {name} and no shipped config of that name{hint}")


def shipped_configs() -> list[str]:
    """Names of the shipped configurations."""
    folder = configs_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def config_words(joined: str) -> list[str]:
    """The words of a command line for configs and options joined by `+`.

    `data/fashion_mnist+recipe/sparse+model.penalty=kl` becomes `-c data/fashion_mnist -c
    recipe/sparse --model.penalty kl`. A file of that whole name is one config.
    """
    if Path(joined).is_file():
        return ["-c", joined]
    words = []
    for part in joined.split("+"):
        option, equals, value = part.partition("=")
        words += [f"--{option}", value] if equals else ["-c", part]
    return words
