"""A classifier on an encoder, frozen or trained with it (He et al. 2021, section 4 and appendix A).

Every held-out sample is scored once, whatever the number of processes.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.data.batch import Batch
from maepretrain.data.finetune_augmentation import Augmentation
from maepretrain.data.module import ShardData
from maepretrain.evaluate.classifier_head import ClassifierHead
from maepretrain.evaluate.drop_path import set_drop_path
from maepretrain.evaluate.scores import scores
from maepretrain.evaluate.targets import Targets
from maepretrain.evaluate.trained_layers import choose_layers
from maepretrain.evaluate.weight_average import make_average, update_average
from maepretrain.models.protocol import declared
from maepretrain.randomness import key
from maepretrain.ranks import run_on_all
from maepretrain.training.module import TrainingModule
from maepretrain.training.nonfinite import NonFinite
from maepretrain.training.optimizer import Optimization


class EncoderWithHead(nn.Module):
    """Encoder and head as `finetune` trains them."""

    def __init__(self, model: nn.Module, head: ClassifierHead) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.shardable = declared(model, "shardable")

    def forward(self, batch: Batch) -> Batch:
        """Cross-entropy; a frozen encoder keeps nothing for a backward."""
        encoder_is_trained = any(p.requires_grad for p in self.model.parameters())
        with torch.set_grad_enabled(encoder_is_trained):
            features = self.head.features(self.model, batch["input"])
        return {"loss": F.cross_entropy(self.head(features), batch["label"])}


class Classifier(TrainingModule):
    """An encoder and a head, trained with cross-entropy.

    Args:
        model: an encoder with `encode()` and, unless it is frozen, `layers()`; parameters in no
            layer (a decoder's) are frozen and unused.
        head: makes logits of the encoder's features.
        optim: optimizer and schedule.
        data: its normalisation and epoch length are used.
        steps: optimizer steps of the run.
        augment: erasing, mixup and cutmix of the training batches.
        trained_blocks: the encoder's last blocks that are trained, with its final norm; 0 for none
            (a probe), -1 for the whole encoder.
        drop_path: rate of stochastic depth (Huang et al. 2016) in the last block, growing linearly
            from 0 in the first.
        ema: decay of the exponential moving average of the weights, which is evaluated then; 0
            for none.
        label_smoothing: share of the target spread over all classes.
        seed: seed of dropout, erasing and mixing.
        targets: the task and its table, where it is not one class for each image.
        guard: against losses that are not finite.

    Raises:
        ValueError: an encoder without layers or blocks where they are needed; a number of blocks
            that it does not have; a BatchNorm head on an encoder that is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        head: ClassifierHead,
        optim: Optimization,
        data: ShardData,
        steps: int,
        augment: Augmentation | None = None,
        trained_blocks: int = -1,
        drop_path: float = 0.0,
        ema: float = 0.0,
        label_smoothing: float = 0.0,
        seed: int = 0,
        targets: Targets | None = None,
        guard: NonFinite | None = None,
    ) -> None:
        super().__init__(optim, data, steps, seed)
        if targets is not None and (label_smoothing or (augment and augment.mixes)):
            raise ValueError(
                f"{targets.task} takes no label_smoothing, mixup or cutmix: set them to 0"
            )
        self.model = model
        self.head = head
        self.augment = augment or Augmentation()
        self.label_smoothing = label_smoothing
        self.frozen = trained_blocks == 0
        self.targets = targets
        self.guard = guard or NonFinite()
        layers = choose_layers(model, head, trained_blocks)
        # Names: a strategy may put other parameters in the place of these.
        names = {id(p): name for name, p in model.named_parameters()}
        self._layers = [[names[id(p)] for p in layer] for layer in layers]
        self.rates = set_drop_path(model, layers, drop_path) if drop_path else []
        self.ema = make_average(self._network, ema) if ema else None
        # All samples are scored: nothing is left out here on several processes.
        self._held_out = data.describe_held_out(1)
        # NOTE Lightning starts in the modes that it finds, and loaded encoders come in eval mode:
        # without this, dropout and drop path would silently do nothing.
        self.train()
        # Of this process in the current validation, batch by batch.
        self._logits: list[Tensor] = []
        self._truth: list[Tensor] = []
        # Of the last validation: all held-out samples in order, on the CPU of every process.
        self.logits_of_all = torch.empty(0)
        self.truth_of_all = torch.empty(0, dtype=torch.int64)
        self.scores: dict[str, float] = {}
        self.scored_at_step = -1

    @property
    def _network(self) -> nn.ModuleDict:
        return nn.ModuleDict({"model": self.model, "head": self.head})

    def parameter_layers(self) -> list[list[nn.Parameter]]:
        parameters = dict(self.model.named_parameters())
        return [[parameters[name] for name in layer] for layer in self._layers]

    def training_step_model(self) -> nn.Module:
        """Encoder and head."""
        return EncoderWithHead(self.model, self.head)

    def sharding_units(self) -> list[nn.Module]:
        averaged = [] if self.ema is None else cast(nn.ModuleDict, self.ema.module).values()
        return [self.model, self.head, *averaged]

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Tokens and positions, as in the official fine-tuning (its pretraining decays them)."""
        ends = ("cls_token", "reg_token", "pos_embed", "norm.latent")
        return [p for name, p in self.named_parameters() if name.endswith(ends)]

    def summary(self) -> dict[str, str]:
        """Trained parameters and regularisation, for the announcements of a run."""
        encoder = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        head = sum(p.numel() for p in self.head.parameters())
        rates = ", ".join(f"{rate:.3g}" for rate in self.rates)
        return {
            "held out": self._held_out,
            "trained": f"{trained:,} of the encoder's {encoder:,} numbers; head "
            f"{self.head.kind} {head:,}",
            "augment": f"{self.augment.describe()}, label smoothing {self.label_smoothing:g}",
            "drop path": rates or "none",
            "ema": f"decay {self.ema.decay}" if self.ema is not None else "none",
        }

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode, except for what is frozen and for the average of the weights."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        if self.ema is not None:
            self.ema.eval()
        return self

    def logits(self, images: Tensor) -> Tensor:
        """Logits of normalised images; of the averaged weights in evaluation, if there are any."""
        network = self._network
        if self.ema is not None and not self.training:
            network = cast(nn.ModuleDict, self.ema.module)
        head = cast(ClassifierHead, network["head"])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = head.features(network["model"], images)
        return head(features)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.augment.change(
            self.normalise(batch["input"]),
            batch["label"],
            self.head.outputs,
            self.label_smoothing,
            key(self.seed, "mix", batch_idx, self.global_rank),
        )
        # Soft targets are smoothed already.
        smoothing = 0.0 if self.augment.mixes else self.label_smoothing

        def losses(images: Tensor) -> Batch:
            return {"loss": self._loss(self.logits(images), targets, smoothing)}

        return self.guard.loss(self, batch, batch_idx, images, losses)

    def _loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        logits = logits.float()
        if self.targets is not None:
            return self.targets.loss(logits, targets)
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """A step, then the average: in here, so that a checkpoint of this step has it."""
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        # DeepSpeed counts micro-batches itself, and is called for each.
        if self.ema is not None and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            update_average(cast(nn.Module, self.ema.module), self._network, self.ema.decay)

    def on_validation_epoch_start(self) -> None:
        self._logits.clear()
        self._truth.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._logits.append(self.logits(self.normalise(batch["input"])).float())
        self._truth.append(batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Score every held-out sample once, whatever the number of processes."""
        logits, truth = self._gather_held_out()
        self.logits_of_all = logits
        self.truth_of_all = truth
        self._logits.clear()
        self._truth.clear()
        if self.targets is None:
            self.scores = scores(logits, truth, self.head.outputs)
        else:
            self.scores = self.targets.scores(logits, truth)
        self.scored_at_step = self.trainer.global_step
        name, figure = next(iter(self.scores.items()))
        logged_name = "val_accuracy" if name == "top1" else f"val_{name}"
        values = {"val_loss": self._loss(logits, truth), logged_name: figure}
        self.log_dict(values, rank_zero_only=False, sync_dist=False, prog_bar=True)

    def _gather_held_out(self) -> tuple[Tensor, Tensor]:
        """Logits and labels of all held-out samples in order, on the CPU of every process.

        All processes took equal steps. The few samples that are left at the end go through every
        process, and count once.
        """
        data = cast(ShardData, cast(Any, self.trainer).datamodule)
        assert data.val_index is not None
        n = len(data.val_index)
        left = n % self.trainer.world_size
        logits: list[Tensor] = []
        truth: list[Tensor] = []
        if self._logits:
            gathered = cast(Tensor, self.all_gather(torch.cat(self._logits)))
            logits.append(gathered.reshape(-1, self.head.outputs))
            truth.append(cast(Tensor, self.all_gather(torch.cat(self._truth))).reshape(-1))
        if left:
            read = data.evaluation(data.val_index).__getitems__(list(range(n - left, n)))
            batch = data.on_before_batch_transfer(read, 0)
            images = self.normalise(batch["input"].to(self.device))
            logits.append(cast(Tensor, run_on_all(self.trainer, "logits", images)).float())
            truth.append(batch["label"].to(self.device))
        return torch.cat(logits).cpu(), torch.cat(truth).cpu()
