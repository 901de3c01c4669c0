"""The command line: `maepretrain VERB ...`. What is heavy is imported only inside the verb that
needs it."""

import os
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from maepretrain import __version__

USAGE = """\
maepretrain VERB [OPTIONS]     self-supervised pretraining of masked autoencoders from WebDataset
shards

  quickstart                   pretrain on handwritten digits and see that it learnt (3 minutes, no
  data needed)
  shards write SRC DST         make tar shards from an image folder, a torchvision set or IDX files
  shards index PATTERN...      make the index beside each shard
  pretrain -c CONFIG           pretrain a model on shards
  probe --encoder RUN          linear probe and k-NN on the features of a pretrained encoder
  finetune --encoder RUN       train the encoder and a classifier on labels

  maepretrain VERB --help      the options of a verb
  maepretrain configs          the shipped configurations, for -c NAME
  maepretrain --version"""


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


def check_torch_pair() -> None:
    """Refuse a torch that torchvision was not built against: it fails later, and obscurely.

    Raises:
        UserError: the installed pair does not belong together.
    """
    from packaging.requirements import Requirement

    installed = metadata.version("torch")
    for line in metadata.requires("torchvision") or []:
        requirement = Requirement(line)
        if requirement.name == "torch" and not requirement.specifier.contains(
            installed, prereleases=True
        ):
            raise UserError(
                f"torchvision {metadata.version('torchvision')} was built for "
                f"torch{requirement.specifier}, "
                f"but torch {installed} is installed; install a pair, such as torch==2.14.1 "
                "torchvision==0.29.1"
            )


def _quickstart(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.quickstart import quickstart

    parser = _parser("quickstart")
    parser.add_function_arguments(quickstart)
    return quickstart(**_parsed(parser, argv))


def _shards(argv: list[str]) -> int:
    if not argv or argv[0] not in ("write", "index"):
        raise UserError("shards needs one of: write, index")
    from maepretrain.data import commands

    verb = getattr(commands, argv[0])
    parser = _parser(f"shards {argv[0]}")
    if argv[0] == "index":
        parser.add_argument("patterns", nargs="+", type=str, help="shards: braces, globs or files")
    parser.add_function_arguments(verb, as_positional=True, skip={"patterns"})
    return verb(**_parsed(parser, argv[1:]))


def _pretrain(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.experiments import pretrain_command

    return pretrain_command(_parser("pretrain"), argv)


def _probe(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.evaluate.table import probe

    parser = _parser("probe")
    parser.add_function_arguments(probe)
    probe(**_parsed(parser, argv))
    return 0


def _finetune(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.experiments import finetune_command

    return finetune_command(_parser("finetune"), argv)


def _configs(argv: list[str]) -> int:
    for name in shipped_configs():
        first = (configs_folder() / f"{name}.yaml").read_text().splitlines()[0]
        print(f"{name:<32} {first.removeprefix('# ')}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "quickstart": _quickstart,
    "shards": _shards,
    "pretrain": _pretrain,
    "probe": _probe,
    "finetune": _finetune,
    "configs": _configs,
}


def _parser(verb: str) -> Any:
    """A jsonargparse parser whose errors are one line."""
    from jsonargparse import ArgumentParser
    from jsonargparse._actions import ActionConfigFile

    class OneLineParser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
            raise UserError(_one_line(message)) from ex

    class ConfigByName(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, value: Any, option: str | None = None) -> None:
            super().__call__(parser, cfg, str(find_config(value)), option)

    parser = OneLineParser(prog=f"maepretrain {verb}")
    parser.add_argument(
        "-c",
        "--config",
        action=ConfigByName,
        help="a YAML file or a shipped config; later ones win",
    )
    return parser


def allow_bare_flags(parser: Any) -> None:
    """Let `--resume` stand for `--resume true`."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True


def _parsed(parser: Any, argv: list[str]) -> dict[str, Any]:
    allow_bare_flags(parser)
    arguments = parser.instantiate(parser.parse_args(argv)).as_dict()
    arguments.pop("config", None)
    return arguments


def _one_line(message: str) -> str:
    """The message in one line; of an error that a loader process sent along with its traceback, the
    error."""
    if message.startswith("Caught ") and "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code is 0, 1 (a check failed), 2 (a mistake in what was asked) or 130
    (stopped).

    Anything that a user can get wrong is a ValueError or an OSError below, and one line here.
    MAEPRETRAIN_TRACEBACK=1 shows where it
    came from.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    try:
        if argv[0] not in VERBS:
            raise UserError(f"no verb {argv[0]}: take one of {', '.join(VERBS)}")
        return VERBS[argv[0]](argv[1:])
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("MAEPRETRAIN_TRACEBACK"):
            traceback.print_exc()
        print(f"maepretrain: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("maepretrain: stopped", file=sys.stderr)
        return 130


def console() -> None:
    """Entry point of the `maepretrain` script."""
    sys.exit(main())
