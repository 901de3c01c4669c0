"""Exports read by those they are for: timm, transformers, safetensors; and read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors import safe_open
from support.models import tiny_gray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import AutoImageProcessor, ViTMAEForPreTraining, ViTMAEModel

from maepretrain.apply import export_formats
from maepretrain.apply.export import export
from maepretrain.apply.export_formats import official_loading, timm_arguments
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.checkpoints.weights import OWN_KEY, read_weights
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.runs.results import write_results

Run = Callable[..., int]
FORMATS = ("timm", "hf", "mae", "safetensors")


# More heads and layers of the decoder than the encoder has, so that neither stands for the other.
CHANGES = {"decoder_depth": 2, "decoder_heads": 4, "norm_pix": False, "mask_ratio": 0.5}


def tiny(**changes: Any) -> Any:
    return tiny_gray(**(CHANGES | changes))


def saved(model: MaskedAutoencoder, folder: Path) -> str:
    """As a spec for --encoder: a file that says what it is."""
    path = folder / "given.pth"
    torch.save({"model": model.state_dict(), OWN_KEY: model.arguments}, path)
    return str(path)


def images(height: int = 16, width: int = 16, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, channels, height, width, generator=generator)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("norm_pix", [True, False])
def test_what_is_exported_is_read_back(format: Any, norm_pix: bool, tmp_path: Path) -> None:
    model, x = tiny(norm_pix=norm_pix), images()
    file = export(saved(model, tmp_path), format, tmp_path / "out")
    for spec in (file, tmp_path / "out"):
        back: Any = load_encoder(str(spec)).eval()
        for pool in ("mean", "cls", "tokens"):
            assert torch.equal(back.encode(x, pool), model.encode(x, pool))
        if format != "timm":  # it has no decoder
            batch = {"input": x, "position": torch.arange(3)}
            assert torch.equal(back(batch)["loss"], model(batch)["loss"])


def test_timm_makes_the_encoder_from_the_folder_and_from_the_file(tmp_path: Path) -> None:
    model, x = tiny(), images()
    file = export(saved(model, tmp_path), "timm", tmp_path / "out")
    vit: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(vit.forward_features(x), model.encoder.forward_features(x))
    assert torch.equal(vit(x), model.encode(x))
    arguments = timm_arguments(model)
    vit = timm.create_model("vit_base_patch16_224", checkpoint_path=str(file), **arguments).eval()
    assert torch.equal(vit(x), model.encode(x))


def test_a_model_that_timm_has_a_name_for_needs_the_name_alone(tmp_path: Path) -> None:
    model, x = (
        tiny(
            encoder="vit_tiny_patch16_224",
            image_size=224,
            patch_size=None,
            channels=3,
            encoder_width=None,
            encoder_depth=None,
            encoder_heads=None,
        ),
        images(224, 224, 3)[:1],
    )
    file = export(saved(model, tmp_path), "timm", tmp_path / "out")
    vit: Any = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(file), num_classes=0)
    assert torch.equal(vit.eval().forward_features(x), model.encoder.forward_features(x))
    assert torch.equal(vit(x), model.encode(x, "cls"))


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": (8, 24)},
        {"encoder": "vit_base_patch16_rpn_224"},  # no class token
        {"encoder": "vit_small_patch14_reg4_dinov2"},  # registers, LayerScale
        {"encoder": "vit_base_patch16_clip_224"},  # a norm before the blocks
    ],
)
def test_timm_takes_what_other_libraries_cannot_express(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(**changes)
    size = model.encoder.patch_embed.img_size
    export(saved(model, tmp_path), "timm", tmp_path / "out")
    vit: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(vit(images(*size)), model.encode(images(*size)))
    for format in ("hf", "mae"):
        with pytest.raises(ValueError, match=r"(ViTMAE|official code) (takes|has)") as caught:
            export(saved(model, tmp_path), format, tmp_path / "no")
        assert "\n" not in str(caught.value) and not (tmp_path / "no").exists()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_transformers_gives_equal_features_and_loss(norm_pix: bool, tmp_path: Path) -> None:
    model, x = tiny(norm_pix=norm_pix), images()
    export(saved(model, tmp_path), "hf", tmp_path / "out")
    encoder, report = cast(Any, ViTMAEModel).from_pretrained(
        tmp_path / "out", mask_ratio=0.0, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    in_order = torch.arange(16.0).expand(3, -1)
    with torch.no_grad():
        tokens = encoder.eval()(x, noise=in_order).last_hidden_state
        torch.testing.assert_close(tokens[:, 1:], model.encode(x, "tokens"), rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens[:, 0], model.encode(x, "cls"), rtol=0, atol=1e-5)
    whole, report = cast(Any, ViTMAEForPreTraining).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    noise = torch.rand(3, 16)
    with torch.no_grad():
        expected = float(whole.eval()(x, noise=noise).loss)
        assert float(model({"input": x}, noise=noise)["loss"]) == pytest.approx(expected, abs=1e-5)
    assert whole.config.layer_norm_eps == 1e-6


def test_names_of_hugging_face_are_those_of_its_published_files(tmp_path: Path) -> None:
    """As in facebook/vit-mae-base, which transformers 4 wrote."""
    file = export(saved(tiny(), tmp_path), "hf", tmp_path / "out")
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
    assert {
        "vit.embeddings.patch_embeddings.projection.weight",
        "vit.encoder.layer.2.attention.attention.query.weight",
        "vit.encoder.layer.0.attention.output.dense.bias",
        "vit.encoder.layer.0.intermediate.dense.weight",
        "vit.encoder.layer.0.output.dense.weight",
        "vit.layernorm.bias",
        "decoder.decoder_layers.1.attention.attention.key.bias",
        "decoder.decoder_layers.0.layernorm_after.weight",
        "decoder.mask_token",
    } <= names


def test_the_official_file_holds_the_official_names(tmp_path: Path) -> None:
    """Which the encoder shares with timm's ViT; torch alone reads it."""
    model = tiny()
    file = export(saved(model, tmp_path), "mae", tmp_path / "out")
    weights = torch.load(file, weights_only=True)["model"]
    vit = VisionTransformer(
        16, 4, 1, num_classes=0, global_pool="", embed_dim=32, depth=3, num_heads=2
    )
    encoder = {k: v for k, v in weights.items() if not k.startswith(("decoder", "mask_token"))}
    vit.load_state_dict(encoder)
    tokens = vit.eval().forward_features(images())[:, 1:]
    torch.testing.assert_close(tokens, model.encode(images(), "tokens"), rtol=0, atol=1e-6)
    assert weights["decoder_pos_embed"].shape == (1, 17, 16)
    assert "num_heads=2" in official_loading(model) and "mlp_ratio=4.0" in official_loading(model)


