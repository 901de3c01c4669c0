"""Weights in and out: the official layout from a table of its own, and files that must not run."""

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from support.models import tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maepretrain.checkpoints.hugging_face import from_hugging_face, to_hugging_face
from maepretrain.checkpoints.official import load_official, official_model, official_weights
from maepretrain.checkpoints.weights import read_file, read_weights

Layout = dict[str, tuple[int, ...]]


def linear(name: str, outputs: int, inputs: int) -> Layout:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Layout:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name: str, width: int) -> Layout:
    return {
        **norm(f"{name}.norm1", width),
        **linear(f"{name}.attn.qkv", 3 * width, width),
        **linear(f"{name}.attn.proj", width, width),
        **norm(f"{name}.norm2", width),
        **linear(f"{name}.mlp.fc1", 4 * width, width),
        **linear(f"{name}.mlp.fc2", width, 4 * width),
    }


def official_encoder(width: int, depth: int, patch: int, n: int) -> Layout:
    """Names and shapes that the official code gives, written from its modules."""
    layout: Layout = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, n + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **norm("norm", width),
    }
    for number in range(depth):
        layout.update(block(f"blocks.{number}", width))
    return layout


def official_decoder(encoder_width: int, width: int, depth: int, patch: int, n: int) -> Layout:
    layout: Layout = {
        "mask_token": (1, 1, width),
        "decoder_pos_embed": (1, n + 1, width),
        **linear("decoder_embed", width, encoder_width),
        **norm("decoder_norm", width),
        **linear("decoder_pred", patch * patch * 3, width),
    }
    for number in range(depth):
        layout.update(block(f"decoder_blocks.{number}", width))
    return layout


# Width, depth, heads, patch, patches at 224, and how many tensors the published files hold.
OFFICIAL = {
    "base": (768, 12, 12, 16, 196, 150),
    "large": (1024, 24, 16, 16, 196, 294),
    "huge": (1280, 32, 16, 14, 256, 390),
}
TINY = {**official_encoder(24, 2, 8, 16), **official_decoder(24, 16, 1, 8, 16)}


def shapes(weights: dict[str, Tensor]) -> Layout:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def filled(layout: Layout) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in layout.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The official layout


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_models_are_told_from_their_shapes(name: str) -> None:
    """On the meta device: ViT-H has 657 million parameters."""
    width, depth, heads, patch, n, count = OFFICIAL[name]
    encoder = official_encoder(width, depth, patch, n)
    full = {**encoder, **official_decoder(width, 512, 8, patch, n)}
    assert (len(encoder), len(full)) == (count, count + 104)
    with torch.device("meta"):
        for layout in (encoder, full):
            model = official_model({key: torch.empty(shape) for key, shape in layout.items()})
            assert shapes(official_weights(model)) == full
            assert shapes(official_weights(model, decoder=False)) == encoder
    attention = [b.attn.num_heads for b in (*model.encoder.blocks, *model.decoder_blocks)]  # pyright: ignore
    assert attention == [heads] * depth + [16] * 8
    assert model.encoder.patch_embed.img_size == (224, 224)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_are_those_of_timm(name: str) -> None:
    width, depth, _, patch, n, _ = OFFICIAL[name]
    with torch.device("meta"):
        vit = timm.create_model(f"vit_{name}_patch{patch}_224.mae", num_classes=0)
    assert shapes(vit.state_dict()) == official_encoder(width, depth, patch, n)


def test_another_decoder_is_told_from_its_shapes() -> None:
    layout = official_encoder(768, 12, 16, 64)  # 128 pixels
    layout |= official_decoder(768, 256, 2, 16, 64)
    with torch.device("meta"):
        model = official_model({key: torch.empty(shape) for key, shape in layout.items()}, False)
    assert model.decoder_embed.out_features == 256
    assert (len(model.decoder_blocks), model.grid, model.norm_pix) == (2, (8, 8), False)


@pytest.mark.slow
def test_an_official_model_holds_the_weights() -> None:
    layout = official_encoder(768, 12, 16, 196)
    weights = {name: torch.tensor(0.5).expand(shape) for name, shape in layout.items()}
    model = official_model(weights)
    assert all(tensor.eq(0.5).all() for tensor in official_weights(model, decoder=False).values())
    assert model.decoder_pred.weight.std() > 0


