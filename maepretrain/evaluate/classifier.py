"""A classifier on an encoder, frozen or trained with it: heads, stochastic depth, averaged weights,
exact scores (He et al. 2021, section 4 and appendix A).

Axes: b images, n patches, d features, k outputs.
"""

from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from maepretrain.data.augment import Augmentation
from maepretrain.data.batch import Batch
from maepretrain.data.module import ShardData
from maepretrain.evaluate.targets import Targets
from maepretrain.models.protocol import Layered, declared, require
from maepretrain.randomness import key
from maepretrain.ranks import run_on_all
from maepretrain.runs.results import scores
from maepretrain.strategies.sharded import local_tensors
from maepretrain.training.module import TrainingModule
from maepretrain.training.nonfinite import NonFinite
from maepretrain.training.optimizer import Optimization

Kind = Literal["linear", "fc_norm", "batchnorm", "attentive"]
Pool = Literal["mean", "cls"]


class BatchNorm(nn.Module):
    """Batch normalisation without affine whose statistics are those of all processes' samples (He
    et al. 2021, appendix A.1).

    Equal to `BatchNorm1d(d, affine=False)` in one process over the global batch, also with unequal
    counts; SyncBatchNorm refuses CPU. No gradient goes through the statistics: its input is frozen.

    Args:
        width: features.
        momentum: share of a batch in the running statistics.
        eps: added to the variance; the official code's.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-6) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Features of mean 0 and variance 1 over the global batch, or by the running statistics in
        evaluation; float32.

        Raises:
            ValueError: one sample in all to train on, which has no variance.
        """
        x = x.float()
        mean, var = self._statistics(x) if self.training else (self.running_mean, self.running_var)
        return (x - mean) * (var + self.eps).rsqrt()

    @torch.no_grad()
    def _statistics(self, x: Float[Tensor, "b d"]) -> tuple[Tensor, Tensor]:
        counted = _all_summed(torch.cat([x.new_tensor([len(x)]), x.sum(0)]))
        n, mean = counted[0], counted[1:] / counted[0]
        if n < 2:
            raise ValueError("a BatchNorm needs two samples or more in a training batch")
        # Around the mean, in a second pass: E[x^2] - E[x]^2 cancels in float32.
        var = _all_summed((x - mean).square().sum(0)) / n
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return mean, var


