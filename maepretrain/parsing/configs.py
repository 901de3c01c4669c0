"""Configurations by name: the shipped ones, and files of the user."""

from difflib import get_close_matches
from pathlib import Path

from maepretrain.parsing.errors import UserError


def configs_folder() -> Path:
    """Folder of the shipped configurations: inside the wheel, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """A file as given, or a shipped configuration by name (`mae/digits`).

    Raises:
        UserError: neither exists.
    """
    file = Path(name)
    if file.is_file():
        return file
    shipped = configs_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and not file.is_absolute() and ".." not in file.parts:
        return shipped
    near = get_close_matches(name.removesuffix(".yaml"), shipped_configs(), n=1)
    hint = f": did you mean {near[0]}?" if near else "; see `maepretrain configs`"
    raise UserError(f"no config file {name} and no shipped config of that name{hint}")


def shipped_configs() -> list[str]:
    """Names of the shipped configurations."""
    folder = configs_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
