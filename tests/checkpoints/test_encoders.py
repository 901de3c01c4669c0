"""Encoders from runs, files and timm, against timm, transformers and hooks."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from support.models import tiny_gray
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from maepretrain.checkpoints.encoders import fresh_encoder, load_encoder, require_blocks
from maepretrain.checkpoints.official import official_weights
from maepretrain.data.module import ShardData
from maepretrain.data.settings import Crop
from maepretrain.evaluate.options import data_of_encoder, evaluation_parser
from maepretrain.models.mae.positions import sincos_positions
from maepretrain.models.timm_encoder import TimmViT
from maepretrain.parsing.errors import UserError
from maepretrain.parsing.parser import make_parser, parse


def images(*size: int, channels: int = 1) -> Tensor:
    return torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def data(shards: Path) -> Callable[..., ShardData]:
    def make(size: int | list[int] = 16, channels: int = 1) -> ShardData:
        values = (0.5,) * channels
        return ShardData(
            f"{shards}/train-*.tar",
            global_batch=10,
            image_size=size,
            channels=channels,
            mean=values,
            std=values,
            crop=Crop(scale=None),
        )

    return make


@pytest.fixture
def run(tmp_path: Path, tiny_run: Path) -> Path:
    """A run folder that a test may write into."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def through_hooks(blocks: Any, call: Callable[[], object]) -> list[Tensor]:
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for b in blocks]
    call()
    for hook in hooks:
        hook.remove()
    return outputs


# The masked autoencoder


@pytest.mark.parametrize("blocks", [[0, 1, 2], [-1], [2, 0, -2], []])
def test_features_are_what_hooks_see(blocks: list[int]) -> None:
    model, x = tiny_gray(), images(16, 16)
    seen = through_hooks(model.encoder.blocks, lambda: model.encoder.forward_features(x))
    found = model.features(x, blocks)
    assert len(found) == len(blocks)
    for block, tokens in zip(blocks, found, strict=True):
        assert torch.equal(tokens, seen[block])
        assert tokens.shape == (3, model.prefix + 16, model.width)
    if blocks == [-1]:
        normed = model.encoder.norm(found[0])
        assert torch.equal(model.encode(x, "tokens"), normed[:, model.prefix :])
        assert torch.equal(model.encode(x, "cls"), normed[:, 0])


def test_features_stop_at_the_last_block_that_is_wanted() -> None:
    model, x = tiny_gray(), images(16, 16)
    assert len(through_hooks(model.encoder.blocks, lambda: model.features(x, [0, 1]))) == 2


@pytest.mark.parametrize("block", [3, -4])
def test_blocks_that_are_not_there_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match=f"block {block} is none of the encoder's 3"):
        tiny_gray().features(images(16, 16), [0, block])


