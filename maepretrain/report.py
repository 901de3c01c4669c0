"""The verb `report`: one HTML page of one or several runs, side by side, from their folders alone.

Nothing on the page runs or is fetched: pictures lie in it, it has no script, and its
Content-Security-Policy allows none. What a folder lacks is left out with one line. The page is made
of parts (texts, tables, code, pictures); the model card of `export` shows the same ones in
Markdown.
"""

import base64
import csv
import math
import shlex
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import yaml
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from maepretrain import __version__
from maepretrain.arguments import UserError, make_parser, one_line, parse
from maepretrain.data.faults import printable
from maepretrain.data.module import ShardData
from maepretrain.evaluate.encoders import evaluation_parser, load_encoder
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.results import COLUMNS, cell_text, read_results
from maepretrain.files import replacing
from maepretrain.plots import COLOURS, Line, curve_panel, embedding_map
from maepretrain.runs import flat
from maepretrain.status import describe, read_starts, read_status
from maepretrain.training import Normalise

# Pictures of reconstructions over a training: the first, the last and some between.
GRIDS = 6
# A larger picture is stored anew, at most so wide, so that a page stays one that can be mailed.
PICTURE_BYTES, PICTURE_WIDTH = 400_000, 1400
# Rows of a list of faults; the file has all.
LISTED = 20
EVALUATORS = {"probe": "Linear probe", "knn": "k-NN", "finetune": "Fine-tuning"}
# Of a result, numbers that are no figures.
SETTINGS = ("seed", "scratch")
CURVES = {
    "loss": "Loss",
    "probe": "Linear probe during training, top-1",
    "knn": "k-NN during training, top-1",
    "top1": "Held-out top-1",
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "img_per_s": "Images a second",
    "data_wait": "Share of the time spent waiting for data",
    "skipped": "Micro-batches left out, their loss was not finite",
}
# They may be drawn on a logarithmic scale.
LOGARITHMIC = ("loss", "grad_norm")
STATES = {"running": "killed, or its node lost", None: ""}


class Text(NamedTuple):
    """A line for people."""

    text: str
    kind = "text"


