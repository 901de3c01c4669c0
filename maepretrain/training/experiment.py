"""From a configuration to objects: the parsers of `pretrain` and `finetune`. The way back from a
run folder is evaluate/encoders.py's."""

from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser

from maepretrain.data.module import add_data
from maepretrain.parsing.parser import allow_bare_flags
from maepretrain.ranks import is_rank_zero, quiet_lightning
from maepretrain.training.optimizer import Optimization

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
    add_data(parser)
    parser.add_class_arguments(Optimization, "optim")
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip=OURS)
    parser.link_arguments("seed", "data.order.seed")


def of_rank(code: int) -> int:
    """An exit code, which is rank zero's: Lightning kills the process that started the others when
    one of them exits with an error."""
    return code if is_rank_zero() else 0


def run_experiment(function: Any, parser: ArgumentParser, argv: list[str]) -> int:
    """Parse, seed, build the objects and call; the resolved configuration goes along as YAML."""
    quiet_lightning()
    allow_bare_flags(parser)
    config = parser.parse_args(argv)
    config.pop("config", None)
    config.pop("verbose", None)
    # Every value, null too: what is left out would be read back as the default.
    resolved = parser.dump(config, skip_unset=False)
    torch.manual_seed(config.seed)
    arguments = parser.instantiate(config).as_dict()
    return 0 if function(**arguments, config=resolved) else 130
