"""What engines that divide a model among processes have in common under Lightning: one way to save
and to resume, and refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.types import _PATH
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from maepretrain.checkpoints.sharded import WEIGHT, Fragment, Saved, load, numbered, save


class Sharded:
    """Mixed into a Lightning strategy, before it: checkpoints as fragments (see `fragments.py`).

    A strategy gives `fragments()`, its memory under the names of the state dict.
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
        """Nothing: `load_model_state_dict` has done it."""

    def trained_module(self) -> L.LightningModule:
        """The module, in no wrapper."""
        return cast(Any, self).lightning_module

    def optimizer_states(self) -> dict[Tensor, dict[str, Any]]:
        """The optimizer's state by the tensors that it steps."""
        raise NotImplementedError

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups with their settings."""
        raise NotImplementedError

    def fragments(self, kinds: dict[str, bool] | None = None) -> Iterator[Fragment]:
        """This process's share of the module's tensors and of the optimizer's state.

        Args:
            kinds: state of the optimizer that is about to be loaded, and whether it is a single
                number for a parameter: made where it is missing. None leaves it as it is.
        """
        raise NotImplementedError

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Save a folder; all processes meet."""
        skipped = ("state_dict", "optimizer_states")
        meta = {k: v for k, v in checkpoint.items() if k not in skipped}
        path = Path(cast(Any, self).broadcast(filepath))
        module = cast(Any, self.trained_module())
        groups = numbered(self.optimizer_groups(), module.group_sizes)
        meta |= {"shapes": self._shapes(), "optimizer_groups": list(groups)}

        def agree(done: bool) -> bool:
            return cast(Any, self).reduce_boolean_decision(done, all=True)

        save(path, meta, self.fragments(), cast(Any, self).global_rank, agree)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {fragment.name: fragment.shape for fragment in self.fragments()}

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Everything of a checkpoint but numbers, which `load_model_state_dict` reads."""
        self._saved = Saved(Path(cast(Any, self).broadcast(checkpoint_path)))
        dropped = ("state_dict", "optimizer_states", "files", "shapes", "optimizer_groups")
        return {k: v for k, v in self._saved.meta.items() if k not in dropped}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Fill this process's share from the checkpoint that was opened."""
        saved = self._saved
        saved.check(self._shapes())
        trained = saved.meta.get("parameter_names")
        if trained is None:
            raise ValueError(
                f"checkpoint {saved.path} is of an older maepretrain: resume it by ddp"
            )
        kinds: dict[str, bool] = {}
        for name in trained[:1]:
            for kind in saved.kinds(name) - {WEIGHT}:
                kinds[kind] = saved.single(kind, name) is not None
        with torch.no_grad():
            load(self.fragments(kinds), saved)
        del self._saved


def made(
    state: dict[str, Any], like: Tensor, kinds: dict[str, bool] | None, on_device: bool
) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, made where they are wanted and missing.

    Args:
        state: of one tensor, changed in place.
        like: that tensor.
        kinds: what is wanted, and whether it is a single number.
        on_device: whether single numbers belong on the device (fused optimizers').
    """
    for kind, single in (kinds or {}).items():
        if not isinstance(state.get(kind), Tensor):
            device = like.device if on_device or not single else torch.device("cpu")
            state[kind] = (
                torch.zeros((), dtype=torch.float32, device=device)
                if single
                else torch.zeros_like(like)
            )
    return {kind: value for kind, value in state.items() if isinstance(value, Tensor)}


def local_tensors(tensor: Tensor) -> list[Tensor]:
    """The memory in which this process holds a tensor, or its part of one: DTensors of FSDP2, the
    partition of ZeRO-3 and, where it keeps a small one whole too, that."""
    if isinstance(tensor, DTensor):
        return [tensor.to_local()]
    if (part := getattr(tensor, "ds_tensor", None)) is not None:
        whole = [tensor.data] if tensor.numel() == cast(Any, tensor).ds_numel else []
        return [part, *whole]
    return [tensor]


def require_shardable(module: nn.Module, engine: str) -> None:
    """Refuse a model that has not been made for, and tested on, a divided memory.

    Raises:
        ValueError: with the way out.
    """
    model = cast(Any, module).model
    if not getattr(model, "shardable", False):
        raise ValueError(
            f"{type(model).__name__} does not run under {engine}, which divides models among "
            "processes: take -c strategy/ddp"
        )
