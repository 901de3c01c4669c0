"""Features in memory-mapped fp16 files, shared by all processes."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from maepretrain.data.samples import Samples
from maepretrain.evaluate.features import read_batches
from maepretrain.evaluate.processes import Processes
from maepretrain.ranks import say_detail


class FeatureFiles:
    """Features of n samples under names ("block 3 mean"), fp16, in a file of each process.

    A file holds rows of all names side by side: a mini-batch is one read for every head.

    Args:
        paths: the files in order of rank; `PATH.labels.npy` beside each.
        widths: features of each name, in the order of the columns.
    """

    def __init__(self, paths: list[Path], widths: dict[str, int]) -> None:
        self.files = [np.load(path, mmap_mode="r") for path in paths]
        labels = [np.load(path.with_suffix(".labels.npy")) for path in paths]
        self.labels = torch.from_numpy(np.concatenate(labels))
        self.widths = widths
        self._columns: dict[str | None, slice] = {}
        begin = 0
        for name, width in widths.items():
            self._columns[name] = slice(begin, begin + width)
            begin += width
        self._columns[None] = slice(0, begin)
        self._ends = torch.tensor([len(file) for file in self.files]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, numbers: Int64[Tensor, "b"], name: str | None = None) -> Float[Tensor, "b d"]:
        """Rows by their numbers in float32, of one name or of all side by side."""
        columns = self._columns[name]
        rows = torch.empty(len(numbers), columns.stop - columns.start)
        file_of = torch.searchsorted(self._ends, numbers, right=True)
        for f in file_of.unique().tolist():
            here = file_of == f
            first = int(self._ends[f]) - len(self.files[f])
            read = self.files[f][(numbers[here] - first).numpy(), columns]
            rows[here] = torch.from_numpy(read).float()
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
    task: str = "",
) -> FeatureFiles:
    """Encode all samples in one pass into memory-mapped files; each rank its share, none twice.

    Args:
        encode: uint8 images (b, c, h, w) to features (b, d) under names.
        widths: d of each name.
        samples: the samples to encode, as evaluation sees them.
        path: the file to write, on a disk that all processes see; `.RANK.npy` is added.
        processes: who shares the work.
        batch: images in one forward pass.
        workers: loader processes of each rank; 0 decodes in this one.
        task: the name of the pass, for the progress bar.

    Raises:
        ValueError: a feature that is not finite, or beyond fp16 (65,504).
    """
    n = len(samples)
    share = processes.share(n)
    paths = [path.with_name(f"{path.name}.{r}.npy") for r in range(processes.world_size)]
    own_path = paths[processes.rank]
    labels = np.empty(len(share), dtype=np.int64)
    # An empty file cannot be mapped; the loop below then writes nothing.
    shape = (max(1, len(share)), sum(widths.values()))
    rows = np.lib.format.open_memmap(own_path, "w+", np.float16, shape)
    batches = [list(share[i : i + batch]) for i in range(0, len(share), batch)]
    done = 0
    for read in read_batches(samples, batches, workers, task):
        encoded = encode(read["input"])
        chunk = torch.cat([encoded[name] for name in widths], 1).half().cpu()
        if not chunk.isfinite().all():
            raise ValueError("features are not finite, or beyond the 65,504 that fp16 files hold")
        rows[done : done + len(chunk)] = chunk.numpy()
        labels[done : done + len(chunk)] = read["label"].numpy()
        done += len(chunk)
    rows.flush()
    del rows
    np.save(own_path.with_suffix(".labels.npy"), labels)
    processes.all(None)  # every file is whole
    # A rank without samples has written one empty row.
    filled = [paths[r] for r in range(processes.world_size) if processes.share_of(r, n)]
    return FeatureFiles(filled, widths)


@contextmanager
def feature_folder(parent: Path, size: int, processes: Processes) -> Iterator[Path]:
    """A folder in `parent` for feature files, deleted at the end.

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
    say_detail(f"features      {size / 1e6:,.1f} MB in {parent} while this runs")
    made = tempfile.mkdtemp(prefix=".features-", dir=parent) if processes.rank == 0 else ""
    folder = Path(processes.all(made)[0])
    try:
        yield folder
    finally:
        if processes.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
