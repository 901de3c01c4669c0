"""The shipped configs of autoencoders, and the options that make small runs of them."""

from pathlib import Path

from maepretrain.parsing.configs import config_words
from maepretrain.parsing.moved_configs import MOVED_CONFIGS

# Configs and options joined by "+", one for each autoencoder of version 0.1.
CONFIGS = [joined for name, joined in MOVED_CONFIGS.items() if name.startswith("ae/")]
# The signals of this one are another test's.
IMAGES = [name for name in CONFIGS if name != "data/ecg+recipe/ecg"]


# Of configs for images in colour.
GRAY = ("--data.channels", "1", "--data.mean", "[0.5]", "--data.std", "[0.5]")


def options(name: str, shards: Path, run: Path, steps: int) -> list[str]:
    """The config on 150 digits of 16 x 16, 30 a step."""
    return [
        *("pretrain", *config_words(name), "--run", str(run), "--trainer.max_steps", str(steps)),
        *("--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"),
        *("--data.image_size", "16", "--data.global_batch", "30", "--data.num_workers", "0"),
        *(
            "--data.crop.flip",
            "0",
            "--optim.warmup_epochs",
            "0",
            "--trainer.log_every_n_steps",
            "1",
        ),
        *("--trainer.accelerator", "cpu", "--trainer.check_val_every_n_epoch", "100"),
        *("--pictures", "2"),
        *(GRAY if name.startswith("data/photographs+recipe/compression") else ()),
    ]
