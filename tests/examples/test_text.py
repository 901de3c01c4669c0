"""The example examples/text.py: its counts against hand-made ones, and all of it on a small
library."""

from pathlib import Path

import pytest
import text
import torch

from maepretrain.parsing.configs import configs_folder


def test_docstrings_of_every_kind_and_no_other_strings(tmp_path: Path) -> None:
    (tmp_path / "package/tests").mkdir(parents=True)
    source = (
        '"""Module."""\nclass A:\n  "Class."\n  x = "no"\n  async def f(self):\n    "Method."\n'
    )
    (tmp_path / "package/a.py").write_text(source)
    (tmp_path / "b.py").write_text('def f():\n    """Function."""\n')
    (tmp_path / "package/tests/c.py").write_text('"""A test."""')
    (tmp_path / "broken.py").write_text('"""Broken."""\nprint "2.7"')
    found = sorted(text.docstrings(tmp_path))
    assert found == [
        *(("b", "Function."), ("package", "Class.")),
        *(("package", "Method."), ("package", "Module.")),
    ]


def test_counts_by_hand() -> None:
    counts = text.Counts([b"abab", b"acaca", b"xby"])
    a, b, c, x = b"abcx"
    assert counts.guess(None, None) == a
    assert counts.guess(a, None) in (b, c) and counts.guess(x, None) == b
    assert counts.guess(None, ord("y")) == b
    assert counts.guess(c, c) == a
    assert counts.guess(x, c) == b  # the two never stood around one: the left one is asked
    assert counts.guess(ord("?"), ord("?")) == a


def test_baselines_and_accuracy_by_hand() -> None:
    """Of `abab` and `b` + padding, the third and the first bytes are hidden."""
    counts = text.Counts([b"aabaab"])
    tokens = torch.tensor([[97, 98, 97, 98], [98, 256, 256, 256]])
    places = torch.tensor([[2], [0]])
    assert text.with_holes(tokens[0], places[0]) == [97, 98, None, 98]
    assert text.with_holes(tokens[1], places[1]) == [None]
    found = text.baselines(counts, tokens, places)
    assert found == {"unigram": 0.5, "bigram, left neighbour": 0.5, "both neighbours": 0.5}
    assert text.accuracy(
        tokens, torch.tensor([[2, 3], [0, 1]]), torch.full((2, 2), 98)
    ) == pytest.approx(2 / 3)
    assert text.as_line([97, None, 10]) == "a_|"


def test_runs_to_its_end_on_a_small_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for module in ("ast", "json", "glob", "queue"):
        lines = [
            f'def f{i}():\n    """Returns {i} of {module}: {"words " * i}."""' for i in range(40)
        ]
        (library / f"{module}.py").write_text("\n".join(lines))
    assert text.is_held_out("glob") and not text.is_held_out("json")
    given = ["--library", str(library), "--out", str(tmp_path / "out"), "--epochs", "2"]
    assert text.main(given) == 0
    printed = capsys.readouterr().out
    rows = printed[printed.index("accuracy of masked") :].splitlines()
    shares = {line[:27].strip(): float(line[27:]) for line in rows[1:6]}
    assert list(shares) == [*text.MODELS, "unigram", "bigram, left neighbour", "both neighbours"]
    assert all(0 <= share <= 1 for share in shares.values())
    assert shares["both neighbours"] > shares["unigram"]
    assert sum(line.startswith("original") for line in rows) == text.SHOWN
    trained = {path.parent.name for path in (tmp_path / "out/texts/train").rglob("*.txt")}
    held_out = {path.parent.name for path in (tmp_path / "out/texts/test").rglob("*.txt")}
    assert held_out == {"glob", "queue"} and trained == {"ast", "json"}


def test_windows_are_those_of_the_config() -> None:
    written = (configs_folder() / "data/text.yaml").read_text()
    assert f"image_size: [{text.LENGTH}]" in written
