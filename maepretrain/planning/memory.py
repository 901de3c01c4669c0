"""Memory of a run: what each strategy divides, what a forward keeps for its backward.

Bytes per process of W = devices x nodes, for P bytes of parameters, T of them trained (fp32: the
project trains fp32 parameters under autocast) and s optimizer states (AdamW 2):

    strategy        parameters    gradients  optimizer  working
    ddp             P             T          s T        T
    fsdp2           P/W           T/W        s T/W      2 B
    zero1           P + T/W       T          s T/W      2 buckets
    zero2           P + T/W       T/W        s T/W      2 buckets
    zero3           P/W           T/W        s T/W      2 B + bucket
    zero3_offload   -             -          -          2 B + bucket

ZeRO-1 and 2 keep an fp32 copy of the partition, T/W, in fp32 runs too; ZeRO-3 does so where it
offloads, which puts P/W + T/W + T/W + s T/W of each process into the host's memory. Working memory
is DDP's buckets (gradients are no views of them by default), DeepSpeed's, and for B bytes of the
largest block its gathered parameters and its whole gradient. With activation checkpointing, the
largest block's recomputed activations are working memory as well.

Activations are what autograd keeps between forward and backward: the forward runs once over fake
tensors, and each storage that is saved counts once; parameters, buffers and the batch do not.
Attention is fused, as flash attention is on GPUs: it keeps q, k, v, its output and the logsumexp,
not the n x n matrix. Autocast keeps its 16-bit copies of the weights. Not counted: the CUDA
context, temporaries, fragmentation; leave a tenth of the memory for them.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maepretrain.data.batch import Batch
from maepretrain.data.normalise import Normalise
from maepretrain.models.flops import imitate
from maepretrain.models.mae.decoders import CrossBlock
from maepretrain.models.protocol import as_taken, declared
from maepretrain.torch_internals import DataDependentOutputException, FakeTensorMode


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A row of the table above.

    Args:
        parameters: are divided among the processes.
        gradients: are divided.
        optimizer: its states are divided.
        copy: an fp32 copy of the partition is kept.
        buckets: of DeepSpeed, that are filled.
        offload: all of these lie in the host's memory.
    """

    parameters: bool = False
    gradients: bool = False
    optimizer: bool = False
    copy: bool = False
    buckets: int = 0
    offload: bool = False


_ALL = {"parameters": True, "gradients": True, "optimizer": True}
STRATEGIES = {
    "ddp": Strategy(),
    "fsdp2": Strategy(**_ALL),
    "zero1": Strategy(optimizer=True, copy=True, buckets=2),
    "zero2": Strategy(gradients=True, optimizer=True, copy=True, buckets=2),
    "zero3": Strategy(**_ALL, buckets=1),
    "zero3_offload": Strategy(**_ALL, copy=True, buckets=1, offload=True),
}
# Bytes of one of DeepSpeed's: `bucket` of strategies/zero.py, in fp32.
BUCKET = 50_000_000 * 4
# fp32 numbers that an optimizer keeps for each parameter.
STATES = {"adamw": 2, "sgd": 1, "lars": 1}
# Columns of a row whose sum is the memory of a process.
SUMMED = ("parameters", "gradients", "optimizer", "activations", "working")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{unit}I": 2 ** (10 * i) for i, unit in enumerate("KMGT", 1)}


class Weights(NamedTuple):
    """Bytes of all parameters, of the trained ones, and of the largest block of a model."""

    parameters: int
    trained: int
    block: int


class Activations(NamedTuple):
    """Bytes that a forward keeps for its backward, and those of the largest recomputed block."""

    kept: int
    recomputed: int


class Measured(NamedTuple):
    """A model on the meta device (with values where its forward looks at them), a batch of two
    samples for it, and its activations at the size of a micro-batch."""

    model: nn.Module
    batch: Batch
    activations: Activations


def in_bytes(text: str) -> int:
    """Bytes of "80GB" (10^9), "80GiB" (2^30), "512MB", ...

    Raises:
        ValueError: anything else, or nothing at all.
    """
    found = re.fullmatch(r"([0-9.]+) ?([KMGT]I?|)B?", text.strip().upper())
    try:
        size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"memory {text} must be a number and a unit, such as 80GB or 80GiB")
    return size


