"""Private names of DeepSpeed, and attributes of its parameters and optimizers that it does not
document: each use of one, and why.

No other module may use them. Written for DeepSpeed 0.19: pyproject.toml caps the version, and
`test_deepspeed_internals.py` states what is relied on. Nothing here imports DeepSpeed at once: it
takes seconds.

A parameter under stage 3 has `ds_tensor` (this process's part, padded), `ds_shape` and `ds_numel`
(of the whole) and `ds_process_group`.
"""

from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch import distributed as dist


class Part(NamedTuple):
    """A run of numbers of a parameter, which lies in a flat fp32 tensor of this process.

    Args:
        flat: that tensor, which the inner optimizer steps; None for a parameter that is frozen, or
            has no number on this process.
        offset: where the run begins in `flat`.
        start: where it begins in the flattened parameter.
        length: how many numbers.
    """

    flat: Tensor | None
    offset: int
    start: int
    length: int


def disable_kernels() -> None:
    """Keep DeepSpeed from compiling kernels on CPU.

    Its kernel for collectives in shared memory takes two minutes to compile, serves inference, and
    is left out by no option.
    """
    import deepspeed

    cast(Any, deepspeed).ops.__compatible_ops__ = {}


def part_of_group(optimizer: Any, parameter: Any) -> Part:
    """The part of a parameter that this process steps under stages 1 and 2.

    They cut one flat fp32 copy of a parameter group into equal parts, wherever a parameter may end.
    The public `safe_get_full_fp32_param` gathers, and does not say where the numbers lie.
    """
    mapping = parameter._hp_mapping if parameter.requires_grad else None
    if mapping is None:
        return Part(None, 0, 0, 0)
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    address = mapping.hp_fragment_address
    return Part(flat, address.start, mapping.lp_fragment_address.start, address.numel)


def part_of_parameter(optimizer: Any, parameter: Any) -> Part:
    """The part of a parameter that this process holds under stage 3, where each parameter is cut
    into equal parts, the last one padded."""
    size = parameter.ds_tensor.ds_numel
    start = dist.get_rank(parameter.ds_process_group) * size
    count = max(0, min(size, parameter.ds_numel - start))
    if not parameter.requires_grad:
        return Part(None, 0, start, count)
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return Part(optimizer.fp32_partitioned_groups_flat[group], offset, start, count)


def external_parameters(module: nn.Module) -> list[Tensor]:
    """Parameters that modules read of their children without calling them, under stage 3.

    DeepSpeed notes them in training, and gathers them with the module that read them.
    """
    noted: dict[int, Tensor] = {}
    for child in module.modules():
        noted |= vars(child).get("_external_params", {})
    return list(noted.values())


def held_by_stage_3(parameter: Tensor) -> list[Tensor]:
    """The memory in which this process holds a parameter under stage 3: its part and, where
    DeepSpeed keeps a small parameter whole, that; empty under other stages."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return []
    if parameter.numel() == cast(Any, parameter).ds_numel:
        return [part, parameter.data]
    return [part]
