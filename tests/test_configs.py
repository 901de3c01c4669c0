"""Every command in the header of a shipped configuration is parsed and its model built, and the
paper's values stand in the paper's recipes."""

import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from maepretrain.evaluate.finetune import finetune_parser
from maepretrain.evaluate.knn import knn_parser
from maepretrain.evaluate.probe import probe_parser
from maepretrain.parsing.configs import config_words, configs_folder, find_config, shipped_configs
from maepretrain.parsing.errors import UserError
from maepretrain.parsing.moved_configs import MOVED_CONFIGS
from maepretrain.parsing.parser import allow_bare_flags, make_parser
from maepretrain.training.trainer_arguments import in_steps
from maepretrain.workflows.pretrain import pretrain_parser

PARSERS: dict[str, Callable[[Any], Any]] = {
    "pretrain": pretrain_parser,
    "finetune": finetune_parser,
    "probe": probe_parser,
    "knn": knn_parser,
}
VIT = "data/imagenet+recipe/mae_vit"
FINETUNE = "data/imagenet+eval/finetune_vit"
LARGE = "model.encoder=vit_large_patch16_224"
HUGE = "model.encoder=vit_huge_patch14_224"


def header_commands(name: str) -> list[str]:
    """Command lines in the header of a config, without what stands after the bar."""
    lines = (configs_folder() / f"{name}.yaml").read_text().splitlines()
    commands = [line[2:].split("  | ")[0] for line in lines if line.startswith("# maepretrain ")]
    return [one for one in commands if one.split()[1] in PARSERS]


COMMANDS = [command for name in shipped_configs() for command in header_commands(name)]


def parse_words(verb: str, words: list[str]) -> Any:
    parser = make_parser(verb)
    PARSERS[verb](parser)
    allow_bare_flags(parser)
    needed = ["--data.train", "t"]
    if verb in ("pretrain", "finetune"):
        needed += ["--run", "r"]
    if verb != "pretrain":
        words = [*words, "--encoder", "timm:e"]
    return parser.parse_args([*needed, *words])


def parse(joined: str, verb: str = "pretrain") -> Any:
    return parse_words(verb, config_words(joined))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_headers_build(command: str) -> None:
    _, verb, *words = [word for word in shlex.split(command) if word != "..."]
    config = parse_words(verb, words)
    assert len(config.data.mean) == len(config.data.std) == config.data.channels
    if "trainer" in config:
        steps = in_steps(config.trainer.as_dict(), 10)["max_steps"]
        assert steps == 10 * config.trainer.max_epochs
    if "model" in config and "huge" not in command:
        build = ArgumentParser(exit_on_error=False)
        build.add_argument("--model", type=nn.Module)
        with torch.device("meta"):
            model = build.instantiate(build.parse_object({"model": config.model})).model
        if "recipe/mae" in command:
            assert model.grid[0] * model.patch_size == config.data.image_size
            assert model.channels == config.data.channels


