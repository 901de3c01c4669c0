"""FSDP2 (torch's `fully_shard`) under Lightning, on any device: parameters, gradients and optimizer
state divided among processes along the first axis of each tensor."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from maepretrain.checkpoints.sharded import WEIGHT, Fragment
from maepretrain.strategies.sharded import Sharded, made, require_shardable

# What evaluation calls of a model, besides its forward.
METHODS = ("encode", "features", "reconstruct")


class FSDP2(Sharded, ModelParallelStrategy):
    """Every process has its share of each tensor, and gathers a block's when it computes it."""

    def setup_environment(self) -> None:
        """One axis of data parallelism over all processes."""
        require_shardable(self.trained_module(), "FSDP2")
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def shard(self, units: list[nn.Module]) -> None:
        """Divide models; what is divided already stays.

        Args:
            units: gathered as a whole where they are called, but for the blocks in them, which are
                gathered one by one.
        """
        mesh = self.device_mesh["data_parallel"]
        for unit in units:
            if isinstance(unit, FSDPModule):
                continue
            for block in _blocks(unit):
                fully_shard(block, mesh=mesh)
            fully_shard(unit, mesh=mesh)
            for method in METHODS:
                if hasattr(unit, method):
                    register_fsdp_forward_method(unit, method)

    def optimizer_states(self) -> dict[Tensor, dict[str, Any]]:
        return cast(Any, self.optimizers[0].state)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self.optimizers[0].param_groups

    def fragments(self, kinds: dict[str, bool] | None = None) -> Iterator[Fragment]:
        """What this process holds; of tensors that every process holds, rank zero writes."""
        fused = bool(self.optimizer_groups()[0].get("fused"))
        parameters = dict(self.trained_module().named_parameters())
        for name, tensor in self.trained_module().state_dict().items():
            owner = parameters.get(name)
            values = {WEIGHT: tensor}
            if owner is not None and owner.requires_grad:
                values |= made(self.optimizer_states()[owner], owner.detach(), kinds, fused)
            shape = tuple(tensor.shape)
            if not isinstance(tensor, DTensor):
                whole = {k: v.view(-1) if v.ndim else v for k, v in values.items()}
                yield Fragment(name, 0, whole, shape, self.global_rank == 0)
                continue
            local, begin = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            start = (
                begin[0] * (tensor.numel() // max(1, shape[0])) if torch.Size(local).numel() else 0
            )
            own = {
                k: v.to_local().view(-1) if isinstance(v, DTensor) else v for k, v in values.items()
            }
            yield Fragment(name, start, own, shape, True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of lists and sequences that are more than one layer."""
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        if listed and sum(1 for _ in child.parameters()) > 2:
            yield child
        else:
            yield from _blocks(child)
