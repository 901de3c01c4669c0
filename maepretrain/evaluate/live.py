"""Live evaluation: a linear probe and k-NN at each validation of a pretraining run."""

from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from maepretrain.data.module import ShardData
from maepretrain.data.samples import ShardIndex
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.linear_sweep import linear_probe
from maepretrain.evaluate.neighbours import knn_accuracy
from maepretrain.randomness import permutation
from maepretrain.ranks import run_on_all


class LiveEvaluation(L.Callback):
    """Linear probe and k-NN on held-out labels at each validation, outside the training strategy.

    The bank is `bank` training samples, centre-cropped; the queries are the held-out samples.
    Nothing of it touches the model's gradients or a random generator, so the loss curve is
    bit-equal with it on or off.

    Args:
        bank: labelled training samples to fit on.
    """

    def __init__(self, bank: int, k: int = 20) -> None:
        if bank < k:
            raise ValueError(f"live_probe {bank} must be at least {k}, the neighbours of its k-NN")
        self.size = bank
        self.k = k
        self.bank: ShardIndex | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the bank, and refuse one that cannot be used now, not hours later."""
        data = cast(ShardData, cast(Any, trainer).datamodule)
        assert data.val_index is not None
        chosen = permutation(0, "bank", len(data.index))[: self.size]
        self.bank = data.index.choose(chosen.sort().values)
        labels = self.bank.require_labels("live_probe")
        data.val_index.require_labels("live_probe")
        if len(labels) < self.k or len(labels.unique()) < 2:
            raise ValueError(f"live_probe needs {self.k} samples of two classes or more")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, data = cast(Any, pl_module), cast(ShardData, cast(Any, trainer).datamodule)
        assert data.val_index is not None and self.bank is not None

        def features(index: ShardIndex) -> tuple[Tensor, Tensor]:
            return embed(
                lambda images: run_on_all(trainer, "encode", images.to(module.device)),
                data.evaluation(index, labelled=True),
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                workers=data.num_workers,
            )

        train, labels = features(self.bank)
        test, truth = features(data.val_index)
        # Lightning validates in inference mode, whose tensors no gradient can be taken of.
        with torch.inference_mode(False), torch.enable_grad():
            probed = linear_probe(train.clone(), labels.clone(), test.clone(), truth.clone())
        values = {
            "val_probe": probed,
            "val_knn": knn_accuracy(test, truth, train, labels, k=self.k),
        }
        pl_module.log_dict(values, rank_zero_only=False, sync_dist=False, prog_bar=True)
