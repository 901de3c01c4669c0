"""CPU time of things side by side, interleaved: neighbours on the machine slow all alike."""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Times = dict[str, list[float]]


def positive(text: str) -> int:
    """An argument of a command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def entry(main: Callable[[list[str]], None]) -> None:
    """Run a benchmark as a program: a mistake is one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except ValueError as error:
        progress(f"error: {error}")
        sys.exit(2)


def cpu_seconds(function: Callable[[], object]) -> float:
    """Process CPU time of a call."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def workers_seconds() -> float:
    """CPU time of this process's children that still run; Linux only."""
    total, tick = 0.0, os.sysconf("SC_CLK_TCK")
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):  # ended meanwhile
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / tick
    return total


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> Times:
    """Seconds of CPU of each in each round. Each round begins with another one, so that none always
    follows the same neighbour.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    names, times = list(functions), {name: [] for name in functions}
    if warm_up:  # memory from the system, code from the disk
        for function in functions.values():
            function()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(cpu_seconds(functions[name]))
        progress(f"round {number + 1} of {rounds}")
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines).replace(
        "| --- ", "|---"
    )


def progress(text: str) -> None:
    """Standard output is for the results."""
    print(text, file=sys.stderr, flush=True)
