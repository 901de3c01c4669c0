"""One checkpoint for every engine: tensors cut where the processes that held them were cut.

Whatever divides a run's memory (DeepSpeed ZeRO, FSDP2) gives each process runs of consecutive
numbers of flattened tensors. A sharded checkpoint is a folder in which each process writes its
runs, with the place where each begins; whoever resumes reads the runs that it needs. So a run that
was saved by any engine on any number of processes goes on under any other, without conversion, and
nothing is unpickled. A plain checkpoint (a Lightning file) is read the same way: a tensor that was
never cut is one run.

    last.ckpt/rank-00000.safetensors ...    tensors "KIND:NAME:START" of one axis
    last.ckpt/meta.pt                       all else, and the size of each file: written last
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maepretrain.ranks import say

META = "meta.pt"
WEIGHT = "weight"
Agree = Callable[[bool], bool]


class Fragment(NamedTuple):
    """A run of consecutive numbers of one flattened tensor, in the memory of this process.

    Args:
        name: of the parameter or buffer in the module's state dict.
        start: where the run begins in the flattened tensor.
        values: views of one axis into the engine's memory, by kind: "weight", and the optimizer's
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
    """Whether this is a sharded checkpoint, whole or not."""
    return path.is_dir()


def is_checkpoint(path: Path) -> bool:
    """Whether this folder is a whole sharded checkpoint."""
    return (path / META).is_file()


def save(
    path: Path, meta: dict[str, Any], fragments: Iterable[Fragment], rank: int, agree: Agree
) -> None:
    """Write a sharded checkpoint; all processes call this together.

    It takes its name when every process has written its file: a kill or a full disk leaves the
    checkpoint that was there. Between two renames none has the name; `recover` mends that.

    Args:
        path: the folder.
        meta: what torch can load with weights_only.
        fragments: of this process.
        rank: of this process.
        agree: whether all processes say yes; they meet here.

    Raises:
        OSError: this process, or another one, could not write.
    """
    partial = partial_of(path)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> None:
        file = partial / f"rank-{rank:05d}.safetensors"
        tensors = {
            f"{kind}:{f.name}:{f.start if values.ndim else 0}": values.detach().to("cpu", copy=True)
            for f in fragments
            if f.written
            for kind, values in f.values.items()
        }
        try:
            save_file(tensors, file)
        except SafetensorError as error:
            raise OSError(f"cannot write {file}: {error}") from error
        file.chmod(partial.stat().st_mode & 0o666)  # it is made for its owner alone
        _flush(file)

    def end() -> None:
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        content = BytesIO()  # torch does not say of a full disk that it is one
        torch.save(meta | {"files": sizes}, content)
        (partial / META).write_bytes(content.getvalue())
        _flush(partial / META)
        take_name(partial, path)

    _together(begin if rank == 0 else None, agree)
    _together(write, agree)
    _together(end if rank == 0 else None, agree)


