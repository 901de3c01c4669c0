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
from maepretrain.ranks import say
from maepretrain.strategies.sharded import local_tensors

COLUMNS = ("step", "rank", "position", "key", "shard")


class NonFinite(L.Callback):
    """What each micro-batch gives to train on and to log, whatever its loss is.

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
        self.skipped = self.in_a_row = 0
        # Of the good micro-batches of this step: their number, and the sums of what they gave.
        self._good, self._sums = 0, torch.zeros(0)
        self._began = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = trainer.global_step

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
            inputs: what the model is given, normalised.
            losses: from inputs to `loss` and other scalars. It may sum over ranks.

        Raises:
            ValueError: too many in a row, or weights that give no finite loss for zeros either.
        """
        # Running statistics must not keep what a bad batch, or the zeros, made of them.
        buffers = [b for m in module.modules() if m.training for b in m.buffers(recurse=False)]
        before = [b.clone() for b in buffers]
        found = losses(inputs)
        loss = found["loss"].float()
        good = on_all_ranks(loss.detach().isfinite())
        if good:
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self._list(module, batch)
            _restore(buffers, before)
            loss = losses(torch.zeros_like(inputs))["loss"].float()
            _restore(buffers, before)
            self._stop_if_hopeless(module, loss.detach())
            loss = 0 * loss
        self._log(module, found, batch_idx, good)
        return loss

    def _list(self, module: L.LightningModule, batch: Batch) -> None:
        """Append this rank's samples to the run's list."""
        path, step = _list_of(module.trainer), module.trainer.global_step
        data = cast(ShardData, cast(Any, module.trainer).datamodule)
        positions = batch["position"].tolist()
        names = data.names(positions)
        rows = [
            (step, module.global_rank, p, *name) for p, name in zip(positions, names, strict=True)
        ]
        # On a disk without locks the head may come twice.
        with locked(path), path.open("ab") as file:
            head = [] if file.seek(0, SEEK_END) else [COLUMNS]
            file.write(as_csv([*head, *rows]))
        if self.skipped == 1:
            say(f"left out      a micro-batch of step {step}: its loss is not finite, see {path}")

    def _stop_if_hopeless(self, module: L.LightningModule, of_zeros: Float[Tensor, ""]) -> None:
        """All ranks have written their lists when they meet here."""
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
        """What to do about broken weights: it depends on where they come from."""
        if trainer.global_step > self._began:
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

    def _log(self, module: L.LightningModule, found: Batch, batch_idx: int, good: bool) -> None:
        """Log what the good micro-batches of the whole global batch gave, whoever computed it:
        ranks and micro-batches mean nothing to a loss curve; NaN where none was good. Ranks meet
        only at steps that are logged."""
        trainer = module.trainer
        accumulation = trainer.accumulate_grad_batches
        micro_batch = batch_idx % accumulation
        if micro_batch == 0:
            self._good, self._sums = 0, torch.full((len(found),), torch.nan, device=module.device)
        if good:
            values = torch.stack([value.detach().float() for value in found.values()])
            self._sums = self._sums + values if self._good else values
            self._good += 1
        # Lightning's own question, which no public name answers.
        logs = cast(Any, trainer)._logger_connector.should_update_logs
        if micro_batch + 1 == accumulation and logs:
            mean = trainer.strategy.reduce(self._sums / max(1, self._good), reduce_op="mean")
            for name, value in zip(found, cast(Tensor, mean), strict=True):
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
    """Whether it holds on every rank; all of them must ask. Waits for the device."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        holds = holds.to(torch.int32)
        dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds)


@torch.no_grad()
def _restore(buffers: list[Tensor], before: list[Tensor]) -> None:
    """Only what has changed: a graph may have saved the others as they are."""
    for buffer, value in zip(buffers, before, strict=True):
        if not torch.equal(buffer, value):
            buffer.copy_(value)


def _list_of(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "nonfinite.csv"


def _last(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
