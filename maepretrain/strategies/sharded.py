"""Strategies that divide a model among processes: one way to save and to resume, and refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from maepretrain.checkpoints.fragments import WEIGHT, Fragment, numbered, save
from maepretrain.checkpoints.saved import Saved, load
from maepretrain.models.protocol import declared
from maepretrain.strategies.deepspeed_internals import held_by_stage_3


class ShardedStrategy:
    """Checkpoints as fragments (see `checkpoints/fragments.py`), for a Lightning strategy.

    Stands before Lightning's class among the bases of a strategy, which gives `fragments()`: its
    memory under the names of the state dict.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is in the fragments."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: no process holds it whole, or needs to."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Empty: it is in the fragments."""
        return {}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Do nothing: `load_model_state_dict` has done it."""

    def trained_module(self) -> L.LightningModule:
        """The LightningModule without what wraps it."""
        return cast(Any, self).lightning_module

    def optimizer_states(self) -> dict[Tensor, dict[str, Any]]:
        """The optimizer's state by the tensors that it steps."""
        raise NotImplementedError

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups with their settings."""
        raise NotImplementedError

    def fragments(self, expected: dict[str, bool] | None = None) -> Iterator[Fragment]:
        """Yield this process's share of the module's tensors and of the optimizer's state.

        Args:
            expected: state of the optimizer that is about to be loaded, and whether it is a single
                number for a parameter: made where it is missing. None leaves it as it is.
        """
        raise NotImplementedError

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        """Save a folder; all processes meet."""
        left_out = ("state_dict", "optimizer_states")
        meta = {name: value for name, value in checkpoint.items() if name not in left_out}
        path = Path(cast(Any, self).broadcast(filepath))
        module = cast(Any, self.trained_module())
        groups = numbered(self.optimizer_groups(), module.group_sizes)
        meta |= {"shapes": self._shapes(), "optimizer_groups": list(groups)}

        def agree(done: bool) -> bool:
            return cast(Any, self).reduce_boolean_decision(done, all=True)

        save(path, meta, self.fragments(), rank=cast(Any, self).global_rank, agree=agree)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {fragment.name: fragment.shape for fragment in self.fragments()}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Everything of a checkpoint but numbers, which `load_model_state_dict` reads."""
        self._saved = Saved(Path(cast(Any, self).broadcast(checkpoint_path)))
        dropped = ("state_dict", "optimizer_states", "files", "shapes", "optimizer_groups")
        return {name: value for name, value in self._saved.meta.items() if name not in dropped}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Fill this process's share from the checkpoint that was opened.

        Raises:
            ValueError: a checkpoint of another model, or one that does not name its parameters.
        """
        saved = self._saved
        saved.check(self._shapes())
        trained = saved.meta.get("parameter_names")
        if trained is None:
            raise ValueError(
                f"checkpoint {saved.path} is of an older maepretrain: resume it by ddp"
            )
        with torch.no_grad():
            load(self.fragments(_optimizer_kinds(saved, trained)), saved)
        del self._saved


def _optimizer_kinds(saved: Saved, trained: list[str]) -> dict[str, bool]:
    """The kinds of optimizer state in a checkpoint, and whether each is a single number.

    The first parameter shows them: all have the same.
    """
    if not trained:
        return {}
    name = trained[0]
    return {kind: saved.single(kind, name) is not None for kind in saved.kinds(name) - {WEIGHT}}


def state_tensors(
    state: dict[str, Any], like: Tensor, expected: dict[str, bool] | None, *, on_device: bool
) -> dict[str, Tensor]:
    """The tensors of an optimizer's state; those that are expected and missing are made.

    Args:
        state: of one tensor, changed in place.
        like: that tensor.
        expected: kinds of state, and whether each is a single number.
        on_device: whether single numbers belong on the device (fused optimizers').
    """
    for kind, single in (expected or {}).items():
        if isinstance(state.get(kind), Tensor):
            continue
        if single:
            device = like.device if on_device else torch.device("cpu")
            state[kind] = torch.zeros((), dtype=torch.float32, device=device)
        else:
            state[kind] = torch.zeros_like(like)
    return {kind: value for kind, value in state.items() if isinstance(value, Tensor)}


def local_tensors(tensor: Tensor) -> list[Tensor]:
    """The memory in which this process holds a tensor, or its part of one: the local part of
    FSDP2's DTensors, the partition of ZeRO-3 and, where it keeps a small one whole too, that."""
    if isinstance(tensor, DTensor):
        return [tensor.to_local()]
    return held_by_stage_3(tensor) or [tensor]


def require_shardable(module: nn.Module, strategy: str) -> None:
    """Refuse a model that has not been made for, and tested on, a divided memory.

    Raises:
        ValueError: with the way out.
    """
    model = cast(Any, module).model
    if not declared(model, "shardable"):
        raise ValueError(
            f"{type(model).__name__} does not run under {strategy}, which divides models among "
            "processes: take --trainer.strategy ddp"
        )
