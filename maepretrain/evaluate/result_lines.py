"""The result of an evaluation on the terminal: three lines, and a table where there are several
rows or seeds. Everything is read from results.json."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from maepretrain.evaluate.frozen_features import PRETRAINED
from maepretrain.ranks import say
from maepretrain.runs.results import read_results
from maepretrain.runs.tables import print_table

# Words for the first figure of a task.
FIGURE_NAMES = {"top1": "top-1"}


@rank_zero_only
def print_frozen(folder: Path, evaluator: str) -> None:
    """Print the result of a linear probe or of k-NN.

    Args:
        folder: of results.json.
        evaluator: "probe" or "knn".
    """
    result = read_results(folder / "results.json")[evaluator]
    rows = result["rows"]
    row = rows[PRETRAINED]
    sizes = result["data"]
    verb = "linear probe" if evaluator == "probe" else "k-NN"
    beside = f", k-NN {_figure(row, 'knn')}" if "knn" in row else ""
    chosen = _settings(row["chosen"])
    if "knn_chosen" in row:
        chosen += f"; k-NN {_settings(row['knn_chosen'])}"
    if len(rows) > 1 or row["seeds"] > 1:
        print_table(rows, recipes=False)
    _print_lines(
        {
            verb: f"top-1 {_figure(row, 'top1')}{beside} on {sizes['tested']:,} test images, "
            f"{sizes['labelled']:,} labelled to train on",
            "chosen": f"{chosen}",
            "results": _places(folder),
        }
    )


def _settings(chosen: list[dict[str, Any]]) -> str:
    """The settings of the first seed, with their accuracy where they were chosen."""
    settings = dict(chosen[0])
    accuracy = settings.pop("accuracy_choosing")
    feature_set = settings.pop("view", None)
    words = [f"{name} {value:g}" for name, value in settings.items()]
    if feature_set is not None:
        words.insert(0, f"features {feature_set}")
    several = f" (the first of {len(chosen)} seeds)" if len(chosen) > 1 else ""
    return f"{', '.join(words)}: {accuracy:.4f} on held-out training images{several}"


@rank_zero_only
def print_finetuned(run: Path) -> None:
    """Print the result of a fine-tuning run or of its seeds; there is none without test data."""
    result = read_results(run / "results.json").get("finetune")
    if result is None:
        return
    name = next(key for key in ("top1", "mAP", "r2") if key in result)
    seeds = result.get("seeds", 1)
    if seeds > 1:
        table = {key: value for key, value in result.items() if key != "recipe"}
        print_table({result["encoder"]: table})
    over = f", mean and spread over {seeds} seeds" if seeds > 1 else ""
    _print_lines(
        {
            "fine-tuned": f"{FIGURE_NAMES.get(name, name)} {_figure(result, name)} on "
            f"{result['n']:,} held-out images, {result['labels']:,} labelled to train on{over}",
            "recipe": f"{result['recipe']}; weights of the last step",
            "results": _places(run),
        }
    )


def _figure(row: dict[str, Any], name: str) -> str:
    spread = f" ± {row[f'{name}_std']:.4f}" if f"{name}_std" in row else ""
    return f"{row[name]:.4f}{spread}"


def _places(folder: Path) -> str:
    pictures = folder / "pictures"
    return f"{folder / 'results.json'}" + (f", pictures in {pictures}" if pictures.exists() else "")


def _print_lines(lines: dict[str, str]) -> None:
    for name, text in lines.items():
        say(f"{name:<13} {text}")
