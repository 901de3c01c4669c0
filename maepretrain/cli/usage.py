"""The usage of the command line, and errors about verbs; made from the table of verbs."""

from difflib import get_close_matches

from maepretrain.cli.verbs import VERBS, Verb
from maepretrain.parsing.errors import UserError

HEAD = "maepretrain VERB [OPTIONS]     pretrain masked autoencoders from WebDataset shards\n"
FOOT = """
  An encoder is a RUN folder, a file of weights, or timm:NAME.

  maepretrain VERB --help         the options of a verb that matter; --help all, --help WORD
  maepretrain --version"""


def usage() -> str:
    """A line for each verb."""
    lines = [f"  {verb.words + ' ' + verb.arguments:<31} {verb.text}" for verb in VERBS]
    return "\n".join([HEAD, *lines, FOOT])


def family_usage(name: str) -> str:
    """A line for each verb of a family, such as `shards`."""
    return "\n".join(
        f"maepretrain {verb.words} {verb.arguments:<14} {verb.text}" for verb in _family(name)
    )


def is_family(name: str) -> bool:
    """A first word that needs a second one."""
    return bool(_family(name))


def find_verb(words: list[str]) -> Verb:
    """The verb of a command line.

    Raises:
        UserError: there is none; the nearest is named.
    """
    first = words[0]
    if is_family(first):
        for verb in _family(first):
            if verb.words.split() == words[:2]:
                return verb
        seconds = [verb.words.split()[1] for verb in _family(first)]
        raise UserError(f"{first} needs one of: {', '.join(seconds)}")
    for verb in VERBS:
        if verb.words == first:
            return verb
    names = list(dict.fromkeys(verb.words.split()[0] for verb in VERBS))
    near = get_close_matches(first, names, n=1)
    if near:
        raise UserError(f"no verb {first}: did you mean {near[0]}?")
    raise UserError(f"no verb {first}: take one of {', '.join(names)}")


def _family(name: str) -> list[Verb]:
    return [verb for verb in VERBS if " " in verb.words and verb.words.split()[0] == name]
