"""The list of a run's errors: a CSV file that several processes and runs write into."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from maepretrain.data.errors import (
    ALWAYS_TOLERATED,
    CORRUPT_INPUT,
    KINDS,
    PRINTED,
    ErrorList,
    ErrorRow,
    ShardError,
    as_csv,
    printable,
    tolerated,
    too_many,
)

AWKWARD = [
    "plain",
    "with, comma",
    'with "quotes"',
    "two\nlines",
    "carriage\rreturn",
    "both\r\n",
    " blank ",
    "çlaß/日本語",
    b"caf\xe9".decode(errors="surrogateescape"),
    "",
    "kind",
]


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def errors(first: int, last: int) -> list[ErrorRow]:
    return [ErrorRow(CORRUPT_INPUT, "a.tar", f"{i}", i, f"{i + 1}") for i in range(first, last)]


def test_an_error_is_a_row_with_a_head(tmp_path: Path):
    ErrorList(tmp_path / "f.csv", 1000, 1.0).add(errors(3, 4))
    assert rows(tmp_path / "f.csv") == [
        ["kind", "shard", "key", "position", "replaced_by"],
        ["unreadable input", "a.tar", "3", "3", "4"],
    ]


def test_no_errors_leave_no_file(tmp_path: Path):
    ErrorList(tmp_path / "f.csv", 1000, 1.0).add([])
    assert not (tmp_path / "f.csv").exists()


def test_awkward_names_come_back(tmp_path: Path):
    """And are known again, in the same list and in that of a resumed run."""
    listed = [ErrorRow("k", key, key, i, key) for i, key in enumerate(AWKWARD)]
    for _ in range(2):
        again = ErrorList(tmp_path / "f.csv", 1000, 1.0)
        again.add(listed)
        again.add(listed)
    names = [["k", key, key, str(i), key] for i, key in enumerate(AWKWARD)]
    assert rows(tmp_path / "f.csv")[1:] == names
    assert b"caf\xe9" in (tmp_path / "f.csv").read_bytes()


def test_each_sample_once(tmp_path: Path):
    """Whatever its position in a later epoch, and however often it comes in a batch."""
    one = ErrorList(tmp_path / "f.csv", 1000, 1.0)
    one.add([*errors(0, 2), *errors(0, 2)])
    one.add([error._replace(position=99) for error in errors(0, 3)])
    assert [row[2] for row in rows(tmp_path / "f.csv")] == ["key", "0", "1", "2"]
    # Another kind, or another shard, is another error.
    one.add([errors(0, 1)[0]._replace(kind="other"), errors(0, 1)[0]._replace(shard="b.tar")])
    assert len(rows(tmp_path / "f.csv")) == 6


def test_a_resumed_run_goes_on_with_the_list(tmp_path: Path):
    ErrorList(tmp_path / "f.csv", 1000, 1.0).add(errors(0, 5))
    resumed = ErrorList(tmp_path / "f.csv", 100, 0.0)
    resumed.add(errors(3, 10))
    assert [row[2] for row in rows(tmp_path / "f.csv")][1:] == [str(i) for i in range(10)]
    with pytest.raises(ShardError, match="11 errors"):
        resumed.add(errors(10, 11))


WRITER = """
import sys
from pathlib import Path
from maepretrain.data.errors import ErrorRow, ErrorList

path, name = Path(sys.argv[1]), sys.argv[2]
mine = ErrorList(path, 10**6, 1.0)
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    mine.add([ErrorRow("k", "both.tar", f"{i}"), ErrorRow("k", f"{name}.tar", f"{i},\\n")])
"""


def test_processes_write_one_list_at_a_time(tmp_path: Path):
    """Every error once, also those that both met, in rows that are whole, under one head."""
    path = tmp_path / "f.csv"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in ("x", "y")
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    head, *listed = rows(path)
    assert head == list(ErrorRow._fields)
    truth = [("both.tar", f"{i}") for i in range(300)]
    truth += [(f"{name}.tar", f"{i},\n") for name in ("x", "y") for i in range(300)]
    assert sorted((row[1], row[2]) for row in listed) == sorted(truth)
    assert all(len(row) == 5 for row in listed)


@pytest.mark.parametrize(
    ("samples", "share", "most"),
    [(100, 0.0, 10), (100, 0.1, 10), (100, 0.2, 20), (1_281_167, 0.001, 1281), (5, 1.0, 10)],
)
def test_the_run_stops_above_its_share_of_errors(
    tmp_path: Path, samples: int, share: float, most: int
):
    assert tolerated(samples, share) == most
    listed = ErrorList(tmp_path / "f.csv", samples, share)
    listed.add(errors(0, most - 1))
    listed.add(errors(most - 1, most))
    listed.add(errors(0, most))
    with pytest.raises(ShardError) as caught:
        listed.add(errors(most, most + 1))
    said = str(caught.value)
    assert said.startswith(f"{most + 1} errors in {samples:,} samples, more than the {most} that")
    assert f"{tmp_path}/f.csv lists them" in said and f"a.tar, {most} at position {most}" in said
    assert len(rows(tmp_path / "f.csv")) == most + 2  # the last one is listed too


def test_the_errors_of_other_processes_count(tmp_path: Path):
    one, two = (ErrorList(tmp_path / "f.csv", 100, 0.0) for _ in range(2))
    one.add(errors(0, 6))
    two.add(errors(6, 10))
    with pytest.raises(ShardError, match="11 errors"):
        one.add(errors(10, 11))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(tmp_path: Path, share: float):
    with pytest.raises(ValueError, match="must be a share of the samples, 0 to 1"):
        ErrorList(tmp_path / "f.csv", 100, share)


def test_few_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    listed = ErrorList(tmp_path / "f.csv", 10_000, 1.0)
    for first in range(0, 70, 7):
        listed.add(errors(first, first + 7))
    assert PRINTED == 20
    assert capsys.readouterr().err.splitlines() == [
        f"unreadable input: a.tar, {i} at position {i}, replaced by {i + 1}" for i in range(20)
    ]


def test_an_error_is_one_printable_line():
    assert str(ErrorRow("k", "a.tar", "x")) == "k: a.tar, x"
    assert str(ErrorRow("k", "a.tar", "x", 0, "y")) == "k: a.tar, x at position 0, replaced by y"
    name = b"caf\xe9 \xc3\xa9\n\t".decode(errors="surrogateescape")
    assert printable(name) == "caf\\udce9 é\\n\\t"
    assert str(ErrorRow("k", "a.tar", name)).isprintable()


def test_csv_without_a_list():
    assert as_csv([("a", "b\r"), (1, None)]) == b'a,"b\r"\r\n1,\r\n'


def test_numbers_of_kinds_stay():
    """A batch carries them; 0 is none."""
    assert KINDS[0] == "" and len(set(KINDS)) == len(KINDS) == 8
    assert ALWAYS_TOLERATED == 10
    assert "maepretrain shards check" in too_many(11, 100, 10)
