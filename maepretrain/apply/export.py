"""`maepretrain export`: a pretrained masked autoencoder for timm, Hugging Face, the official code,
or as safetensors, with a model card.

    timm         model.safetensors (encoder), config.json: a folder for timm's local-dir: and hub
    hf           model.safetensors, config.json, preprocessor_config.json: a ViTMAEForPreTraining
    mae          mae.pth: {"model": weights} under the names of facebookresearch/mae
    safetensors  model.safetensors: our own names

Each file also carries the arguments of its MaskedAutoencoder, so that `--encoder` takes it back.
Nothing of timm, transformers or the official code runs here; what they cannot express is refused.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.checkpoints.hugging_face import hugging_face_config, to_hugging_face
from maepretrain.checkpoints.official import check_official, official_weights
from maepretrain.checkpoints.run_config import run_of
from maepretrain.checkpoints.weights import OWN_KEY
from maepretrain.files import replacing
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.models.protocol import declared
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.report.document import Text, markdown
from maepretrain.report.evaluations import evaluations, last_values
from maepretrain.report.overview import summary
from maepretrain.report.records import Record, read_run
from maepretrain.report.settings import applied, configuration, environment
from maepretrain.runs.status import versions

Format = Literal["timm", "hf", "mae", "safetensors"]
WEIGHTS = {"timm": "model.safetensors", "hf": "model.safetensors", "mae": "mae.pth"}


def export(encoder: str, format: Format, out: Path, overwrite: bool = False) -> Path:
    """Write a pretrained encoder in the layout of another library, and a model card beside it.

    Args:
        encoder: a run folder, one of its checkpoints, or a file of MAE weights.
        format: timm (the encoder alone), hf (Hugging Face's ViTMAE), mae (the official code) or
            safetensors (this project's own names).
        out: a new folder.
        overwrite: replace what an export left in the folder.

    Returns:
        The file of weights.

    Raises:
        ValueError: no masked autoencoder, a folder that holds something, a model that the format
            cannot express.
    """
    model = load_encoder(encoder)
    if declared(model, "layout") != "mae":
        raise ValueError(f"export takes a MaskedAutoencoder; {encoder} is a {type(model).__name__}")
    model = cast(MaskedAutoencoder, model)
    run = run_of(encoder)
    data = read_section(run, "data")
    files = {"timm": _timm, "hf": _hugging_face, "mae": _official, "safetensors": _own}[format](
        model, data
    )
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise ValueError(f"{out} is not empty: take another --out, or --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    pictures = _copy_pictures(run, out)
    files["README.md"] = model_card(model, format, encoder, run, pictures).encode()
    for name, content in files.items():
        with replacing(out / name) as file:
            file.write(content)
    return out / WEIGHTS.get(format, "model.safetensors")


def _safetensors(model: MaskedAutoencoder, weights: dict[str, Tensor]) -> bytes:
    about = {"format": "pt", OWN_KEY: json.dumps(model.arguments)}
    return save({name: tensor.contiguous() for name, tensor in weights.items()}, about)


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def _own(model: MaskedAutoencoder, data: dict[str, Any]) -> dict[str, bytes]:
    return {"model.safetensors": _safetensors(model, model.state_dict())}


def _official(model: MaskedAutoencoder, data: dict[str, Any]) -> dict[str, bytes]:
    from io import BytesIO

    check_official(model, "the official code")
    buffer = BytesIO()
    torch.save({"model": official_weights(model), OWN_KEY: model.arguments}, buffer)
    return {"mae.pth": buffer.getvalue()}


def _hugging_face(model: MaskedAutoencoder, data: dict[str, Any]) -> dict[str, bytes]:
    config = hugging_face_config(model)
    weights = to_hugging_face(official_weights(model))
    files = {"config.json": _json(config), "model.safetensors": _safetensors(model, weights)}
    if "mean" in data:
        height, width = model.encoder.patch_embed.img_size
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": data["mean"],
            "image_std": data["std"],
        }
        files["preprocessor_config.json"] = _json(processor)
    return files


def timm_arguments(model: MaskedAutoencoder) -> dict[str, Any]:
    """What makes the encoder again by `timm.create_model(name, **arguments)`; it pools the mean of
    the patches."""
    size = model.encoder.patch_embed.img_size
    names = {
        "patch_size": "patch_size",
        "encoder_width": "embed_dim",
        "encoder_depth": "depth",
        "encoder_heads": "num_heads",
    }
    given = {
        theirs: model.arguments[ours]
        for ours, theirs in names.items()
        if model.arguments.get(ours) is not None
    }
    return {
        "img_size": list(size),
        "in_chans": model.channels,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
        **given,
    }


def timm_name(model: MaskedAutoencoder) -> str:
    """The name of the encoder's architecture in timm."""
    return str(model.arguments.get("encoder", "vit_base_patch16_224"))


def _timm(model: MaskedAutoencoder, data: dict[str, Any]) -> dict[str, bytes]:
    arguments = timm_arguments(model)
    pretrained: dict[str, Any] = {
        "input_size": [model.channels, *arguments["img_size"]],
        "fixed_input_size": True,
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    pretrained |= {name: data[name] for name in ("mean", "std") if name in data}
    config = {
        "architecture": timm_name(model).partition(".")[0],
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "avg",
        "model_args": {k: v for k, v in arguments.items() if k not in ("in_chans", "num_classes")},
        "pretrained_cfg": pretrained,
    }
    weights = _safetensors(model, official_weights(model, decoder=False))
    return {"config.json": _json(config), "model.safetensors": weights}


def read_section(run: Path | None, name: str) -> dict[str, Any]:
    """A section of a run's configuration, empty where there is none."""
    if run is None:
        return {}
    return (yaml.safe_load((run / "config.yaml").read_text()) or {}).get(name) or {}


def _copy_pictures(run: Path | None, out: Path) -> list[str]:
    """Copy a run's last reconstruction and its evaluation's pictures; their paths in the folder."""
    if run is None:
        return []
    steps = sorted((run / "pictures").glob("step-*.png"))[-1:]
    others = [p for p in sorted(run.rglob("*.png")) if not p.name.startswith("step-")]
    copied = []
    for picture in [*steps, *others]:
        copy = out / "pictures" / "-".join(picture.relative_to(run).parts).removeprefix("pictures-")
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, copy)
        copied.append(str(copy.relative_to(out)))
    return copied


def model_card(
    model: MaskedAutoencoder, format: Format, encoder: str, run: Path | None, pictures: list[str]
) -> str:
    """The README.md of an exported encoder: how to load it, what it is, what it was trained on and
    how good it is."""
    block: Any = model.encoder.blocks[0]
    height, width = model.encoder.patch_embed.img_size
    count = sum(p.numel() for p in model.encoder.parameters())
    library = {"timm": "timm", "hf": "transformers"}.get(format, "maepretrain")
    said = [
        f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\n"
        "tags: [masked-autoencoder, self-supervised]\n---",
        "# Masked autoencoder (He et al. 2021, arXiv 2111.06377)",
        f"Encoder: {model.depth} blocks, width {model.width}, {block.attn.num_heads} heads, "
        f"patches of {model.patch_size}x{model.patch_size}, {count:,} parameters. "
        f"Images: {model.channels} x {height} x {width}. "
        f"Exported from `{encoder}` by `maepretrain export --format {format}`.",
        f"## Load it\n\n```python\n{loading(model, format)}\n```",
        _card_data(read_section(run, "data")),
        *([f"## Pictures\n\n{_links(pictures)}"] if pictures else []),
        *(_card_run(read_run(run)) if run else []),
        f"## Exported with\n\n{', '.join(f'{name} {v}' for name, v in versions().items())}",
    ]
    return "\n\n".join(part for part in said if part) + "\n"


def loading(model: MaskedAutoencoder, format: Format) -> str:
    """The lines of Python that load an exported folder; the card shows them."""
    if format == "timm":
        options = ", ".join(f"{name}={value!r}" for name, value in timm_arguments(model).items())
        return (
            "import timm\n"
            'encoder = timm.create_model("local-dir:FOLDER", pretrained=True)\n'
            "features = encoder(images)  # the mean of the patches, (b, width)\n"
            "# the same from the file alone:\n"
            f'encoder = timm.create_model("{timm_name(model)}", '
            f'checkpoint_path="FOLDER/model.safetensors", {options})'
        )
    if format == "hf":
        return (
            "from transformers import ViTMAEModel, ViTMAEForPreTraining\n"
            'encoder = ViTMAEModel.from_pretrained("FOLDER", mask_ratio=0.0)\n'
            "features = encoder(images).last_hidden_state[:, 1:].mean(1)  # patches come shuffled\n"
            'autoencoder = ViTMAEForPreTraining.from_pretrained("FOLDER")'
        )
    if format == "mae":
        return (
            "import torch, models_mae  # of facebookresearch/mae\n"
            f"model = models_mae.MaskedAutoencoderViT({_official_arguments(model)})\n"
            'model.load_state_dict(torch.load("FOLDER/mae.pth", weights_only=True)["model"])'
        )
    return (
        "from maepretrain.checkpoints.encoders import load_encoder\n"
        'encoder = load_encoder("FOLDER")\n'
        "features = encoder.encode(images)  # (b, width)"
    )


def _official_arguments(model: MaskedAutoencoder) -> str:
    block: Any = model.encoder.blocks[0]
    decoder: Any = model.decoder_blocks
    arguments = {
        "img_size": model.encoder.patch_embed.img_size[0],
        "patch_size": model.patch_size,
        "in_chans": model.channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": block.attn.num_heads,
        "decoder_embed_dim": model.decoder_embed.out_features,
        "decoder_depth": len(decoder),
        "decoder_num_heads": decoder[0].attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.width,
        "norm_pix_loss": model.norm_pix,
    }
    options = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"{options}, norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6)"


def _card_data(data: dict[str, Any]) -> str:
    if not data:
        return "## Data\n\nNot known: the weights came without the folder of their run."
    shown = ("train", "val", "image_size", "channels", "scale", "flip", "mean", "std")
    lines = [f"- {name}: `{json.dumps(data[name])}`" for name in shown if name in data]
    return "## Data\n\nPixels are divided by 255, then normalised by mean and std.\n\n" + "\n".join(
        lines
    )


def _card_run(record: Record) -> list[str]:
    """What `report` says of the run, and how good its encoder is."""
    figures = [*evaluations([record]), Text("Last values of the training:"), last_values(record)]
    return [
        f"## Training\n\n{markdown([summary([record]), *applied([record])])}",
        f"## Metrics\n\n{markdown(figures)}",
        f"## Recipe\n\n{markdown([configuration(record)])}",
        f"## Made with\n\n{markdown(environment([record]))}",
    ]


def _links(pictures: list[str]) -> str:
    return "\n".join(f"![{Path(picture).stem}]({picture})" for picture in pictures)


def export_command(argv: list[str]) -> int:
    """The verb `export`."""
    parser = make_parser("export")
    parser.add_function_arguments(export)
    arguments = parse(parser, argv)
    written = export(**arguments)
    print(f"{written} and its README.md; --encoder {arguments['out']} takes it back")
    return 0
