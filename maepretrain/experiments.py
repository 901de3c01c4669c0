"""From a configuration to objects: the parsers of `pretrain` and `finetune`, and the way back from
a run folder."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

from maepretrain.arguments import allow_bare_flags, make_parser
from maepretrain.checkpoints import read_weights
from maepretrain.data.module import ShardData
from maepretrain.distributed import is_rank_zero, quiet_lightning
from maepretrain.models.mae import MaskedAutoencoder  # noqa: F401  a short class name for configs
from maepretrain.optim import Optimization
from maepretrain.pretrain import pretrain

# Trainer arguments that the project sets itself.
OURS: set[str | int] = {
    "logger",
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "use_distributed_sampler",
    "reload_dataloaders_every_n_epochs",
    "min_epochs",
    "min_steps",
    "max_time",
    "num_sanity_val_steps",
    "fast_dev_run",
    "overfit_batches",
    "limit_train_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "barebones",
    "model_registry",
    "plugins",
}


def add_experiment(parser: ArgumentParser) -> None:
    """The sections that every training shares: data, optim, trainer."""
    parser.add_class_arguments(ShardData, "data")
    parser.add_class_arguments(Optimization, "optim")
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip=OURS)
    parser.link_arguments("seed", "data.seed")


def pretrain_parser(parser: ArgumentParser) -> ArgumentParser:
    """`pretrain`: its sections come from the signatures of the classes, its options from
    `pretrain()`."""
    sections: set[str | int] = {"model", "data", "optim", "trainer", "config"}
    parser.add_function_arguments(pretrain, skip=sections)
    parser.add_argument("--model", type=nn.Module, required=True, help="class and its arguments")
    add_experiment(parser)
    # What the images are is said once, under data.
    for source, target in (
        ("data.image_size", "image_size"),
        ("data.channels", "channels"),
        ("seed", "seed"),
    ):
        parser.link_arguments(source, f"model.init_args.{target}")
    return parser


def pretrain_command(argv: list[str]) -> int:
    """The verb `pretrain`; 0 when it came to its end, 130 when it was stopped."""
    return run_experiment(pretrain, pretrain_parser(make_parser("pretrain")), argv)


def run_experiment(function: Any, parser: ArgumentParser, argv: list[str]) -> int:
    """Parse, seed, build the objects and call; the resolved configuration goes along as YAML."""
    quiet_lightning()
    allow_bare_flags(parser)
    config = parser.parse_args(argv)
    config.pop("config", None)
    # Every value, null too: what is left out would be read back as the default.
    resolved = parser.dump(config, skip_unset=False)
    torch.manual_seed(config.seed)
    arguments = parser.instantiate(config).as_dict()
    ended = function(**arguments, config=resolved)
    # Lightning kills the process that started the others when one of them exits with an error.
    return 0 if ended or not is_rank_zero() else 130


def _read_config(run: Path) -> Namespace:
    """The configuration of a pretraining run, what follows from other parts of it filled in."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is no run folder: it holds no config.yaml")
    try:
        return pretrain_parser(ArgumentParser(exit_on_error=False)).parse_path(str(path))
    except ArgumentError as error:
        raise ValueError(f"{run} is no pretraining run: {error}") from error


def read_model(run: Path) -> nn.Module:
    """The model of a pretraining run with the weights of its last checkpoint.

    Raises:
        ValueError: a folder that holds no pretraining run, or one of another model.
    """
    model, path = fresh_model(run), run / "checkpoints" / "last.ckpt"
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model of {run}/config.yaml: {error}") from error
    return model


def fresh_model(run: Path, seed: int | None = None) -> nn.Module:
    """The model of a pretraining run at random initial values, by default its own.

    Raises:
        ValueError: a folder that holds no pretraining run.
    """
    config = _read_config(run)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    torch.manual_seed(config.seed if seed is None else seed)
    return parser.instantiate(parser.parse_object({"model": config.model})).model


def read_run_data(run: Path, train: list[str] | None, val: list[str] | None) -> ShardData:
    """The data of a pretraining run, from other shards where they are given."""
    section = _read_config(run).data
    section.train, section.val = train or section.train, val or section.val
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ShardData, "data")
    return parser.instantiate(parser.parse_object({"data": section})).data
