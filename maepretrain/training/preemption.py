"""Requests to stop a run: Ctrl-C, and the signals with which SLURM takes its nodes back.

SLURM sends USR1 ahead of the time limit (`--signal=USR1@SECONDS`) and TERM at a preemption. A run
that they stop ends with exit code 75 (EX_TEMPFAIL of sysexits.h: try again), after which its job
script asks for the next start. Nothing heavy is imported here: the verbs listen before they spend
seconds on importing torch, in which either signal would end the process.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

TRY_AGAIN = 75
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopReason(IntEnum):
    """The reason to stop a run; where processes have different ones, the largest holds."""

    NONE = 0
    PREEMPTED = 1
    INTERRUPTED = 2


class Preempted(Exception):
    """SLURM wants the nodes; the run has saved a checkpoint, and goes on from it."""


def under_slurm() -> bool:
    """Return whether this process belongs to a SLURM job."""
    return "SLURM_JOB_ID" in os.environ


class Listener:
    """Notes USR1 and TERM under SLURM, from the start of a verb until training looks."""

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the signals instead of ending; outside SLURM nothing changes."""
        self.received = False
        if not under_slurm() or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.received = True


listener = Listener()
