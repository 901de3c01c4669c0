"""Progress in a log file: all items, in order, and a line now and then."""

import pytest

from maepretrain.evaluate import progress
from maepretrain.evaluate.progress import tracked


def test_every_item_comes_once_and_long_passes_leave_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(tracked(range(3), 3, "a pass")) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # it took no time
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert list(tracked(range(3), 3, "a pass")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["a pass: 0 of 3", "a pass: 1 of 3", "a pass: 2 of 3"]
    assert list(tracked(range(3), 3, "")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
