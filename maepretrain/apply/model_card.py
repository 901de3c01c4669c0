"""The model card of an exported encoder: the README.md beside its weights."""

import json
from pathlib import Path
from typing import Any

from maepretrain.apply.export_formats import FORMATS, Name
from maepretrain.data.settings import translated
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.report.document import Text, markdown
from maepretrain.report.evaluations import evaluations, last_values
from maepretrain.report.overview import summary
from maepretrain.report.records import Record, read_run
from maepretrain.report.settings import applied, configuration, environment
from maepretrain.runs.status import versions

# Of the section `data`.
SHOWN = ("train", "val", "image_size", "channels", "crop", "mean", "std")


def model_card(
    model: MaskedAutoencoder,
    *,
    format: Name,
    encoder: str,
    run: Path | None,
    data: dict[str, Any],
    pictures: list[str],
) -> str:
    """The card: how to load the encoder, its sizes, its data and training, and its figures.

    Args:
        model: the encoder.
        format: of the export.
        encoder: as the user named it.
        run: the run folder, where there is one.
        data: the section `data` of the run; empty without a run.
        pictures: paths in the folder of the export.
    """
    sections = [
        f"---\nlibrary_name: {FORMATS[format].library}\npipeline_tag: image-feature-extraction\n"
        "tags: [masked-autoencoder, self-supervised]\n---",
        "# Masked autoencoder (He et al. 2021, arXiv 2111.06377)",
        f"{_sizes(model)} Exported from `{encoder}` by `maepretrain export --format {format}`.",
        f"## Load it\n\n```python\n{FORMATS[format].loading(model)}\n```",
        _data(data),
    ]
    if pictures:
        sections.append(f"## Pictures\n\n{_links(pictures)}")
    if run is not None:
        sections += _run(read_run(run))
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    sections.append(f"## Exported with\n\n{packages}")
    return "\n\n".join(sections) + "\n"


def _sizes(model: MaskedAutoencoder) -> str:
    block: Any = model.encoder.blocks[0]
    height, width = model.encoder.patch_embed.img_size
    parameters = sum(p.numel() for p in model.encoder.parameters())
    return (
        f"Encoder: {model.depth} blocks, width {model.width}, {block.attn.num_heads} heads, "
        f"patches of {model.patch_size}x{model.patch_size}, {parameters:,} parameters. "
        f"Images: {model.channels} x {height} x {width}."
    )


def _data(data: dict[str, Any]) -> str:
    if not data:
        return "## Data\n\nNot known: the weights came without the folder of their run."
    data = translated(data)
    lines = [f"- {name}: `{json.dumps(data[name])}`" for name in SHOWN if name in data]
    pixels = "Pixels are divided by 255, then normalised by mean and std."
    return "\n".join([f"## Data\n\n{pixels}\n", *lines])


def _run(record: Record) -> list[str]:
    """Training, figures, configuration and versions, as `report` has them."""
    figures = [*evaluations([record]), Text("Last values of the training:"), last_values(record)]
    return [
        f"## Training\n\n{markdown([summary([record]), *applied([record])])}",
        f"## Metrics\n\n{markdown(figures)}",
        f"## Recipe\n\n{markdown([configuration(record)])}",
        f"## Made with\n\n{markdown(environment([record]))}",
    ]


def _links(pictures: list[str]) -> str:
    return "\n".join(f"![{Path(picture).stem}]({picture})" for picture in pictures)