class Table(NamedTuple):
    """Rows under a head; the first column names the row."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    kind = "table"


class Code(NamedTuple):
    """Text as it is; folded away where it is `long`."""

    title: str
    text: str
    long: bool = False
    language: str = ""
    kind = "code"


class Picture(NamedTuple):
    """A picture as a data URI; `shape` is how the page lays it out: as a "curve", on "paper", or on
    "wide paper"."""

    uri: str
    alt: str
    caption: str = ""
    shape: str = "paper"


class Figures(NamedTuple):
    """Pictures of one run, under its name where there are several runs."""

    title: str
    pictures: list[Picture]


class Columns(NamedTuple):
    """Runs side by side; `legend` has names and colours."""

    columns: list[Figures]
    legend: list[tuple[str, str]] = []  # noqa: RUF012, never changed
    kind = "columns"


Part = Text | Table | Code | Columns


class Section(NamedTuple):
    """A heading and what stands under it."""

    name: str
    title: str
    parts: list[Part]


@dataclass(frozen=True)
class Record:
    """What a run folder says.

    Args:
        path: the folder.
        name: of the run on the page.
        config: the resolved configuration.
        status: of status.json.
        starts: of starts.json.
        metrics: of metrics.csv, by column: (steps done, value).
        results: of results.json.
    """

    path: Path
    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    starts: list[dict[str, Any]]
    metrics: dict[str, list[tuple[int, float]]]
    results: dict[str, Any]

    @property
    def applied(self) -> dict[str, str]:
        """What the last start really applied."""
        return self.starts[-1].get("applied", {}) if self.starts else {}

    @property
    def versions(self) -> dict[str, str]:
        """Of the last start."""
        return self.starts[-1].get("versions", {}) if self.starts else {}

    @property
    def verb(self) -> str:
        """The verb that made it."""
        return "finetune" if "encoder" in self.config else "pretrain"


def read_run(path: Path) -> Record:
    """Read a run folder; files that it lacks are empty.

    Raises:
        ValueError: it holds no run, or a file of it is damaged.
    """
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} holds no run: it has no config.yaml")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text()) or {}
        assert isinstance(config, dict)
    except (yaml.YAMLError, UnicodeDecodeError, AssertionError):
        raise ValueError(f"{path / 'config.yaml'} is no configuration") from None
    return Record(
        path,
        str(path),
        config,
        read_status(path),
        read_starts(path),
        read_metrics(path / "metrics.csv"),
        read_results(path / "results.json"),
    )


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The columns of metrics.csv: (steps done, value), in the order of the file. Half a row, which
    a full disk left, is no row."""
    columns: dict[str, list[tuple[int, float]]] = {}
    for row in _rows(path):
        if not (row.get("step") or "").isdigit():
            continue
        for name, text in row.items():
            try:
                value = float(text or "")
            except (ValueError, TypeError):
                continue
            if name not in ("step", "epoch"):
                # A row carries the number of steps before its own.
                columns.setdefault(name, []).append((int(row["step"]) + 1, value))
    return columns


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, none where it is missing."""
    if not path.is_file():
        return []
    with path.open(newline="", errors="surrogateescape") as file:
        # What a row has beyond the head is under None.
        return [{k: v for k, v in row.items() if k} for row in csv.DictReader(file)]


def _expanded(paths: list[Path]) -> list[Path]:
    """A folder of several seeds stands for its runs."""
    found: list[Path] = []
    for path in paths:
        seeds = sorted(folder.parent for folder in path.glob("seed-*/config.yaml"))
        found += [path] if (path / "config.yaml").is_file() or not seeds else seeds
    return list(dict.fromkeys(found))


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
    records = [read_run(path) for path in _expanded(runs)]
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
    return environment.get_template("report.html").render(
        title=", ".join(_plain(record.name) for record in records),
        leads=[(_plain(record.name), lead(record)) for record in records],
        sections=parts,
        written=_time(time.time()),
        version=__version__,
        command=_plain(command),
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
        Section("faults", "Faults in the data", faults(records)),
        Section("applied", "What was really applied", applied(records)),
        Section("config", "Configuration", configs),
        Section("environment", "Environment and versions", environment(records)),
        Section("reproduce", "Commands to reproduce", reproduce(records)),
    ]


def lead(record: Record) -> str:
    """A run in a sentence."""
    row = describe(record.path)
    what = "fine-tuned" if record.verb == "finetune" else "pretrained"
    parts = [f"{model_name(record)} {what} on {data_of(record)}", row["state"]]
    parts.append(f"step {row['step']}")
    if row["ETA"] != "-":
        parts.append(f"{row['ETA']} to go")
    if last := record.metrics.get("val_loss", []):
        parts.append(f"held-out loss {last[-1][1]:.4g}")
    for key, title in EVALUATORS.items():
        figures = result_rows(record.results.get(key))
        first = next(iter(figures.values()), {})
        if "top1" in first:
            parts.append(f"{title.lower() if key != 'knn' else title} {cell_text(first, 'top1')}")
    return _plain("; ".join(parts) + ".")


def model_name(record: Record) -> str:
    """The class of the model; of fine-tuning, the encoder that it began with."""
    model = record.config.get("model")
    if isinstance(model, dict):
        return str(model.get("class_path", "model")).rpartition(".")[2]
    encoder = record.config.get("encoder", "an unknown model")
    return f"{'architecture of ' if record.config.get('scratch') else 'encoder '}{encoder}"


def data_of(record: Record) -> str:
    """Patterns of the training shards."""
    train = (record.config.get("data") or {}).get("train", "unknown data")
    names = train if isinstance(train, list | dict) else [train]
    return ", ".join(str(name) for name in names)


def summary(records: list[Record]) -> Table:
    """State, length, model and data of each run."""
    rows: dict[str, list[str]] = {}
    for i, record in enumerate(records):
        data = record.config.get("data") or {}
        state = describe(record.path)
        last = ", ".join(
            f"{name} {values[-1][1]:.4g}"
            for name, values in record.metrics.items()
            if "loss" in name
        )
        model = record.config.get("model") or {}
        given = {k: v for k, v in (model.get("init_args") or {}).items() if v is not None}
        facts = {
            "State": state["state"],
            "Step": f"{state['step']} (epoch {state['epoch']})",
            "Model": model_name(record),
            "Its arguments": ", ".join(f"{k} {_value(v)}" for k, v in given.items()),
            "Trained on": record.applied.get("data", data_of(record)),
            "Shards": data_of(record) if "data" in record.applied else "",
            "Held out": record.applied.get("held out", str(data.get("val") or "none")),
            "Batch": record.applied.get("batch", str(data.get("global_batch", ""))),
            "Learning rate": record.applied.get("lr", ""),
            "Devices": record.applied.get("devices", ""),
            "Precision": record.applied.get("precision", ""),
            "Seed": str(record.config.get("seed", "")),
            "Last losses": last,
            "Images a second": state["img/s"],
            "Last checkpoint": state["last checkpoint"],
            "Silent for": state["silent"],
        }
        for name, text in facts.items():
            rows.setdefault(name, [""] * len(records))[i] = "" if text == "-" else text
    shown = [[name, *map(_plain, row)] for name, row in rows.items() if any(row)]
    return Table(["", *_names(records)], shown)


def _names(records: list[Record]) -> list[str]:
    return [_plain(record.name) for record in records]


def _value(value: Any) -> str:
    """A value of a configuration; of a class, its name and what it was given."""
    if isinstance(value, dict) and "class_path" in value:
        given = {k: v for k, v in (value.get("init_args") or {}).items() if v is not None}
        inside = ", ".join(f"{k} {_value(v)}" for k, v in given.items())
        return f"{str(value['class_path']).rpartition('.')[2]} ({inside})"
    return str(value)


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
    legend = list(zip(_names(records), _cycled(len(records)), strict=True)) if several else []
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
    return _plain(f"{_title(name)} by step. {'; '.join(said)}.")


def _title(name: str) -> str:
    return CURVES.get(name, _plain(name.replace("_", " ").capitalize()))


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
        columns.append(Figures(record.name, [p for p in shown if p is not None]))
    return _side_by_side(columns, "No reconstructions yet, they are drawn at each validation")


def _side_by_side(columns: list[Figures], otherwise: str) -> list[Part]:
    """The runs that have pictures beside each other, and a line for those that have none."""
    several = len(columns) > 1
    full = [f._replace(title=_plain(f.title) if several else "") for f in columns if f.pictures]
    empty = [f.title for f in columns if not f.pictures]
    parts: list[Part] = [Columns(full)] if full else []
    if empty:
        which = f"{', '.join(empty)}: " if several else ""
        parts.append(Text(_plain(f"{which}{otherwise}.")))
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
    return Picture(_uri(data, kind), _plain(alt), _plain(caption))


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def result_rows(result: Any) -> dict[str, dict[str, Any]]:
    """The rows of an evaluator's result by name: those of a table, or the result itself."""
    if not isinstance(result, dict):
        return {}
    if isinstance(result.get("rows"), dict):
        return {str(k): v for k, v in result["rows"].items() if isinstance(v, dict)}
    return {"from scratch" if result.get("scratch") else "fine-tuned": result}


