"""The Trainer's arguments of a run: lengths in steps, and the threads of a process."""

from typing import Any

import torch


def set_threads(threads: int | None) -> None:
    """Set the compute threads of this process; None leaves torch's choice.

    Raises:
        ValueError: fewer than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads {threads} must be at least 1")
    torch.set_num_threads(threads)


def in_steps(trainer_arguments: dict[str, Any], steps_per_epoch: int) -> dict[str, Any]:
    """Convert epochs to steps, since the whole run is one Lightning epoch.

    Raises:
        ValueError: neither max_epochs nor max_steps, or numbers below 1.
    """
    arguments = dict(trainer_arguments)
    epochs = arguments.pop("max_epochs", None)
    steps = _steps(arguments.get("max_steps"), epochs, steps_per_epoch)
    accumulation = arguments.get("accumulate_grad_batches") or 1
    if steps < 1 or accumulation < 1:
        raise ValueError(f"{steps} steps of {accumulation} micro-batches: both must be at least 1")
    interval = _validation_interval(arguments, steps_per_epoch, accumulation)
    return arguments | {
        "max_steps": steps,
        "max_epochs": -1,
        # Lightning refuses an interval longer than the run.
        "val_check_interval": min(interval, steps * accumulation),
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": min(arguments.get("log_every_n_steps") or 50, steps),
    }


def _steps(steps: int | None, epochs: int | None, steps_per_epoch: int) -> int:
    if steps is not None and steps >= 0:
        return steps
    if epochs is None or epochs < 1:
        raise ValueError("the length of the run is missing: set trainer.max_epochs or max_steps")
    return epochs * steps_per_epoch


def _validation_interval(arguments: dict[str, Any], steps_per_epoch: int, accumulation: int) -> int:
    """Micro-batches between two validations."""
    interval = arguments.get("val_check_interval")
    epochs = arguments.get("check_val_every_n_epoch") or 1
    if isinstance(interval, int):
        return interval
    if not isinstance(interval, float | None):
        raise ValueError(
            f"trainer.val_check_interval {interval} must be a number of micro-batches or a "
            "share of an epoch"
        )
    share = epochs if interval is None else interval * epochs
    return max(1, round(share * steps_per_epoch)) * accumulation
