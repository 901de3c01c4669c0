"""What a page about runs is made of: lines, tables, code and pictures; those that need no drawing.

`report` puts them into HTML, and the model card of `export` into Markdown.
"""

import shlex
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from maepretrain.report.records import Record, plain, read_rows
from maepretrain.runs.configuration import flat
from maepretrain.runs.results import COLUMNS, cell_text, read_results
from maepretrain.runs.status import describe

# Rows of a list of errors; the file has all.
LISTED = 20
# Of a result, numbers that are no figures.
SETTINGS = ("seed", "scratch")
EVALUATORS = {"probe": "Linear probe", "knn": "k-NN", "finetune": "Fine-tuning"}
STATES = {"running": "killed, or its node lost", None: ""}


class Text(NamedTuple):
    """A line for people."""

    text: str
    kind = "text"


class Table(NamedTuple):
    """Rows under a head; the first column names the row."""

    head: list[str]
    rows: list[list[str]]
    kind = "table"


class Code(NamedTuple):
    """Text as it is; folded away where it is `long`."""

    title: str
    text: str
    long: bool = False
    language: str = ""
    kind = "code"


class Picture(NamedTuple):
    """A picture as a data URI; `shape` is how the page lays it out: as a "curve", on "paper", on
    "wide paper" or on the "paper" of a "grid"."""

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
    return plain("; ".join(parts) + ".")


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
            "Step": state["step"],
            "Epoch": state["epoch"],
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
            "Last checkpoint": _saved(record),
            "Silent for": state["silent"],
        }
        for name, text in facts.items():
            rows.setdefault(name, [""] * len(records))[i] = "" if text == "-" else text
    shown = [[name, *map(plain, row)] for name, row in rows.items() if any(row)]
    return Table(["", *names_of(records)], shown)


def _saved(record: Record) -> str:
    if "saved_step" not in record.status:
        return ""
    return f"step {record.status['saved_step']:,}, {utc(record.status.get('saved_at'))}"


def names_of(records: list[Record]) -> list[str]:
    return [plain(record.name) for record in records]


def _value(value: Any) -> str:
    """A value of a configuration; of a class, its name and what it was given."""
    if isinstance(value, dict) and "class_path" in value:
        given = {k: v for k, v in (value.get("init_args") or {}).items() if v is not None}
        inside = ", ".join(f"{k} {_value(v)}" for k, v in given.items())
        return f"{str(value['class_path']).rpartition('.')[2]} ({inside})"
    return str(value)


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
            parts += [Code("What was chosen", plain("\n".join(said), "\n"), True)] if said else []
    if not parts:
        return [Text("No evaluation yet: maepretrain probe --encoder RUN makes one.")]
    return [Text("Mean ± standard deviation over seeds, where there are several."), *parts]


def _figures(title: str, rows: list[tuple[str, dict[str, Any]]]) -> Table | None:
    """A table of numbers, columns that no row fills left out."""
    numbers = {
        key: None
        for _, row in rows
        for key, value in row.items()
        if isinstance(value, int | float)
        and not key.endswith("_std")
        and key not in ("seed", "scratch")
    }
    columns = [key for key in COLUMNS if key in numbers]
    columns += [key for key in numbers if key not in COLUMNS]
    if not columns:
        return None
    head = [title, *(COLUMNS.get(key, key.replace("_", " ")) for key in columns)]
    return Table(head, [[plain(name), *(_cell(row, k) for k in columns)] for name, row in rows])


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, int) and f"{key}_std" not in row:
        return f"{value:,}"
    return cell_text(row, key) if isinstance(value, int | float) else ""


def last_values(record: Record) -> Table:
    """The last value of every column of metrics.csv."""
    rows = [[plain(name), str(values[-1][1])] for name, values in record.metrics.items()]
    return Table(["metric", "last value"], rows)


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
            rows.append([*named, str(number), utc(start.get("at")), step, str(after), place])
        state = describe(record.path)
        times = record.status.get("starts", 0)
        line = f"{record.name}: {state['state']}"
        if times:
            line += f", started {times} time{'s'[: times - 1]}"
        changed = record.status.get("changed_at")
        line += f", last word {utc(changed)}" if changed else ""
        if not record.starts:
            line += "; its folder has no list of starts"
        parts.append(Text(plain(line + ".")))
    head = ["run"] * (len(records) > 1) + ["start", "time", "from step", "the one before", "where"]
    table = Table(head, [[plain(cell) for cell in row] for row in rows])
    return [*parts, *([table] if rows else [])]


