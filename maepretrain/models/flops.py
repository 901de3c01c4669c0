"""FLOPs of training: a multiplication and an addition are two, and matrix products alone count, as
papers and MFU have it.

torch's FlopCounterMode counts a forward and a backward on meta tensors, which have shapes but no
values: what is not computed is not counted. Blocks that activation checkpointing computes a second
time are counted apart.
"""

import copy
import re
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maepretrain.data.batch import Batch
from maepretrain.models.protocol import as_taken, declared
from maepretrain.torch_internals import DataDependentOutputException, FakeTensorMode

# Dense peak TFLOP/s in 16 bits (V100 and T4 have float16 only) and in fp32 without TF32: the
# vendors' data sheets, from memory; of the SXM version where there are several.
DEVICES = {
    "t4": (65.0, 8.1),
    "v100": (125.0, 15.7),
    "rtx3090": (71.0, 35.6),
    "rtx4090": (165.0, 82.6),
    "a10": (125.0, 31.2),
    "a40": (150.0, 37.4),
    "l4": (121.0, 30.3),
    "l40s": (362.0, 91.6),
    "a100": (312.0, 19.5),
    "h100": (989.0, 67.0),
    "h200": (989.0, 67.0),
    "b200": (2250.0, 80.0),
}


class Flops(NamedTuple):
    """FLOPs of one sample: `forward`; `training`, forward and backward; `recomputed`, which
    activation checkpointing adds and MFU does not count."""

    forward: float
    training: float
    recomputed: float = 0.0


def flops(model: nn.Module, batch: Batch) -> Flops:
    """FLOPs of a sample in training. The model stays as it is: parameters, gradients, buffers.

    Args:
        model: `model(batch) -> {"loss": ...}`.
        batch: of the size of a micro-batch: what is computed once a batch is shared by its samples.
            Only its shapes and types are used, unless the model's forward looks at values.
    """
    batch = as_taken(model, batch)
    shapes = {name: tensor.to("meta") for name, tensor in batch.items()}
    try:
        return _of_copy(imitate(model, "meta"), shapes)
    except RuntimeError:  # a forward that asks for its device, or looks at values
        return _of_fake_or_real(model, batch)


def _of_fake_or_real(model: nn.Module, batch: Batch) -> Flops:
    """Of fake tensors, which have a device but no values, or of real ones."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            shapes = {name: torch.empty_like(x, device="cpu") for name, x in batch.items()}
            return _of_copy(imitate(model, "cpu"), shapes)
    except DataDependentOutputException:  # its forward looks at values: such models are small
        few = {name: _with_values(tensor[:2]) for name, tensor in batch.items()}
        return _of_copy(copy.deepcopy(model), few)


def _with_values(tensor: Tensor) -> Tensor:
    """Zeros, which every likelihood takes, where a tensor has only a shape."""
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


def _of_copy(model: nn.Module, batch: Batch) -> Flops:
    """Of a model that may be changed: it runs with recomputation, if it has some, and without."""
    model.eval()  # nothing random is drawn, and no statistics kept
    recomputing: list[Any] = [
        module for module in model.modules() if declared(module, "activation_checkpointing")
    ]
    in_all = _counted(model, batch)
    if not recomputing:
        return in_all
    for module in recomputing:
        module.activation_checkpointing = False
    once = _counted(model, batch)
    return once._replace(recomputed=in_all.training - once.training)


def _counted(model: nn.Module, batch: Batch) -> Flops:
    n = len(batch["input"])
    # Fused attention is not counted on the CPU; its products are the same.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(batch)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
        return Flops(forward / n, counter.get_total_flops() / n)


def imitate(model: nn.Module, device: str) -> nn.Module:
    """A copy whose tensors have shapes and types but neither memory nor values: on the device
    "meta", or on another one inside a FakeTensorMode."""

    def empty(tensor: Tensor) -> Tensor:
        imitation = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(imitation, tensor.requires_grad)
        return imitation

    tensors = [*model.parameters(), *model.buffers()]
    # deepcopy does not copy what it believes to have met already.
    return copy.deepcopy(model, {id(tensor): empty(tensor) for tensor in tensors})


def peak_of(device: str | None, dtype: torch.dtype | None) -> float | None:
    """Peak TFLOP/s of a GPU of DEVICES in a type; None where none is named.

    Raises:
        ValueError: an unknown one.
    """
    if device is None:
        return None
    if device.lower() not in DEVICES:
        raise ValueError(f"device {device} is none of {', '.join(DEVICES)}: give --tflops")
    return DEVICES[device.lower()][dtype is None]


def peak_here(device: torch.device, dtype: torch.dtype | None) -> tuple[float, str]:
    """Peak TFLOP/s of a device of this machine, and where it is from: the data sheet of a GPU of
    DEVICES, else the fastest of some matrix products (a fifth of a second).

    Args:
        device: what computes.
        dtype: what autocast casts to; None for fp32.
    """
    if device.type == "cuda":
        words = re.split(r"[^a-z0-9]+", torch.cuda.get_device_name(device).lower())
        joined = {*words, "".join(words[-2:])}
        for name in DEVICES:
            if name in joined:
                return peak_of(name, dtype) or 0.0, f"{name}'s data sheet"
    n = 8192 if device.type == "cuda" else 512
    x = torch.randn(n, n, device=device, dtype=dtype or torch.float32)
    seconds = []
    for _ in range(8):
        _wait(device)
        began = time.perf_counter()
        torch.mm(x, x)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds) / 1e12, f"measured, {n} x {n} matrices"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
