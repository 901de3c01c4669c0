"""The norm of the gradient at the steps that are logged."""

from typing import Any, cast

import lightning as L
import torch
from torch.distributed.tensor import DTensor


class GradientNorm(L.Callback):
    """Logs `grad_norm`, the Euclidean norm of all gradients before they are clipped, at the steps
    that are logged; left out where an engine does not know it."""

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if hasattr(trainer.model, "get_global_grad_norm") or not self._is_logged(trainer):
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # ranks meet
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            norm = norm / scaler.get_scale()  # a fused optimizer takes the scale out itself
        pl_module.log("grad_norm", norm)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """DeepSpeed divides gradients, and tells their norm after the step."""
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last and hasattr(trainer.model, "get_global_grad_norm") and self._is_logged(trainer):
            norm = cast(Any, trainer.model).get_global_grad_norm()
            if norm is not None:
                pl_module.log("grad_norm", float(norm))

    def _is_logged(self, trainer: L.Trainer) -> bool:
        # Lightning's own question, which no public name answers.
        return cast(Any, trainer)._logger_connector.should_update_logs
