"""The options of a parser as data: for the help, and for errors that name the nearest one."""

from argparse import SUPPRESS
from typing import Any, NamedTuple, get_args

import yaml
from jsonargparse import ArgumentParser

from maepretrain.parsing.configs import find_config
from maepretrain.parsing.jsonargparse_internals import actions_of, type_of


class Option(NamedTuple):
    """An option as the help shows it.

    Args:
        name: with its section, `optim.base_lr`.
        flags: as they are typed, `--optim.base_lr`; of a positional argument its name.
        section: the first part of the name where that is a section, otherwise empty.
        type: of its values.
        default: as text; empty where there is none.
        text: the description.
    """

    name: str
    flags: str
    section: str
    type: str
    default: str
    text: str


def options_of(parser: Any, argv: list[str]) -> list[Option]:
    """All options of a parser; of a class that the command line or a config names, its arguments
    too.

    Args:
        parser: a OneLineParser, whose `classes` an option takes.
        argv: the command line.
    """
    options = [_option(action) for action in actions_of(parser) if _is_shown(action)]
    for name, classes in parser.classes.items():
        chosen = classes[chosen_class(parser, name, argv)]
        options += _options_of_class(name, chosen, parser.linked)
    return options


def _options_of_class(name: str, chosen: type, linked: tuple[str, ...]) -> list[Option]:
    """The arguments of a class, but for those that other options give."""
    inside = ArgumentParser(exit_on_error=False)
    inside.add_class_arguments(chosen, name, instantiate=False)
    elsewhere = {f"{name}.{target}" for target in linked}
    options = []
    for action in actions_of(inside):
        if _is_shown(action) and action.dest not in elsewhere:
            options.append(_option(action))
    return options


def chosen_class(parser: Any, name: str, argv: list[str]) -> str:
    """Name of the class that the command line or a config gives to an option, else the first."""
    classes = parser.classes[name]
    named = _named_class(name, argv)
    if named in classes:
        return named
    return next(iter(classes))


def _is_shown(action: Any) -> bool:
    if action.dest == "help" or action.dest.endswith(".help"):
        return False
    # A section as a whole can be given as a file; its options say more.
    is_section = "." not in action.dest and type(action).__name__ == "_ActionConfigLoad"
    return not is_section


def _option(action: Any) -> Option:
    section = ""
    if "." in action.dest:
        section = action.dest.partition(".")[0]
    # "--data.train+" appends to a list; it is the same option.
    flags = ", ".join(flag for flag in action.option_strings if not flag.endswith("+"))
    default = ""
    if action.default not in (None, SUPPRESS):
        default = _plain(action.default)
    text = " ".join((action.help or "").replace("%%", "%").split())
    kind = _type_name(type_of(action))
    return Option(action.dest, flags or action.dest, section, kind, default, text)


def _plain(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return str(value)


def _type_name(kind: Any) -> str:
    """A type hint in words: `int or null`."""
    if kind is None:
        return ""
    if kind is type(None):
        return "null"
    arguments = get_args(kind)
    origin = getattr(kind, "__origin__", None)
    name = getattr(kind, "__name__", str(kind))
    if str(kind).startswith("typing.Literal"):
        return "|".join(str(value) for value in arguments)
    if origin in (list, tuple, dict):
        return str(kind).replace("typing.", "")
    if arguments:
        return " or ".join(_type_name(argument) for argument in arguments)
    return {"Path": "path", "Module": "class"}.get(name, name)


def _named_class(option: str, argv: list[str]) -> str:
    """The class that options or configs name, the last one winning; without its module."""
    named = ""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if not equals:
            value = following
        if flag in (f"--{option}", f"--{option}.class_path"):
            named = value
        elif flag in ("-c", "--config"):
            named = _class_in(find_config(value).read_text(), option) or named
    return named.rpartition(".")[2]


def _class_in(text: str, option: str) -> str:
    try:
        section = (yaml.safe_load(text) or {}).get(option)
    except (yaml.YAMLError, AttributeError):
        return ""  # the parser says what is wrong with it
    if isinstance(section, dict):
        section = section.get("class_path")
    return str(section or "")
