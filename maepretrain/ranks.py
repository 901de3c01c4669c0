"""Printing, computing and agreeing where a run has several processes."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import distributed as dist


def is_rank_zero() -> bool:
    """Return whether this process is the one that writes and prints; known before any process
    group starts."""
    return cast(Any, rank_zero_only).rank == 0


@rank_zero_only
def say(text: str) -> None:
    """Print once, on rank zero."""
    print(text, flush=True)


# The file that details go to; None is standard output.
_detail_file: ContextVar[TextIO | None] = ContextVar("detail_file", default=None)


@rank_zero_only
def say_detail(text: str) -> None:
    """Print a detail, such as a setting that is applied, once, on rank zero.

    It goes to standard output, or to the file of `details_to`.
    """
    print(text, file=_detail_file.get(), flush=True)


@contextmanager
def details_to(path: Path) -> Iterator[None]:
    """Append the details that are printed meanwhile to a file, `os.devnull` among them.

    An outer `details_to` wins: a workflow that keeps the details of its stages has all of them.
    """
    if _detail_file.get() is not None:
        yield
        return
    with path.open("a") as file:
        token = _detail_file.set(file)
        try:
            yield
        finally:
            _detail_file.reset(token)


def run_on_all(trainer: Any, method: str, *arguments: Any) -> Any:
    """Call a method of the trained module that computes with its parameters, outside a step.

    All processes call this together: where a strategy divides the parameters, they gather them.
    """
    strategy = trainer.strategy
    if hasattr(strategy, "call"):
        return strategy.call(method, *arguments)
    return getattr(trainer.lightning_module, method)(*arguments)


def largest_on_all(trainer: Any, *values: int) -> list[int]:
    """The largest of each value over all processes, which call this together; waits for the
    device."""
    if trainer.world_size == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int32, device=trainer.strategy.root_device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def quiet_lightning() -> None:
    """Leave out Lightning's tips, repeated device lists and the warnings that do not concern a
    user; its other warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning's own use of a torch function; nothing that a user can change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=DeprecationWarning)
    # True of plain loaders; ours is a stream that knows where it stopped.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # A machine that has SLURM and is asked for a run outside of it, such as a login node.
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    # DeepSpeed's use of torch functions that have new names.
    warnings.filterwarnings(
        "ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning
    )
    # A frozen encoder, and an average of weights.
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
    # A run that is resumed or overwritten; the run folder has seen to that.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Without held-out shards there is no validation, which the configuration says.
    warnings.filterwarnings("ignore", message="Total length of .* across ranks is zero")
