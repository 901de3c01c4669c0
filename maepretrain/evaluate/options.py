"""Options of evaluations: the section data starts from the run of the encoder."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentParser

from maepretrain.checkpoints.run_config import locate, read_mapping, run_of
from maepretrain.data.module import add_data
from maepretrain.data.settings import translated, without
from maepretrain.parsing.configs import find_config
from maepretrain.ranks import details_to

# Keys of a run's data that only its training uses: an evaluation shows every image once.
TRAINING_ONLY = (
    "global_batch",
    "max_errors",
    "low_resolution",
    "crop.per_image",
    "order.seed",
    "order.streams",
    "order.block",
    "order.tail",
)


def evaluation_parser(
    parser: ArgumentParser, function: Callable[..., Any], skip: Iterable[str] = ()
) -> ArgumentParser:
    """Options of an evaluation: those of `function`, which has an argument `encoder`, and the
    section `data`, whose values start from the encoder's run where there is one."""
    parser.add_function_arguments(function, skip={"data", "config", *skip})
    add_data(parser)
    # An evaluation has no training batches, which could be larger than the set.
    parser.set_defaults({"data.global_batch": 1})
    return data_of_encoder(parser, TRAINING_ONLY)


def add_verbose(parser: ArgumentParser) -> None:
    """Add `--verbose` to the options of an evaluation's verb."""
    parser.add_argument(
        "--verbose", type=bool, default=False, help="print the settings that are applied, too"
    )


def details(*, shown: bool) -> AbstractContextManager[None]:
    """A context in which details are printed, or not."""
    return nullcontext() if shown else details_to(Path(os.devnull))


def data_of_encoder(
    parser: ArgumentParser, skip: Sequence[str] = ("order.seed",), also: Sequence[str] = ()
) -> ArgumentParser:
    """Let the section `data` start from the data that the run of `--encoder` was trained on.

    Configs and options of the user come after and win.

    Args:
        parser: has the section `data`.
        skip: keys that are not taken over (one that another argument sets would be refused).
        also: further sections and options that start from the run's.
    """
    parse_args = parser.parse_args

    def parse_after_run(argv: list[str], *args: Any, **kwargs: Any) -> Any:
        return parse_args([*_options_of_run(argv, skip, also), *argv], *args, **kwargs)

    cast(Any, parser).parse_args = parse_after_run
    return parser


def _options_of_run(argv: list[str], skip: Sequence[str], also: Sequence[str]) -> list[str]:
    """The configuration of the encoder's run as options; none where it belongs to no run."""
    encoder = _named_encoder(argv)
    if encoder is None:
        return []
    if not encoder.startswith("timm:"):
        locate(encoder)  # the error names the encoder, and not the data that it would bring
    run = run_of(encoder)
    if run is None:
        return []
    config = read_mapping(run / "config.yaml")
    sections: dict[str, Any] = {"data": without(translated(config.get("data") or {}), skip)}
    sections |= {name: config[name] for name in also if name in config}
    options = []
    for name, value in sections.items():
        options += [f"--{name}", json.dumps(value)]
    return options


def _named_encoder(argv: list[str]) -> str | None:
    """The encoder that options or configs name, the last one winning."""
    named = None
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option == "--encoder":
            named = value
        elif option in ("-c", "--config"):
            named = read_mapping(find_config(value)).get("encoder", named)
    return None if named is None else str(named)
