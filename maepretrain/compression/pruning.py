"""Pruning of the smallest weights during a training (Han, Mao and Dally 2016, arXiv 1510.00149,
section 2), in rounds (Zhu and Gupta 2017, arXiv 1710.01878).
"""

from typing import Any, cast

import lightning as L
from torch import Tensor, nn
from torch.nn.utils import prune


class Pruning(L.Callback):
    """Prunes a model's smallest weights in rounds of its training, all of them by one threshold.

    After round r of R a share of s (1 - (1 - r / R)^3) is pruned (Zhu and Gupta 2017, equation 1):
    what goes first is missed least, and the last rounds have time to heal.

    Args:
        modules: whose `weight` is pruned. The first round is made at once.
        sparsity: s, of all their weights together.
        rounds: R, at equal distances from the first step on.
        steps: of the training.
    """

    def __init__(self, modules: list[nn.Module], sparsity: float, rounds: int, steps: int) -> None:
        self.modules = modules
        self.sparsity = sparsity
        self.rounds = rounds
        self.round_at_step = {steps * r // rounds: r + 1 for r in range(1, rounds)}
        self._pruned = 0
        # Before there is an optimizer: it makes other parameters of the weights.
        self.prune(1)

    def prune(self, r: int) -> None:
        """Make round r, 1..R."""
        total = sum(cast(Tensor, module.weight).numel() for module in self.modules)
        wanted = round(total * self.sparsity * (1 - (1 - r / self.rounds) ** 3))
        # `weight` is what the last forward left, a step older than `weight_orig`.
        scores = {(m, "weight"): getattr(m, "weight_orig", m.weight) for m in self.modules}
        prune.global_unstructured(
            list(scores),
            prune.L1Unstructured,
            importance_scores=scores,
            amount=wanted - self._pruned,
        )
        self._pruned = wanted

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self.round_at_step:
            self.prune(self.round_at_step[trainer.global_step])

    def finish(self) -> None:
        """Make the weights parameters again; those that were pruned are zero."""
        for module in self.modules:
            prune.remove(module, "weight")
