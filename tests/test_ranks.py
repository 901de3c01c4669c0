"""Details of a stage: on the terminal, or in the file of the workflow that called it."""

from pathlib import Path

import pytest

from maepretrain.ranks import details_to, say, say_detail


def test_details_go_to_the_outer_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_detail("before")
    with details_to(tmp_path / "outer.txt"):
        say("a result")
        say_detail("first")
        with details_to(tmp_path / "inner.txt"):
            say_detail("second")
    say_detail("after")
    assert capsys.readouterr().out == "before\na result\nafter\n"
    assert (tmp_path / "outer.txt").read_text() == "first\nsecond\n"
    assert not (tmp_path / "inner.txt").exists()
