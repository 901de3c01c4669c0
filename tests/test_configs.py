"""Every shipped configuration is built, and the paper's values stand in the paper's recipes."""

from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from maepretrain.evaluate.finetune import finetune_parser
from maepretrain.evaluate.knn import knn_parser
from maepretrain.evaluate.probe import probe_parser
from maepretrain.parsing.configs import configs_folder, find_config, shipped_configs
from maepretrain.training.trainer_arguments import in_steps
from maepretrain.workflows.pretrain import pretrain_parser

SIZES = ("base", "large", "huge")
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
MAE_OPTIONS = ("compiled", "cross", "lean_memory", "low_resolution", "mask_tokens_in_encoder")
MAE_OPTIONS += ("several_masks", "small_decoder")
OVERLAYS = {
    "mae/fast": "mae/vit_base",
    "mae/epochs_1600": "mae/vit_large",
    **{f"mae/{name}": "mae/vit_base" for name in MAE_OPTIONS},
    "eval/few_labels": "eval/finetune_fashion_mnist",
    "eval/from_scratch": "eval/finetune_fashion_mnist",
    "eval/attentive_probe": "eval/linear_probe",
    "eval/attentive_fashion_mnist": "eval/finetune_fashion_mnist",
    "eval/partial_fashion_mnist": "eval/finetune_fashion_mnist",
    "eval/partial": "eval/finetune_vit_large",
    "eval/probe_few_labels": "eval/probe_fashion_mnist",
    **{f"strategy/{name}": "mae/fashion_mnist" for name in STRATEGIES},
    **{f"eval/official_{size}": f"eval/finetune_vit_{size}" for size in SIZES},
    **{f"eval/scratch_vit_{size}": f"eval/finetune_vit_{size}" for size in SIZES},
}


FROZEN: dict[str, Any] = {"probe": probe_parser, "knn": knn_parser}


def verb(name: str) -> str:
    """Of the command in a config's first line."""
    return (configs_folder() / f"{name}.yaml").read_text().split()[2]


