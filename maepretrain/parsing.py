"""Options and configurations: parsers whose errors are one line, and configs found by name.

jsonargparse is imported inside: `maepretrain --help` does not wait for it.
"""

from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in what was asked, already put into one line."""


def configs_folder() -> Path:
    """Where the shipped configurations lie: inside the wheel, or at the root of a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def find_config(name: str) -> Path:
    """A file as given, or a shipped configuration by name (`mae/digits`).

    Raises:
        UserError: neither exists.
    """
    given, shipped = Path(name), configs_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if given.is_file():
        return given
    if shipped.is_file() and not given.is_absolute() and ".." not in given.parts:
        return shipped
    raise UserError(
        f"no config file {name} and no shipped config of that name; see `maepretrain configs`"
    )


def shipped_configs() -> list[str]:
    """Names of the shipped configurations."""
    folder = configs_folder()
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def one_line(message: str) -> str:
    """The message in one line, without the traceback that a loader process puts before it."""
    if message.startswith("Caught ") and "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


def make_parser(verb: str, config: bool = True) -> Any:
    """A jsonargparse parser whose errors are one line; with `-c` for its options, unless `config`
    is False."""
    from jsonargparse import ArgumentParser
    from jsonargparse._actions import ActionConfigFile

    class OneLineParser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
            raise UserError(one_line(message)) from ex

    class ConfigByName(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, value: Any, option: str | None = None) -> None:
            super().__call__(parser, cfg, str(find_config(value)), option)

    parser = OneLineParser(prog=f"maepretrain {verb}")
    if config:
        words = "a YAML file or a shipped config; later ones win"
        parser.add_argument("-c", "--config", action=ConfigByName, help=words)
    return parser


def allow_bare_flags(parser: Any) -> None:
    """Let `--resume` stand for `--resume true`."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True


def parse(parser: Any, argv: list[str]) -> dict[str, Any]:
    """The options of a verb as the arguments of its function."""
    allow_bare_flags(parser)
    arguments = parser.instantiate(parser.parse_args(argv)).as_dict()
    arguments.pop("config", None)
    return arguments