def utc(seconds: Any) -> str:
    """A time for people, empty where there is none."""
    if not isinstance(seconds, int | float):
        return ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def errors(records: list[Record]) -> list[Part]:
    """What was wrong with shards and samples, and micro-batches whose loss was not finite."""
    parts: list[Part] = []
    clean = []
    for record in records:
        listed = read_rows(record.path / "errors.csv")
        listed += read_rows(record.path / "faults.csv")  # the name in older runs
        left = read_rows(record.path / "nonfinite.csv")
        if listed:
            kinds = Counter(row.get("kind") or "" for row in listed).most_common()
            counted = ", ".join(f"{n:,} {kind}" for kind, n in kinds)
            parts += _listed(f"{record.name}: {len(listed):,} errors: {counted}", listed)
        if left:
            steps = len({row.get("step") for row in left})
            line = f"{record.name}: {len(left):,} samples in {steps:,} steps gave no finite loss"
            parts += _listed(line, left)
        if not listed and not left:
            clean.append(record.name)
    if clean:
        which = f" of {', '.join(clean)}" if len(records) > 1 else ""
        parts.append(Text(plain(f"No sample{which} was unreadable, and every loss was finite.")))
    return parts


def _listed(line: str, rows: list[dict[str, str]]) -> list[Part]:
    more = f"; the first {LISTED} are shown" if len(rows) > LISTED else ""
    cells = [[plain(value or "") for value in row.values()] for row in rows[:LISTED]]
    return [Text(plain(line + more + ".")), Table([plain(name) for name in rows[0]], cells)]


def applied(records: list[Record]) -> list[Part]:
    """What each run printed before its first step."""
    known = [record for record in records if record.applied]
    parts: list[Part] = []
    if known:
        names = dict.fromkeys(name for record in known for name in record.applied)
        rows = [[name, *(plain(r.applied.get(name, ""), "\n") for r in known)] for name in names]
        parts.append(Table(["", *names_of(known)], rows))
    parts += [
        Text(plain(f"{record.name} left no record of what it applied: an older maepretrain."))
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
            rows.append([plain(key), *map(plain, values)])
    if not rows:
        return [Text("The configurations are equal but for the run folder.")]
    return [Table(["differs in", *names_of(records)], rows)]


def configuration(record: Record) -> Code:
    """The resolved configuration."""
    text = (record.path / "config.yaml").read_text().strip()
    return Code(plain(f"{record.name}/config.yaml"), plain(text, "\n"), True, "yaml")


def environment(records: list[Record]) -> list[Part]:
    """Versions of what computed."""
    known = [record for record in records if record.versions]
    parts: list[Part] = []
    if known:
        names = dict.fromkeys(name for record in known for name in record.versions)
        rows = [
            [plain(name), *(plain(str(r.versions.get(name, ""))) for r in known)] for name in names
        ]
        parts.append(Table(["", *names_of(known)], rows))
    parts += [
        Text(plain(f"{record.name}: earlier starts had other versions."))
        for record in known
        if any(start.get("versions") != record.versions for start in record.starts)
    ]
    parts += [
        Text(plain(f"{record.name} left no record of its environment: an older maepretrain."))
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
        parts.append(Code(plain(record.name), plain("\n".join(lines), "\n"), language="shell"))
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


def markdown(parts: list[Part]) -> str:
    """Texts, tables and code in Markdown; pictures, which are data in a page, are left out."""
    return "\n\n".join(_markdown(part) for part in parts if not isinstance(part, Columns))


def _markdown(part: Part) -> str:
    if isinstance(part, Table):
        lines = [part.head, ["---"] * len(part.head), *part.rows]
        return "\n".join(f"| {' | '.join(_in_cell(cell) for cell in row)} |" for row in lines)
    if isinstance(part, Code):
        fence = "````" if "```" in part.text else "```"
        return f"{part.title}:\n\n{fence}{part.language}\n{part.text}\n{fence}"
    assert isinstance(part, Text)
    return part.text.replace("<", "&lt;")


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
