"""Fine-tuning: supervised training on labels.

Linear probe, attentive probe, partial and full fine-tuning and training from scratch differ in
their head, and in which layers of the encoder are trained.
"""

from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import nn

from maepretrain.checkpoints.encoders import fresh_encoder, load_encoder
from maepretrain.data.finetune_augmentation import Augmentation
from maepretrain.data.module import ShardData
from maepretrain.evaluate.classifier import Classifier
from maepretrain.evaluate.classifier_head import ClassifierHead, HeadKind, TokenPool
from maepretrain.evaluate.finetune_results import write_result
from maepretrain.evaluate.labels import choose_labels, count_classes
from maepretrain.evaluate.targets import Targets, Task
from maepretrain.models.protocol import TrainsPositions
from maepretrain.runs.folder import RunFolder
from maepretrain.strategies.sharded import ShardedStrategy
from maepretrain.training.callbacks.last_checkpoint import LastCheckpoint
from maepretrain.training.callbacks.throughput import Throughput
from maepretrain.training.experiment import add_experiment
from maepretrain.training.fit import fit
from maepretrain.training.nonfinite import NonFinite
from maepretrain.training.optimizer import Optimization
from maepretrain.training.trainer_arguments import in_steps, set_threads


def finetune(
    encoder: str,
    data: ShardData,
    optim: Optimization,
    augment: Augmentation,
    trainer: dict[str, Any],
    run: Path,
    scratch: bool = False,
    trained_blocks: int = -1,
    head: HeadKind = "linear",
    pool: TokenPool = "mean",
    heads: int = 8,
    drop_path: float = 0.0,
    ema: float = 0.0,
    classes: int | None = None,
    task: Task = "classes",
    targets: Path | None = None,
    label_fraction: float = 1.0,
    labels_per_class: int | None = None,
    label_smoothing: float = 0.0,
    seed: int = 0,
    seeds: int = 1,
    resume: bool = False,
    ckpt_path: str = "auto",
    allow_reorder: bool = False,
    same_config: bool = False,
    overwrite: bool = False,
    checkpoint_every_steps: int = 1000,
    checkpoint_every_minutes: float = 10.0,
    nonfinite: int = 10,
    threads: int | None = None,
    config: str = "",
) -> bool:
    """Train a classifier on an encoder, frozen or trained with it, on labels; the figures go to
    results.json in the run folder.

    Args:
        encoder: run folder of a pretraining, a file of weights, or timm:NAME.
        data: labelled shards; `val` is the test set, never used for choosing.
        optim: optimizer, schedule, layer decay.
        augment: RandAugment, erasing, mixup, cutmix.
        trainer: arguments of Lightning's Trainer.
        run: the run folder.
        scratch: start the same architecture from random initial values.
        trained_blocks: the encoder's last blocks to train; 0 freezes it (a probe), -1 trains all.
        head: linear (on pooled features), fc_norm (the official fine-tuning's), batchnorm (the
            paper's linear probe) or attentive (a learned query over the patch tokens).
        pool: mean of the patch tokens or cls, for the heads linear and batchnorm.
        heads: attention heads of the attentive head.
        drop_path: stochastic depth in the last block, growing linearly from 0 in the first.
        ema: decay of an average of the weights, which is evaluated then; 0 for none.
        classes: number of classes (or values); default as the training labels tell.
        task: classes, multilabel (several of them at once) or regression.
        targets: CSV for multilabel and regression, a sample a line: its key, then its class numbers
            or its values.
        label_fraction: class-balanced share of the training labels to use.
        labels_per_class: so many training labels of each class.
        label_smoothing: share of the target spread over all classes.
        seed: seed of initial values, of the chosen labels, of order and augmentation.
        seeds: runs with seed, seed + 1, ... in RUN/seed-N; RUN/results.json has mean and spread.
        resume: go on from the run folder's last checkpoint.
        ckpt_path: the checkpoint that a resume takes: last, best, a path, or auto, which is last
            or, where that cannot be read, the one of most steps.
        allow_reorder: resume although other settings change the order of samples.
        same_config: with resume: refuse a run folder whose configuration differs in more than the
            length of the run and where it runs, as job scripts do.
        overwrite: delete the run that the folder holds.
        checkpoint_every_steps: optimizer steps between two saves of last.ckpt.
        checkpoint_every_minutes: time between two saves, whatever the steps; what a kill can lose.
        nonfinite: micro-batches in a row with a non-finite loss after which the run stops. Each
            trains nothing; its samples are listed in RUN/nonfinite.csv.
        threads: compute threads of each process on the CPU. Default torch's choice.
        config: the resolved configuration as YAML, for the run folder.

    Returns:
        True when the run came to its end, False when it was stopped on the way.

    Raises:
        ValueError: labels that are missing, out of range or too few; an encoder, head and recipe
            that do not go together; a run folder that holds another run; losses or weights that
            are not finite.
        Preempted: SLURM took the nodes; the run goes on from its checkpoint.
    """
    set_threads(threads)
    guard = NonFinite(nonfinite)
    folder = RunFolder(
        run,
        resume=resume,
        overwrite=overwrite,
        config=config,
        ckpt_path=ckpt_path,
        same_config=same_config,
    )
    last = LastCheckpoint(
        folder, every_steps=checkpoint_every_steps, every_minutes=checkpoint_every_minutes
    )
    table = _use_targets(data, task, targets, classes)
    if table is None:
        count = _use_labels(data, classes, label_fraction, labels_per_class, seed)
    elif label_fraction == 1 and labels_per_class is None:
        count = table.outputs
    else:
        raise ValueError(f"a share of the labels is taken by class, and {task} has none")
    data.labelled = table is None
    data.allow_reorder = allow_reorder
    augment.apply(data)
    arguments = in_steps(trainer, data.order.steps_per_epoch)
    _require_last_validation(arguments)
    model = fresh_encoder(encoder, data, seed) if scratch else load_encoder(encoder, data)
    if trained_blocks == -1 and isinstance(model, TrainsPositions):
        model.train_positions()
    torch.manual_seed(seed)
    module = Classifier(
        model,
        ClassifierHead(_width(model, data), count, head, pool, heads),
        optim,
        data,
        arguments["max_steps"],
        augment=augment,
        trained_blocks=trained_blocks,
        drop_path=drop_path,
        ema=ema,
        label_smoothing=label_smoothing,
        seed=seed,
        targets=table,
        guard=guard,
    )
    outputs = f"{count} classes" if table is None else f"{task} of {count}"
    origin = f"architecture of {encoder}, from scratch" if scratch else f"encoder {encoder}"
    with folder:
        module.announce({"classifier": f"{outputs}, {len(data.index):,} labelled images, {origin}"})
        ended, engine = fit(module, data, arguments, folder, [guard], last)
        if ended and data.val_index is not None:
            if module.scored_at_step != engine.global_step:
                # Of the final weights, whenever the last validation was.
                engine.validate(module, data, verbose=False)
            write_result(
                run,
                module,
                data,
                engine,
                seconds=_seconds(engine),
                encoder=encoder,
                scratch=scratch,
                seed=seed,
            )
        if ended:
            folder.mark(state="done")
    return ended


