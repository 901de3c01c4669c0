"""The command line: `maepretrain VERB ...`. A verb imports what is heavy when it runs."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path

from maepretrain import __version__
from maepretrain.parsing import (
    UserError,
    configs_folder,
    make_parser,
    one_line,
    parse,
    shipped_configs,
)
from maepretrain.training import preemption

USAGE = """\
maepretrain VERB [OPTIONS]     pretrain masked autoencoders from WebDataset shards

  quickstart                   pretrain on handwritten digits and see that it learnt (minutes)
  shards write SRC DST         make tar shards from an image folder, a torchvision set or IDX files
  shards index PATTERN...      make the index beside each shard
  shards check PATTERN...      find what is wrong with shards before a run does
  shards order PATTERN...      print the samples that a rank will read
  pretrain -c CONFIG           pretrain a model on shards
  plan -c CONFIG               memory, speed and length of a run before it is submitted
  probe --encoder RUN          linear probe on the features of a pretrained encoder
  knn --encoder RUN            k-nearest-neighbour classification of the same features
  finetune --encoder RUN       train the encoder and a classifier on labels
  embed --encoder RUN          write the features of images, with their keys, to a file; draw a map
  search --index FILE          images of such a file that are most like a query
  reconstruct --encoder RUN    draw images, what the model saw of them, and what it made of that
  denoise --encoder RUN        clean noisy images
  generate sample              draw images from a generative model
  generate interpolate         draw the way from one image to another through the code
  generate traverse            draw what single numbers of the code change
  compare -c CONFIG...         train several models for equal CPU time, and judge them alike
  checkpoint consolidate RUN   one file of a run's weights, whatever engine divided them
  export --encoder RUN         the encoder for timm, Hugging Face or the official code
  compress --encoder RUN       a fine-tuned encoder in a tenth of its bytes or less
  codec encode|decode          write an image into a small file by a compression run, and read it
  status RUN...                how far runs are, from their folders alone
  report RUN... --out PAGE     one HTML page of runs: curves, pictures, figures, configuration

  An encoder is a RUN folder, a file of weights, or timm:NAME.

  maepretrain VERB --help      the options of a verb
  maepretrain configs          the shipped configurations, for -c NAME
  maepretrain --version"""


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
    from maepretrain.workflows.quickstart import quickstart

    parser = make_parser("quickstart")
    parser.add_function_arguments(quickstart)
    return quickstart(**parse(parser, argv))


def _shards(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print("maepretrain shards write SRC DST | index|check|order PATTERN...   (--help for each)")
        return 0
    if not argv or argv[0] not in ("write", "index", "check", "order"):
        raise UserError("shards needs one of: write, index, check, order")
    from maepretrain.data import commands

    verb = getattr(commands, argv[0])
    parser = make_parser(f"shards {argv[0]}")
    if argv[0] != "write":
        parser.add_argument("patterns", nargs="+", type=str, help="shards: braces, globs or files")
    parser.add_function_arguments(verb, as_positional=argv[0] == "write", skip={"patterns"})
    return verb(**parse(parser, argv[1:]))


def _pretrain(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.workflows.pretrain import pretrain_command

    return pretrain_command(argv)


def _plan(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.planning.plan import plan_command

    return plan_command(argv)


def _probe(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.evaluate.probe import probe_command

    return probe_command(argv)


def _knn(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.evaluate.knn import knn_command

    return knn_command(argv)


def _embed(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.apply.embed import embed_command

    return embed_command(argv)


def _search(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.apply.search import search_command

    return search_command(argv)


def _reconstruct(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.apply.reconstruct import reconstruct_command

    return reconstruct_command(argv)


def _denoise(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.apply.denoise import denoise_command

    return denoise_command(argv)


def _generate(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print("maepretrain generate sample|interpolate|traverse   (--help for each)")
        return 0
    if not argv or argv[0] not in ("sample", "interpolate", "traverse"):
        raise UserError("generate needs one of: sample, interpolate, traverse")
    check_torch_pair()
    from maepretrain.apply.generate import generate_command

    return generate_command(argv[0], argv[1:])


def _finetune(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.evaluate.finetune import finetune_command

    return finetune_command(argv)


def _export(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.apply.export import export_command

    return export_command(argv)


def _compress(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.compression.compress import compress_command

    return compress_command(argv)


def _checkpoint(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print("maepretrain checkpoint consolidate RUN   (--help for its options)")
        return 0
    if not argv or argv[0] != "consolidate":
        raise UserError("checkpoint needs: consolidate RUN")
    check_torch_pair()
    from maepretrain.checkpoints.consolidate import consolidate

    parser = make_parser("checkpoint consolidate", config=False)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_function_arguments(consolidate, skip={"run"})
    return consolidate(**parse(parser, argv[1:]))


def _compare(argv: list[str]) -> int:
    check_torch_pair()
    from maepretrain.workflows.compare import compare_command

    return compare_command(argv)


def _codec(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print("maepretrain codec encode|decode --encoder RUN IN OUT   (--help for each)")
        return 0
    if not argv or argv[0] not in ("encode", "decode"):
        raise UserError("codec needs one of: encode, decode")
    check_torch_pair()
    from maepretrain.compression.codec import codec_command

    return codec_command(argv[0], argv[1:])


def _status(argv: list[str]) -> int:
    from maepretrain.runs.status import status

    parser = make_parser("status", config=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_function_arguments(status, skip={"runs"})
    return status(**parse(parser, argv))


def _report(argv: list[str]) -> int:
    from maepretrain.report.page import report

    parser = make_parser("report", config=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, shown side by side")
    parser.add_function_arguments(report, skip={"runs"})
    return report(**parse(parser, argv))


def _configs(argv: list[str]) -> int:
    for name in shipped_configs():
        first = (configs_folder() / f"{name}.yaml").read_text().splitlines()[0]
        print(f"{name:<32} {first.removeprefix('# ')}")
    return 0


_LONG = re.compile("--[A-Za-z]").match

VERBS: dict[str, Callable[[list[str]], int]] = {
    "quickstart": _quickstart,
    "shards": _shards,
    "pretrain": _pretrain,
    "plan": _plan,
    "probe": _probe,
    "knn": _knn,
    "embed": _embed,
    "search": _search,
    "reconstruct": _reconstruct,
    "denoise": _denoise,
    "generate": _generate,
    "finetune": _finetune,
    "compare": _compare,
    "checkpoint": _checkpoint,
    "export": _export,
    "compress": _compress,
    "codec": _codec,
    "status": _status,
    "report": _report,
    "configs": _configs,
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0, 1 (a check failed), 2 (a mistake in what was asked), 75 (SLURM took the nodes: try again)
        or 130 (stopped).

    Anything that a user can get wrong is a ValueError or an OSError below, and one line here.
    MAEPRETRAIN_TRACEBACK=1 shows where it came from.
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
        saves = argv[0] in ("pretrain", "finetune")
        with preemption.listener.listening() if saves else nullcontext():
            return VERBS[argv[0]]([_underscored(word) for word in argv[1:]])
    except preemption.Preempted:
        return preemption.TRY_AGAIN
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("MAEPRETRAIN_TRACEBACK"):
            traceback.print_exc()
        line = f"maepretrain: error: {one_line(str(error))}"
        print(line, file=sys.stderr)
        _leave_word(line)
        return 2
    except KeyboardInterrupt:
        print("maepretrain: stopped", file=sys.stderr)
        return 130
    except Exception:
        _leave_word(traceback.format_exc())
        raise


def _leave_word(why: str) -> None:
    """Why this rank failed, for its job script, which prints the first one's last."""
    folder = os.environ.get("MAEPRETRAIN_ERRORS")
    if folder:
        with suppress(OSError):  # the folder may be what fails
            path = Path(folder) / f"rank-{os.environ.get('SLURM_PROCID', '0')}.txt"
            path.write_text(why.rstrip() + "\n")


def _underscored(word: str) -> str:
    """`--global-batch=64` as `--global_batch=64`: options may be written either way."""
    if not _LONG(word):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def console() -> None:
    """Entry point of the `maepretrain` script."""
    sys.exit(main())
