"""All that maepretrain relies on of jsonargparse and argparse beyond their public names.

`tests/parsing/test_jsonargparse_internals.py` holds what is relied on.
"""

from typing import Any

from jsonargparse import ArgumentParser

# The action of `--config`, which is called with the path; jsonargparse does not export it.
from jsonargparse._actions import ActionConfigFile

__all__ = ["ActionConfigFile", "actions_of", "type_of"]


def actions_of(parser: ArgumentParser) -> list[Any]:
    """The options of a parser in the order of their declaration: argparse's `_actions`, which have
    `dest`, `option_strings`, `help`, `default`, `nargs` and `const`."""
    return list(parser._actions)


def type_of(action: Any) -> Any:
    """The type hint of an option, None where it has none."""
    return getattr(action, "_typehint", None) or action.type
