"""Real ranks that write down what they train on.

`Recorder` is a model for `maepretrain pretrain --model recorder.Recorder`; `Ranks` starts the
processes of a run, as torchrun would, from a parent that has imported all they need: torch and
lightning cost each new interpreter eight seconds. Loader workers are the run's own.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor, nn

from maepretrain.randomness import uniform

# Folder of the records; file of what is read with pread.
RECORDS, READS = "RECORDER_RECORDS", "RECORDER_READS"
# "RANK:N": this rank stops for good in its N-th forward pass, after it wrote it down.
HOLD = "RECORDER_HOLD"
# A run that takes longer hangs.
HANGS = 300


class Record(NamedTuple):
    """One sample that was trained on.

    Args:
        position: that the batch said.
        image: its number, read from its pixels.
        crop: crc32 of the normalised input.
        mask: crc32 of the mask noise.
        loss: of this sample alone.
        forward: training passes that its process had done before.
        rank: of its process.
    """

    position: int
    image: int
    crop: int
    mask: int
    loss: float
    forward: int
    rank: int


def picture(number: int, side: int = 12) -> np.ndarray:
    """An image that says its number in two constant channels, whatever is cut out of it."""
    image = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = (20 + 4 * digit for digit in divmod(number, 50))
    return image


def numbers(inputs: Tensor) -> list[int]:
    """What `picture` wrote into normalised images (mean 0, std 1)."""
    value = inputs[:, :2].mean((2, 3)) * 255
    digits = ((value - 20) / 4).round().long()
    return (digits[:, 0] * 50 + digits[:, 1]).tolist()


class Recorder(nn.Module):
    """A linear layer whose loss depends on every pixel; appends what it is trained on to
    $RECORDER_RECORDS/RANK.csv."""

    def __init__(self, image_size: int = 8, channels: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * image_size**2, 4)
        self.seed, self.forwards = seed, 0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`: how far the layer is from four numbers that belong to the image's position."""
        assert set(batch) == {"input", "position", "label"}, set(batch)
        target = uniform(1, "target", batch["position"], 4)
        losses = (self.linear(batch["input"].flatten(1)) - target).square().mean(1)
        if self.training and RECORDS in os.environ:
            self._record(batch, losses.detach())
        return {"loss": losses.mean()}

    def _record(self, batch: dict[str, Tensor], losses: Tensor) -> None:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        noise = uniform(self.seed, "mask", batch["position"], 9)
        rows = zip(
            batch["position"].tolist(),
            numbers(batch["input"]),
            map(_checksum, batch["input"]),
            map(_checksum, noise),
            losses.tolist(),
            strict=True,
        )
        lines = [",".join(map(repr, (*row, self.forwards, rank))) + "\n" for row in rows]
        append(Path(os.environ[RECORDS]) / f"{rank}.csv", "".join(lines))
        if os.environ.get(HOLD) == f"{rank}:{self.forwards}":
            while True:
                time.sleep(60)
        self.forwards += 1


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().numpy().tobytes())


def append(path: Path, text: str) -> None:
    """All of the text or, in a process that is killed, nothing."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def read_records(folder: Path) -> list[Record]:
    """The records of all ranks by position."""
    rows = [
        row.split(",") for path in folder.glob("*.csv") for row in path.read_text().splitlines()
    ]
    return sorted(
        Record(int(p), int(i), int(c), int(m), float(loss), int(f), int(r))
        for p, i, c, m, loss, f, r in rows
    )


class Ranks:
    """The processes of one run.

    Args:
        log: what they print goes to `log/RANK.txt`, their records to `log/RANK.csv`, what they read
            to `log/reads`.
        argv: of `maepretrain`.
        world_size: how many.
        strategy: what divides the work among several.
        hold: (rank, n): this rank stops for good in its n-th forward pass.
    """

    def __init__(
        self,
        log: Path,
        argv: Sequence[object],
        world_size: int = 1,
        hold: tuple[int, int] | None = None,
        strategy: str = "ddp",
    ) -> None:
        self.log, self.hold = log, hold
        log.mkdir(parents=True)
        words = [str(word) for word in argv]
        if world_size > 1:
            words += ["-c", f"strategy/{strategy}", "--trainer.devices", str(world_size)]
        environment = {
            RECORDS: str(log),
            READS: str(log / "reads"),
            HOLD: "" if hold is None else f"{hold[0]}:{hold[1]}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(world_size),
        }
        context = _context()
        self.processes = [
            context.Process(target=_run_rank, args=(words, environment, rank))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int | None]:
        """The exit codes of the ranks, which must end by themselves."""
        deadline = time.monotonic() + HANGS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = any(process.is_alive() for process in self.processes)
        self.kill()
        assert not hung, f"still running after {HANGS} s:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def kill_at_hold(self) -> None:
        """kill -9 of the whole run when the rank that is to stop has stopped."""
        deadline = time.monotonic() + HANGS
        while not any((r.rank, r.forward) == self.hold for r in read_records(self.log)):
            alive = all(process.is_alive() for process in self.processes)
            if not alive or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"never came to {self.hold}:\n{self.output()}")
            time.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """kill -9 of the ranks and of what they started."""
        kill_trees([p.pid for p in self.processes if p.is_alive() and p.pid is not None])
        for process in self.processes:
            process.join()

    def output(self) -> str:
        """What the ranks printed."""
        return "".join(path.read_text() for path in sorted(self.log.glob("*.txt")))


def kill_trees(pids: list[int]) -> None:
    """kill -9 of these processes and of all below them, found before the first one dies."""
    every, found = list(pids), list(pids)
    while found:
        found = [child for pid in found for child in _children(pid)]
        every += found
    for pid in every:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Processes that any thread of this one started."""
    children = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, file.read_text().split())
    return children


@cache
def _context() -> ForkServerContext:
    """Forks from a process that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recorder", "maepretrain.experiments"])
    # The server imports before it learns where its parent imports from.
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ |= {} if kept is None else {"PYTHONPATH": kept}
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(words: list[str], environment: dict[str, str], rank: int) -> None:
    """`maepretrain ...` as one rank, its output in a file."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from maepretrain.cli import main

    # Loader workers start as they do in an interpreter of their own, not by this parent's server.
    multiprocessing.set_start_method("fork", force=True)
    # What torchrun sets, and Lightning looks at when it is imported.
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    cast(Any, rank_zero_only).rank = rank
    output = os.open(Path(environment[RECORDS]) / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    _note_reads()
    sys.argv = ["maepretrain"]
    sys.exit(main(words))


def _note_reads() -> None:
    """Each `os.pread` of this process and its loader workers leaves a line `FILE OFFSET BYTES`."""
    pread, path = os.pread, Path(os.environ[READS])

    def noted(file: int, size: int, offset: int) -> bytes:
        append(path, f"{Path(f'/proc/self/fd/{file}').readlink()} {offset} {size}\n")
        return pread(file, size, offset)

    os.pread = noted


def read_reads(folder: Path) -> list[tuple[str, int, int]]:
    """(file name, offset, bytes) of each read of a run."""
    rows = [line.split() for line in (folder / "reads").read_text().splitlines()]
    return [(Path(name).name, int(offset), int(size)) for name, offset, size in rows]
