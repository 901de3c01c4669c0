"""Parsers whose help is short, whose errors are one line, and which know configs by name."""

from typing import Any

from jsonargparse import ArgumentParser

from maepretrain.parsing.configs import find_config
from maepretrain.parsing.errors import UserError
from maepretrain.parsing.help import help_text
from maepretrain.parsing.jsonargparse_internals import ActionConfigFile, actions_of, type_of
from maepretrain.parsing.suggestions import explained

HELP = ("-h", "--help")


class OneLineParser(ArgumentParser):
    """jsonargparse's parser with help of our own, and errors in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Options of older versions, and their names now.
        self.moved: dict[str, str] = {}
        # Classes that an option takes, by the option: their names, and they themselves.
        self.classes: dict[str, dict[str, type]] = {}
        # Arguments of these classes that other options give.
        self.linked: tuple[str, ...] = ()
        self._argv: list[str] = []

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        raise UserError(explained(message, self, self._argv)) from ex

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if args is not None:
            self._argv = [str(word) for word in args]
            self._answer_help()
        return super().parse_args(args, *rest, **kwargs)

    def _answer_help(self) -> None:
        """Print the help that is asked for, and leave."""
        for number, word in enumerate(self._argv):
            if word not in HELP:
                continue
            about = None
            following = self._argv[number + 1 : number + 2]
            if following and not following[0].startswith("-"):
                about = following[0]
            print(help_text(self, self._argv, about))
            raise SystemExit(0)


class ConfigByName(ActionConfigFile):
    """`-c`: a file, or a shipped configuration by name."""

    def __call__(self, parser: Any, cfg: Any, value: Any, option: str | None = None) -> None:
        super().__call__(parser, cfg, str(find_config(value)), option)


def make_parser(verb: str, config: bool = True) -> Any:
    """A parser for a verb; with `-c` for its options, unless `config` is False."""
    parser = OneLineParser(prog=f"maepretrain {verb}")
    if config:
        words = "a YAML file or a shipped config; later ones win"
        parser.add_argument("-c", "--config", action=ConfigByName, help=words)
    return parser


def allow_bare_flags(parser: Any) -> None:
    """Let `--resume` stand for `--resume true`."""
    for action in actions_of(parser):
        if type_of(action) is bool:
            action.nargs = "?"
            action.const = True


def parse(parser: Any, argv: list[str]) -> dict[str, Any]:
    """The options of a verb as the arguments of its function."""
    allow_bare_flags(parser)
    arguments = parser.instantiate(parser.parse_args(argv)).as_dict()
    arguments.pop("config", None)
    return arguments
