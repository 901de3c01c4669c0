"""The verb `report`: one HTML page of one or several runs, side by side, from their folders alone.

Nothing on the page runs or is fetched: pictures lie in it, it has no script, and its
Content-Security-Policy allows none. What a folder lacks is left out with one line.
"""

import base64
import math
import shlex
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import jinja2
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from maepretrain import __version__
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.module import ShardData
from maepretrain.data.normalise import Normalise
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.options import evaluation_parser
from maepretrain.files import replacing
from maepretrain.parsing import UserError, make_parser, one_line, parse
from maepretrain.plots import COLOURS, Line, curve_panel, embedding_map
from maepretrain.report.records import Record, expanded, plain, read_run
from maepretrain.report.sections import (
    EVALUATORS,
    Columns,
    Figures,
    Part,
    Picture,
    Section,
    Text,
    applied,
    configuration,
    differences,
    environment,
    errors,
    evaluations,
    lead,
    names_of,
    reproduce,
    result_rows,
    starts,
    summary,
    utc,
)
from maepretrain.runs.results import cell_text

# Pictures of reconstructions over a training: the first, the last and some between.
GRIDS = 6
# A larger picture is stored anew, at most so wide, so that a page stays one that can be mailed.
PICTURE_BYTES, PICTURE_WIDTH = 400_000, 1400
CURVES = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "probe": "Linear probe during training, top-1",
    "knn": "k-NN during training, top-1",
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "img_per_s": "Images a second",
    "data_wait": "Share of the time spent waiting for data",
    "skipped": "Micro-batches left out, their loss was not finite",
}
# They may be drawn on a logarithmic scale.
LOGARITHMIC = ("loss", "grad_norm")
METHODS = {
    "pca": "PCA, the two directions of largest variance",
    "tsne": "t-SNE: neighbours stay together, distances say nothing",
}


def report(runs: list[Path], out: Path = Path("report.html"), map_images: int = 2000) -> int:
    """Write one HTML page of runs, for a browser without network. Pretraining or fine-tuning,
    running, stopped, failed or done.

    Args:
        runs: run folders; a folder of several seeds stands for its runs.
        out: the page; an older one is replaced.
        map_images: held-out images of a map of the features (PCA and t-SNE), which is computed
            where no evaluation left one and the shards lie on a disk here; 0 for none.

    Returns:
        0.

    Raises:
        ValueError: a folder that holds no run, a damaged file in it, a page that cannot be written.
    """
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out} must end in .html")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if map_images < 0:
        raise ValueError(f"map_images {map_images} must be at least 0")
    records = [read_run(path) for path in expanded(runs)]
    page = render(records, sections(records, runs, map_images), out)
    with replacing(out) as file:
        file.write(page.encode())
    print(f"{out}  {len(page) / 1e6:.1f} MB, {len(records)} run{'s'[: len(records) - 1]}")
    return 0


def render(records: list[Record], parts: list[Section], out: Path) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    command = shlex.join(["maepretrain", "report", *(r.name for r in records), "--out", str(out)])
    return environment.get_template("page.html").render(
        title=", ".join(plain(record.name) for record in records),
        leads=[(plain(record.name), lead(record)) for record in records],
        sections=parts,
        written=utc(time.time()),
        version=__version__,
        command=plain(command),
    )


def sections(records: list[Record], runs: list[Path], map_images: int) -> list[Section]:
    """The page in the order of its table of contents."""
    configs: list[Part] = [configuration(record) for record in records]
    if len(records) > 1:
        configs = [*differences(records), *configs]
    return [
        Section("summary", "What was trained on what", [summary(records)]),
        Section("curves", "Curves", curves(records)),
        Section("reconstructions", "Reconstructions over training", reconstructions(records)),
        Section("evaluations", "Evaluations", evaluations(records, runs)),
        Section("confusion", "Confusions", confusions(records)),
        Section("map", "Maps of the features", maps(records, map_images)),
        Section("starts", "Starts, restarts and preemptions", starts(records)),
        Section("errors", "Errors in the data", errors(records)),
        Section("applied", "What was really applied", applied(records)),
        Section("config", "Configuration", configs),
        Section("environment", "Environment and versions", environment(records)),
        Section("reproduce", "Commands to reproduce", reproduce(records)),
    ]


