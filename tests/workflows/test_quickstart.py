"""The quickstart end to end with a small budget: it learns, and leaves what it says."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from maepretrain.workflows.quickstart import read_metrics


@pytest.mark.slow
def test_quickstart_learns(
    tmp_path: Path, run_cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    assert run_cli("quickstart", "--dst", tmp_path, "--epochs", 60) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())["probe"]["rows"]
    # 360 held-out digits: a point is 3.6 digits.
    assert results["pretrained"]["top1"] > results["random encoder"]["top1"] + 0.02
    assert results["pretrained"]["knn"] > results["random encoder"]["knn"] + 0.1
    losses = [float(row["loss"]) for row in read_metrics(tmp_path / "run") if row["loss"]]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    for line in ("raw pixels", "img/s", "minutes", "picture", "checkpoint"):
        assert line in out
    picture = Image.open(max((tmp_path / "run" / "pictures").glob("step-*.png")))
    assert picture.width > 600
    assert len(picture.convert("L").getcolors() or []) > 50