def test_encoding_recomputes_where_it_was_asked_to() -> None:
    plain, saving = tiny_gray(), tiny_gray(activation_checkpointing=True)
    x, calls = images(16, 16), []
    hooks = [
        m.encoder.blocks[0].register_forward_pre_hook(lambda m, _: calls.append(m))
        for m in (plain, saving)
    ]
    for model in (plain, saving):
        model.encode(x).square().sum().backward()
    assert len(hooks) == 2
    assert calls.count(plain.encoder.blocks[0]) == 1
    assert calls.count(saving.encoder.blocks[0]) == 2
    for a, b in zip(plain.encoder.parameters(), saving.encoder.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def official_interpolation(positions: Tensor, old: int, new: int) -> Tensor:
    """util/pos_embed.py of the official code."""
    extra, patches = positions[:, :1], positions[:, 1:]
    patches = patches.reshape(-1, old, old, positions.shape[-1]).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([extra, patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)


@pytest.mark.parametrize("trained", [False, True])
def test_positions_are_interpolated_as_the_official_code_does(trained: bool) -> None:
    model: Any = tiny_gray()
    if trained:
        model.train_positions()
        model.encoder.pos_embed.data += torch.randn(1, 17, 32)
    before = model.encoder.pos_embed.detach().clone()
    model.resize((28, 28))
    after = model.encoder.pos_embed
    torch.testing.assert_close(after.detach(), official_interpolation(before, 4, 7))
    assert torch.equal(after[:, 0], before[:, 0])
    assert isinstance(after, nn.Parameter) == trained
    assert model.decoder_pos_embed.shape == (1, 50, 16)
    assert model.encode(images(28, 28)).shape == (3, 32)
    loss = model({"input": images(28, 28), "position": torch.arange(3)})["loss"]
    assert loss.isfinite() and model.masking.visible(model.grid) == 12
    with pytest.raises(ValueError, match="the model takes"):
        model.encode(images(16, 16))


def test_a_resized_model_gives_what_timms_does() -> None:
    """To a grid that is not square."""
    model = tiny_gray()
    vit: Any = timm.create_model(
        "vit_base_patch16_224",
        img_size=16,
        patch_size=4,
        in_chans=1,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=0,
    )
    vit.set_input_size(img_size=(12, 24))
    model.resize((12, 24))
    vit.load_state_dict(official_weights(model, decoder=False))
    x = images(12, 24)
    torch.testing.assert_close(
        model.encode(x, "tokens"), vit.eval().forward_features(x)[:, 1:], rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match="image size 12x25 must be divisible by patch size 4"):
        model.resize((12, 25))


# Runs


def test_a_run_gives_the_weights_of_its_last_checkpoint(
    run: Path, data: Callable[..., ShardData]
) -> None:
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for spec in (run, run / "checkpoints/last.ckpt"):
        for given in (data(), None):
            model = load_encoder(str(spec), given)
            assert model.state_dict().keys() == {k.removeprefix("model.") for k in saved}
            for name, value in model.state_dict().items():
                assert torch.equal(value, saved[f"model.{name}"])


def test_another_normalisation_than_the_runs_is_said(
    run: Path, data: Callable[..., ShardData], capsys: pytest.CaptureFixture[str]
) -> None:
    given = data()
    own = yaml.safe_load((run / "config.yaml").read_text())["data"]
    given.mean, given.std = tuple(own["mean"]), tuple(own["std"])
    load_encoder(str(run), given)
    assert "WARNING" not in capsys.readouterr().out
    given.std = (0.5,)
    load_encoder(str(run), given)
    warning = capsys.readouterr().out
    assert f"trained on data of mean {own['mean']} and std {own['std']}" in warning
    assert "and [0.5]" in warning


def test_a_run_takes_images_of_another_size(run: Path, data: Callable[..., ShardData]) -> None:
    old: Any = load_encoder(str(run), data())
    model: Any = load_encoder(str(run), data([24, 16]))
    assert model.grid == (6, 4)
    expected = resample_abs_pos_embed(old.encoder.pos_embed, [6, 4], [4, 4], antialias=False)
    assert torch.equal(model.encoder.pos_embed, expected)
    assert torch.equal(model.encoder.blocks[0].norm1.weight, old.encoder.blocks[0].norm1.weight)


def test_fresh_encoders_are_seeded_and_have_positions_of_their_own(
    run: Path, data: Callable[..., ShardData]
) -> None:
    first, same, other = (fresh_encoder(str(run), data(24), seed) for seed in (0, 0, 1))
    trained = load_encoder(str(run), data(24))
    name = "encoder.blocks.0.attn.qkv.weight"
    weights = [m.state_dict()[name] for m in (first, same, other, trained)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    assert torch.equal(first.encoder.pos_embed, sincos_positions(32, (6, 6), 1))  # pyright: ignore
    state = torch.get_rng_state()
    fresh_encoder(str(run), data(), 5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prefix", ["", "model.", "_forward_module.model."])
def test_a_consolidated_file_is_read_with_the_runs_architecture(run: Path, prefix: str) -> None:
    """DeepSpeed's zero_to_fp32 gives the names of Lightning's module, from whichever wrapper."""
    model = tiny_gray(encoder_depth=2)
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(weights, run / "checkpoints" / "pytorch_model.bin")
    loaded: Any = load_encoder(str(run / "checkpoints" / "pytorch_model.bin"))
    assert torch.equal(loaded.encode(images(16, 16)), model.encode(images(16, 16)))


# Files


def test_an_official_file_gives_what_timm_gives(
    tmp_path: Path, data: Callable[..., ShardData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a size that the official code does not publish, or this would take a gigabyte."""
    from maepretrain.checkpoints import official as module

    vit: Any = timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=0, img_size=64)
    monkeypatch.setitem(module.OFFICIAL_ENCODERS, (192, 12, 16), "vit_tiny_patch16_224")
    args = argparse.Namespace(model="mae_vit_tiny")
    torch.save({"model": vit.state_dict(), "args": args}, tmp_path / "tiny.pth")
    model: Any = load_encoder(str(tmp_path / "tiny.pth"), data(64, 3)).eval()
    x, vit = images(64, 64, channels=3), vit.eval()
    torch.testing.assert_close(model.encode(x, "cls"), vit(x), rtol=0, atol=1e-5)
    model = load_encoder(str(tmp_path / "tiny.pth"), data(112, 3)).eval()
    positions = official_interpolation(vit.pos_embed.data, 4, 7)
    vit.set_input_size(img_size=112)
    vit.pos_embed.data = positions
    x = images(112, 112, channels=3)
    torch.testing.assert_close(model.encode(x, "cls"), vit(x), rtol=0, atol=1e-5)


def test_a_folder_of_transformers_gives_what_its_model_gives(tmp_path: Path) -> None:
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        layer_norm_eps=1e-6,
        mask_ratio=0.0,
    )
    torch.manual_seed(0)
    whole = ViTMAEForPreTraining(config).eval()
    for tensor in whole.parameters():
        tensor.data += 0.1 * torch.randn_like(tensor)
    whole.decoder.decoder_pos_embed.data[:, 0] = 0  # as in every MAE
    whole.config.mask_ratio = 0.75  # what is written
    whole.save_pretrained(tmp_path)
    reference = ViTMAEModel.from_pretrained(tmp_path, mask_ratio=0.0).eval()
    model: Any = load_encoder(str(tmp_path)).eval()
    x = images(16, 16, channels=3)
    theirs = reference(x, noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
    torch.testing.assert_close(model.encode(x, "tokens"), theirs[:, 1:], rtol=0, atol=1e-5)
    noise = torch.rand(3, 16)
    with torch.no_grad():
        loss, expected = model({"input": x}, noise=noise)["loss"], whole(x, noise=noise).loss
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


# timm


def test_a_vit_of_timm(data: Callable[..., ShardData], capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = load_encoder("timm:vit_tiny_patch16_224", data(32)).eval()
    assert "vit_tiny_patch16_224 at RANDOM initial values" in capsys.readouterr().out
    assert isinstance(model, TimmViT) and (model.depth, model.width, model.prefix) == (12, 192, 1)
    x, vit = images(32, 32), model.encoder
    tokens = vit.forward_features(x)
    assert torch.equal(model.encode(x, "cls"), tokens[:, 0])
    assert torch.equal(model.encode(x, "tokens"), tokens[:, 1:])
    assert torch.equal(model.encode(x), tokens[:, 1:].mean(1))
    seen = through_hooks(vit.blocks, lambda: vit(x))
    for block, found in zip([3, -1, 0], model.features(x, [3, -1, 0]), strict=True):
        assert torch.equal(found, seen[block])
    with pytest.raises(ValueError, match="block 12 is none of the encoder's 12"):
        model.features(x, [12])
    layers = model.layers()
    assert len(layers) == 14
    assert sorted(id(p) for layer in layers for p in layer) == sorted(map(id, model.parameters()))
    assert {id(p) for p in layers[1]} == {id(p) for p in vit.blocks[0].parameters()}
    assert id(vit.cls_token) in {id(p) for p in layers[0]}
    assert {id(p) for p in layers[-1]} == {id(p) for p in vit.norm.parameters()}
    require_blocks(model, "the sweep")


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "vit_base_patch16_siglip_224"])
def test_every_parameter_of_a_vit_that_pools_gets_a_gradient(name: str) -> None:
    with torch.device("meta"):
        model: Any = fresh_encoder(f"timm:{name}", None, 0)
        model.encode(torch.zeros(1, 3, 224, 224)).sum().backward()
        assert [p.shape for layer in model.layers() for p in layer if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "size"), [("resnet10t", 64), ("swin_tiny_patch4_window7_224", 224)]
)
def test_other_models_of_timm_encode_and_have_no_blocks(
    name: str, size: int, data: Callable[..., ShardData]
) -> None:
    model: Any = load_encoder(f"timm:{name}", data(size, 3)).eval()
    x = images(size, size, channels=3)[:1]
    torch.testing.assert_close(model.encode(x), model.encoder(x), rtol=0, atol=1e-5)
    assert model.encode(x).shape == (1, model.width)
    assert model.encode(x, "tokens").shape[0::2] == (1, model.width)
    with pytest.raises(ValueError, match='no class token: use pool "mean"'):
        model.encode(x, "cls")
    with pytest.raises(ValueError, match=r"a sweep needs a ViT; \w+ has no blocks"):
        require_blocks(model, "a sweep")


def test_weights_of_timm_that_are_on_this_machine_are_taken(
    tmp_path: Path,
    data: Callable[..., ShardData],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    vit: Any = timm.create_model("vit_tiny_patch16_224")
    config: Any = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    repository = config.hf_hub_id
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(vit.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    model: Any = load_encoder("timm:vit_tiny_patch16_224", data(224, 3)).eval()
    assert f"with the weights of {repository}" in capsys.readouterr().out
    x = images(224, 224, channels=3)[:1]
    torch.testing.assert_close(model.encode(x, "cls"), vit.eval().forward_features(x)[:, 0])
    fresh: Any = fresh_encoder("timm:vit_tiny_patch16_224", data(224, 3), 0).eval()
    assert not torch.allclose(fresh.encode(x), model.encode(x))


# What cannot be


def test_mistakes_are_one_line(run: Path, tmp_path: Path, data: Callable[..., ShardData]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other.pth"
    torch.save(official_weights(tiny_gray()), other)
    wrong = run / "checkpoints" / "wrong.ckpt"
    torch.save(tiny_gray(encoder_depth=3).state_dict(), wrong)
    odd = tmp_path / "odd.safetensors"
    about = {"maepretrain": json.dumps({"encoder": "hf-hub:some/where"})}
    save_file(tiny_gray().state_dict(), odd, about)
    strange = tmp_path / "strange.safetensors"
    save_file(tiny_gray().state_dict(), strange, {"maepretrain": json.dumps({"depth": 3})})
    for spec, size, channels, rule in (
        ("nowhere", 16, 1, "encoder nowhere is no run folder, no file, and no timm:NAME"),
        (str(empty), 16, 1, "is no run folder: it holds no config.yaml"),
        (str(other), 16, 1, "width 32, depth 3 and patch size 4 are of no official MAE"),
        (str(wrong), 16, 1, r"wrong.ckpt: weights do not fit the model \(12 unknown"),
        (str(odd), 16, 1, "timm has no model hf-hub:some/where"),
        (str(strange), 16, 1, "describes no MaskedAutoencoder: .*depth"),
        (str(run), 16, 3, "takes images of 1 channels; data.channels is 3"),
        (str(run), 18, 1, "image size 18x18 must be divisible by patch size 4"),
        (str(run), [16], 1, r"takes inputs of size \[16, 16\], not \[16\]: set data.image_size"),
        ("timm:vit_enormous", 16, 1, "timm has no model vit_enormous"),
        ("timm:vit_tiny_patch16_224?seed=1", 16, 1, r"what may follow a name is \?pretrained"),
        ("timm:vit_tiny_patch16_224", [16], 1, r"takes images, not signals of size \[16\]"),
    ):
        with pytest.raises(ValueError, match=rule) as caught:
            load_encoder(spec, data(size, channels))
        assert "\n" not in str(caught.value), spec


# Options


def evaluate(encoder: str, data: ShardData, k: int = 20) -> tuple[str, ShardData, int]:
    """An evaluation.

    Args:
        encoder: which.
        data: of what.
        k: how many.
    """
    return encoder, data, k


def options(*argv: object) -> tuple[str, ShardData, int]:
    parser = evaluation_parser(make_parser("probe"), evaluate)
    return evaluate(**parse(parser, [str(a) for a in argv]))


def test_a_run_brings_its_data(run: Path, shards: Path, tmp_path: Path) -> None:
    encoder, data, _ = options("--encoder", run)
    assert encoder == str(run)
    assert (data.shape, data.mean) == ((1, 16, 16), (0.305,))
    # `scale: null` is not the default: a run without its nulls would bring that back.
    found: Any = data
    assert (found.augment.scale, found.centre_crop.share) == (None, 1.0)
    assert (len(data.index), data.val_index is not None and len(data.val_index)) == (150, 50)
    assert data.global_batch == 1
    # Options and configs win, whichever comes first.
    _, data, k = options(f"--data.train={shards}/test-*.tar", f"--encoder={run}", "--k", 3)
    assert (len(data.index), data.shape, k) == (50, (1, 16, 16), 3)
    (tmp_path / "eval.yaml").write_text(f"encoder: {run}\ndata:\n  image_size: 24\nk: 4\n")
    encoder, data, k = options("-c", tmp_path / "eval.yaml")
    assert (encoder, data.shape, data.mean, k) == (str(run), (1, 24, 24), (0.305,), 4)
    _, data, _ = options("--encoder", run / "checkpoints" / "last.ckpt")
    assert data.mean == (0.305,)


def test_other_encoders_need_their_data_said(shards: Path) -> None:
    with pytest.raises(UserError, match=r"required: data\.train"):
        options("--encoder", "timm:vit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"required: .*encoder"):
        options()
    with pytest.raises(ValueError, match="nowhere is no run folder"):
        options("--encoder", "nowhere")
    _, data, _ = options("--encoder", "timm:x", "--data.train", f"{shards}/train-*.tar")
    assert (data.shape, data.global_batch) == ((3, 224, 224), 1)


def test_training_takes_the_batch_too(run: Path) -> None:
    parser = make_parser("finetune")
    parser.add_function_arguments(evaluate, skip={"data"})
    parser.add_class_arguments(ShardData, "data")
    arguments = parse(data_of_encoder(parser), ["--encoder", str(run)])
    assert arguments["data"].global_batch == 24
