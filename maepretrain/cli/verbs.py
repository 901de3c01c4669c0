"""The verbs of the command line, each said once: the usage, the dispatch and the errors are made
from this table. A new verb is a function, and a line here."""

from typing import NamedTuple


class Verb(NamedTuple):
    """A verb, or one of the verbs of a family (`shards write`).

    Args:
        words: that are typed.
        arguments: the ones that matter, for the usage.
        text: a line of help.
        function: `module:name`. A name that ends with `_command` gets the command line, and before
            it the second word where there is one. Of any other the signature is the command line.
        positional: arguments of such a function that are typed without their name, and their help.
        config: such a function takes `-c` too.
        needs_torch: whether the installed pair of torch and torchvision is checked first.
        saves: listens for requests to stop from the start, since it can save a checkpoint.
    """

    words: str
    arguments: str
    text: str
    function: str
    positional: tuple[tuple[str, str], ...] = ()
    config: bool = False
    needs_torch: bool = True
    saves: bool = False


_SHARDS = "maepretrain.data.commands"
_PATTERNS = (("patterns", "shards: braces (a-{000..011}.tar), globs or files"),)
_GENERATE = "maepretrain.apply.generate:generate_command"
_CODEC = "maepretrain.compression.codec:codec_command"

VERBS = (
    Verb(
        "quickstart",
        "",
        "pretrain on handwritten digits and see that it learnt (minutes)",
        "maepretrain.workflows.quickstart:quickstart",
        config=True,
    ),
    Verb(
        "shards write",
        "SRC DST",
        "make tar shards from an image folder, a torchvision set or IDX files",
        f"{_SHARDS}:write",
        positional=(
            ("src", "folder of images, arrays, texts or IDX files, or torchvision:NAME"),
            ("dst", "folder of the shards"),
        ),
        config=True,
        needs_torch=False,
    ),
    Verb(
        "shards index",
        "PATTERN...",
        "make the index beside each shard",
        f"{_SHARDS}:index",
        positional=_PATTERNS,
        config=True,
        needs_torch=False,
    ),
    Verb(
        "shards check",
        "PATTERN...",
        "find what is wrong with shards before a run does",
        f"{_SHARDS}:check",
        positional=_PATTERNS,
        config=True,
        needs_torch=False,
    ),
    Verb(
        "shards order",
        "PATTERN...",
        "print the samples that a rank will read",
        f"{_SHARDS}:order",
        positional=_PATTERNS,
        config=True,
        needs_torch=False,
    ),
    Verb(
        "pretrain",
        "-c CONFIG",
        "pretrain a model on shards",
        "maepretrain.workflows.pretrain:pretrain_command",
        saves=True,
    ),
    Verb(
        "plan",
        "-c CONFIG",
        "memory, speed and length of a run before it is submitted",
        "maepretrain.planning.plan:plan_command",
    ),
    Verb(
        "probe",
        "--encoder RUN",
        "linear probe on the features of a pretrained encoder",
        "maepretrain.evaluate.probe:probe_command",
    ),
    Verb(
        "knn",
        "--encoder RUN",
        "k-nearest-neighbour classification of the same features",
        "maepretrain.evaluate.knn:knn_command",
    ),
    Verb(
        "finetune",
        "--encoder RUN",
        "train the encoder and a classifier on labels",
        "maepretrain.evaluate.finetune_command:finetune_command",
        saves=True,
    ),
    Verb(
        "embed",
        "--encoder RUN",
        "write the features of images, with their keys, to a file; draw a map",
        "maepretrain.apply.embed:embed_command",
    ),
    Verb(
        "search",
        "--index FILE",
        "images of such a file that are most like a query",
        "maepretrain.apply.search:search_command",
    ),
    Verb(
        "reconstruct",
        "--encoder RUN",
        "draw images, what the model saw of them, and what it made of that",
        "maepretrain.apply.reconstruct:reconstruct_command",
    ),
    Verb(
        "denoise",
        "--encoder RUN",
        "clean noisy images",
        "maepretrain.apply.denoise:denoise_command",
    ),
    Verb("generate sample", "--encoder RUN", "draw images from a generative model", _GENERATE),
    Verb(
        "generate interpolate",
        "--encoder RUN",
        "draw the way from one image to another through the code",
        _GENERATE,
    ),
    Verb(
        "generate traverse",
        "--encoder RUN",
        "draw what single numbers of the code change",
        _GENERATE,
    ),
    Verb(
        "compare",
        "-c CONFIG...",
        "train several models for equal CPU time, and judge them alike",
        "maepretrain.workflows.compare:compare_command",
    ),
    Verb(
        "checkpoint consolidate",
        "RUN",
        "one file of a run's weights, whatever strategy divided them",
        "maepretrain.checkpoints.consolidate:consolidate",
        positional=(("run", "the run folder"),),
    ),
    Verb(
        "export",
        "--encoder RUN",
        "the encoder for timm, Hugging Face or the official code",
        "maepretrain.apply.export:export_command",
    ),
    Verb(
        "compress",
        "--encoder RUN",
        "a fine-tuned encoder in a tenth of its bytes or less",
        "maepretrain.compression.compress:compress_command",
    ),
    Verb("codec encode", "IMAGE OUT", "write an image into a small file", _CODEC),
    Verb("codec decode", "FILE OUT", "read such a file", _CODEC),
    Verb(
        "status",
        "RUN...",
        "how far runs are, from their folders alone",
        "maepretrain.runs.status:status",
        positional=(("runs", "run folders"),),
        needs_torch=False,
    ),
    Verb(
        "report",
        "RUN... --out PAGE",
        "one HTML page of runs: curves, pictures, figures, configuration",
        "maepretrain.report.page:report",
        positional=(("runs", "run folders"),),
        needs_torch=False,
    ),
    Verb(
        "configs",
        "",
        "the shipped configurations, for -c NAME",
        "maepretrain.cli.main:configs_command",
        needs_torch=False,
    ),
)