def evaluations(records: list[Record], folders: list[Path] = []) -> list[Part]:  # noqa: B006
    """A table for each evaluator, with the spread over seeds, all runs in it.

    Args:
        records: the runs.
        folders: that may hold the mean over several runs.
    """
    known = {record.path for record in records}
    sources = [(record.name, record.results) for record in records]
    sources += [(str(f), read_results(f / "results.json")) for f in folders if f not in known]
    several = len(sources) > 1
    parts: list[Part] = []
    for key in dict.fromkeys(key for _, results in sources for key in results):
        rows = [
            (f"{name}: {row}" if several else row, figures)
            for name, results in sources
            for row, figures in result_rows(results.get(key)).items()
        ]
        if table := _figures(EVALUATORS.get(key, key), rows):
            parts.append(table)
            said = [f"{name}: {row['recipe']}" for name, row in rows if "recipe" in row]
            parts += [Code("What was chosen", _plain("\n".join(said)), True)] if said else []
    if not parts:
        return [Text("No evaluation yet: `maepretrain probe --encoder RUN` makes one.")]
    return [Text("Mean ± standard deviation over seeds, where there are several."), *parts]


def _figures(title: str, rows: list[tuple[str, dict[str, Any]]]) -> Table | None:
    """A table of numbers, columns that no row fills left out."""
    numbers = {
        key: None
        for _, row in rows
        for key, value in row.items()
        if isinstance(value, int | float) and not key.endswith("_std") and key not in SETTINGS
    }
    columns = [key for key in COLUMNS if key in numbers]
    columns += [key for key in numbers if key not in COLUMNS]
    if not columns:
        return None
    head = [title, *(COLUMNS.get(key, key.replace("_", " ")) for key in columns)]
    return Table(head, [[_plain(name), *(_cell(row, k) for k in columns)] for name, row in rows])


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, int) and f"{key}_std" not in row:
        return f"{value:,}"
    return cell_text(row, key) if isinstance(value, int | float) else ""


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
    full = [f._replace(title=_plain(f.title) if several else "") for f in columns if f.pictures]
    return [*([Columns(full)] if full else []), *(Text(_plain(line)) for line in missing)]


