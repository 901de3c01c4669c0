"""A run in a sentence, and the table of what was trained on what."""

from typing import Any

from maepretrain.data.errors import printable
from maepretrain.report.document import Table
from maepretrain.report.evaluations import EVALUATORS, result_rows
from maepretrain.report.records import Record, names_of, utc
from maepretrain.runs.status import describe
from maepretrain.runs.tables import cell_text


def sentence(record: Record) -> str:
    """A run in a sentence."""
    status = describe(record.path)
    trained = "fine-tuned" if record.verb == "finetune" else "pretrained"
    facts = [
        f"{model_name(record)} {trained} on {data_of(record)}",
        status["state"],
        f"step {status['step']}",
    ]
    if status["ETA"] != "-":
        facts.append(f"{status['ETA']} to go")
    if held_out := record.metrics.get("val_loss", []):
        facts.append(f"held-out loss {held_out[-1][1]:.4g}")
    for key, title in EVALUATORS.items():
        rows = result_rows(record.results.get(key))
        first = next(iter(rows.values()), {})
        if "top1" in first:
            name = title if key == "knn" else title.lower()
            facts.append(f"{name} {cell_text(first, 'top1')}")
    return printable("; ".join(facts) + ".")


def model_name(record: Record) -> str:
    """The class of the model; of fine-tuning, the encoder that it began with."""
    model = record.config.get("model")
    if isinstance(model, dict):
        return str(model.get("class_path", "model")).rpartition(".")[2]
    encoder = record.config.get("encoder", "an unknown model")
    if record.config.get("scratch"):
        return f"architecture of {encoder}"
    return f"encoder {encoder}"


def data_of(record: Record) -> str:
    """Patterns of the training shards."""
    train = (record.config.get("data") or {}).get("train", "unknown data")
    names = train if isinstance(train, list | dict) else [train]
    return ", ".join(str(name) for name in names)


def summary(records: list[Record]) -> Table:
    """State, length, model and data of each run."""
    rows: dict[str, list[str]] = {}
    for i, record in enumerate(records):
        for name, text in _facts(record).items():
            cells = rows.setdefault(name, [""] * len(records))
            cells[i] = "" if text == "-" else text
    shown = [[name, *map(printable, cells)] for name, cells in rows.items() if any(cells)]
    return Table(["", *names_of(records)], shown)


def _facts(record: Record) -> dict[str, str]:
    data = record.config.get("data") or {}
    status = describe(record.path)
    model = record.config.get("model") or {}
    return {
        "State": status["state"],
        "Step": status["step"],
        "Epoch": status["epoch"],
        "Model": model_name(record),
        "Its arguments": _arguments(model),
        "Trained on": record.applied.get("data", data_of(record)),
        "Shards": data_of(record) if "data" in record.applied else "",
        "Held out": record.applied.get("held out", str(data.get("val") or "none")),
        "Batch": record.applied.get("batch", str(data.get("global_batch", ""))),
        "Learning rate": record.applied.get("lr", ""),
        "Devices": record.applied.get("devices", ""),
        "Precision": record.applied.get("precision", ""),
        "Seed": str(record.config.get("seed", "")),
        "Last losses": _last_losses(record),
        "Images a second": status["img/s"],
        "Last checkpoint": _last_checkpoint(record),
        "Silent for": status["silent"],
    }


def _last_losses(record: Record) -> str:
    losses = {name: points for name, points in record.metrics.items() if "loss" in name}
    return ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in losses.items())


def _last_checkpoint(record: Record) -> str:
    if "saved_step" not in record.status:
        return ""
    return f"step {record.status['saved_step']:,}, {utc(record.status.get('saved_at'))}"


def _arguments(configured: dict[str, Any]) -> str:
    """The arguments of a configured class that are set."""
    arguments = configured.get("init_args") or {}
    return ", ".join(
        f"{name} {_value(value)}" for name, value in arguments.items() if value is not None
    )


def _value(value: Any) -> str:
    """A value of a configuration; of a class, its name and its arguments."""
    if isinstance(value, dict) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        return f"{name} ({_arguments(value)})"
    return str(value)
