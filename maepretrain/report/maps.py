"""Maps of the features in the plane, coloured by class: those that evaluations drew, and where they
drew none, computed here."""

import tempfile
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float, Int64
from torch import Tensor

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.errors import printable
from maepretrain.data.module import ShardData
from maepretrain.data.normalise import Normalise
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.options import evaluation_parser
from maepretrain.parsing.errors import UserError, one_line
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.plots.maps import embedding_map
from maepretrain.report.document import Element, Picture, PictureGroup, Text
from maepretrain.report.evaluations import EVALUATORS
from maepretrain.report.pictures import read_picture, side_by_side
from maepretrain.report.records import Record

Method = Literal["pca", "tsne"]
METHODS: dict[Method, str] = {
    "pca": "PCA, the two directions of largest variance",
    "tsne": "t-SNE: neighbours stay together, distances say nothing",
}
NAMES: dict[Method, str] = {"pca": "PCA", "tsne": "t-SNE"}


def maps(records: list[Record], images: int) -> list[Element]:
    """The maps of each run by PCA and t-SNE.

    Args:
        records: the runs.
        images: held-out images of a map that is computed; 0 computes none.
    """
    groups = []
    missing: list[Element] = []
    for record in records:
        pictures = _drawn_maps(record)
        lacking: list[Method] = [method for method in METHODS if method not in pictures]
        if lacking:
            computed, reason = _try_to_compute(record, images, lacking)
            pictures |= computed
            if reason:
                names = " and ".join(NAMES[method] for method in lacking)
                line = f"{record.name}: no map by {names}, {reason}."
                missing.append(Text(printable(line)))
        groups.append(PictureGroup(record.name, list(pictures.values())))
    return [*side_by_side(groups), *missing]


def _drawn_maps(record: Record) -> dict[Method, Picture]:
    """The maps that evaluations left in the run folder."""
    pictures: dict[Method, Picture] = {}
    for method, description in METHODS.items():
        for evaluator in ("probe", "knn"):
            path = record.path / "pictures" / f"{evaluator}-map-{method}.png"
            alt = f"Map of {record.name}'s features of test images, coloured by class"
            caption = f"{description} ({EVALUATORS[evaluator]})"
            picture = read_picture(path, f"{alt}; {description}", caption)
            if picture is not None and method not in pictures:
                pictures[method] = picture
    return pictures


def _try_to_compute(
    record: Record, images: int, methods: list[Method]
) -> tuple[dict[Method, Picture], str]:
    """The maps, and the reason where none can be computed."""
    reason = _reason_for_no_map(record, images)
    if reason:
        return {}, reason
    try:
        return _compute_maps(record, images, methods), ""
    except (UserError, ValueError, OSError) as error:
        return {}, one_line(str(error))


def _reason_for_no_map(record: Record, images: int) -> str:
    """The reason why no map can be computed here; empty where one can."""
    data = record.config.get("data") or {}
    if not images:
        return "--map_images 0 leaves it out"
    if not data.get("val"):
        return "there are no held-out shards"
    shards = str([data.get("train"), data.get("val")])
    if "://" in shards or "pipe:" in shards:
        return (
            "its shards are not on a disk here; `maepretrain probe --encoder RUN --tsne` draws it"
        )
    size = data.get("image_size")
    if not isinstance(size, int) and len(size or []) != 2:
        return "its inputs are no images"
    if not list((record.path / "checkpoints").glob("*.ckpt")):
        return "it has no checkpoint yet"
    return ""


def _compute_maps(record: Record, images: int, methods: list[Method]) -> dict[Method, Picture]:
    parser = evaluation_parser(make_parser("report", config=False), features_of)
    argv = ["--encoder", str(record.path), "--data.num_workers", "0", "--images", str(images)]
    print(f"map of {record.name}: at most {images:,} images", flush=True)
    features, labels = features_of(**parse(parser, argv))
    pictures: dict[Method, Picture] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in methods:
            path = Path(folder) / f"{method}.png"
            embedding_map(features, labels, path, method)
            alt = f"Map of {record.name}'s features of {len(labels):,} held-out images, by class"
            caption = f"{METHODS[method]} (encoder's output)"
            picture = read_picture(path, f"{alt}; {METHODS[method]}", caption)
            assert picture is not None, "it has just been written"
            pictures[method] = picture
    return pictures


def features_of(
    encoder: str, data: ShardData, images: int
) -> tuple[Float[Tensor, "n d"], Int64[Tensor, "n"]]:
    """The encoder's output for held-out images, evenly chosen, and their classes.

    Args:
        encoder: of a run.
        data: shards; `val` is used.
        images: at most so many.

    Raises:
        ValueError: fewer than three labelled images, an encoder that cannot be read.
    """
    assert data.val_index is not None, "_reason_for_no_map has refused it"
    labels = data.val_index.require_labels("a map")
    labelled = (labels >= 0).nonzero().flatten()
    every = max(1, -(-len(labelled) // images))
    numbers = labelled[::every].contiguous()
    if len(numbers) < 3:
        raise ValueError(f"a map needs three labelled images, there are {len(numbers)}")
    model: Any = load_encoder(encoder, data).eval()
    normalise = Normalise(data.mean, data.std)
    samples = data.evaluation(data.val_index.choose(numbers), labelled=True)
    return embed(lambda batch: model.encode(normalise(batch)), samples)
