"""Fine-tuning: a linear classifier on the mean patch feature, trained together with the encoder (He
et al. 2021, section 4)."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int64
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.arguments import make_parser
from maepretrain.callbacks import LastCheckpoint
from maepretrain.data.module import ShardData
from maepretrain.data.samples import Batch, ShardIndex
from maepretrain.distributed import say
from maepretrain.experiments import add_experiment, fresh_model, read_model, run_experiment
from maepretrain.files import replacing
from maepretrain.optim import Optimization
from maepretrain.randomness import permutation
from maepretrain.runs import RunFolder
from maepretrain.training import Scheduled, fit, in_steps, set_threads


class Classifier(Scheduled):
    """An encoder and a linear head, trained with cross-entropy.

    Args:
        model: has `encode(images) -> (b, d)` and `layers()`; what is in no layer (a decoder) is
            frozen and unused.
        classes: outputs of the head.
        optim: optimizer and schedule.
        data: its normalisation and epoch length are used.
        steps: optimizer steps of the run.
        label_smoothing: share of the target spread over all classes.
        seed: seed of dropout and its like.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        optim: Optimization,
        data: ShardData,
        steps: int,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(optim, data, steps, seed)
        if not hasattr(model, "layers"):
            raise ValueError(f"{type(model).__name__} has no layers(): it cannot be fine-tuned")
        self.model, self.label_smoothing = model, label_smoothing
        inside = {id(p) for p in self._encoder_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in inside)
        with torch.no_grad():
            features = cast(Any, model).encode(torch.zeros(1, *data.shape))
        self.head = nn.Linear(features.shape[1], classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # the official code's
        nn.init.zeros_(self.head.bias)

    def _encoder_parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.parameter_layers() for p in layer]

    def parameter_layers(self) -> list[list[nn.Parameter]]:
        return cast(Any, self.model).layers()

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Tokens and positions, as in the official fine-tuning (its pretraining decays them)."""
        ends = ("cls_token", "reg_token", "pos_embed")
        return [p for name, p in self.named_parameters() if name.endswith(ends)]

    def _logits(self, batch: Batch) -> Tensor:
        return self.head(cast(Any, self.model).encode(self.normalise(batch["input"])))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(
            self._logits(batch), batch["label"], label_smoothing=self.label_smoothing
        )
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, label = self._logits(batch), batch["label"]
        values = {
            "val_loss": F.cross_entropy(logits, label),
            "val_accuracy": (logits.argmax(1) == label).float().mean(),
        }
        self.log_dict(values, batch_size=len(label), sync_dist=True, prog_bar=True)


def choose_fraction(labels: Int64[Tensor, "n"], fraction: float, seed: int) -> Int64[Tensor, "m"]:
    """Numbers of a class-balanced, seeded share of the samples: the same share of every class, at
    least one.

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label_fraction {fraction} must be in (0, 1]")
    chosen = []
    for label in labels[labels >= 0].unique().tolist():
        numbers = (labels == label).nonzero().flatten()
        order = permutation(seed, "labels", len(numbers), label)
        chosen.append(numbers[order[: max(1, round(fraction * len(numbers)))]])
    return torch.cat(chosen).sort().values


def _count_classes(train: ShardIndex, held_out: ShardIndex | None) -> int:
    indexes = [index for index in (train, held_out) if index is not None]
    return max(int(index.require_labels("fine-tuning").max()) for index in indexes) + 1


def finetune(
    encoder: Path,
    data: ShardData,
    optim: Optimization,
    trainer: dict[str, Any],
    run: Path,
    scratch: bool = False,
    label_fraction: float = 1.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
    resume: bool = False,
    allow_reorder: bool = False,
    overwrite: bool = False,
    checkpoint_every_steps: int = 1000,
    threads: int | None = None,
    config: str = "",
) -> bool:
    """Train a pretrained encoder and a classifier on labels; the figures go to results.json in the
    run folder.

    Args:
        encoder: run folder of a pretraining.
        data: labelled shards; `val` is the test set, looked at after training and never for
            choosing.
        optim: optimizer, schedule, layer decay.
        trainer: arguments of Lightning's Trainer.
        run: the run folder.
        scratch: start the same architecture from random initial values.
        label_fraction: class-balanced share of the training labels to use.
        label_smoothing: share of the target spread over all classes.
        seed: seed of initial values and of the chosen labels.
        resume: go on from the run folder's last checkpoint.
        allow_reorder: resume although other settings change the order of samples.
        overwrite: delete the run that the folder holds.
        checkpoint_every_steps: optimizer steps between two saves of last.ckpt.
        threads: compute threads of each process on the CPU. Default torch's choice.
        config: the resolved configuration as YAML, for the run folder.

    Returns:
        True when the run came to its end, False when it was stopped on the way.

    Raises:
        ValueError: no labels, a fraction outside (0, 1], a run folder that holds another run.
    """
    set_threads(threads)
    classes = _count_classes(data.index, data.val_index)
    data.labelled, data.allow_reorder = True, allow_reorder
    if label_fraction != 1:
        data.choose(choose_fraction(data.index.labels(), label_fraction, seed))
    arguments = in_steps(trainer, data.order.steps_per_epoch)
    model = fresh_model(encoder, seed) if scratch else read_model(encoder)
    if hasattr(model, "train_positions"):
        cast(Any, model).train_positions()
    torch.manual_seed(seed)
    module = Classifier(model, classes, optim, data, arguments["max_steps"], label_smoothing, seed)
    with RunFolder(run, resume, overwrite, config) as folder:
        say(
            f"classifier    {classes} classes, {len(data.index):,} labelled images, "
            + ("from scratch" if scratch else f"encoder of {encoder}")
        )
        last = LastCheckpoint(folder, checkpoint_every_steps)
        ended, engine = fit(module, data, arguments, folder, [], last)
        if ended and data.val_index is not None:
            # Of the final weights, whenever the last validation was.
            (final,) = engine.validate(module, data, verbose=False)
            _report(run, final["val_accuracy"], len(data.index), scratch)
    return ended


@rank_zero_only
def _report(run: Path, accuracy: float, labels: int, scratch: bool) -> None:
    path = run / "results.json"
    result = {"accuracy": accuracy, "labels": labels, "scratch": scratch}
    with replacing(path) as file:
        file.write(json.dumps(result, indent=1).encode() + b"\n")
    say(f"accuracy on held-out images: {accuracy:.4f}  ({path})")


def finetune_parser(parser: Any) -> Any:
    """`finetune`: options from its signature, sections shared with `pretrain`."""
    parser.add_function_arguments(finetune, skip={"data", "optim", "trainer", "config"})
    add_experiment(parser)
    return parser


def finetune_command(argv: list[str]) -> int:
    """The verb `finetune`; 0 when it came to its end, 130 when it was stopped."""
    return run_experiment(finetune, finetune_parser(make_parser("finetune")), argv)
