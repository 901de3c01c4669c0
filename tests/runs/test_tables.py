"""The tables that people read."""

import pytest

from maepretrain.runs.tables import print_table


def test_the_table_shows_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"top1": 0.91234, "top1_std": 0.005, "n": 10000, "seeds": 3, "recipe": "lr 0.1"}
    print_table({"pretrained": row, "raw pixels": {"top1": 0.5, "knn": 0.25, "n": 10000}})
    out = capsys.readouterr().out
    for cell in ("0.9123 ± 0.0050", "0.5000", "0.2500", "10,000", "pretrained: lr 0.1"):
        assert cell in out
    assert "top-5" not in out
