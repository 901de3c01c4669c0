"""Configurations of old runs, and what loading an encoder imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maepretrain.checkpoints.run_config import present_path, read_model_config
from maepretrain.compression.autoencoder import Compression
from maepretrain.models.autoencoders.coders import Dense
from maepretrain.models.autoencoders.denoising import Denoising
from maepretrain.models.mae.model import MaskedAutoencoder


@pytest.mark.parametrize(
    ("old", "present"),
    [
        ("maepretrain.models.mae.MaskedAutoencoder", MaskedAutoencoder),
        ("maepretrain.models.denoising.Denoising", Denoising),
        ("maepretrain.models.coders.Dense", Dense),
        ("maepretrain.models.compression.Compression", Compression),
        ("maepretrain.models.mae.model.MaskedAutoencoder", MaskedAutoencoder),
    ],
)
def test_old_class_paths_are_those_of_today(old: str, present: type) -> None:
    assert present_path(old) == f"{present.__module__}.{present.__name__}"


def test_a_class_of_the_users_own_stays() -> None:
    assert present_path("collections.OrderedDict") == "collections.OrderedDict"


def test_a_run_of_before_the_move_gives_its_model(tmp_path: Path) -> None:
    """A model inside a model moved too."""
    coder = {"class_path": "maepretrain.models.coders.Dense", "init_args": {"widths": [6]}}
    model = {"class_path": "maepretrain.models.denoising.Denoising", "init_args": {"coder": coder}}
    config = {"seed": 3, "data": {"image_size": 8, "channels": 1}, "model": model}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    parser, section = read_model_config(tmp_path)
    made = parser.instantiate(section).model
    assert type(made) is Denoising and type(made.coder) is Dense


@pytest.mark.slow
def test_an_encoder_needs_no_trainer() -> None:
    code = (
        "import sys, maepretrain.checkpoints.encoders as _; "
        "print([n for n in sys.modules if n.startswith(('maepretrain.training', 'deepspeed'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