def parse(name: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    if verb(name) == "pretrain" or name == "mae/digits":
        pretrain_parser(parser)
        paths = ["--run", "r", "--data.train", "t"]
    elif verb(name) in FROZEN:
        FROZEN[verb(name)](parser)
        paths = ["--encoder", "timm:e", "--data.train", "t"]
    else:
        finetune_parser(parser)
        paths = ["--run", "r", "--encoder", "e", "--data.train", "t"]
    parser.add_argument("-c", action="config")
    files = [OVERLAYS[name], name] if name in OVERLAYS else [name]
    return parser.parse_args([a for f in files for a in ("-c", str(find_config(f)))] + paths)


@pytest.mark.parametrize("name", shipped_configs())
def test_config_builds(name: str) -> None:
    config = parse(name)
    if verb(name) in FROZEN:
        assert "trainer" not in config
        assert len(config.data.mean) == len(config.data.std) == config.data.channels
        return
    steps = in_steps(config.trainer.as_dict(), 10)["max_steps"]
    assert steps == 10 * config.trainer.max_epochs
    if "model" in config and "huge" not in name:
        build = ArgumentParser(exit_on_error=False)
        build.add_argument("--model", type=nn.Module)
        with torch.device("meta"):
            model = build.instantiate(build.parse_object({"model": config.model})).model
        if name.startswith("mae/"):
            assert model.grid[0] * model.patch_size == config.data.image_size
            assert model.channels == config.data.channels
        assert len(config.data.mean) == len(config.data.std) == config.data.channels


@pytest.mark.parametrize("name", shipped_configs())
def test_header_gives_command_and_result(name: str) -> None:
    first = (configs_folder() / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# maepretrain ")
    assert "|" in first


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_the_papers_recipe(size: str) -> None:
    """arXiv 2111.06377, table 8."""
    config = parse(f"mae/vit_{size}")
    optim, data, model = config.optim, config.data, config.model.init_args
    assert (optim.optimizer, optim.base_lr, optim.weight_decay) == ("adamw", 1.5e-4, 0.05)
    assert (tuple(optim.betas), optim.warmup_epochs, optim.min_lr) == ((0.9, 0.95), 40, 0)
    assert (data.global_batch, tuple(data.scale), data.flip) == (4096, (0.2, 1.0), 0.5)
    assert (model.masking.ratio, model.norm_pix, config.trainer.max_epochs) == (0.75, True, 800)
    assert (model.decoder_width, model.decoder_depth, model.decoder_heads) == (512, 8, 16)
    assert optim.base_lr * data.global_batch / 256 == pytest.approx(2.4e-3)


@pytest.mark.parametrize(
    ("size", "drop_path", "epochs"), [("base", 0.1, 100), ("large", 0.1, 50), ("huge", 0.2, 50)]
)
def test_the_papers_fine_tuning(size: str, drop_path: float, epochs: int) -> None:
    """arXiv 2111.06377, table 9."""
    config = parse(f"eval/finetune_vit_{size}")
    optim, augment = config.optim, config.augment
    assert (optim.optimizer, optim.base_lr, optim.weight_decay) == ("adamw", 1e-3, 0.05)
    assert (tuple(optim.betas), optim.layer_decay) == ((0.9, 0.999), 0.75)
    assert (optim.warmup_epochs, config.trainer.max_epochs) == (5, epochs)
    assert (config.data.global_batch, config.drop_path) == (1024, drop_path)
    assert (augment.mixup, augment.cutmix, augment.erasing) == (0.8, 1.0, 0.0)
    assert (augment.randaugment, config.label_smoothing) == ("rand-m9-mstd0.5-inc1", 0.1)
    assert (config.head, config.trained_blocks, config.scratch) == ("fc_norm", -1, False)


@pytest.mark.parametrize(
    ("size", "lr", "decay", "drop_path", "epochs"),
    [("base", 5e-4, 0.65, 0.1, 100), ("large", 1e-3, 0.75, 0.2, 50), ("huge", 1e-3, 0.75, 0.3, 50)],
)
def test_the_official_fine_tuning(
    size: str, lr: float, decay: float, drop_path: float, epochs: int
) -> None:
    """facebookresearch/mae, FINETUNE.md."""
    config = parse(f"eval/official_{size}")
    assert (config.optim.base_lr, config.optim.layer_decay, config.drop_path) == (
        lr,
        decay,
        drop_path,
    )
    assert (config.augment.erasing, config.augment.mixup, config.augment.cutmix) == (0.25, 0.8, 1.0)
    assert (config.trainer.max_epochs, config.data.global_batch) == (epochs, 1024)


@pytest.mark.parametrize(
    ("size", "drop_path", "epochs"), [("base", 0.1, 300), ("large", 0.2, 200), ("huge", 0.2, 200)]
)
def test_the_papers_training_from_scratch(size: str, drop_path: float, epochs: int) -> None:
    """arXiv 2111.06377, table 11."""
    config = parse(f"eval/scratch_vit_{size}")
    optim = config.optim
    assert (optim.base_lr, optim.weight_decay, tuple(optim.betas)) == (1e-4, 0.3, (0.9, 0.95))
    assert (optim.layer_decay, optim.warmup_epochs, config.trainer.max_epochs) == (1, 20, epochs)
    assert (config.data.global_batch, config.drop_path, config.ema) == (4096, drop_path, 0.9999)
    assert (config.scratch, config.augment.mixup, config.label_smoothing) == (True, 0.8, 0.1)


def test_the_papers_linear_probe() -> None:
    """arXiv 2111.06377, table 10."""
    config = parse("eval/linear_probe")
    optim = config.optim
    assert (optim.optimizer, optim.base_lr, optim.weight_decay) == ("lars", 0.1, 0.0)
    assert (optim.momentum, optim.warmup_epochs, config.trainer.max_epochs) == (0.9, 10, 90)
    assert (config.data.global_batch, config.trained_blocks) == (16384, 0)
    assert (config.head, config.augment.randaugment, config.augment.mixup) == ("batchnorm", None, 0)


def test_k_nn_of_imagenet_tries_the_usual_settings() -> None:
    """arXiv 2104.14294, appendix F.1: k of 10, 20, 100, 200, temperature .07."""
    config = parse("eval/knn_imagenet")
    assert tuple(config.neighbours.ks) == (10, 20, 100, 200)
    assert tuple(config.neighbours.temperatures) == (0.07,)
    assert (config.data.image_size, config.data.val_share) == (224, 0.875)
    few = parse("eval/probe_few_labels")
    assert (few.labels_per_class, few.seeds, few.data.image_size) == (5, 5, 28)


def test_overlays_change_only_what_they_say() -> None:
    assert parse("mae/epochs_1600").trainer.max_epochs == 1600
    fast = parse("mae/fast")
    assert (fast.model.init_args.mask_ratio, fast.model.init_args.decoder_depth) == (0.9, 2)
    assert fast.model.init_args.decoder_width == 512