def measure(
    build: Callable[[], nn.Module], data: Any, n: int, dtype: torch.dtype | None
) -> Measured:
    """Make a model without memory, and measure what a forward of n samples keeps.

    Args:
        build: makes the model.
        data: the options under `data`.
        n: samples of a micro-batch.
        dtype: what autocast casts to; None for fp32.
    """
    with torch.device("meta"):
        model = build()
    two = make_batch(data, 2)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            activations = kept(imitate(model, "cpu"), make_batch(data, n), dtype)
    except DataDependentOutputException:  # its forward looks at values: such models are small
        model = build()
        of_two = kept(model, two, dtype).kept
        of_four = kept(model, make_batch(data, 4), dtype).kept
        activations = Activations(of_two + (n - 2) * (of_four - of_two) // 2, 0)
    return Measured(model, two, activations)


def make_batch(data: Any, n: int) -> Batch:
    """A batch of random images or signals."""
    size = data.image_size
    sides = [size, size] if isinstance(size, int) else size
    pixels = torch.randint(0, 256, (n, data.channels, *sides), dtype=torch.uint8)
    return {
        "input": Normalise(tuple(data.mean), tuple(data.std))(pixels),
        "position": torch.arange(n),
        "label": torch.zeros(n, dtype=torch.int64),
    }


def kept(model: nn.Module, batch: Batch, dtype: torch.dtype | None) -> Activations:
    """Activations of a forward of this batch."""
    batch = as_taken(model, batch)
    known = [*model.parameters(), *model.buffers()]
    with _Calls(model) as calls:
        total = saved_bytes(lambda: model(batch)["loss"], [*known, *batch.values()], dtype)
    largest = 0
    for block, inputs in calls.blocks.values():
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        size = saved_bytes(lambda b=block, x=inputs: b(*x), [*known, *tensors], dtype)
        largest = max(largest, size)
    return Activations(total, largest)


class _Calls:
    """While it is entered, one call of each kind of block that a model recomputes: the block and
    its inputs, by type and shapes."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks: dict[tuple[Any, ...], tuple[nn.Module, list[Any]]] = {}
        recomputes = any(declared(m, "activation_checkpointing") for m in model.modules())
        modules = model.modules() if recomputes else ()
        self.watched = [m for m in modules if isinstance(m, Block | CrossBlock)]

    def __enter__(self) -> "_Calls":
        self.hooks = [block.register_forward_pre_hook(self._remember) for block in self.watched]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _remember(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes = [x.shape if isinstance(x, Tensor) else x for x in inputs]
        self.blocks[type(block), *shapes] = block, [_leaf(x) for x in inputs]


def _leaf(x: Any) -> Any:
    if isinstance(x, Tensor):
        x = x.detach()
        return x.requires_grad_() if x.is_floating_point() else x
    return x


def saved_bytes(
    forward: Callable[[], Tensor], known: list[Tensor], dtype: torch.dtype | None
) -> int:
    """Bytes that autograd saves in a forward, each storage once, those of `known` tensors left
    out."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype is not None):
        forward()
    for tensor in known:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def weigh(model: nn.Module, *, averaged: bool = False) -> Weights:
    """Bytes of a model's parameters; an average of the weights is a second, frozen copy."""
    size = _bytes(model.parameters())
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    largest = 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for block in module:
                # As strategies/fsdp2.py divides a model: blocks are of more than one layer.
                if sum(1 for _ in block.parameters()) > 2:
                    largest = max(largest, _bytes(block.parameters()))
    return Weights(size * (2 if averaged else 1), trained, largest or size)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def state(strategy: Strategy, weights: Weights, states: int, world: int) -> dict[str, float]:
    """Bytes of a process by column, and its share of `host`, the node's memory; the module's table.

    Args:
        strategy: one of STRATEGIES.
        weights: of the model.
        states: numbers that the optimizer keeps for each one trained.
        world: processes.
    """

    def share(size: int, *, divided: bool) -> float:
        return size / world if divided else float(size)

    trained = weights.trained
    row = {
        "parameters": share(weights.parameters, divided=strategy.parameters)
        + share(trained * strategy.copy, divided=True),
        "gradients": share(trained, divided=strategy.gradients),
        "optimizer": share(states * trained, divided=strategy.optimizer),
    }
    working = float(strategy.buckets * BUCKET + 2 * weights.block * strategy.parameters)
    if not strategy.optimizer and world > 1:
        working += trained
    if not strategy.offload:
        return row | {"working": working, "host": 0.0}
    return dict.fromkeys(row, 0.0) | {"working": working, "host": sum(row.values())}


def memory_rows(
    measured: Measured, weights: Weights, optimizer: str, world: int, devices: int, available: int
) -> dict[str, dict[str, float]]:
    """Bytes of a process by strategy and column: those of `state`, `activations`, `total`, `fits`
    (the total as a share of `available`), and `host`, bytes of a node.

    Args:
        measured: the model and its activations.
        weights: of the model.
        optimizer: a name of STATES.
        world: processes.
        devices: processes of a node.
        available: bytes of a device.
    """
    rows = {}
    for name, strategy in STRATEGIES.items():
        # Other models are refused by strategies that divide them.
        if strategy.optimizer and not declared(measured.model, "shardable"):
            continue
        row = state(strategy, weights, STATES[optimizer], world)
        row["activations"] = float(measured.activations.kept)
        row["working"] += measured.activations.recomputed
        row["total"] = sum(row[column] for column in SUMMED)
        row["fits"] = row["total"] / available
        row["host"] *= devices
        rows[name] = row
    return rows