@pytest.mark.parametrize(
    ("width", "depth", "patch", "rule"),
    [
        (384, 12, 16, "width 384, depth 12 and patch size 16 are of no official MAE"),
        (768, 11, 16, "width 768, depth 11 and patch size 16"),
        (1280, 32, 16, "width 1280, depth 32 and patch size 16"),
    ],
)
def test_models_that_are_not_official_are_refused(
    width: int, depth: int, patch: int, rule: str
) -> None:
    layout = official_encoder(width, depth, patch, 196)
    with torch.device("meta"), pytest.raises(ValueError, match=rule):
        official_model({name: torch.empty(shape) for name, shape in layout.items()})


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed"])
def test_weights_that_tell_no_shape_are_refused(name: str) -> None:
    layout = official_encoder(768, 12, 16, 196)
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in layout.items()}
        for broken in ({**weights, name: torch.empty(7)}, {**weights, name: None}):
            given = {key: tensor for key, tensor in broken.items() if tensor is not None}
            with pytest.raises(ValueError, match=f"no official MAE: no {name}"):
                official_model(given)


# Loading


def test_a_round_trip_keeps_every_bit() -> None:
    weights, model = filled(TINY), tiny(decoder_depth=1)
    assert load_official(model, weights) == "encoder and decoder"
    assert equal(official_weights(model), weights)
    copy = tiny(weights=1, decoder_depth=1)
    load_official(copy, official_weights(model))
    assert equal(copy.state_dict(), model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    batch = {"input": images, "position": torch.arange(2)}
    assert torch.equal(copy(batch)["loss"], model(batch)["loss"])


def test_an_encoder_alone_leaves_the_decoder() -> None:
    weights, model = filled(official_encoder(24, 2, 8, 16)), tiny(decoder_depth=1)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    assert load_official(model, weights) == "encoder"
    after = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    assert equal(before, after)
    assert equal(official_weights(model, decoder=False), weights)


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.pop(name)


def having(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (without("norm.bias"), r"1 missing: norm\.bias"),
        (without("decoder_pos_embed"), "1 missing: decoder_pos_embed"),
        (without("mask_token"), "1 missing: mask_token"),
        (having("head.weight", 10, 24), r"1 unknown: head\.weight"),
        (having("encoder.norm.bias", 24), r"1 unknown: encoder\.norm\.bias"),
        (having("decoder_blocks.1.norm1.bias", 16), r"1 unknown: decoder_blocks\.1\.norm1\.bias"),
        (having("pos_embed", 1, 16, 24), r"pos_embed \(1, 16, 24\) for \(1, 17, 24\)"),
        (having("norm.bias", 1), r"1 of another shape: norm\.bias \(1,\) for \(24,\)"),
        (lambda weights: weights.clear(), "30 missing: blocks.0.attn.proj.bias, .*, ...\\)"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    change: Callable[[dict[str, Tensor]], object], rule: str
) -> None:
    weights, model = filled(TINY), tiny(decoder_depth=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(weights)
    with pytest.raises(ValueError, match=rule) as caught:
        load_official(model, weights)
    assert "\n" not in str(caught.value)
    assert equal(before, model.state_dict())


# Files


def save_plain(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path)


def save_legacy(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)


def save_official(weights: dict[str, Tensor], path: Path) -> None:
    """As the official training loop saves."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    args = argparse.Namespace(model="mae_vit_base_patch16", lr=None, norm_pix_loss=True, gpu=0)
    state = {"model": weights, "optimizer": optimizer.state_dict(), "epoch": 3, "args": args}
    torch.save(state, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.safetensors", save_file),
        ("a.pth", save_plain),
        ("a.pth", save_official),
        ("old.pth", save_legacy),
    ],
)
def test_files_give_what_was_saved(name: str, save: Callable[..., None], tmp_path: Path) -> None:
    weights = filled(TINY)
    save(weights, tmp_path / name)
    assert equal(read_weights(tmp_path / name), weights)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Training(lightning.LightningModule):
    """What a run saves: the model, and something beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny(decoder_depth=1)
        self.register_buffer("mean", torch.zeros(3))

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        return self.model({"input": batch, "position": torch.arange(len(batch))})["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_lightning_gives_the_model(tmp_path: Path) -> None:
    training = Training()
    images: Any = list(torch.randn(2, 3, 32, 32))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(tmp_path, save_last=True)],
    )
    trainer.fit(training, DataLoader(images, batch_size=2))
    weights = read_weights(tmp_path / "last.ckpt")
    assert equal(weights, training.model.state_dict())
    tiny(weights=1, decoder_depth=1).load_state_dict(weights)


@pytest.mark.parametrize("prefix", ["model.", "_forward_module.model."])
def test_what_deepspeed_consolidates_gives_the_model(prefix: str, tmp_path: Path) -> None:
    """A plain state dict of Lightning's module, with what else the module holds."""
    weights = filled(TINY)
    named = {prefix + name: tensor for name, tensor in weights.items()}
    head = prefix.removesuffix("model.") + "head.weight"
    torch.save(named | {head: torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    assert equal(read_weights(tmp_path / "pytorch_model.bin"), weights)


def test_a_file_tells_the_arguments_of_its_model(tmp_path: Path) -> None:
    weights, arguments = filled(TINY), {"encoder_width": 24, "norm_pix": False}
    torch.save({"model": weights, "maepretrain": arguments}, tmp_path / "a.pth")
    save_file(weights, tmp_path / "a.safetensors", {"maepretrain": json.dumps(arguments)})
    for name in ("a.pth", "a.safetensors"):
        read, told = read_file(tmp_path / name)
        assert equal(read, weights) and told == arguments
    save_file(weights, tmp_path / "a.safetensors")
    assert read_file(tmp_path / "a.safetensors")[1] is None
    save_file(weights, tmp_path / "a.safetensors", {"maepretrain": "{encoder"})
    with pytest.raises(ValueError, match=r"a\.safetensors: no safetensors file"):
        read_file(tmp_path / "a.safetensors")


# Hugging Face's layout; test_export and test_encoders compare with transformers itself


def test_hugging_faces_names_and_back_keep_every_bit() -> None:
    weights = filled(TINY)
    theirs = to_hugging_face(weights)
    assert len(theirs) == len(weights) + 4 * 3  # q, k and v apart in three blocks
    assert equal(from_hugging_face(theirs), weights)
    encoder = {k.removeprefix("vit."): v for k, v in theirs.items() if k.startswith("vit.")}
    assert equal(from_hugging_face(encoder), filled_part(weights))
    width = 24
    for third, part in enumerate(("query", "key", "value")):
        name = f"vit.encoder.layer.1.attention.attention.{part}.weight"
        rows = weights["blocks.1.attn.qkv.weight"][third * width : (third + 1) * width]
        assert torch.equal(theirs[name], rows)


def filled_part(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in weights.items() if not k.startswith(("decoder", "mask_token"))}


@pytest.mark.parametrize("name", ["reg_token", "blocks.0.ls1.gamma", "norm_pre.weight", "head"])
def test_what_hugging_face_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Hugging Face's ViTMAE has no {name}"):
        to_hugging_face({**filled(TINY), name: torch.ones(24)})


class Trap:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "caught")


def in_zip(content: object, path: Path) -> None:
    torch.save({"model": filled(TINY), "extra": content}, path)


def in_legacy(content: object, path: Path) -> None:
    torch.save(
        {"model": filled(TINY), "extra": content}, path, _use_new_zipfile_serialization=False
    )


def in_namespace(content: object, path: Path) -> None:
    torch.save({"model": filled(TINY), "args": argparse.Namespace(extra=content)}, path)


def in_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("save", [in_zip, in_legacy, in_namespace, in_pickle])
def test_a_pickle_with_code_is_refused_and_does_not_run(
    save: Callable[[object, Path], None], name: str, tmp_path: Path
) -> None:
    caught, path = tmp_path / "caught", tmp_path / name
    save(Trap(caught), path)
    with pytest.raises(
        ValueError, match=r"a\.(pth|ckpt|safetensors): (refused|no safetensors)"
    ) as e:
        read_weights(path)
    assert "\n" not in str(e.value)
    assert not caught.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    in_zip(Trap(tmp_path / "caught"), tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "caught").exists()


class Foreign:
    pass


def test_a_class_of_others_is_named(tmp_path: Path) -> None:
    in_zip(Foreign(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"it needs \S*Foreign, and unpickling would run code"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"PK\x03\x04 half a zip", b"\x80\x02K\x01."]
)
def test_damaged_files_are_refused(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"weights .*a\.\w+: ") as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, [torch.ones(1)], {"epoch": 1}, {"model": {"lr": 0.1}}])
def test_files_without_weights_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: this file holds no state dict of tensors"):
        read_weights(tmp_path / "a.pth")


def test_missing_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ValueError, match=f"weights {path}: there is no such file"):
            read_weights(path)
