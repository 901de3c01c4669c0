"""`maepretrain export`: a pretrained masked autoencoder for timm, Hugging Face, the official code,
or as safetensors (export_formats.py), with a model card (model_card.py)."""

import shutil
from pathlib import Path
from typing import Any, cast

import yaml

from maepretrain.apply.export_formats import FORMATS, Name
from maepretrain.apply.model_card import model_card
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.checkpoints.run_config import run_of
from maepretrain.files import replacing
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.models.protocol import declared
from maepretrain.parsing.parser import make_parser, parse


def export(encoder: str, format: Name, out: Path, overwrite: bool = False) -> Path:
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
    data = {} if run is None else _data_section(run)
    files = FORMATS[format].files(model, data)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise ValueError(f"{out} is not empty: take another --out, or --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    pictures = [] if run is None else _copy_pictures(run, out)
    card = model_card(model, format=format, encoder=encoder, run=run, data=data, pictures=pictures)
    for name, content in (files | {"README.md": card.encode()}).items():
        with replacing(out / name) as file:
            file.write(content)
    return out / FORMATS[format].weights


def _data_section(run: Path) -> dict[str, Any]:
    """The section `data` of a run's configuration, empty where there is none."""
    config = yaml.safe_load((run / "config.yaml").read_text()) or {}
    return config.get("data") or {}


def _copy_pictures(run: Path, out: Path) -> list[str]:
    """Copy a run's last reconstruction and the pictures of its evaluations.

    Returns:
        Their paths in the folder.
    """
    steps = sorted((run / "pictures").glob("step-*.png"))[-1:]
    others = [p for p in sorted(run.rglob("*.png")) if not p.name.startswith("step-")]
    copied = []
    for picture in [*steps, *others]:
        copy = out / "pictures" / "-".join(picture.relative_to(run).parts).removeprefix("pictures-")
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, copy)
        copied.append(str(copy.relative_to(out)))
    return copied


def export_command(argv: list[str]) -> int:
    """The verb `export`."""
    parser = make_parser("export")
    parser.add_function_arguments(export)
    arguments = parse(parser, argv)
    written = export(**arguments)
    print(f"{written} and its README.md; --encoder {arguments['out']} takes it back")
    return 0
