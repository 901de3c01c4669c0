"""One checkpoint for every strategy: tensors cut where the processes that held them were cut.

Whatever divides a run's memory (DeepSpeed ZeRO, FSDP2) gives each process runs of consecutive
numbers of flattened tensors. A sharded checkpoint is a folder in which each process writes its
runs, with the place where each begins; a resume reads the runs that it needs. So a training
that was saved by any strategy on any number of processes goes on under any other, without
conversion, and nothing is unpickled. A plain checkpoint (a Lightning file) is read the same way: a
tensor that was never cut is one run.

    last.ckpt/rank-00000.safetensors ...    tensors "KIND:NAME:START" of one axis
    last.ckpt/meta.pt                       all else, and the size of each file: written last
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from maepretrain.checkpoints.folder import partial_of, take_name

META = "meta.pt"
WEIGHT = "weight"
Agree = Callable[[bool], bool]


class Fragment(NamedTuple):
    """A run of consecutive numbers of one flattened tensor, in the memory of this process.

    Args:
        name: of the parameter or buffer in the module's state dict.
        start: where the run begins in the flattened tensor.
        values: views of one axis into the strategy's memory, by kind: "weight", and the optimizer's
            state under its own names ("exp_avg", ...); a single number for the whole parameter
            ("step") has no axis.
        shape: of the whole tensor.
        written: whether this process writes it; what all processes hold, one of them writes.
    """

    name: str
    start: int
    values: dict[str, Tensor]
    shape: tuple[int, ...]
    written: bool


def is_sharded(path: Path) -> bool:
    """Return whether this is a sharded checkpoint, whole or not."""
    return path.is_dir()


def is_checkpoint(path: Path) -> bool:
    """Return whether this folder is a whole sharded checkpoint."""
    return (path / META).is_file()


def save(
    path: Path, meta: dict[str, Any], fragments: Iterable[Fragment], *, rank: int, agree: Agree
) -> None:
    """Write a sharded checkpoint; all processes call this together.

    It takes its name when every process has written its file: a kill or a full disk leaves the
    checkpoint that was there. Between two renames none has the name; `recover` mends that.

    Args:
        path: the folder.
        meta: values that torch can load with weights_only.
        fragments: of this process.
        rank: of this process.
        agree: from this process's answer to whether all processes say yes; they meet there.

    Raises:
        OSError: this process, or another one, could not write.
    """
    partial = partial_of(path)
    is_first = rank == 0
    _together(lambda: _begin(partial) if is_first else None, agree)
    _together(lambda: _write_fragments(partial, fragments, rank), agree)
    _together(lambda: _finish(partial, path, meta) if is_first else None, agree)


def _together(work: Callable[[], None], agree: Agree) -> None:
    """Do some work on every process; all of them go on or none does."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:  # whatever it is, the others must learn of it
        failure = error
    if not agree(failure is None):
        raise failure or OSError("another process could not write the checkpoint")


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_fragments(partial: Path, fragments: Iterable[Fragment], rank: int) -> None:
    file = partial / f"rank-{rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    for fragment in fragments:
        if not fragment.written:
            continue
        for kind, values in fragment.values.items():
            start = fragment.start if values.ndim else 0
            tensors[f"{kind}:{fragment.name}:{start}"] = values.detach().to("cpu", copy=True)
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error
    file.chmod(partial.stat().st_mode & 0o666)  # it is made for its owner alone
    _flush(file)


def _finish(partial: Path, path: Path, meta: dict[str, Any]) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    # In memory first: torch's own writer does not report a full disk as one.
    content = BytesIO()
    torch.save(meta | {"files": sizes}, content)
    (partial / META).write_bytes(content.getvalue())
    _flush(partial / META)
    take_name(partial, path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def numbered(groups: Iterable[dict[str, Any]], sizes: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yield parameter groups as torch saves them: settings, and the numbers of their parameters.

    Args:
        groups: of an optimizer.
        sizes: parameters in each.
    """
    first = 0
    for group, size in zip(groups, sizes, strict=True):
        settings = {name: value for name, value in group.items() if name != "params"}
        yield settings | {"params": list(range(first, first + size))}
        first += size
