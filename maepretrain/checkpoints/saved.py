"""A saved checkpoint, read as runs of flattened tensors."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maepretrain.checkpoints.fragments import META, WEIGHT, Fragment, is_sharded


class Run(NamedTuple):
    """Consecutive numbers of one flattened tensor in a file.

    Args:
        start: where they begin in the flattened tensor.
        length: how many.
        read: from (first, end) inside the run to the numbers there.
    """

    start: int
    length: int
    read: Callable[[int, int], Tensor]


class Saved:
    """A checkpoint as runs of flattened tensors, whichever strategy wrote it.

    Args:
        path: a sharded checkpoint, or a plain file.

    Raises:
        ValueError: it is damaged, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta = read_meta(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        # By kind and name; a single number for a whole parameter is no run.
        self._runs: dict[tuple[str, str], list[Run]] = {}
        self._single: dict[tuple[str, str], Tensor] = {}
        if is_sharded(path):
            self._open_sharded()
        else:
            self._open_plain()
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[:2])

    def _open_sharded(self) -> None:
        for name, shape in self.meta["shapes"].items():
            self.shapes[name] = tuple(shape)
        for name in self.meta["files"]:
            try:
                file = safe_open(self.path / name, "pt")
            except SafetensorError as error:
                raise ValueError(
                    f"checkpoint {self.path} cannot be read: {name}: {error}"
                ) from None
            for key in file.keys():  # noqa: SIM118  a file of safetensors is no dict
                self._add_fragment(file, key)

    def _add_fragment(self, file: Any, key: str) -> None:
        kind, rest = key.split(":", 1)
        name, start = rest.rsplit(":", 1)
        piece = file.get_slice(key)
        if not piece.get_shape():
            self._single[kind, name] = file.get_tensor(key)
            return
        run = Run(int(start), piece.get_shape()[0], lambda first, end: piece[first:end])
        self._runs.setdefault((kind, name), []).append(run)

    def _open_plain(self) -> None:
        for name, tensor in self.meta["state_dict"].items():
            self.shapes[name] = tuple(tensor.shape)
            self._add_whole(WEIGHT, name, tensor)
        states = self._optimizer_states()
        # A parameter that is one number itself does not show which kinds are single.
        single = {kind for kind, name, value in states if value.ndim == 0 and self.shapes[name]}
        for kind, name, value in states:
            if kind in single:
                self._single[kind, name] = value
            else:
                self._add_whole(kind, name, value)

    def _optimizer_states(self) -> list[tuple[str, str, Tensor]]:
        """(kind, name of the parameter, value) of a plain file's optimizer state."""
        names = self.meta.get("parameter_names", [])
        states: list[tuple[str, str, Tensor]] = []
        for optimizer in self.meta.get("optimizer_states", []):
            for number, values in optimizer["state"].items():
                for kind, value in values.items():
                    if isinstance(value, Tensor) and number < len(names):
                        states.append((kind, names[number], value))
        return states

    def _add_whole(self, kind: str, name: str, tensor: Tensor) -> None:
        flat = tensor.reshape(-1)
        self._runs[kind, name] = [Run(0, len(flat), lambda first, end: flat[first:end])]

    def kinds(self, name: str) -> set[str]:
        """The kinds of values that are saved of a tensor: "weight" and the optimizer's state."""
        return {kind for kind, other in (*self._runs, *self._single) if other == name}

    def single(self, kind: str, name: str) -> Tensor | None:
        """A single number for the whole parameter, None where this kind is none."""
        return self._single.get((kind, name))

    def read(self, kind: str, name: str, start: int, count: int) -> Shaped[Tensor, "count"]:
        """`count` numbers of a flattened tensor from `start` on.

        Raises:
            ValueError: numbers that the checkpoint does not hold.
        """
        pieces: list[Tensor] = []
        here = start
        end = start + count
        for run in self._runs.get((kind, name), []):
            run_end = min(end, run.start + run.length)
            if run.start <= here < run_end:
                pieces.append(run.read(here - run.start, run_end - run.start))
                here = run_end
        if here != end:
            raise ValueError(f"checkpoint {self.path} has no {kind} of {name} from {here} on")
        return torch.cat(pieces) if pieces else torch.empty(0)

    def whole(self, kind: str, name: str) -> Tensor:
        """A tensor in its own shape; a single number as a scalar."""
        single = self.single(kind, name)
        if single is not None:
            return single
        size = torch.Size(self.shapes[name])
        return self.read(kind, name, 0, size.numel()).reshape(size)

    def weights(self) -> dict[str, Tensor]:
        """The module's state dict."""
        return {name: self.whole(WEIGHT, name) for name in self.shapes}

    def plain(self) -> dict[str, Any]:
        """The dict of whole tensors that Lightning's own strategies load."""
        if not is_sharded(self.path):
            return self.meta
        state: dict[int, dict[str, Tensor]] = {}
        for number, name in enumerate(self.meta["parameter_names"]):
            values = {kind: self.whole(kind, name) for kind in self.kinds(name) - {WEIGHT}}
            if values:
                state[number] = values
        optimizer = {"state": state, "param_groups": self.meta["optimizer_groups"]}
        return self.meta | {"state_dict": self.weights(), "optimizer_states": [optimizer]}

    def check(self, own: dict[str, tuple[int, ...]]) -> None:
        """Refuse a model of other names or shapes.

        Args:
            own: shapes of the model's tensors, by name.

        Raises:
            ValueError: the first difference.
        """
        for name in sorted(own.keys() | self.shapes.keys()):
            theirs = self.shapes.get(name)
            ours = own.get(name)
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
        actual = (path / name).stat().st_size
        if actual != size:
            raise ValueError(
                f"checkpoint {path} cannot be read: {name} has {actual} bytes and not {size}"
            )
    return meta


def load(fragments: Iterable[Fragment], saved: Saved) -> None:
    """Fill a strategy's memory with the numbers of a checkpoint.

    Raises:
        ValueError: numbers that the checkpoint does not hold.
    """
    for fragment in fragments:
        for kind, view in fragment.values.items():
            single = saved.single(kind, fragment.name)
            if single is not None:
                view.copy_(single)
                continue
            flat = view.view(-1)  # a tensor of one number may have no axis
            flat.copy_(saved.read(kind, fragment.name, fragment.start, len(flat)))
