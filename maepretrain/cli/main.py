"""The command line: `maepretrain VERB ...`. A verb imports what is heavy when it runs."""

import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import get_args

from maepretrain import __version__
from maepretrain.cli.usage import family_usage, find_verb, is_family, usage
from maepretrain.cli.verbs import Verb
from maepretrain.parsing.configs import configs_folder, shipped_configs
from maepretrain.parsing.errors import UserError, one_line
from maepretrain.training import preemption

HELP = ("-h", "--help")
_LONG_OPTION = re.compile("--[A-Za-z]")


def console() -> None:
    """Entry point of the `maepretrain` script."""
    sys.exit(main())


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0, 1 (a check failed), 2 (a mistake in what was asked), 75 (SLURM took the nodes: try again)
        or 130 (stopped).

    Anything that a user can get wrong is a ValueError or an OSError below, and one line here.
    MAEPRETRAIN_TRACEBACK=1 shows where it came from.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in (*HELP, "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if is_family(words[0]) and words[1:2] and words[1] in HELP:
        print(family_usage(words[0]))
        return 0
    try:
        verb = find_verb(words)
        options = words[len(verb.words.split()) :]
        with preemption.listener.listening() if verb.saves else nullcontext():
            return run(verb, [_underscored(word) for word in options])
    except preemption.Preempted:
        return preemption.TRY_AGAIN
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("MAEPRETRAIN_TRACEBACK"):
            traceback.print_exc()
        line = f"maepretrain: error: {one_line(str(error))}"
        print(line, file=sys.stderr)
        _write_for_job_script(line)
        return 2
    except KeyboardInterrupt:
        print("maepretrain: stopped", file=sys.stderr)
        return 130
    except Exception:
        _write_for_job_script(traceback.format_exc())
        raise


def run(verb: Verb, argv: list[str]) -> int:
    """Import the function of a verb and call it with the command line."""
    if verb.needs_torch:
        check_torch_pair()
    if any(word in HELP for word in argv):
        print(f"maepretrain {verb.words} {verb.arguments}     {verb.text}\n")
    module, _, name = verb.function.partition(":")
    function = getattr(import_module(module), name)
    if not name.endswith("_command"):
        return _call_by_signature(verb, function, argv)
    second = verb.words.split()[1:]
    return function(*second, argv)


def _call_by_signature(verb: Verb, function: Callable[..., int], argv: list[str]) -> int:
    """Call a function whose signature is the command line."""
    # jsonargparse takes a while to import: `maepretrain --help` does not wait for it.
    from maepretrain.parsing.parser import make_parser, parse

    parser = make_parser(verb.words, config=verb.config)
    parameters = inspect.signature(function).parameters
    for name, text in verb.positional:
        kind = parameters[name].annotation
        if get_args(kind):
            parser.add_argument(name, nargs="+", type=get_args(kind)[0], help=text)
        else:
            parser.add_argument(name, type=kind, help=text)
    parser.add_function_arguments(function, skip={name for name, _ in verb.positional})
    return function(**parse(parser, argv))


def check_torch_pair() -> None:
    """Refuse a torch that torchvision was not built against: it fails later, and obscurely.

    Raises:
        UserError: the installed pair does not belong together.
    """
    from packaging.requirements import Requirement

    installed = metadata.version("torch")
    for line in metadata.requires("torchvision") or []:
        requirement = Requirement(line)
        if requirement.name != "torch":
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            raise UserError(
                f"torchvision {metadata.version('torchvision')} was built for "
                f"torch{requirement.specifier}, but torch {installed} is installed; install a "
                "pair, such as torch==2.14.1 torchvision==0.29.1"
            )


def configs_command(argv: list[str]) -> int:
    """The verb `configs`: the shipped configurations by folder, each with its first line."""
    del argv
    last_folder = ""
    for name in shipped_configs():
        folder, _, short = name.rpartition("/")
        if folder != last_folder:
            print(f"{folder}/")
        last_folder = folder
        first = (configs_folder() / f"{name}.yaml").read_text().splitlines()[0]
        print(f"  {short:<24} {first.removeprefix('# ')}")
    return 0


def _write_for_job_script(why: str) -> None:
    """Write why this rank failed into a file, for its job script, which prints the first one's
    last."""
    folder = os.environ.get("MAEPRETRAIN_ERRORS")
    if not folder:
        return
    with suppress(OSError):  # the folder may be what fails
        path = Path(folder) / f"rank-{os.environ.get('SLURM_PROCID', '0')}.txt"
        path.write_text(why.rstrip() + "\n")


def _underscored(word: str) -> str:
    """`--global-batch=64` as `--global_batch=64`: options may be written either way."""
    if not _LONG_OPTION.match(word):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