METHODS = {
    "pca": "PCA, the two directions of largest variance",
    "tsne": "t-SNE: neighbours stay together, distances say nothing",
}


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
    numbers = numbers[:: max(1, -(-len(numbers) // images))]
    if len(numbers) < 3:
        raise ValueError(f"a map needs three labelled images, there are {len(numbers)}")
    model: Any = load_encoder(encoder, data).eval()
    normalise = Normalise(data.mean, data.std)
    samples = data.evaluation(data.val_index.choose(numbers), labelled=True)
    return embed(lambda batch: model.encode(normalise(batch)), samples)


def starts(records: list[Record]) -> list[Part]:
    """When each run was started, and why again."""
    rows, parts = [], []
    for record in records:
        named = [record.name] if len(records) > 1 else []
        for number, start in enumerate(record.starts, 1):
            after = start.get("after")
            after = STATES.get(after, after) if number > 1 else ""
            place = " ".join(str(start[k]) for k in ("host", "job") if k in start)
            step = f"{start.get('step', 0):,}"
            rows.append([*named, str(number), _time(start.get("at")), step, str(after), place])
        state = describe(record.path)
        times = record.status.get("starts", 0)
        line = f"{record.name}: {state['state']}"
        if times:
            line += f", started {times} time{'s'[: times - 1]}"
        changed = record.status.get("changed_at")
        line += f", last word {_time(changed)}" if changed else ""
        if not record.starts:
            line += "; its folder has no list of starts"
        parts.append(Text(_plain(line + ".")))
    head = ["run"] * (len(records) > 1) + ["start", "time", "from step", "the one before", "where"]
    table = Table(head, [[_plain(cell) for cell in row] for row in rows])
    return [*parts, *([table] if rows else [])]


def _time(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def faults(records: list[Record]) -> list[Part]:
    """Samples that were replaced, and micro-batches whose loss was not finite."""
    parts: list[Part] = []
    clean = []
    for record in records:
        listed = _rows(record.path / "faults.csv")
        left = _rows(record.path / "nonfinite.csv")
        if listed:
            kinds = Counter(row.get("kind") or "" for row in listed).most_common()
            counted = ", ".join(f"{n:,} {kind}" for kind, n in kinds)
            parts += _listed(f"{record.name}: {len(listed):,} samples replaced: {counted}", listed)
        if left:
            steps = len({row.get("step") for row in left})
            line = f"{record.name}: {len(left):,} samples in {steps:,} steps gave no finite loss"
            parts += _listed(line, left)
        if not listed and not left:
            clean.append(record.name)
    if clean:
        which = f" of {', '.join(clean)}" if len(records) > 1 else ""
        parts.append(Text(_plain(f"No sample{which} was unreadable, and every loss was finite.")))
    return parts


def _listed(line: str, rows: list[dict[str, str]]) -> list[Part]:
    more = f"; the first {LISTED} are shown" if len(rows) > LISTED else ""
    cells = [[_plain(value or "") for value in row.values()] for row in rows[:LISTED]]
    return [Text(_plain(line + more + ".")), Table([_plain(name) for name in rows[0]], cells)]


def applied(records: list[Record]) -> list[Part]:
    """What each run printed before its first step."""
    known = [record for record in records if record.applied]
    parts: list[Part] = []
    if known:
        names = dict.fromkeys(name for record in known for name in record.applied)
        rows = [[name, *(_plain(r.applied.get(name, ""), "\n") for r in known)] for name in names]
        parts.append(Table(["", *_names(known)], rows))
    parts += [
        Text(_plain(f"{record.name} left no record of what it applied: an older maepretrain."))
        for record in records
        if not record.applied
    ]
    return parts


def differences(records: list[Record]) -> list[Part]:
    """The values in which the configurations differ."""
    configs = [flat(record.config) for record in records]
    keys = sorted({key for config in configs for key in config})
    rows = []
    for key in keys:
        values = [str(config.get(key, "")) for config in configs]
        if len(set(values)) > 1 and key != "run":
            rows.append([_plain(key), *map(_plain, values)])
    if not rows:
        return [Text("The configurations are equal but for the run folder.")]
    return [Table(["differs in", *_names(records)], rows)]


def configuration(record: Record) -> Code:
    """The resolved configuration."""
    text = (record.path / "config.yaml").read_text().strip()
    return Code(_plain(f"{record.name}/config.yaml"), _plain(text, "\n"), True, "yaml")


def environment(records: list[Record]) -> list[Part]:
    """Versions of what computed."""
    known = [record for record in records if record.versions]
    parts: list[Part] = []
    if known:
        names = dict.fromkeys(name for record in known for name in record.versions)
        rows = [
            [_plain(name), *(_plain(str(r.versions.get(name, ""))) for r in known)]
            for name in names
        ]
        parts.append(Table(["", *_names(known)], rows))
    parts += [
        Text(_plain(f"{record.name}: earlier starts had other versions."))
        for record in known
        if any(start.get("versions") != record.versions for start in record.starts)
    ]
    parts += [
        Text(_plain(f"{record.name} left no record of its environment: an older maepretrain."))
        for record in records
        if not record.versions
    ]
    return parts


def reproduce(records: list[Record]) -> list[Part]:
    """The commands that make the runs and their figures again."""
    parts: list[Part] = []
    for record in records:
        lines = []
        for start in record.starts[:1]:
            if "command" in start:
                lines += ["# as it was started", shlex.join(["cd", str(start.get("folder", "."))])]
                lines += [str(start["command"]), ""]
        lines += ["# the same from its resolved configuration, in a new folder"]
        again = ["maepretrain", record.verb, "-c", str(record.path / "config.yaml")]
        again += ["--run", f"{record.path}-again"]
        for flag in ("resume", "overwrite"):
            again += [f"--{flag}", "false"] if record.config.get(flag) else []
        lines.append(shlex.join(again))
        evaluated = [_evaluate_again(record, key) for key in ("probe", "knn")]
        lines += ["", "# its figures", *filter(None, evaluated)] if any(evaluated) else []
        parts.append(Code(_plain(record.name), _plain("\n".join(lines), "\n"), language="shell"))
    return parts


def _evaluate_again(record: Record, key: str) -> str:
    """The command of an evaluation, with the options that its result tells."""
    result = record.results.get(key)
    if not isinstance(result, dict):
        return ""
    words = ["maepretrain", key, "--encoder", str(record.path)]
    if len(result_rows(result)) > 1:
        words.append("--baselines")
    data = result.get("data") or {}
    for name in ("label_fraction", "labels_per_class"):
        if data.get(name) not in (None, 1.0):
            words += [f"--{name}", str(data[name])]
    seeds = result.get("seeds")
    if isinstance(seeds, list) and seeds and seeds != [0]:
        words += ["--seeds", str(len(seeds)), "--seed", str(seeds[0])]
    return shlex.join(words)


def _plain(text: str, keep: str = "") -> str:
    """Text that any file can hold: bytes that are no UTF-8 and control characters are spelt."""
    return "".join(c if c in keep else printable(c) for c in text)


def markdown(parts: list[Part]) -> str:
    """Texts, tables and code in Markdown; pictures, which are data in a page, are left out."""
    return "\n\n".join(_markdown(part) for part in parts if not isinstance(part, Columns))


def _markdown(part: Part) -> str:
    if isinstance(part, Table):
        lines = [part.head, ["---"] * len(part.head), *part.rows]
        return "\n".join(f"| {' | '.join(_in_cell(cell) for cell in row)} |" for row in lines)
    if isinstance(part, Code):
        return f"{part.title}:\n\n```{part.language}\n{part.text}\n```"
    assert isinstance(part, Text)
    return part.text


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
