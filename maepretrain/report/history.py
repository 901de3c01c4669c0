"""History of runs: starts and restarts, errors in their data, losses that were not finite."""

from collections import Counter

from maepretrain.data.errors import printable
from maepretrain.report.document import Element, Table, Text, counted
from maepretrain.report.records import Record, read_rows, utc
from maepretrain.runs.status import describe

# Rows of a list of errors; the file has all.
LISTED = 20
STATES = {"running": "killed, or its node lost", None: ""}


def starts(records: list[Record]) -> list[Element]:
    """When each run was started, and why again."""
    elements: list[Element] = [Text(_state(record)) for record in records]
    head = ["start", "time", "from step", "the one before", "where"]
    rows = []
    for record in records:
        rows += _start_rows(record, name_run=len(records) > 1)
    if len(records) > 1:
        head = ["run", *head]
    if rows:
        elements.append(Table(head, rows))
    return elements


def _start_rows(record: Record, *, name_run: bool) -> list[list[str]]:
    rows = []
    name = [record.name] if name_run else []
    for number, start in enumerate(record.starts, 1):
        before = start.get("after")
        before = STATES.get(before, before) if number > 1 else ""
        row = [
            *name,
            str(number),
            utc(start.get("at")),
            f"{start.get('step', 0):,}",
            str(before),
            " ".join(str(start[key]) for key in ("host", "job") if key in start),
        ]
        rows.append([printable(cell) for cell in row])
    return rows


def _state(record: Record) -> str:
    line = f"{record.name}: {describe(record.path)['state']}"
    if times := record.status.get("starts", 0):
        line += f", started {counted(times, 'time')}"
    if changed := record.status.get("changed_at"):
        line += f", last word {utc(changed)}"
    if not record.starts:
        line += "; its folder has no list of starts"
    return printable(line + ".")


def errors(records: list[Record]) -> list[Element]:
    """Errors of shards and samples, and micro-batches whose loss was not finite."""
    elements: list[Element] = []
    clean = []
    for record in records:
        listed = read_rows(record.path / "errors.csv")
        listed += read_rows(record.path / "faults.csv")  # the name in older runs
        left_out = read_rows(record.path / "nonfinite.csv")
        if listed:
            kinds = Counter(row.get("kind") or "" for row in listed).most_common()
            counts = ", ".join(f"{n:,} {kind}" for kind, n in kinds)
            elements += _listed(f"{record.name}: {len(listed):,} errors: {counts}", listed)
        if left_out:
            steps = len({row.get("step") for row in left_out})
            line = f"{record.name}: {len(left_out):,} samples in {steps:,} steps"
            elements += _listed(f"{line} gave no finite loss", left_out)
        if not listed and not left_out:
            clean.append(record.name)
    if clean:
        of = f" of {', '.join(clean)}" if len(records) > 1 else ""
        line = f"No sample{of} was unreadable, and every loss was finite."
        elements.append(Text(printable(line)))
    return elements


def _listed(line: str, rows: list[dict[str, str]]) -> list[Element]:
    if len(rows) > LISTED:
        line += f"; the first {LISTED} are shown"
    head = [printable(name) for name in rows[0]]
    cells = [[printable(value or "") for value in row.values()] for row in rows[:LISTED]]
    return [Text(printable(line + ".")), Table(head, cells)]
