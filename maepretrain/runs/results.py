"""RUN/results.json: the results of each evaluator of a run."""

import json
from pathlib import Path
from typing import Any

from maepretrain.files import locked, replacing
from maepretrain.runs.status import versions


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
