"""Options of evaluations: the section data starts from the run of the encoder."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from jsonargparse import ArgumentParser

from maepretrain.checkpoints.run_config import locate, read_mapping, run_of
from maepretrain.data.module import ShardData
from maepretrain.parsing.configs import find_config

# Of a run's data these belong to its training; an evaluation shows every image once.
OF_TRAINING = (
    "seed",
    "global_batch",
    "streams",
    "block",
    "tail",
    "crops_per_image",
    "max_errors",
    "low_image_size",
    "low_epochs",
)


def evaluation_parser(
    parser: ArgumentParser, function: Callable[..., Any], skip: Iterable[str] = ()
) -> ArgumentParser:
    """Options of an evaluation: those of `function`, which has an argument `encoder`, and the
    section `data`, whose values come from the run where the encoder is one."""
    parser.add_function_arguments(function, skip={"data", "config", *skip})
    parser.add_class_arguments(ShardData, "data")
    # An evaluation has no training batches, which could be larger than the set.
    parser.set_defaults({"data.global_batch": 1})
    return data_of_encoder(parser, OF_TRAINING)


def data_of_encoder(
    parser: ArgumentParser, skip: Sequence[str] = ("seed",), also: Sequence[str] = ()
) -> ArgumentParser:
    """Let the section `data` start from what the run of `--encoder` was trained on; configs and
    options that are given come after and win.

    Args:
        parser: has the section `data`.
        skip: keys that are not taken over (one that another argument sets would be refused).
        also: further sections and options that start from the run's.
    """
    plain = parser.parse_args

    def parse_args(argv: list[str], *args: Any, **kwargs: Any) -> Any:
        encoder = _named_encoder(argv)
        if encoder is not None and not encoder.startswith("timm:"):
            locate(encoder)  # otherwise the data that it would bring are what is missing
        run = None if encoder is None else run_of(encoder)
        if run is not None:
            config = read_mapping(run / "config.yaml")
            data = config.get("data") or {}
            known = {key: value for key, value in data.items() if key not in skip}
            starts = {"data": known} | {name: config[name] for name in also if name in config}
            given = [word for k, v in starts.items() for word in (f"--{k}", json.dumps(v))]
            argv = [*given, *argv]
        return plain(argv, *args, **kwargs)

    cast(Any, parser).parse_args = parse_args
    return parser


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
