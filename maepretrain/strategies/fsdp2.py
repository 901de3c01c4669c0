"""FSDP2 (torch's `fully_shard`) under Lightning, on any device: parameters, gradients and optimizer
state divided among processes along the first axis of each tensor."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from maepretrain.checkpoints.fragments import WEIGHT, Fragment
from maepretrain.models.protocol import entry_points
from maepretrain.strategies.sharded import ShardedStrategy, require_shardable, state_tensors
from maepretrain.torch_internals import local_slice


class FSDP2(ShardedStrategy, ModelParallelStrategy):
    """Every process has its share of each tensor, and gathers a block's when it computes it."""

    def setup_environment(self) -> None:
        """Set up one axis of data parallelism over all processes."""
        require_shardable(self.trained_module(), "FSDP2")
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def shard(self, units: list[nn.Module]) -> None:
        """Divide models; what is divided already stays.

        Args:
            units: each is gathered where it is called, its blocks one by one.
        """
        mesh = self.device_mesh["data_parallel"]
        for unit in units:
            if isinstance(unit, FSDPModule):
                continue
            for block in _blocks(unit):
                fully_shard(block, mesh=mesh)
            fully_shard(unit, mesh=mesh)
            for method in entry_points(unit):
                register_fsdp_forward_method(unit, method)

    def optimizer_states(self) -> dict[Tensor, dict[str, Any]]:
        return cast(Any, self.optimizers[0].state)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self.optimizers[0].param_groups

    def fragments(self, expected: dict[str, bool] | None = None) -> Iterator[Fragment]:
        """Yield this process's numbers; of tensors that every process holds, rank zero writes."""
        parameters = dict(self.trained_module().named_parameters())
        for name, tensor in self.trained_module().state_dict().items():
            values = {WEIGHT: tensor} | self._state(parameters.get(name), expected)
            if isinstance(tensor, DTensor):
                yield _local_fragment(name, tensor, values)
            else:
                whole = {k: v.view(-1) if v.ndim else v for k, v in values.items()}
                shape = tuple(tensor.shape)
                yield Fragment(name, 0, whole, shape, written=self.global_rank == 0)

    def _state(
        self, parameter: nn.Parameter | None, expected: dict[str, bool] | None
    ) -> dict[str, Tensor]:
        """The optimizer's state of a parameter; empty for buffers and what is frozen."""
        if parameter is None or not parameter.requires_grad:
            return {}
        fused = bool(self.optimizer_groups()[0].get("fused"))
        state = self.optimizer_states()[parameter]
        return state_tensors(state, parameter.detach(), expected, on_device=fused)


def _local_fragment(name: str, tensor: DTensor, values: dict[str, Tensor]) -> Fragment:
    """This process's part of a tensor that is divided along its first axis."""
    shape = tuple(tensor.shape)
    local_shape, begin = local_slice(tensor)
    start = 0
    if torch.Size(local_shape).numel():
        start = begin[0] * (tensor.numel() // max(1, shape[0]))
    own = {k: v.to_local().view(-1) if isinstance(v, DTensor) else v for k, v in values.items()}
    return Fragment(name, start, own, shape, written=True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules of lists and sequences that are more than one layer."""
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        if listed and sum(1 for _ in child.parameters()) > 2:
            yield child
        else:
            yield from _blocks(child)
