"""Figures of an evaluation: scores, mean and spread over seeds, results.json, the printed table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from maepretrain.files import locked, replacing
from maepretrain.runs.status import versions

# From so many classes on, being among the first five says something.
TOP5_FROM = 6
COLUMNS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "per class",
    "knn": "k-NN",
    "n": "n",
    "seeds": "seeds",
    "minutes": "min",
    "img_per_s": "img/s",
}


def scores(
    predicted: Shaped[Tensor, "n *c"], truth: Int64[Tensor, "n"], classes: int
) -> dict[str, float]:
    """`top1`, `top5` (of logits with 6 classes or more), `mean_per_class` (mean recall of the
    classes that the truth holds) and `n`.

    Args:
        predicted: logits (n, classes), or predicted classes (n,).
        truth: the right classes.
        classes: how many there are.

    Raises:
        ValueError: no samples, or a truth outside 0..classes-1.
    """
    if not len(truth) or not 0 <= int(truth.min()) <= int(truth.max()) < classes:
        raise ValueError(f"scores need truths in 0..{classes - 1}, one sample or more")
    first = predicted.argmax(1) if predicted.ndim == 2 else predicted
    right = first == truth
    recall = truth[right].bincount(minlength=classes) / truth.bincount(minlength=classes)
    result = {"top1": float(right.double().mean())}
    if predicted.ndim == 2 and classes >= TOP5_FROM:
        five = predicted.topk(5, dim=1).indices
        result["top5"] = float((five == truth[:, None]).any(1).double().mean())
    return result | {"mean_per_class": float(recall.nanmean()), "n": len(truth)}


def spread(seeds: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over seeds, and `NAME_std`, the sample standard deviation, where there
    are several."""
    result: dict[str, float] = {}
    for name in seeds[0]:
        values = torch.tensor([float(seed[name]) for seed in seeds], dtype=torch.float64)
        result[name] = float(values.mean())
        if len(seeds) > 1 and name != "n":
            result[f"{name}_std"] = float(values.std())
    result["n"] = seeds[0]["n"]
    return result


def write_results(where: Path, evaluator: str, result: dict[str, Any]) -> Path:
    """Put the result of one evaluator into results.json; those of the others stay.

    Args:
        where: a folder, made where it is missing, or the file.
        evaluator: the key: "probe", "knn", "finetune", ...
        result: figures, recipe, encoder, data, seeds, minutes, img/s; the versions are added.

    Returns:
        The file.

    Raises:
        ValueError: a file that holds something else.
    """
    path = where if where.suffix == ".json" else where / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two evaluations of one run may end at the same time.
    with locked(path):
        results = read_results(path) | {evaluator: result | {"versions": versions()}}
        with replacing(path) as file:
            file.write(json.dumps(results, indent=1).encode() + b"\n")
    return path


def read_results(path: Path) -> dict[str, Any]:
    """The results in a file by evaluator; none where it is missing.

    Raises:
        ValueError: a file that holds something else.
    """
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path} holds no results: it is a {type(results).__name__}")
    return results


def print_table(rows: dict[str, dict[str, Any]], *, recipes: bool = True) -> None:
    """Print the table for people; columns that no row fills are left out.

    Args:
        rows: name of the features -> figures as `spread` gives them (top1, top1_std, ...), with
            `knn`, `seeds`, `recipe`, `minutes` and `img_per_s` where they are known.
        recipes: print those of the rows under it.
    """
    shown = {k: name for k, name in COLUMNS.items() if any(k in row for row in rows.values())}
    console = print_columns("features", shown, rows, cell_text)
    for name, row in rows.items():
        if recipes and "recipe" in row:
            console.print(f"  {name}: {row['recipe']}", highlight=False, markup=False)


def print_columns(
    first: str,
    columns: dict[str, str],
    rows: dict[str, dict[str, Any]],
    cell: Callable[[dict[str, Any], str], str],
) -> Console:
    """A table on the terminal or, as wide as it needs to be, in a log.

    Args:
        first: heading of the rows' names.
        columns: heading of each key.
        rows: name -> values by key.
        cell: the text of a row's key.

    Returns:
        The console, for what is printed below.
    """
    table = Table(box=box.SIMPLE, padding=0, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(cell(row, key) for key in columns))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # rich takes 80 columns for a log, and cuts
    console.print(table)
    return console


def cell_text(row: dict[str, Any], key: str) -> str:
    """A figure of a row with its spread, as a table shows it; empty where there is none."""
    value = row.get(key)
    if value is None:
        return ""
    if key in ("n", "seeds", "img_per_s"):
        return f"{value:,.0f}"
    if key == "minutes":
        return f"{value:.1f}"
    std = row.get(f"{key}_std")
    return f"{value:.4f}" + ("" if std is None else f" ± {std:.4f}")
