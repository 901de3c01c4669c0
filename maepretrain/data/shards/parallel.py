"""Many shards at once: in worker processes or threads, with a bar. Nothing here imports torch."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from maepretrain.data.stores.remote import is_remote

_T = TypeVar("_T")


# So many threads work side by side, each taking so many jobs in a row.
THREADS = 16
IN_A_ROW = 256


def in_threads(function: Callable[[str], _T], urls: list[str]) -> list[_T]:
    """`function(url)` of each, in order: a network's disk answers late, but many questions at once.

    A few local files are asked one after the other.
    """
    if len(urls) <= IN_A_ROW and not any(map(is_remote, urls)):
        return [function(url) for url in urls]

    def in_a_row(start: int) -> list[_T]:
        return [function(url) for url in urls[start : start + IN_A_ROW]]

    starts = range(0, len(urls), IN_A_ROW)
    results: list[_T] = []
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for done in progress(pool.map(in_a_row, starts), "reading indexes", len(starts)):
                results += done
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def progress(work: Iterable[_T], what: str, total: int) -> Iterable[_T]:
    """A bar while the work is done, beside what is printed for other programs."""
    return track(work, what, total, console=Console(stderr=True), transient=True)


def in_processes(function: Any, jobs: list[Any], workers: int) -> Iterator[Any]:
    """`function(job)` for each job in worker processes, results in order.

    In this process when there is nothing to share out.
    """
    if min(workers, len(jobs)) <= 1:
        yield from map(function, jobs)
        return
    # "spawn": the parent may hold threads (torch, rich), which must not be forked.
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        try:
            yield from pool.map(function, jobs)
        finally:
            pool.shutdown(cancel_futures=True)