@pytest.mark.parametrize("name", shipped_configs())
def test_a_header_gives_a_command_with_the_config_and_its_result(name: str) -> None:
    lines = (configs_folder() / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    if name.startswith("data/"):
        assert any(f"-c {name} " in command for command in COMMANDS)
        return
    assert any(f"-c {name} " in f"{command} " for command in header_commands(name))
    assert all("  | " in line for line in lines if line.startswith("# maepretrain "))


@pytest.mark.parametrize("name", MOVED_CONFIGS)
def test_old_names_say_what_they_are_now(name: str) -> None:
    joined = MOVED_CONFIGS[name]
    words = config_words(joined)
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option == "-c":
            find_config(value)
    with pytest.raises(UserError) as error:
        find_config(name)
    assert str(error.value) == f"config {name} is now {shlex.join(words)}"
    if not name.startswith("eval/") and joined.startswith("data/"):
        parse(joined)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_the_papers_recipe(size: str) -> None:
    """arXiv 2111.06377, table 8."""
    config = parse("+".join([VIT, *{"base": [], "large": [LARGE], "huge": [HUGE]}[size]]))
    optim, data, model = config.optim, config.data, config.model.init_args
    assert (optim.optimizer, optim.base_lr, optim.weight_decay) == ("adamw", 1.5e-4, 0.05)
    assert (tuple(optim.betas), optim.warmup_epochs, optim.min_lr) == ((0.9, 0.95), 40, 0)
    assert (data.global_batch, tuple(data.crop.scale), data.crop.flip) == (4096, (0.2, 1.0), 0.5)
    assert (model.mask_ratio, model.norm_pix, config.trainer.max_epochs) == (0.75, True, 800)
    assert (model.decoder_width, model.decoder_depth, model.decoder_heads) == (512, 8, 16)
    assert optim.base_lr * data.global_batch / 256 == pytest.approx(2.4e-3)


@pytest.mark.parametrize(
    ("options", "drop_path", "epochs"),
    [
        ([], 0.1, 100),
        (["trainer.max_epochs=50"], 0.1, 50),
        (["drop_path=0.2", "trainer.max_epochs=50"], 0.2, 50),
    ],
)
def test_the_papers_fine_tuning(options: list[str], drop_path: float, epochs: int) -> None:
    """arXiv 2111.06377, table 9."""
    config = parse("+".join([FINETUNE, *options]), "finetune")
    optim, augment = config.optim, config.augment
    assert (optim.optimizer, optim.base_lr, optim.weight_decay) == ("adamw", 1e-3, 0.05)
    assert (tuple(optim.betas), optim.layer_decay) == ((0.9, 0.999), 0.75)
    assert (optim.warmup_epochs, config.trainer.max_epochs) == (5, epochs)
    assert (config.data.global_batch, config.drop_path) == (1024, drop_path)
    assert (augment.mixup, augment.cutmix, augment.erasing) == (0.8, 1.0, 0.0)
    assert (augment.randaugment, config.label_smoothing) == ("rand-m9-mstd0.5-inc1", 0.1)
    assert (config.head, config.trained_blocks, config.scratch) == ("fc_norm", -1, False)


LIKE_LARGE = ["optim.base_lr=1.0e-3", "optim.layer_decay=0.75", "trainer.max_epochs=50"]


@pytest.mark.parametrize(
    ("options", "lr", "decay", "drop_path", "epochs"),
    [
        ([], 5e-4, 0.65, 0.1, 100),
        ([*LIKE_LARGE, "drop_path=0.2"], 1e-3, 0.75, 0.2, 50),
        ([*LIKE_LARGE, "drop_path=0.3"], 1e-3, 0.75, 0.3, 50),
    ],
)
def test_the_official_fine_tuning(
    options: list[str], lr: float, decay: float, drop_path: float, epochs: int
) -> None:
    """facebookresearch/mae, FINETUNE.md."""
    config = parse("+".join([FINETUNE, "eval/finetune_vit_official", *options]), "finetune")
    assert (config.optim.base_lr, config.optim.layer_decay, config.drop_path) == (
        lr,
        decay,
        drop_path,
    )
    assert (config.augment.erasing, config.augment.mixup, config.augment.cutmix) == (0.25, 0.8, 1.0)
    assert (config.trainer.max_epochs, config.data.global_batch) == (epochs, 1024)


@pytest.mark.parametrize(
    ("options", "drop_path", "epochs"),
    [([], 0.1, 300), (["drop_path=0.2", "trainer.max_epochs=200"], 0.2, 200)],
)
def test_the_papers_training_from_scratch(
    options: list[str], drop_path: float, epochs: int
) -> None:
    """arXiv 2111.06377, table 11."""
    config = parse("+".join([FINETUNE, "eval/finetune_vit_scratch", *options]), "finetune")
    optim = config.optim
    assert (optim.base_lr, optim.weight_decay, tuple(optim.betas)) == (1e-4, 0.3, (0.9, 0.95))
    assert (optim.layer_decay, optim.warmup_epochs, config.trainer.max_epochs) == (1, 20, epochs)
    assert (config.data.global_batch, config.drop_path, config.ema) == (4096, drop_path, 0.9999)
    assert (config.scratch, config.augment.mixup, config.label_smoothing) == (True, 0.8, 0.1)


def test_the_papers_linear_probe() -> None:
    """arXiv 2111.06377, table 10."""
    config = parse("data/imagenet+eval/finetune_linear_probe", "finetune")
    optim = config.optim
    assert (optim.optimizer, optim.base_lr, optim.weight_decay) == ("lars", 0.1, 0.0)
    assert (optim.momentum, optim.warmup_epochs, config.trainer.max_epochs) == (0.9, 10, 90)
    assert (config.data.global_batch, config.trained_blocks) == (16384, 0)
    assert (config.head, config.augment.randaugment, config.augment.mixup) == ("batchnorm", None, 0)


def test_k_nn_of_imagenet_tries_the_usual_settings() -> None:
    """arXiv 2104.14294, appendix F.1: k of 10, 20, 100, 200, temperature .07."""
    config = parse("data/imagenet+eval/knn_vit", "knn")
    assert tuple(config.neighbours.ks) == (10, 20, 100, 200)
    assert tuple(config.neighbours.temperatures) == (0.07,)
    assert (config.data.image_size, config.data.crop.val_share) == (224, 0.875)
    few = parse("data/fashion_mnist+labels_per_class=5+seeds=5", "probe")
    assert (few.labels_per_class, few.seeds, few.data.image_size) == (5, 5, 28)


def test_overlays_change_only_what_they_say() -> None:
    fast = parse(f"{VIT}+overlay/fast")
    assert (fast.model.init_args.mask_ratio, fast.model.init_args.decoder_depth) == (0.9, 2)
    assert fast.model.init_args.decoder_width == 512