def test_a_resized_model_is_exported_at_its_new_size(tmp_path: Path) -> None:
    model = tiny()
    model.resize((24, 24))
    export(saved(model, tmp_path), "safetensors", tmp_path / "out")
    back: Any = load_encoder(str(tmp_path / "out")).eval()
    assert torch.equal(back.encode(images(24, 24)), model.encode(images(24, 24)))


def test_the_card_tells_recipe_data_figures_pictures_and_loads(
    tmp_path: Path, pretrain_tiny: Run, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert pretrain_tiny(run, "--trainer.max_steps", 2, "--pictures", 8) == 0
    rows = {"pretrained": {"top1": 0.875, "top1_std": 0.0125, "n": 360, "recipe": "lr 0.1"}}
    write_results(run, "probe", {"rows": rows})
    command = ["export", "--encoder", run, "--format", "hf", "--out", out]
    assert run_cli(*command) == 0
    assert f"--encoder {out} takes it back" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "Encoder: 2 blocks, width 32, 2 heads, patches of 4x4, 26,048 parameters",
        'ViTMAEModel.from_pretrained("FOLDER"',
        "- mean: `[0.305]`\n- std: `[0.376]`",
        "| val_loss |",
        "| Linear probe | top-1 | n |\n| --- | --- | --- |\n| pretrained | 0.8750 ± 0.0125 | 360 |",
        "| Trained on | 150 samples in 4 shards",
        "![step-00000002](pictures/step-00000002.png)",
        "encoder_width: 32",
        f"torch {torch.__version__.partition('+')[0]}",
    ):
        assert part in card, part
    assert (out / "pictures" / "step-00000002.png").read_bytes().startswith(b"\x89PNG")
    row = (run / "metrics.csv").read_text().splitlines()
    losses = [line.split(",")[row[0].split(",").index("loss")] for line in row[1:]]
    assert f"| loss | {[value for value in losses if value][-1]} |" in card
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.305]
    assert type(AutoImageProcessor.from_pretrained(out)).__name__.startswith("ViTImageProcessor")
    capsys.readouterr()
    assert run_cli(*command) == 2
    assert f"{out} is not empty: take another --out, or --overwrite" in capsys.readouterr().err
    assert run_cli(*command, "--overwrite") == 0


@pytest.mark.parametrize("format", ["timm", "hf", "safetensors"])
def test_the_lines_of_the_card_run(format: Any, tmp_path: Path) -> None:
    model = tiny()
    export(saved(model, tmp_path), format, tmp_path / "out")
    lines = export_formats.FORMATS[format].loading(model).replace("FOLDER", str(tmp_path / "out"))
    names: dict[str, Any] = {"images": images()}
    exec(lines, names)
    torch.testing.assert_close(names["features"], model.encode(images()), rtol=0, atol=1e-5)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes a MaskedAutoencoder; timm:resnet10t is a Timm"):
        export("timm:resnet10t", "timm", tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="full is not empty"):
        export(saved(tiny(), tmp_path), "timm", full)
    export(saved(tiny(), tmp_path), "timm", full, overwrite=True)
    assert (full / "thesis.tex").read_text() == "years"


def test_exports_run_no_code(tmp_path: Path) -> None:
    for format in FORMATS:
        file = export(saved(tiny(), tmp_path), format, tmp_path / format)
        assert all(isinstance(tensor, Tensor) for tensor in read_weights(file).values())