def _all_summed(x: Tensor) -> Tensor:
    """The sum of `x` over all processes; `x` itself where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


class Head(nn.Module):
    """From images, through an encoder, to logits (b, k).

    Linear on pooled tokens, or attentive: a learned query over the patch tokens (V-JEPA, Bardes et
    al. 2024, section 4).

    Initial values: linear weights N(0, .01) after "batchnorm" (He et al. 2021, appendix A.1),
    otherwise N(0, 2e-5) as in the official fine-tuning; zero biases; LayerNorm 1 and 0; attention
    as timm's AttentionPoolLatent.

    Args:
        width: features of a token.
        outputs: logits.
        kind: "linear" on pooled tokens after the encoder's norm; "fc_norm" on the mean of the
            patch tokens before it, with a norm of its own (the official fine-tuning); "batchnorm"
            (the paper's linear probe); "attentive" on all patch tokens.
        pool: "mean" of the patch tokens or "cls", for "linear" and "batchnorm".
        heads: attention heads of "attentive".

    Raises:
        ValueError: heads that do not divide the width; pool "cls" for a head that does not pool so.
    """

    def __init__(
        self, width: int, outputs: int, kind: Kind = "linear", pool: Pool = "mean", heads: int = 8
    ) -> None:
        super().__init__()
        if kind in ("fc_norm", "attentive") and pool == "cls":
            raise ValueError(f'head "{kind}" takes the patch tokens: leave pool at "mean"')
        if kind == "attentive" and (heads < 1 or width % heads):
            raise ValueError(f"{heads} attention heads do not divide a width of {width}")
        self.kind, self.pool, self.outputs = kind, pool, outputs
        self.norm: nn.Module = nn.Identity()
        if kind == "attentive":
            self.norm = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        elif kind == "fc_norm":
            self.norm = nn.LayerNorm(width, eps=1e-6)
        elif kind == "batchnorm":
            self.norm = BatchNorm(width)
        self.linear = nn.Linear(width, outputs)
        nn.init.normal_(self.linear.weight, std=0.01 if kind == "batchnorm" else 2e-5)
        nn.init.zeros_(self.linear.bias)

    def features(self, encoder: nn.Module, images: Float[Tensor, "b c *size"]) -> Tensor:
        """What this head takes of an encoder: (b, d), or (b, n, d) for "attentive"."""
        vit = cast(Any, encoder)
        if self.kind == "fc_norm":
            (tokens,) = vit.features(images, [-1])
            return tokens[:, vit.prefix :].mean(1)
        pool = "tokens" if self.kind == "attentive" else self.pool
        # Encoders without tokens need not know the word.
        return vit.encode(images) if pool == "mean" else vit.encode(images, pool=pool)

    def forward(self, features: Tensor) -> Float[Tensor, "b k"]:
        """Logits of what `features` gave."""
        return self.linear(self.norm(features))


class Finetuned(nn.Module):
    """Encoder and head as `finetune` trains them."""

    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.shardable = declared(model, "shardable")

    def forward(self, batch: Batch) -> Batch:
        """Cross-entropy; a frozen encoder keeps nothing for a backward."""
        with torch.set_grad_enabled(any(p.requires_grad for p in self.model.parameters())):
            features = self.head.features(self.model, batch["input"])
        return {"loss": F.cross_entropy(self.head(features), batch["label"])}


class Classifier(TrainingModule):
    """An encoder and a head, trained with cross-entropy.

    Args:
        model: an encoder with `encode()` and, unless it is frozen, `layers()`; what is in no layer
            (a decoder) is frozen and unused.
        head: makes logits of the encoder's features.
        optim: optimizer and schedule.
        data: its normalisation and epoch length are used.
        steps: optimizer steps of the run.
        augment: erasing, mixup and cutmix of the training batches.
        trained_blocks: the encoder's last blocks that are trained, with its final norm; 0 for none
            (a probe), -1 for the whole encoder.
        drop_path: rate of stochastic depth (Huang et al. 2016) in the last block, growing linearly
            from 0 in the first.
        ema: decay of the exponential moving average of the weights, which is what is evaluated
            then; 0 for none.
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
        head: Head,
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
        self.targets, self.guard = targets, guard or NonFinite()
        if targets is not None and (label_smoothing or (augment and augment.mixes)):
            raise ValueError(
                f"{targets.task} takes no label_smoothing, mixup or cutmix: set them to 0"
            )
        self.model, self.head, self.augment = model, head, augment or Augmentation()
        self.label_smoothing, self.frozen = label_smoothing, trained_blocks == 0
        layers = choose_layers(model, head, trained_blocks)
        # Names: an engine may put other parameters in the place of these.
        names = {id(p): name for name, p in model.named_parameters()}
        self._layers = [[names[id(p)] for p in layer] for layer in layers]
        self.rates = set_drop_path(model, layers, drop_path) if drop_path else []
        self.ema = _average(self._network, ema) if ema else None
        # All samples are scored: nothing is left out here on several processes.
        self._held_out = data.describe_held_out(1)
        # NOTE Lightning starts in the modes that it finds, and loaded encoders come in eval mode:
        # without this, dropout and drop path would silently do nothing.
        self.train()
        self.predicted: list[Tensor] = []
        self.truth: list[Tensor] = []
        # Of the last validation: all held-out samples in order, on the CPU of every process.
        self.logits_of_all, self.truth_of_all = torch.empty(0), torch.empty(0, dtype=torch.int64)
        self.scores: dict[str, float] = {}
        self.scored_at = -1

    @property
    def _network(self) -> nn.ModuleDict:
        return nn.ModuleDict({"model": self.model, "head": self.head})

    def parameter_layers(self) -> list[list[nn.Parameter]]:
        parameters = dict(self.model.named_parameters())
        return [[parameters[name] for name in layer] for layer in self._layers]

    def training_step_model(self) -> nn.Module:
        """Encoder and head."""
        return Finetuned(self.model, self.head)

    def sharding_units(self) -> list[nn.Module]:
        averaged = [] if self.ema is None else cast(nn.ModuleDict, self.ema.module).values()
        return [self.model, self.head, *averaged]

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Tokens and positions, as in the official fine-tuning (its pretraining decays them)."""
        ends = ("cls_token", "reg_token", "pos_embed", "norm.latent")
        return [p for name, p in self.named_parameters() if name.endswith(ends)]

    def summary(self) -> dict[str, str]:
        """What is trained, and how it is regularised."""
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
        for module in (self.model if self.frozen else None, self.ema):
            if module is not None:
                module.eval()
        return self

    def logits(self, images: Tensor) -> Tensor:
        """Logits of normalised images; of the averaged weights in evaluation, if there are any."""
        averaged = self.ema is not None and not self.training
        network = cast(nn.ModuleDict, cast(Any, self.ema).module) if averaged else self._network
        head = cast(Head, network["head"])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = head.features(network["model"], images)
        return head(features)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels, k = self.normalise(batch["input"]), batch["label"], self._outputs
        seed = key(self.seed, "mix", batch_idx, self.global_rank)
        images, targets = self.augment.change(images, labels, k, self.label_smoothing, seed)
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

    @property
    def _outputs(self) -> int:
        return self.head.outputs

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """A step, then the average: in here, so that a checkpoint of this step has it."""
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        # DeepSpeed counts micro-batches itself, and is called for each.
        if self.ema is not None and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            update_average(cast(nn.Module, self.ema.module), self._network, self.ema.decay)

    def on_validation_epoch_start(self) -> None:
        self.predicted, self.truth = [], []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.predicted.append(self.logits(self.normalise(batch["input"])).float())
        self.truth.append(batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Score every held-out sample once, whatever the number of processes."""
        logits, truth = self.logits_of_all, self.truth_of_all = self._gathered()
        self.predicted, self.truth = [], []
        if self.targets is None:
            self.scores = scores(logits, truth, self._outputs)
        else:
            self.scores = self.targets.scores(logits, truth)
        self.scored_at = self.trainer.global_step
        name, figure = next(iter(self.scores.items()))
        named = "val_accuracy" if name == "top1" else f"val_{name}"
        values = {"val_loss": self._loss(logits, truth), named: figure}
        self.log_dict(values, rank_zero_only=False, sync_dist=False, prog_bar=True)

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Logits and labels of all held-out samples in order, on the CPU of every process."""
        data = cast(ShardData, cast(Any, self.trainer).datamodule)
        assert data.val_index is not None
        n = len(data.val_index)
        left = n % self.trainer.world_size
        parts: list[tuple[Tensor, Tensor]] = []
        if self.predicted:
            mine = torch.cat(self.predicted), torch.cat(self.truth)
            logits, truth = (cast(Tensor, self.all_gather(x)) for x in mine)
            parts.append((logits.reshape(-1, self._outputs), truth.reshape(-1)))
        if left:
            # All processes took equal steps; each of them also takes the few that are left.
            read = data.evaluation(data.val_index).__getitems__(list(range(n - left, n)))
            batch = data.on_before_batch_transfer(read, 0)
            images = self.normalise(batch["input"].to(self.device))
            logits = cast(Tensor, run_on_all(self.trainer, "logits", images))
            parts.append((logits.float(), batch["label"].to(self.device)))
        logits, truth = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
        return logits, truth


def choose_layers(model: nn.Module, head: Head, trained_blocks: int) -> list[list[nn.Parameter]]:
    """The encoder's layers from input to output; what is not trained is frozen, in it and outside.

    Args:
        model: the encoder.
        head: decides whether the encoder's final norm is used.
        trained_blocks: as of `Classifier`.

    Raises:
        ValueError: as of `Classifier`.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if trained_blocks == 0:
        return []
    if head.kind == "batchnorm":
        raise ValueError('head "batchnorm" is for a frozen encoder: set trained_blocks to 0')
    refusal = "has no layers(): it cannot be fine-tuned"
    layers = require(model, Layered, refusal).layers()
    blocks = len(layers) - 2  # the embedding before, the norm after
    if not -1 <= trained_blocks <= blocks:
        raise ValueError(f"trained_blocks {trained_blocks} must be -1 (all) to {blocks}")
    trained = layers if trained_blocks < 0 else layers[-1 - trained_blocks :]
    if head.kind == "fc_norm":  # takes the place of the final norm
        trained = trained[:-1]
    for parameter in (p for layer in trained for p in layer):
        parameter.requires_grad_()
    return layers


def set_drop_path(model: nn.Module, layers: list[list[nn.Parameter]], rate: float) -> list[float]:
    """Stochastic depth in the blocks of the encoder, rising linearly from 0 to `rate`.

    Returns:
        The rate of each block.

    Raises:
        ValueError: a rate outside [0, 1), or blocks that cannot be found.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path {rate} must be in [0, 1)")
    inside = {id(p) for layer in layers[1:-1] for p in layer}
    # A decoder has blocks too.
    blocks = [
        block
        for block in model.modules()
        if hasattr(block, "drop_path1") and id(next(block.parameters())) in inside
    ]
    if not blocks or len(blocks) != len(layers) - 2:
        raise ValueError(
            f"drop_path {rate}: {type(model).__name__} has {len(blocks)} trained blocks with "
            f"residual paths in {len(layers)} layers"
        )
    rates = cast(list[float], calculate_drop_path_rates(rate, len(blocks)))
    for block, dropped in zip(blocks, rates, strict=True):
        cast(Any, block).drop_path1 = DropPath(dropped)
        cast(Any, block).drop_path2 = DropPath(dropped)
    return rates


def _average(network: nn.Module, decay: float) -> ModelEmaV3:
    if not 0 < decay < 1:
        raise ValueError(f"ema {decay} must be a decay between 0 and 1, such as 0.9999")
    average = ModelEmaV3(network, decay=decay)
    return cast(ModelEmaV3, average.requires_grad_(False))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * network, of whatever part of each tensor this
    process holds; integers are copied.

    Args:
        average: of the same structure as `network`.
        network: is trained.
        decay: 0..1.
    """
    for mean, now in zip(tensors(average), tensors(network), strict=True):
        for ours, theirs in zip(local_tensors(mean), local_tensors(now), strict=True):
            if ours.is_floating_point():
                ours.lerp_(theirs, 1 - decay)
            else:
                ours.copy_(theirs)


def tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*network.parameters(), *network.buffers()]
