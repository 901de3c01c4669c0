"""Errors of shards and samples: the kinds, and the list of a run, RUN/errors.csv."""

import csv
import sys
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import IO, NamedTuple

from maepretrain.files import locked

CORRUPT_INPUT = "unreadable input"
CUT_OFF_INPUT = "input cut off"
WRONG_LABEL_ERROR = "wrong label"
MISSING_INPUT = "sample without input"
SECOND_FILE = "second member of one name"  # as index files have it on disk
EMPTY_SHARD = "empty shard"
DAMAGED_SHARD = "damaged shard"
# A batch carries the number of a kind; 0 stands for none.
KINDS = (
    "",
    CORRUPT_INPUT,
    CUT_OFF_INPUT,
    WRONG_LABEL_ERROR,
    MISSING_INPUT,
    SECOND_FILE,
    EMPTY_SHARD,
    DAMAGED_SHARD,
)

# So few errors never stop a run.
ALWAYS_TOLERATED = 10
# So many are printed; the list holds all.
PRINTED = 20


class ShardError(ValueError):
    """A shard or its index that cannot be used, named with the reason."""


class Unreadable(ValueError):
    """A sample that another one takes the place of; `kind` is one of KINDS."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class ErrorRow(NamedTuple):
    """One line of the list: a sample that was replaced, or what an index says of its shard."""

    kind: str
    shard: str
    key: str
    position: int | None = None
    replaced_by: str = ""

    def __str__(self) -> str:
        place = "" if self.position is None else f" at position {self.position}"
        instead = f", replaced by {self.replaced_by}" if self.replaced_by else ""
        return printable(f"{self.kind}: {self.shard}, {self.key}{place}{instead}")


def printable(text: str) -> str:
    """The text in one line: names in tars may hold newlines, and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def as_csv(rows: Iterable[tuple[object, ...]]) -> bytes:
    """Rows of a list of errors; the bytes of names that are no UTF-8 stay as they are."""
    text = StringIO()
    # With "\n" alone as the end of a line, Python 3.11 would not quote a "\r" in a name.
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


class ErrorList:
    """The errors that all processes of a run met, each sample once: appended to one file.

    Args:
        path: the file; lines that an earlier part of the run wrote count too.
        samples: how many samples the data set has.
        share: more errors than this share of the samples (and more than 10) stop the run.
    """

    def __init__(self, path: Path, samples: int, share: float) -> None:
        self.path, self.samples, self.tolerated = path, samples, tolerated(samples, share)
        self._known: set[tuple[str, ...]] = set()
        self._read_to = self._printed = 0

    def add(self, errors: list[ErrorRow]) -> None:
        """List what is not listed yet.

        Raises:
            ShardError: more errors than are tolerated.
        """
        if all(error[:3] in self._known for error in errors):
            return
        # On a disk without locks two processes may list one error.
        with locked(self.path), self.path.open("a+b") as file:
            self._read(file)
            new = list({f[:3]: f for f in errors if f[:3] not in self._known}.values())
            head = [] if self._read_to else [ErrorRow._fields]
            file.write(as_csv([*head, *new]))
            self._read(file)
        for error in new[: max(0, PRINTED - self._printed)]:
            print(error, file=sys.stderr, flush=True)
        self._printed += len(new)
        if new and len(self._known) > self.tolerated:
            raise ShardError(
                f"{too_many(len(self._known), self.samples, self.tolerated)}; "
                f"{self.path} lists them, the last one is {new[-1]}"
            )

    def _read(self, file: IO[bytes]) -> None:
        """Read the rows that were appended since the last look."""
        file.seek(self._read_to)
        text = StringIO(file.read().decode(errors="surrogateescape"), newline="")
        self._read_to = file.tell()
        self._known |= {tuple(row[:3]) for row in csv.reader(text)} - {ErrorRow._fields[:3]}


def tolerated(samples: int, share: float) -> int:
    """Number of errors that a run tolerates.

    Raises:
        ValueError: a share that is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"max_errors {share} must be a share of the samples, 0 to 1")
    return max(ALWAYS_TOLERATED, int(share * samples))


def too_many(errors: int, samples: int, limit: int) -> str:
    """The sentence with which a run stops."""
    return (
        f"{errors} errors in {samples:,} samples, more than the {limit} that are tolerated: mend "
        "the shards (`maepretrain shards check`) or raise --data.max_errors"
    )
