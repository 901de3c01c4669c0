"""The figures of evaluations, in a table for each evaluator with all runs in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maepretrain.data.errors import printable
from maepretrain.report.document import Code, Element, Table, Text, printable_lines
from maepretrain.report.records import Record
from maepretrain.runs.results import read_results
from maepretrain.runs.tables import HEADINGS, cell_text

EVALUATORS = {"probe": "Linear probe", "knn": "k-NN", "finetune": "Fine-tuning"}
# Numbers of a result that are no figures.
SETTINGS = ("seed", "scratch")


def evaluations(records: list[Record], folders: Sequence[Path] = ()) -> list[Element]:
    """A table for each evaluator, with the spread over seeds, all runs in it.

    Args:
        records: the runs.
        folders: that may hold the mean over several runs.
    """
    sources = _sources(records, folders)
    elements: list[Element] = []
    for evaluator in dict.fromkeys(key for _, results in sources for key in results):
        rows = _rows(sources, evaluator)
        table = _table(EVALUATORS.get(evaluator, evaluator), rows)
        if table is None:
            continue
        elements.append(table)
        recipes = [f"{name}: {figures['recipe']}" for name, figures in rows if "recipe" in figures]
        if recipes:
            elements.append(Code("What was chosen", printable_lines("\n".join(recipes)), long=True))
    if not elements:
        return [Text("No evaluation yet: maepretrain probe --encoder RUN makes one.")]
    return [Text("Mean ± standard deviation over seeds, where there are several."), *elements]


def _sources(records: list[Record], folders: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Results with the name of the run or folder that they are of."""
    runs = {record.path for record in records}
    sources = [(record.name, record.results) for record in records]
    others = [folder for folder in folders if folder not in runs]
    return sources + [(str(folder), read_results(folder / "results.json")) for folder in others]


def _rows(
    sources: list[tuple[str, dict[str, Any]]], evaluator: str
) -> list[tuple[str, dict[str, Any]]]:
    several = len(sources) > 1
    return [
        (f"{name}: {row}" if several else row, figures)
        for name, results in sources
        for row, figures in result_rows(results.get(evaluator)).items()
    ]


def result_rows(result: Any) -> dict[str, dict[str, Any]]:
    """The rows of an evaluator's result by name: those of a table, or the result itself."""
    if not isinstance(result, dict):
        return {}
    if isinstance(result.get("rows"), dict):
        return {str(k): v for k, v in result["rows"].items() if isinstance(v, dict)}
    return {"from scratch" if result.get("scratch") else "fine-tuned": result}


def _table(title: str, rows: list[tuple[str, dict[str, Any]]]) -> Table | None:
    """A table of numbers without columns that no row fills; None where there are no numbers."""
    numbers: list[str] = []
    for _, figures in rows:
        numbers += [key for key, value in figures.items() if _is_figure(key, value)]
    columns = [key for key in HEADINGS if key in numbers]
    columns += dict.fromkeys(key for key in numbers if key not in HEADINGS)
    if not columns:
        return None
    head = [title, *(HEADINGS.get(key, key.replace("_", " ")) for key in columns)]
    cells = [[printable(name), *(_cell(row, key) for key in columns)] for name, row in rows]
    return Table(head, cells)


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and not key.endswith("_std") and key not in SETTINGS


def _cell(figures: dict[str, Any], key: str) -> str:
    value = figures.get(key)
    if not isinstance(value, int | float):
        return ""
    if isinstance(value, int) and f"{key}_std" not in figures:
        return f"{value:,}"
    return cell_text(figures, key)


def last_values(record: Record) -> Table:
    """The last value of every column of metrics.csv."""
    rows = [[printable(name), str(points[-1][1])] for name, points in record.metrics.items()]
    return Table(["metric", "last value"], rows)
