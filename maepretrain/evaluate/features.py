"""Features of a data set: one pass of an encoder over images in order, shared out over processes;
in memory, or in memory-mapped fp16 files."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from rich.progress import track
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader

from maepretrain.data.batch import Batch
from maepretrain.data.errors import ErrorRow
from maepretrain.data.samples import Samples
from maepretrain.ranks import is_rank_zero, say

# Rows that are read or computed on at a time.
CHUNK = 4096


@torch.no_grad()
def embed(
    encode: Callable[[Tensor], Tensor],
    samples: Samples,
    batch: int = 256,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> tuple[Float[Tensor, "n d"], Int64[Tensor, "n"]]:
    """Features and labels of all samples, in order, on the CPU and on every rank.

    Args:
        encode: uint8 images (b, c, h, w) to features (b, d).
        samples: what to encode, as evaluation sees it.
        batch: images in one forward pass.
        rank: this process; it encodes every `world_size`-th batch.
        world_size: processes. All ranks run the same number of passes, since sharded engines need
            all of them in a forward.
        workers: loader processes; 0 decodes in this one.
    """
    n, rounds = len(samples), -(-len(samples) // (batch * world_size))
    batches = []
    for i in range(rounds):
        # Past the end a rank encodes the last sample again, and it is cut off below.
        begin = (i * world_size + rank) * batch
        numbers = [min(k, n - 1) for k in range(begin, begin + batch)]
        batches.append(numbers[: n - begin] if world_size == 1 else numbers)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for read in _read(samples, batches, workers):
        encoded = encode(read["input"]).float()
        label = read["label"].to(encoded.device)
        if world_size > 1:
            encoded, label = _gather(encoded, world_size), _gather(label, world_size)
        features.append(encoded.cpu())
        labels.append(label.cpu())
    return torch.cat(features)[:n], torch.cat(labels)[:n]


def _gather(x: Tensor, world_size: int) -> Tensor:
    gathered = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(gathered, x.contiguous())
    return torch.cat(gathered)


def _read(
    samples: Samples, batches: list[list[int]], workers: int, progress: str = ""
) -> Iterator[Batch]:
    """The batches in order, decoded by loader processes; what was replaced is said at the end."""
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=cast(Any, _as_batch),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_quiet_worker,
        generator=torch.Generator().manual_seed(0),  # leaves the global generator alone
    )
    shown = progress and is_rank_zero() and sys.stderr.isatty()
    errors: list[ErrorRow] = []
    for batch in track(loader, progress, len(batches), disable=not shown):
        errors += samples.pop_errors(batch)
        yield batch
    if errors:
        print(f"{len(errors)} samples were replaced; the first is {errors[0]}", file=sys.stderr)


def _as_batch(batch: Batch) -> Batch:
    return batch


def _quiet_worker(_: int) -> None:
    """Ctrl-C reaches the whole process group: this process decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class Processes:
    """The processes of one evaluation, as torchrun or SLURM started them; a context manager.

    They share files and exchange small objects (gloo): no engine, no gradients.
    """

    def __init__(self) -> None:
        found = (TorchElasticEnvironment, SLURMEnvironment)
        self._environment = next((kind() for kind in found if kind.detect()), None)
        self.rank = self._environment.global_rank() if self._environment else 0
        self.world_size = self._environment.world_size() if self._environment else 1
        local = self._environment.local_rank() if self._environment else 0
        self.device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
        self._joined = False

    def __enter__(self) -> "Processes":
        if self._environment is not None and self.world_size > 1 and not dist.is_initialized():
            # A rank may wait for another's share of the images, so hours, not gloo's 30 minutes.
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://{self._environment.main_address}:{self._environment.main_port}",
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(hours=12),
            )
            self._joined = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._joined:
            dist.destroy_process_group()

    def share(self, n: int) -> range:
        """This rank's part of 0..n-1; the parts of all ranks are disjoint and cover it."""
        return range(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)

    def all(self, value: Any) -> list[Any]:
        """The values of every rank, in order of rank; all ranks come here."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


class FeatureFiles:
    """Features of n samples under names ("block 3 mean"), fp16, in a file of each process.

    A file holds rows of all names side by side: a mini-batch is one read for every head.

    Args:
        paths: the files in order of rank; `PATH.labels.npy` beside each.
        widths: features of each name, in the order of the columns.
    """

    def __init__(self, paths: list[Path], widths: dict[str, int]) -> None:
        self.parts = [np.load(path, mmap_mode="r") for path in paths]
        labels = [np.load(path.with_suffix(".labels.npy")) for path in paths]
        self.labels = torch.from_numpy(np.concatenate(labels))
        self.widths = widths
        ends = list(accumulate(widths.values()))
        self.columns = dict(zip(widths, zip([0, *ends], ends, strict=False), strict=True))
        self._ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, numbers: Int64[Tensor, "b"], name: str | None = None) -> Float[Tensor, "b d"]:
        """Rows by their numbers in float32, of one name or of all side by side."""
        begin, end = self.columns[name] if name is not None else (0, sum(self.widths.values()))
        part = torch.searchsorted(self._ends, numbers, right=True)
        rows = torch.empty(len(numbers), end - begin)
        for p in part.unique().tolist():
            chosen, first = part == p, int(self._ends[p]) - len(self.parts[p])
            read = self.parts[p][(numbers[chosen] - first).numpy(), begin:end]
            rows[chosen] = torch.from_numpy(read).float()
        return rows


@torch.no_grad()
def write_features(
    encode: Callable[[Tensor], dict[str, Tensor]],
    widths: dict[str, int],
    samples: Samples,
    path: Path,
    processes: Processes,
    batch: int = 256,
    workers: int = 0,
) -> FeatureFiles:
    """Encode all samples in one pass into memory-mapped files; each rank its share, none twice.

    Args:
        encode: uint8 images (b, c, h, w) to features (b, d) under names.
        widths: d of each name.
        samples: what to encode, as evaluation sees it.
        path: the file to write, on a disk that all processes see; `.RANK.npy` is added.
        processes: who shares the work.
        batch: images in one forward pass.
        workers: loader processes of each rank; 0 decodes in this one.

    Raises:
        ValueError: a feature beyond fp16 (65,504), or no number.
    """
    share, width = processes.share(len(samples)), sum(widths.values())
    paths = [path.with_name(f"{path.name}.{r}.npy") for r in range(processes.world_size)]
    mine = paths[processes.rank]
    labels = np.empty(len(share), dtype=np.int64)
    # An empty file cannot be mapped; the loop below then writes nothing.
    rows = np.lib.format.open_memmap(mine, "w+", np.float16, (max(1, len(share)), width))
    batches = [list(share[i : i + batch]) for i in range(0, len(share), batch)]
    done = 0
    for read in _read(samples, batches, workers, f"features of {path.name}"):
        encoded = encode(read["input"])
        block = torch.cat([encoded[name] for name in widths], 1).half().cpu()
        if not block.isfinite().all():
            raise ValueError("features are no numbers, or beyond the 65,504 that fp16 files hold")
        rows[done : done + len(block)] = block.numpy()
        labels[done : done + len(block)] = read["label"].numpy()
        done += len(block)
    rows.flush()
    del rows
    np.save(mine.with_suffix(".labels.npy"), labels)
    processes.all(None)  # every file is whole
    return FeatureFiles(
        [p for r, p in enumerate(paths) if _holds(r, len(samples), processes)], widths
    )


def _holds(rank: int, n: int, processes: Processes) -> bool:
    """Whether a rank has a share of n samples."""
    world_size = processes.world_size
    return n * rank // world_size < n * (rank + 1) // world_size


@contextmanager
def feature_folder(parent: Path, size: int, processes: Processes) -> Iterator[Path]:
    """A folder in `parent` for feature files, deleted at the end; its size is said first.

    Args:
        parent: on a disk that all processes see; made where it is missing.
        size: bytes that will be written.
        processes: who shares the work.

    Raises:
        ValueError: the disk has less free.
    """
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if size > free:
        raise ValueError(
            f"the features take {size / 1e9:.3f} GB and {parent} has {free / 1e9:.3f} GB free: "
            "take fewer --blocks or --pools, or another --cache"
        )
    say(f"features      {size / 1e6:,.1f} MB in {parent} while this runs")
    made = tempfile.mkdtemp(prefix=".features-", dir=parent) if processes.rank == 0 else ""
    folder = Path(processes.all(made)[0])
    try:
        yield folder
    finally:
        if processes.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
