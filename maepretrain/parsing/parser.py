"""Parsers whose help is short, whose errors are one line, and which know configs by name.

jsonargparse is imported inside: `maepretrain --help` does not wait for it.
"""

from typing import Any

from maepretrain.parsing.errors import UserError


def make_parser(verb: str, config: bool = True) -> Any:
    """A jsonargparse parser whose errors are one line; with `-c` for its options, unless `config`
    is False."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    from maepretrain.parsing.configs import find_config
    from maepretrain.parsing.help import help_text
    from maepretrain.parsing.suggestions import explained

    class OneLineParser(ArgumentParser):
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
                if word in ("-h", "--help"):
                    following = self._argv[number + 1 : number + 2]
                    about = following[0] if following and following[0][0] != "-" else None
                    print(help_text(self, self._argv, about))
                    raise SystemExit(0)

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
    from maepretrain.parsing.jsonargparse_internals import actions_of, type_of

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
