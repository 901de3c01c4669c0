"""From a configuration to objects: the parsers of `pretrain` and `finetune`. The way back from a
run folder is evaluate/encoders.py's."""

from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser
from torch import nn

from maepretrain.arguments import allow_bare_flags, make_parser
from maepretrain.data.module import ShardData
from maepretrain.distributed import is_rank_zero, quiet_lightning

# Short class names for configs.
from maepretrain.models.adversarial import Adversarial  # noqa: F401
from maepretrain.models.autoencoder import Autoencoder  # noqa: F401
from maepretrain.models.coders import Convolutional, Dense  # noqa: F401
from maepretrain.models.compression import Compression  # noqa: F401
from maepretrain.models.contractive import Contractive  # noqa: F401
from maepretrain.models.denoising import Denoising  # noqa: F401
from maepretrain.models.generative_stochastic import GenerativeStochastic  # noqa: F401
from maepretrain.models.helmholtz import Helmholtz  # noqa: F401
from maepretrain.models.mae import MaskedAutoencoder  # noqa: F401
from maepretrain.models.masked_tokens import MaskedTokens  # noqa: F401
from maepretrain.models.predictive_sparse import PredictiveSparse  # noqa: F401
from maepretrain.models.recirculation import Recirculation  # noqa: F401
from maepretrain.models.residual_coder import ResidualCoder  # noqa: F401
from maepretrain.models.semantic_hashing import SemanticHashing  # noqa: F401
from maepretrain.models.sparse import Sparse  # noqa: F401
from maepretrain.models.stacked import Stacked  # noqa: F401
from maepretrain.models.variational import Variational  # noqa: F401
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
        ("seed", "layer.init_args.seed"),
    ):
        parser.link_arguments(source, f"model.init_args.{target}")
    for name in ("image_size", "channels"):
        parser.link_arguments(f"data.{name}", f"model.init_args.coder.init_args.{name}")
    return parser


def pretrain_command(argv: list[str]) -> int:
    """The verb `pretrain`; 0 when it came to its end, 130 when it was stopped."""
    return of_rank(run_experiment(pretrain, pretrain_parser(make_parser("pretrain")), argv))


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
    # Every value, null too: what is left out would be read back as the default.
    resolved = parser.dump(config, skip_unset=False)
    torch.manual_seed(config.seed)
    arguments = parser.instantiate(config).as_dict()
    return 0 if function(**arguments, config=resolved) else 130
