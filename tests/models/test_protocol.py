"""The whole autoencoder family under one contract: every config of ae/ trains through the same
verbs, and on two processes as on one."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from support.autoencoders import IMAGES, options
from support.recorder import Ranks
from torch import nn

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.adversarial import Adversarial
from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.coders import Dense
from maepretrain.models.autoencoders.denoising import Denoising
from maepretrain.models.autoencoders.semantic_hashing import SemanticHashing
from maepretrain.models.autoencoders.variational import Variational
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.models.masked_tokens import MaskedTokens
from maepretrain.models.protocol import (
    DECLARATIONS,
    BinaryCodes,
    Blocks,
    Decodes,
    Denoises,
    Encodes,
    Layered,
    Masks,
    Reconstructs,
    Resizes,
    Samples,
    Seeded,
    Summarises,
    TakesSmaller,
    TrainsPositions,
    as_taken,
    declared,
    entry_points,
    require,
)
from maepretrain.models.timm_encoder import TimmEncoder, TimmViT


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize("name", IMAGES)
def test_a_config_trains_and_keeps_the_contract(
    name: str, shards: Path, tmp_path: Path, run_cli: Callable[..., int]
) -> None:
    """20 steps at a learning rate for 256 a step: the training loss falls."""
    assert run_cli(*options(name, shards, tmp_path / "run", 20)) == 0
    found = losses(tmp_path / "run")
    assert len(found) == 20
    assert sum(found[-5:]) < sum(found[:5])
    assert list((tmp_path / "run/pictures").glob("step-*.png"))

    model = cast(Any, load_encoder(str(tmp_path / "run"))).eval()
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    code = model.encode(images)
    assert code.ndim == 2 and len(code) == 3
    assert torch.equal(model.encode(images), code)
    torch.testing.assert_close(model.encode(images[1:2]), code[1:2], atol=1e-5, rtol=1e-4)
    shown = model.reconstruct(images)
    assert torch.equal(shown.original, images)
    assert all(row.shape == images.shape for row in shown)
    assert "reconstruction" in shown._fields
    if (
        name
        == "data/fashion_mnist+recipe/adversarial+model.classes=10+model.coder.widths=[512,256,18]"
    ):
        with pytest.raises(ValueError, match="one of 10 classes"):
            model.decode(code)
    elif not hasattr(model, "decode_symbols"):  # what they decode is quantised, and no vector
        decoded = model.decode(code)
        assert any(torch.allclose(decoded, row, atol=1e-6) for row in shown)
    inside = {id(p) for layer in model.layers() for p in layer}
    assert inside and inside <= {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match="the model takes"):
        model.encode(torch.rand(2, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_two_processes_equal_one(
    name: str, shards: Path, tmp_path: Path, run_cli: Callable[..., int]
) -> None:
    """SGD: Adam turns a gradient that is zero but for rounding into a full step."""
    sgd = ["--optim.optimizer", "sgd", "--optim.base_lr", "1e-2"]
    one = [*options(name, shards, tmp_path / "one", 4), *sgd]
    assert run_cli(*one) == 0
    ranks = Ranks(tmp_path / "log", [*options(name, shards, tmp_path / "two", 4), *sgd], 2)
    assert ranks.wait() == [0, 0], ranks.output()
    states = [
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("one", "two")
    ]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for weight in states[0]:
        torch.testing.assert_close(states[1][weight], states[0][weight], atol=2e-6, rtol=1e-5)


def digits_coder(**arguments: Any) -> Dense:
    return Dense(image_size=8, channels=1, widths=[6], code_activation="none", **arguments)


def small_vit() -> MaskedAutoencoder:
    return MaskedAutoencoder("vit_tiny_patch16_224", image_size=32, patch_size=8, encoder_depth=1)


class OnlyForward(nn.Module):
    """A user's own model."""

    def forward(self, batch: Batch) -> Batch:
        return {"loss": batch["input"].mean()}


VIT = {Encodes, Layered, Blocks}
CODES = {Encodes, Layered, Decodes, Reconstructs, Summarises}
ABILITIES: list[tuple[Callable[[], nn.Module], set[type]]] = [
    (
        small_vit,
        VIT | {Reconstructs, Resizes, TakesSmaller, TrainsPositions, Masks, Seeded, Summarises},
    ),
    (lambda: TimmViT(cast(Any, timm.create_model("vit_tiny_patch16_224", num_classes=0))), VIT),
    (lambda: TimmEncoder(timm.create_model("resnet10t", num_classes=0)), {Encodes}),
    (MaskedTokens, {Encodes, Layered, Seeded, Summarises}),
    (lambda: Autoencoder(digits_coder()), CODES),
    (lambda: Denoising(digits_coder()), CODES | {Denoises, Seeded}),
    (lambda: Variational(digits_coder()), CODES | {Samples, Seeded}),
    (lambda: Adversarial(digits_coder()), CODES | {Samples, Seeded}),
    (lambda: SemanticHashing(digits_coder()), CODES | {BinaryCodes, Seeded}),
    (OnlyForward, set()),
]
EVERY = VIT | CODES | {Resizes, TakesSmaller, TrainsPositions, Masks, Seeded, Denoises, Samples}
EVERY |= {BinaryCodes}


@pytest.mark.parametrize(("make", "abilities"), ABILITIES)
def test_models_have_the_abilities_that_their_verbs_ask_for(
    make: Callable[[], nn.Module], abilities: set[type]
) -> None:
    model = make()
    assert {ability for ability in EVERY if isinstance(model, ability)} == abilities
    for ability in EVERY:
        if ability in abilities:
            assert require(model, ability, "lacks it") is model
        else:
            with pytest.raises(ValueError, match=f"^{type(model).__name__} lacks it$"):
                require(model, ability, "lacks it")


def test_what_a_model_does_not_declare_has_a_default() -> None:
    assert {name: declared(OnlyForward(), name) for name in DECLARATIONS} == DECLARATIONS
    vit = small_vit()
    assert declared(vit, "shardable") and declared(vit, "norm_pix")
    assert (declared(vit, "layout"), declared(vit, "needs_labels")) == ("mae", False)
    coder = Dense(image_size=8, channels=1, widths=[9], code_activation="none")
    conditional = Adversarial(coder, classes=3)
    assert declared(conditional, "needs_labels") and declared(conditional, "classes") == 3
    tokens = as_taken(MaskedTokens(), {"input": torch.zeros(1, 1, 128)})
    assert tokens["input"].dtype == torch.int64
    assert entry_points(vit) == ["encode", "features", "reconstruct"]
    assert entry_points(OnlyForward()) == []
