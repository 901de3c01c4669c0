"""Progress of a long pass: a bar on a terminal, a line now and then in a log file; on standard
error, so that standard output holds results alone."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from maepretrain.ranks import is_rank_zero

T = TypeVar("T")
# Seconds between two lines of a log file.
INTERVAL = 30.0


def tracked(items: Iterable[T], total: int, task: str) -> Iterator[T]:
    """Yield all items and show on rank zero how many are done; a bar vanishes at the end.

    Args:
        items: what is worked through.
        total: how many items there are.
        task: the name of the pass; without one nothing is shown.
    """
    if not task or not is_rank_zero():
        yield from items
        return
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, task, total, console=console, transient=True)
    else:
        yield from _with_lines(items, total, task)


def _with_lines(items: Iterable[T], total: int, task: str) -> Iterator[T]:
    last = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if now - last >= INTERVAL:
            print(f"{task}: {done:,} of {total:,}", file=sys.stderr, flush=True)
            last = now
        yield item
