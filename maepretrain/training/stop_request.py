"""The signals that ask this process to stop training."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from maepretrain.ranks import is_rank_zero
from maepretrain.training.preemption import SIGNALS, StopReason, listener, under_slurm


class StopRequest:
    """A request to stop: Ctrl-C or SIGTERM, under SLURM also SIGUSR1.

    A second Ctrl-C ends the process at once. SLURM may repeat its signals as often as it likes.
    """

    def __init__(self) -> None:
        self.reason = StopReason.NONE
        self._handlers_before: dict[int, Any] = {}
        self._process = os.getpid()

    def install(self) -> None:
        """Handle the signals from now on. Python allows it in the main thread only."""
        if listener.received:
            self.reason = StopReason.PREEMPTED
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = {signal.SIGINT, signal.SIGTERM}
        if under_slurm():
            numbers.update(SIGNALS)
        for number in numbers:
            self._handlers_before[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Put the handlers back that `install` replaced."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process that has only just been forked
        is_first = self.reason == StopReason.NONE
        if number in SIGNALS and under_slurm():
            self.reason = max(self.reason, StopReason.PREEMPTED)
        else:
            self.reason = StopReason.INTERRUPTED
            again = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, again)
        if is_first and is_rank_zero():
            more = "; again: at once" if self.reason == StopReason.INTERRUPTED else ""
            print(f"\nstopping at the next step with a checkpoint{more}", file=sys.stderr)
