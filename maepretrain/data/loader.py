"""Loader processes: how they are started, which signals they ignore, and how they end."""

import atexit
import multiprocessing
import multiprocessing.util
import signal
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from maepretrain.data.batch import Batch


def make_loader(
    samples: Dataset[Batch], batches: Sampler[list[int]] | None, workers: int
) -> DataLoader[Batch]:
    """A loader of whole batches: those that the sampler names, or the data set's own."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        batch_size=None if batches is None else 1,
        num_workers=workers,
        collate_fn=cast(Any, _as_batch),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator().manual_seed(0),  # leaves the global generator alone
    )


def _as_batch(batch: Batch) -> Batch:
    return batch


def _end_workers() -> None:
    """At the end of the process, whatever the end: multiprocessing sends loader processes SIGTERM,
    which they ignore, and would wait for ever."""
    # torch's handler would call their death an error.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


# Before multiprocessing's own, which was registered before.
atexit.register(_end_workers)


def _quiet_worker(_: int) -> None:
    """Ctrl-C, and the signals of SLURM, reach the whole process group: the training process, which
    needs batches until its next step ends, decides when workers end. Without it they end by
    themselves: torch's loop looks for its parent every few seconds."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