def _require_last_validation(trainer: dict[str, Any]) -> None:
    """Divided weights are scored while they are trained, and not after it.

    Raises:
        ValueError: a run whose last step is no validation, under a strategy that divides.
    """
    micro_batches = trainer["max_steps"] * (trainer.get("accumulate_grad_batches") or 1)
    interval = trainer["val_check_interval"]
    if isinstance(trainer.get("strategy"), ShardedStrategy) and micro_batches % interval:
        raise ValueError(
            f"a validation every {interval} micro-batches leaves the last of {micro_batches} "
            "without one: set trainer.check_val_every_n_epoch to a divisor of max_epochs"
        )


def _use_targets(
    data: ShardData, task: Task, path: Path | None, outputs: int | None
) -> Targets | None:
    """The table of a task that is not one class for each image; the samples point into it."""
    if (task == "classes") != (path is None):
        raise ValueError(f"task {task} and targets {path} do not go together")
    if path is None:
        return None
    table = Targets(path, task, outputs)
    if data.unindexed is not None:
        raise ValueError("targets need samples with an index (not exact: false)")
    data.index = table.of(data.index)
    if data.val_index is not None:
        data.val_index = table.of(data.val_index)
    table.standardise(data.index)
    return table


def _use_labels(
    data: ShardData, classes: int | None, fraction: float, per_class: int | None, seed: int
) -> int:
    """Keep the chosen labelled samples to train on; return the number of classes."""
    labels = data.index.require_labels("fine-tuning")
    if data.val_index is None:
        count = count_classes(labels, classes=classes)
    else:
        held_out = data.val_index.require_labels("fine-tuning")
        count = count_classes(labels, held_out, classes=classes)
    if fraction != 1 or per_class is not None:
        data.choose(choose_labels(labels, fraction, per_class, seed))
    return count


@torch.no_grad()
def _width(model: nn.Module, data: ShardData) -> int:
    return cast(Any, model).eval().encode(torch.zeros(1, *data.shape)).shape[1]


def _seconds(engine: L.Trainer) -> float:
    """Time of the whole run, stops left out."""
    for callback in engine.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput):
            return callback.seconds
    raise AssertionError("fit() adds a Throughput")


def finetune_parser(parser: Any) -> Any:
    """`finetune`: options from its signature, sections shared with `pretrain`."""
    sections: set[str | int] = {"data", "optim", "augment", "trainer", "config"}
    parser.add_function_arguments(finetune, skip=sections)
    parser.add_class_arguments(Augmentation, "augment")
    add_experiment(parser)
    return parser
