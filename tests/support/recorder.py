"""Real ranks that write down what they train on.

`Recorder` is a model for `maepretrain pretrain --model support.recorder.Recorder`; `Ranks` starts
the processes of a run, as torchrun would, from a parent that has imported all they need: torch and
lightning cost each new interpreter eight seconds. Loader workers are the run's own.
"""

import itertools
import json
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
import torch
from torch import Tensor, nn

from maepretrain.randomness import uniform

# Folder of the records; file of what is read with pread.
RECORDS, READS = "RECORDER_RECORDS", "RECORDER_READS"
# "RANK:N": this rank stops for good in its N-th forward pass, after it wrote it down.
HOLD = "RECORDER_HOLD"
# "RANK:N": this rank kills itself before its N-th flush or rename of a file, counted from 0.
DIE = "RECORDER_DIE"
# A run that takes longer hangs.
HANGS = 180


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


_started: list["Ranks"] = []


def end_all() -> None:
    """End what a test left running: pytest would wait for it at its own end, for ever."""
    while _started:
        _started.pop().kill()


# Of strategies that are not an overlay alone.
STRATEGY_OPTIONS = {
    "ddp": ["--trainer.strategy", "ddp"],
    "zero3_offload": [
        "-c",
        "overlay/zero3",
        "--trainer.strategy.init_args.offload",
        "true",
    ],
}


class Ranks:
    """The processes of one run.

    Args:
        log: what they print goes to `log/RANK.txt`, their records to `log/RANK.csv`, what they read
            to `log/reads`, what they hold when they save to `log/RANK.json`.
        argv: of `maepretrain`.
        world_size: how many.
        hold: (rank, n): this rank stops for good in its n-th forward pass.
        strategy: what divides the work; one process of ddp needs none.
        settings: of the strategy, as options.
        die: (rank, n): this rank kills itself before its n-th flush or rename of a file.
    """

    def __init__(
        self,
        log: Path,
        argv: Sequence[object],
        world_size: int = 1,
        hold: tuple[int, int] | None = None,
        strategy: str = "ddp",
        settings: Sequence[object] = (),
        die: tuple[int, int] | None = None,
    ) -> None:
        self.log, self.hold = log, hold
        log.mkdir(parents=True)
        words = [str(word) for word in argv]
        if world_size > 1 or strategy != "ddp":
            words += ["--trainer.devices", str(world_size)]
            words += STRATEGY_OPTIONS.get(strategy, ["-c", f"overlay/{strategy}"])
            words += map(str, settings)
        environment = {
            RECORDS: str(log),
            READS: str(log / "reads"),
            HOLD: "" if hold is None else f"{hold[0]}:{hold[1]}",
            DIE: "" if die is None else f"{die[0]}:{die[1]}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(world_size),
        }
        context = _context()
        self.processes = [
            context.Process(target=_run_rank, args=(words, environment, rank))
            for rank in range(world_size)
        ]
        _started.append(self)
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
    context.set_forkserver_preload(["support.recorder", "support.preloaded"])
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

    from maepretrain.cli.main import main

    # Loader workers start as they do in an interpreter of their own, not by this parent's server.
    multiprocessing.set_start_method("fork", force=True)
    # What torchrun sets, and Lightning looks at when it is imported.
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    cast(Any, rank_zero_only).rank = rank
    output = os.open(Path(environment[RECORDS]) / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    _note_reads()
    _note_held(rank)
    _die_when_told(rank)
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


class Held(NamedTuple):
    """What one process held when it saved a checkpoint.

    Args:
        parameters: bytes of its share of the model's parameters.
        stepped: bytes of the tensors that its optimizer steps.
        optimizer: bytes of the optimizer's state.
        groups: settings of the optimizer's parameter groups.
        steps: that the optimizer has counted, for each tensor that it steps.
        shared: whether two of these tensors share one count, which would count twice.
    """

    parameters: int
    stepped: int
    optimizer: int
    groups: list[dict[str, float]]
    steps: list[float]
    shared: bool


def _note_held(rank: int) -> None:
    """What this process holds when it saves: asked of the tensors, not of the engine."""
    import lightning as L

    save, path = L.Trainer.save_checkpoint, Path(os.environ[RECORDS]) / f"{rank}.json"

    def noted(trainer: L.Trainer, *arguments: Any, **options: Any) -> None:
        append(path, json.dumps(_held(trainer)._asdict()) + "\n")
        save(trainer, *arguments, **options)

    cast(Any, L.Trainer).save_checkpoint = noted


def _held(trainer: Any) -> Held:
    optimizer = trainer.optimizers[0]
    while hasattr(optimizer, "optimizer"):  # DeepSpeed's, and torch's in it
        optimizer = optimizer.optimizer
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    named = ("lr", "weight_decay", "lr_scale")
    return Held(
        sum(map(_bytes, trainer.lightning_module.parameters())),
        sum(map(_bytes, optimizer.state)),
        sum(_bytes(v) for state in optimizer.state.values() for k, v in state.items()),
        [{name: group[name] for name in named} for group in optimizer.param_groups],
        [float(count) for count in counts],
        len({id(count) for count in counts}) < len(counts),
    )


def _bytes(tensor: Any) -> int:
    """Of this process's share of a tensor."""
    tensor = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # FSDP2
    return tensor.numel() * tensor.element_size()


def read_held(folder: Path) -> list[list[Held]]:
    """By rank, what it held at each save."""
    return [
        [Held(**json.loads(line)) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.json"))
    ]


def _die_when_told(rank: int) -> None:
    """Count the moments at which a file may be lost, and end at one of them as `kill -9` does."""
    told, _, last = os.environ.get(DIE, "").partition(":")
    if told != str(rank):
        return
    moments = itertools.count()

    def mortal(work: Any) -> Any:
        def done(*arguments: Any, **options: Any) -> Any:
            if next(moments) == int(last):
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **options)

        return done

    os.fsync, os.rename, os.replace = map(mortal, (os.fsync, os.rename, os.replace))


class Odd(nn.Module):
    """A model that every engine cuts at awkward places: odd sizes, numbers of one axis, a layer
    that is frozen, a buffer that is a count. Records its samples as `Recorder` does."""

    shardable = True

    def __init__(self, image_size: int = 16, channels: int = 1, seed: int = 0) -> None:
        super().__init__()
        values = channels * image_size**2
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(values, 13), nn.GELU(), nn.Linear(13, 7)) for _ in range(2)]
        )
        self.frozen = nn.Linear(values, 7).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(7, 3)
        self.register_buffer("forwards", torch.tensor(0))
        self.register_buffer("table", torch.arange(5) * 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`: how far the output is from three numbers that belong to the image's position."""
        x = batch["input"].flatten(1)
        hidden = self.frozen(x) + sum(block(x) for block in self.blocks)
        target = uniform(1, "target", batch["position"], 3)
        losses = (self.last(hidden) * self.gain - target).square().mean(1)
        if self.training:
            cast(Tensor, self.forwards).add_(1)
            folder, rank = Path(os.environ[RECORDS]), os.environ["RANK"]
            lines = "".join(f"{position}\n" for position in batch["position"].tolist())
            append(folder / f"{rank}.positions", lines)
        return {"loss": losses.mean()}


def read_positions(folder: Path) -> list[int]:
    """Places in the run of the samples that `Odd` was trained on, in order."""
    return sorted(
        int(line) for path in folder.glob("*.positions") for line in path.read_text().splitlines()
    )
