"""A loss that is NaN or infinite: its micro-batch trains nothing on any rank, its samples are
listed in RUN/nonfinite.csv, and after so many in a row the run stops.

A rank that leaves backward out would hang the others under DDP, ZeRO and FSDP. So all ranks agree
before backward, and all of them go backward from a second forward, of zeros, times 0: 0 times the
first one's graph would be NaN.
"""

from collections.abc import Callable
from os import SEEK_END
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch import distributed as dist

from maepretrain.data.batch import Batch
from maepretrain.data.errors import as_csv
from maepretrain.data.module import ShardData
from maepretrain.files import locked
from maepretrain.lightning_internals import is_logging_step
from maepretrain.ranks import say
from maepretrain.strategies.sharded import local_tensors

COLUMNS = ("step", "rank", "position", "key", "shard")


class NonFinite(L.Callback):
    """The loss of each micro-batch to train on, and its values to log, whatever it is.

    A callback of the run too: its counts go along in checkpoints, and no checkpoint is written of
    weights that are not finite.

    Args:
        most: micro-batches in a row with a non-finite loss after which the run stops.

    Raises:
        ValueError: fewer than one.
    """

    def __init__(self, most: int = 10) -> None:
        if most < 1:
            raise ValueError(f"nonfinite {most} must be at least 1")
        self.most = most
        self.skipped = 0
        self.in_a_row = 0
        # Of the finite micro-batches of this step: their number, and the sums of their values.
        self._finite = 0
        self._sums = torch.zeros(0)
        self._first_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.in_a_row = state_dict["in_a_row"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step

    def loss(
        self,
        module: L.LightningModule,
        batch: Batch,
        batch_idx: int,
        inputs: Shaped[Tensor, "b c *size"],
        losses: Callable[[Tensor], Batch],
    ) -> Float[Tensor, ""]:
        """The loss of a micro-batch in float32, with a gradient of zeros where any rank's is not
        finite; all its values are logged.

        Args:
            module: is trained; a logger of its values.
            batch: `position`, int64 (b,).
            batch_idx: number of the micro-batch.
            inputs: of the model, normalised.
            losses: from inputs to `loss` and other scalars. It may sum over ranks.

        Raises:
            ValueError: too many in a row, or weights that give no finite loss for zeros either.
        """
        # Running statistics must not keep the effect of a bad batch, or of the zeros.
        buffers = [b for m in module.modules() if m.training for b in m.buffers(recurse=False)]
        before = [b.clone() for b in buffers]
        values = losses(inputs)
        loss = values["loss"].float()
        finite = on_all_ranks(loss.detach().isfinite())
        if finite:
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
            self._list_samples(module, batch)
            _restore(buffers, before)
            loss = losses(torch.zeros_like(inputs))["loss"].float()
            _restore(buffers, before)
            self._stop_if_hopeless(module, loss.detach())
            loss = 0 * loss
        self._log(module, values, batch_idx, finite=finite)
        return loss

    def _list_samples(self, module: L.LightningModule, batch: Batch) -> None:
        """Append this rank's samples to the run's list."""
        path = _list_of(module.trainer)
        step = module.trainer.global_step
        data = cast(ShardData, cast(Any, module.trainer).datamodule)
        positions = batch["position"].tolist()
        rows = [
            (step, module.global_rank, position, *name)
            for position, name in zip(positions, data.names(positions), strict=True)
        ]
        # On a disk without locks the header may come twice.
        with locked(path), path.open("ab") as file:
            is_new = file.seek(0, SEEK_END) == 0
            if is_new:
                file.write(as_csv([COLUMNS]))
            file.write(as_csv(rows))
        if self.skipped == 1:
            say(f"left out      a micro-batch of step {step}: its loss is not finite, see {path}")

    def _stop_if_hopeless(self, module: L.LightningModule, of_zeros: Float[Tensor, ""]) -> None:
        """Stop where going on makes no sense; all ranks have written their lists when they meet
        here."""
        trainer = module.trainer
        step = trainer.global_step
        if not on_all_ranks(of_zeros.isfinite()):
            raise ValueError(
                f"the loss of step {step} is not finite, nor is it for inputs of zeros: the "
                f"weights are not finite or too large; {self._way_out(trainer)}"
            )
        if self.in_a_row >= self.most:
            raise ValueError(
                f"{self.in_a_row} micro-batches in a row had a loss that is not finite, the last "
                f"in step {step}: {_list_of(trainer)} lists their samples; mend the shards, lower "
                "--optim.base_lr or raise --nonfinite, and go on from the last checkpoint with "
                "the same command and --resume"
            )

    def _way_out(self, trainer: L.Trainer) -> str:
        """The advice about broken weights, which depends on where they come from."""
        if trainer.global_step > self._first_step:
            return (
                f"go on from {_last(trainer)} with --resume, and a lower --optim.base_lr or "
                "--trainer.gradient_clip_val 1"
            )
        if trainer.ckpt_path:
            return (
                f"they came so from {trainer.ckpt_path}: go on from an earlier checkpoint with "
                "--resume and --ckpt_path, or start again with --overwrite"
            )
        return "they were so from the start: begin with other weights or another --seed"

    def _log(
        self, module: L.LightningModule, values: Batch, batch_idx: int, *, finite: bool
    ) -> None:
        """Log the mean over the finite micro-batches of the whole global batch; NaN without any.

        Ranks and micro-batches mean nothing to a loss curve. Ranks meet only at steps that are
        logged.
        """
        trainer = module.trainer
        accumulation = trainer.accumulate_grad_batches
        micro_batch = batch_idx % accumulation
        if micro_batch == 0:
            self._finite = 0
            self._sums = torch.full((len(values),), torch.nan, device=module.device)
        if finite:
            stacked = torch.stack([value.detach().float() for value in values.values()])
            self._sums = self._sums + stacked if self._finite else stacked
            self._finite += 1
        if micro_batch + 1 < accumulation or not is_logging_step(trainer):
            return
        mean = trainer.strategy.reduce(self._sums / max(1, self._finite), reduce_op="mean")
        for name, value in zip(values, cast(Tensor, mean), strict=True):
            module.log(name, value, prog_bar=name == "loss")
        if self.skipped:
            module.log("skipped", float(self.skipped), prog_bar=True)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to put broken weights in the place of the last good ones.

        Raises:
            ValueError: trained weights of any rank that are not finite.
        """
        trained = (p for p in pl_module.parameters() if p.requires_grad)
        finite = all(bool(local_tensors(p)[0].isfinite().all()) for p in trained)
        if not on_all_ranks(torch.tensor(finite, device=pl_module.device)):
            raise ValueError(
                f"the weights after step {trainer.global_step - 1} are not finite and were not "
                f"saved; {self._way_out(trainer)}"
            )


def on_all_ranks(holds: Bool[Tensor, ""]) -> bool:
    """Return whether it holds on every rank; all of them must ask. Waits for the device."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        holds = holds.to(torch.int32)
        dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds)


@torch.no_grad()
def _restore(buffers: list[Tensor], before: list[Tensor]) -> None:
    """Copy back the buffers that have changed: a graph may have saved the others as they are."""
    for buffer, value in zip(buffers, before, strict=True):
        if not torch.equal(buffer, value):
            buffer.copy_(value)


def _list_of(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "nonfinite.csv"


def _last(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
