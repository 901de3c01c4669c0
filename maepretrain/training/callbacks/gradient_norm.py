"""The norm of the gradient at the steps that are logged."""

from typing import Any, cast

import lightning as L
import torch
from torch.distributed.tensor import DTensor

from maepretrain.lightning_internals import is_logging_step
from maepretrain.torch_internals import unscales_gradients


class GradientNorm(L.Callback):
    """Logs `grad_norm`, the Euclidean norm of all gradients before they are clipped, at the steps
    that are logged; left out where a strategy does not know it."""

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if _is_deepspeed(trainer) or not is_logging_step(trainer):
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # ranks meet
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and unscales_gradients(optimizer):
            norm = norm / scaler.get_scale()
        pl_module.log("grad_norm", norm)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the norm that DeepSpeed, which divides gradients, knows after the step."""
        is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_last and _is_deepspeed(trainer) and is_logging_step(trainer):
            norm = cast(Any, trainer.model).get_global_grad_norm()
            if norm is not None:
                pl_module.log("grad_norm", float(norm))


def _is_deepspeed(trainer: L.Trainer) -> bool:
    return hasattr(trainer.model, "get_global_grad_norm")