def curves(records: list[Record]) -> list[Part]:
    """A panel for each column of metrics.csv, with the held-out values of the same name."""
    if not any(record.metrics for record in records):
        return [Text("No step has been logged yet.")]
    found = {name.removeprefix("val_") for record in records for name in record.metrics}
    ordered = [name for name in CURVES if name in found]
    after = ordered.index("loss") + 1 if "loss" in ordered else 0
    ordered[after:after] = sorted(found - set(CURVES))
    several = len(records) > 1
    single = [name for name in ordered if not _is_curve(records, name)]
    pictures = [_panel(records, name) for name in ordered if name not in single]
    legend = list(zip(names_of(records), _cycled(len(records)), strict=True)) if several else []
    if not several:
        legend = [("training", COLOURS[0]), ("held out", COLOURS[1])]
    words = "Solid lines: training; dashed: held out. " if several else ""
    restarted = any(len(record.starts) > 1 for record in records)
    words += "Dotted verticals: restarts. " if restarted else ""
    parts: list[Part] = [Text(words.strip())] if words else []
    parts += [Columns([Figures("", pictures)], legend)] if pictures else []
    return [*parts, *(Text(_described(records, name)) for name in single)]


def _cycled(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _is_curve(records: list[Record], name: str) -> bool:
    """Whether it has two points anywhere; a single one is better said."""
    columns = (record.metrics.get(c, []) for record in records for c in (name, f"val_{name}"))
    return any(len(points) > 1 for points in columns)


def _described(records: list[Record], name: str) -> str:
    """Curves in words."""
    said = [
        f"{record.name}, {'held out' if held_out else 'training'}: {_told(points)}"
        for record in records
        for held_out, column in enumerate((name, f"val_{name}"))
        if (points := record.metrics.get(column, []))
    ]
    return plain(f"{_title(name)} by step: {'; '.join(said)}.")


def _title(name: str) -> str:
    return CURVES.get(name, plain(name.replace("_", " ").capitalize()))


def _panel(records: list[Record], name: str) -> Picture:
    lines = []
    several = len(records) > 1
    for record, colour in zip(records, _cycled(len(records)), strict=True):
        for held_out, column in enumerate((name, f"val_{name}")):
            points = record.metrics.get(column, [])
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            alone = COLOURS[held_out]
            dashed = several and bool(held_out)
            lines.append(Line([*steps], [*values], colour if several else alone, dashed))
    marks = [
        (int(start.get("step", 0)), colour if several else "gray")
        for record, colour in zip(records, _cycled(len(records)), strict=True)
        for start in record.starts[1:]
    ]
    uri = _uri(curve_panel(lines, marks, name in LOGARITHMIC), "image/svg+xml")
    return Picture(uri, _described(records, name), _title(name), "curve")


def _told(points: list[tuple[int, float]]) -> str:
    """A curve in words."""
    (first, begin), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{begin:.4g} at step {first:,}"
    finite = [value for _, value in points if math.isfinite(value)]
    ends = f"{begin:.4g} at step {first:,}, {end:.4g} at step {last:,}"
    return ends + (f", between {min(finite):.4g} and {max(finite):.4g}" if finite else "")


def reconstructions(records: list[Record]) -> list[Part]:
    """Held-out images as the model saw them, early and late."""
    columns = []
    for record in records:
        grids = sorted((record.path / "pictures").glob("step-*.png"))
        last = len(grids) - 1
        some = sorted({round(i * last / (GRIDS - 1)) for i in range(GRIDS)}) if grids else []
        shown = []
        for grid in (grids[i] for i in some):
            step = grid.stem.removeprefix("step-").lstrip("0") or "0"
            alt = f"Reconstructions of held-out images by {record.name} after step {step}"
            shown.append(picture(grid, alt, f"step {int(step):,}" if step.isdigit() else step))
        large = [p._replace(shape="paper grid") for p in shown if p is not None]
        columns.append(Figures(record.name, large))
    return _side_by_side(columns, "No reconstructions yet, they are drawn at each validation")


def _side_by_side(columns: list[Figures], otherwise: str) -> list[Part]:
    """The runs that have pictures beside each other, and a line for those that have none."""
    several = len(columns) > 1
    full = [f._replace(title=plain(f.title) if several else "") for f in columns if f.pictures]
    empty = [f.title for f in columns if not f.pictures]
    parts: list[Part] = [Columns(full)] if full else []
    if empty:
        which = f"{', '.join(empty)}: " if several else ""
        parts.append(Text(plain(f"{which}{otherwise}.")))
    return parts


def picture(path: Path, alt: str, caption: str = "") -> Picture | None:
    """A picture of a run folder, a large one stored anew; None where it is half written."""
    try:
        data = path.read_bytes()
        with Image.open(BytesIO(data)) as opened:
            opened.load()
            kind = {"PNG": "image/png", "JPEG": "image/jpeg"}.get(str(opened.format))
            if kind is None or len(data) > PICTURE_BYTES:
                smaller = opened.convert("RGB")
                smaller.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
                buffer = BytesIO()
                smaller.save(buffer, "JPEG", quality=88)
                data, kind = buffer.getvalue(), "image/jpeg"
    except (OSError, SyntaxError, ValueError):  # Pillow's ways to say that it is no picture
        return None
    return Picture(_uri(data, kind), plain(alt), plain(caption))


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def confusions(records: list[Record]) -> list[Part]:
    """What evaluations drew of their mistakes."""
    columns = []
    for record in records:
        shown = []
        for key, title in EVALUATORS.items():
            figures = next(iter(result_rows(record.results.get(key)).values()), {})
            score = f"; top-1 {cell_text(figures, 'top1')}" if "top1" in figures else ""
            for kind, words in (
                ("confusion", "confusion matrix, rows are true and columns predicted classes"),
                ("most-confused", "test images taken for another class with most confidence"),
            ):
                path = record.path / "pictures" / f"{key}-{kind}.png"
                alt = f"{title} of {record.name}: {words}{score}"
                if drawn := picture(path, alt, f"{title}: {words}"):
                    wide = "wide paper" if kind == "most-confused" else "paper"
                    shown.append(drawn._replace(shape=wide))
        columns.append(Figures(record.name, shown))
    return _side_by_side(columns, "None was drawn yet, which probe, knn and finetune do")


def maps(records: list[Record], images: int) -> list[Part]:
    """Features in the plane, coloured by class: those that evaluations drew, the rest computed."""
    columns: list[Figures] = []
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for record in records:
            shown = _drawn_maps(record)
            lacking = [method for method in ("pca", "tsne") if method not in shown]
            why = _why_no_map(record, images) if lacking else ""
            if lacking and not why:
                try:
                    shown |= _compute_maps(record, images, lacking, Path(folder))
                except (UserError, ValueError, OSError) as error:
                    why = one_line(str(error))
            if why:
                names = " and ".join({"pca": "PCA", "tsne": "t-SNE"}[m] for m in lacking)
                missing.append(f"{record.name}: no map by {names}, {why}.")
            columns.append(Figures(record.name, list(shown.values())))
    several = len(columns) > 1
    full = [f._replace(title=plain(f.title) if several else "") for f in columns if f.pictures]
    return [*([Columns(full)] if full else []), *(Text(plain(line)) for line in missing)]


def _drawn_maps(record: Record) -> dict[str, Picture]:
    found = {}
    for method, words in METHODS.items():
        for key in ("probe", "knn"):
            path = record.path / "pictures" / f"{key}-map-{method}.png"
            alt = f"Map of {record.name}'s features of test images, coloured by class; {words}"
            drawn = picture(path, alt, f"{words} ({EVALUATORS[key]})")
            if drawn is not None:
                found.setdefault(method, drawn)
    return found


def _why_no_map(record: Record, images: int) -> str:
    """Why none can be computed here, or nothing."""
    data = record.config.get("data") or {}
    if not images:
        return "--map_images 0 leaves it out"
    if not data.get("val"):
        return "there are no held-out shards"
    named = str([data.get("train"), data.get("val")])
    if "://" in named or "pipe:" in named:
        return (
            "its shards are not on a disk here; `maepretrain probe --encoder RUN --tsne` draws it"
        )
    if len(_sides(data.get("image_size"))) != 2:
        return "its inputs are no images"
    if not list((record.path / "checkpoints").glob("*.ckpt")):
        return "it has no checkpoint yet"
    return ""


def _sides(size: Any) -> list[Any]:
    return [size, size] if isinstance(size, int) else list(size or [])


def _compute_maps(
    record: Record, images: int, methods: list[str], folder: Path
) -> dict[str, Picture]:
    parser = evaluation_parser(make_parser("report", config=False), features_of)
    argv = ["--encoder", str(record.path), "--data.num_workers", "0", "--images", str(images)]
    print(f"map of {record.name}: at most {images:,} images", flush=True)
    features, labels = features_of(**parse(parser, argv))
    found = {}
    for method in methods:
        path = folder / f"{method}.png"
        embedding_map(features, labels, path, _method(method))
        alt = f"Map of {record.name}'s features of {len(labels):,} held-out images, by class"
        drawn = picture(path, f"{alt}; {METHODS[method]}", f"{METHODS[method]} (encoder's output)")
        assert drawn is not None
        found[method] = drawn
    return found


def _method(name: str) -> Literal["pca", "tsne"]:
    return "pca" if name == "pca" else "tsne"


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
    assert data.val_index is not None
    labels = data.val_index.require_labels("a map")
    numbers = (labels >= 0).nonzero().flatten()
    numbers = numbers[:: max(1, -(-len(numbers) // images))].contiguous()
    if len(numbers) < 3:
        raise ValueError(f"a map needs three labelled images, there are {len(numbers)}")
    model: Any = load_encoder(encoder, data).eval()
    normalise = Normalise(data.mean, data.std)
    samples = data.evaluation(data.val_index.choose(numbers), labelled=True)
    return embed(lambda batch: model.encode(normalise(batch)), samples)
