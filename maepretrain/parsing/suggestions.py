"""Errors of a parser in one line that says how it should have been: the nearest option or class,
or the name that an option of an older version has now."""

import re
from difflib import get_close_matches
from typing import Any

from maepretrain.parsing.errors import one_line
from maepretrain.parsing.options import options_of

UNKNOWN_OPTION = re.compile(r"unrecognized arguments: --([\w.-]+)", re.IGNORECASE)
UNKNOWN_IN_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '(\w+)'")
# A single value where older versions had an option and this one has a section.
NO_SECTION = re.compile(r'Parser key "([\w.]+)": Unable to load config')
UNKNOWN_KEY = re.compile(r"Option '([\w.]+)' is not accepted")
UNKNOWN_CLASS = re.compile(r'Parser key "([\w.]+)": Expected a dot import path string: (\S+)')


def explained(message: str, parser: Any, argv: list[str]) -> str:
    """The error of a parser, explained.

    Args:
        message: of jsonargparse.
        parser: `moved` has the new names of old options, `classes` the classes of an option.
        argv: the command line.
    """
    message = one_line(message)
    wrong_class = UNKNOWN_CLASS.search(message)
    if wrong_class and wrong_class[1] in parser.classes:
        option, name = wrong_class.groups()
        return f"no {option} {name}{_nearest(name, list(parser.classes[option]))}"
    name, dashes = _unknown_name(message)
    no_section = NO_SECTION.search(message)
    if no_section and no_section[1] in parser.moved:
        name = no_section[1]
    if not name:
        return re.sub(r"<class '([\w.]+)'>", r"\1", message)
    if name in parser.moved:
        return f"{dashes}{name} is now {dashes}{parser.moved[name]}"
    known = [option.name for option in options_of(parser, argv)]
    if "." not in name:
        # A key of a class, whose section the message leaves out.
        ends: dict[str, str] = {}
        for option in known:
            ends.setdefault(option.rpartition(".")[2], option)
        near = get_close_matches(name, ends, n=1)
        if near:
            return f"no option {dashes}{name}: did you mean {dashes}{ends[near[0]]}?"
    return f"no option {dashes}{name}{_nearest(name, known, dashes)}"


def _unknown_name(message: str) -> tuple[str, str]:
    """The option that the message does not know, and the dashes with which it was typed."""
    typed = UNKNOWN_OPTION.search(message)
    if typed:
        return typed[1].replace("-", "_"), "--"
    in_group = UNKNOWN_IN_GROUP.search(message)
    if in_group:
        return f"{in_group[1]}.{in_group[2]}", ""
    key = UNKNOWN_KEY.search(message)
    if key:
        return key[1], ""
    return "", ""


def _nearest(name: str, known: list[str], dashes: str = "") -> str:
    near = get_close_matches(name, known, n=1)
    if near:
        return f": did you mean {dashes}{near[0]}?"
    return "; --help WORD finds options by name or text"