def _together(work: Callable[[], None] | None, agree: Agree) -> None:
    """Some processes work; all of them go on or none does."""
    failure: Exception | None = None
    try:
        if work is not None:
            work()
    except Exception as error:  # whatever it is, the others wait to hear of it
        failure = error
    if not agree(failure is None):
        raise failure or OSError("another process could not write the checkpoint")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def partial_of(path: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    return path.with_name(f".{path.name}.partial")


def take_name(partial: Path, path: Path) -> None:
    """Put a whole checkpoint, file or folder, in the place of another."""
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Mend a folder of checkpoints after a kill: half-written ones go, and one that was just being
    replaced takes its name again.

    Args:
        folder: of checkpoints; no process may be writing into it.
    """
    for partial in _halves(folder):
        _remove(partial)
    for path, old in _replaced(folder):
        if path.exists():
            _remove(old)
        else:
            old.rename(path)


def await_recovery(folder: Path, seconds: float = 60.0) -> None:
    """Wait until another process has mended a folder: until then checkpoints change their names.

    Args:
        folder: of checkpoints.
        seconds: after which there is nobody to wait for.
    """
    deadline = time.monotonic() + seconds
    while (_halves(folder) or _replaced(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _halves(folder: Path) -> list[Path]:
    """What a kill left of checkpoints that were being written."""
    return [*folder.glob(".*.partial"), *folder.glob("*.part")]


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, also where a kill left one without its name."""
    lost = [old for path, old in _replaced(folder) if not path.exists()]
    return sorted(folder.glob("[!.]*.ckpt")) + lost


def choose(folder: Path, asked: str) -> Path | None:
    """The checkpoint to go on from, None where there is none yet.

    Args:
        folder: of a run's checkpoints.
        asked: "last", "best", a path, or "auto": last.ckpt or, where it cannot be read, the one of
            most steps that can.

    Raises:
        ValueError: there is none of that name, or "auto" finds some and none can be read.
    """
    if asked != "auto":
        path = folder / f"{asked}.ckpt" if asked in ("last", "best") else Path(asked)
        if not path.exists():
            raise ValueError(f"ckpt_path {asked}: there is no {path}")
        return path
    found, steps, failure = checkpoints(folder), dict[Path, int](), ""
    for path in found:
        try:
            steps[path] = int(read_meta(path)["global_step"])
        except ValueError as error:
            failure = str(error)
            say(f"left out      {failure}")
    if found and not steps:
        raise ValueError(f"{failure}, nor any other of {folder}; put one that can in its place")
    newest = max(steps, key=lambda path: steps[path], default=None)
    # Somebody may have put an older one in its place.
    last = next((path for path in steps if "last.ckpt" in path.name), newest)
    if newest is not None and last is not None and steps[newest] > steps[last]:
        further = steps[newest] - steps[last]
        say(f"resumed from  {last}; {newest.name} is {further} steps further: --ckpt_path {newest}")
    return last


def _replaced(folder: Path) -> list[tuple[Path, Path]]:
    """(name, where it lies) of checkpoints that were just being replaced."""
    cut = [(old, old.name.removeprefix(".").removesuffix(".old")) for old in folder.glob(".*.old")]
    return [(folder / name, old) for old, name in cut]


class Saved:
    """A checkpoint as runs of flattened tensors, whichever engine wrote it.

    Args:
        path: a sharded checkpoint, or a plain file.

    Raises:
        ValueError: it is damaged, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # (kind, name) -> [(start, count, how to read from a to b)]
        self._runs: dict[tuple[str, str], list[tuple[int, int, Callable[[int, int], Tensor]]]] = {}
        self._single: dict[tuple[str, str], Tensor] = {}
        self.meta = read_meta(path)
        if is_sharded(path):
            self._open_sharded()
        else:
            self._open_plain()
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[:2])

    def _open_sharded(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in self.meta["shapes"].items()
        }
        for name in self.meta["files"]:
            try:
                file = safe_open(self.path / name, "pt")
            except SafetensorError as error:
                raise ValueError(
                    f"checkpoint {self.path} cannot be read: {name}: {error}"
                ) from None
            for key in file.keys():  # noqa: SIM118  a file of safetensors is no dict
                kind, rest = key.split(":", 1)
                tensor, start = rest.rsplit(":", 1)
                piece = file.get_slice(key)
                if not piece.get_shape():
                    self._single[kind, tensor] = file.get_tensor(key)
                    continue
                self._runs.setdefault((kind, tensor), []).append(
                    (int(start), piece.get_shape()[0], lambda a, b, piece=piece: piece[a:b])
                )

    def _open_plain(self) -> None:
        weights = self.meta["state_dict"]
        self.shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for name, tensor in weights.items():
            self._add_whole(WEIGHT, name, tensor)
        names = self.meta.get("parameter_names", [])
        found = [
            (kind, names[number], value)
            for state in self.meta.get("optimizer_states", [])
            for number, values in state["state"].items()
            for kind, value in values.items()
            if isinstance(value, Tensor) and number < len(names)
        ]
        # A parameter that is one number itself does not tell which of its state is one anyway.
        single = {kind for kind, name, value in found if value.ndim == 0 and self.shapes[name]}
        for kind, name, value in found:
            if kind in single:
                self._single[kind, name] = value
            else:
                self._add_whole(kind, name, value)

    def _add_whole(self, kind: str, name: str, tensor: Tensor) -> None:
        flat = tensor.reshape(-1)
        self._runs[kind, name] = [(0, len(flat), lambda a, b: flat[a:b])]

    def kinds(self, name: str) -> set[str]:
        """What is saved of a tensor: "weight" and the optimizer's state."""
        return {kind for kind, other in (*self._runs, *self._single) if other == name}

    def single(self, kind: str, name: str) -> Tensor | None:
        """A single number for the whole parameter, None where this kind is none."""
        return self._single.get((kind, name))

    def read(self, kind: str, name: str, start: int, count: int) -> Shaped[Tensor, "count"]:
        """`count` numbers of a flattened tensor from `start` on.

        Raises:
            ValueError: numbers that the checkpoint does not hold.
        """
        pieces, here, end = [], start, start + count
        for begin, length, read in self._runs.get((kind, name), []):
            if begin <= here < min(end, begin + length):
                upto = min(end, begin + length)
                pieces.append(read(here - begin, upto - begin))
                here = upto
        if here != end:
            raise ValueError(f"checkpoint {self.path} has no {kind} of {name} from {here} on")
        return torch.cat(pieces) if pieces else torch.empty(0)

    def whole(self, kind: str, name: str) -> Tensor:
        """A tensor in its own shape; a single number as a scalar."""
        if (single := self.single(kind, name)) is not None:
            return single
        size = torch.Size(self.shapes[name])
        return self.read(kind, name, 0, size.numel()).reshape(size)

    def weights(self) -> dict[str, Tensor]:
        """The module's state dict."""
        return {name: self.whole(WEIGHT, name) for name in self.shapes}

    def plain(self) -> dict[str, Any]:
        """What Lightning's own strategies load: one dict of whole tensors."""
        if not is_sharded(self.path):
            return self.meta
        names, groups = self.meta["parameter_names"], self.meta["optimizer_groups"]
        state = {
            number: {kind: self.whole(kind, name) for kind in self.kinds(name) if kind != WEIGHT}
            for number, name in enumerate(names)
        }
        optimizer = {"state": {n: kept for n, kept in state.items() if kept}}
        return self.meta | {
            "state_dict": self.weights(),
            "optimizer_states": [optimizer | {"param_groups": groups}],
        }

    def check(self, own: dict[str, tuple[int, ...]]) -> None:
        """Refuse a model of other names or shapes.

        Args:
            own: shapes of the model's tensors, by name.

        Raises:
            ValueError: the first difference.
        """
        for name in sorted(own.keys() | self.shapes.keys()):
            theirs, ours = self.shapes.get(name), own.get(name)
            if theirs != ours:
                raise ValueError(
                    f"the model differs from the one in {self.path}: {name} has shape "
                    f"{theirs or 'none'} there and {ours or 'none'} here"
                )


def read_meta(path: Path) -> dict[str, Any]:
    """All of a checkpoint but its numbers; of a plain file the numbers too, unread (mmap).

    Raises:
        ValueError: it is damaged, or not whole.
    """
    file = path / META if is_sharded(path) else path
    try:
        meta = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        int(meta["global_step"])
        files = dict(meta["files"]) if is_sharded(path) else {}
    except Exception as error:  # damaged bytes fail in any way
        inside = f": {META}" if file != path else ""
        kind = type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read{inside} ({kind})") from error
    for name, size in files.items():
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {path} cannot be read: {name} is missing")
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(
                f"checkpoint {path} cannot be read: {name} has {found} bytes and not {size}"
            )
    return meta


def load(fragments: Iterable[Fragment], saved: Saved) -> None:
    """Fill an engine's memory with what a checkpoint holds.

    Raises:
        ValueError: numbers that the checkpoint does not hold.
    """
    for name, start, values, _, _ in fragments:
        for kind, view in values.items():
            if (single := saved.single(kind, name)) is not None:
                view.copy_(single)
                continue
            flat = view.view(-1)  # what is one number may have no axis
            flat.copy_(saved.read(kind, name, start, len(flat)))


def numbered(groups: Iterable[dict[str, Any]], sizes: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Parameter groups as torch saves them: their settings, and the numbers of their parameters.

    Args:
        groups: of an optimizer.
        sizes: parameters in each.
    """
    first = 0
    for group, size in zip(groups, sizes, strict=True):
        settings = {k: v for k, v in group.items() if k != "params"}
        yield settings | {"params": list(range(first, first + size))}
        first += size
