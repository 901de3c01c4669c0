"""`maepretrain finetune`: supervised training on labels. Linear probe, attentive probe, partial and
full fine-tuning and training from scratch differ in their head and in what of the encoder is
trained."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from lightning.fabric.utilities.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor, nn

from maepretrain.checkpoints.encoders import fresh_encoder, load_encoder
from maepretrain.data.augment import Augmentation
from maepretrain.data.module import ShardData
from maepretrain.data.shards.index import class_names
from maepretrain.evaluate.classifier import Classifier, Head, Kind, Pool
from maepretrain.evaluate.frozen_features import CONFUSED, shown
from maepretrain.evaluate.labels import choose_labels, count_classes
from maepretrain.evaluate.targets import Targets, Task
from maepretrain.models.protocol import TrainsPositions
from maepretrain.parsing.parser import allow_bare_flags, make_parser
from maepretrain.plots import confusion_matrix, most_confused
from maepretrain.ranks import say
from maepretrain.runs.folder import RunFolder
from maepretrain.runs.results import print_table, spread, write_results
from maepretrain.strategies.sharded import ShardedStrategy
from maepretrain.training.callbacks.last_checkpoint import LastCheckpoint
from maepretrain.training.callbacks.pictures import log_picture
from maepretrain.training.callbacks.throughput import Throughput
from maepretrain.training.experiment import add_experiment, of_rank, run_experiment
from maepretrain.training.fit import fit
from maepretrain.training.nonfinite import NonFinite
from maepretrain.training.optimizer import Optimization
from maepretrain.training.trainer_arguments import in_steps, set_threads

FIGURES = ("top1", "top5", "mean_per_class", "mAP", "r2", "n", "minutes", "img_per_s")


def finetune(
    encoder: str,
    data: ShardData,
    optim: Optimization,
    augment: Augmentation,
    trainer: dict[str, Any],
    run: Path,
    scratch: bool = False,
    trained_blocks: int = -1,
    head: Kind = "linear",
    pool: Pool = "mean",
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
    if table is not None and (label_fraction != 1 or labels_per_class is not None):
        raise ValueError(f"a share of the labels is taken by class, and {task} has none")
    fraction = (label_fraction, labels_per_class)
    count = table.outputs if table else _use_labels(data, classes, *fraction, seed)
    data.labelled, data.allow_reorder = table is None, allow_reorder
    augment.apply(data)
    arguments = in_steps(trainer, data.order.steps_per_epoch)
    _require_last_validation(arguments)
    model = fresh_encoder(encoder, data, seed) if scratch else load_encoder(encoder, data)
    if trained_blocks == -1 and isinstance(model, TrainsPositions):
        model.train_positions()
    torch.manual_seed(seed)
    classifier = Head(_width(model, data), count, head, pool, heads)
    recipe = (augment, trained_blocks, drop_path, ema, label_smoothing, seed, table, guard)
    module = Classifier(model, classifier, optim, data, arguments["max_steps"], *recipe)
    with folder:
        origin = f"architecture of {encoder}, from scratch" if scratch else f"encoder {encoder}"
        what = f"{count} classes" if table is None else f"{task} of {count}"
        module.announce({"classifier": f"{what}, {len(data.index):,} labelled images, {origin}"})
        ended, engine = fit(module, data, arguments, folder, [guard], last)
        if ended and data.val_index is not None:
            if module.scored_at != engine.global_step:
                # Of the final weights, whenever the last validation was.
                engine.validate(module, data, verbose=False)
            about = {"encoder": encoder, "scratch": scratch, "seed": seed}
            _report(run, module, data, engine, about)
        if ended:
            folder.mark(state="done")
    return ended


def _require_last_validation(trainer: dict[str, Any]) -> None:
    """Divided weights are scored while they are trained, and not after it.

    Raises:
        ValueError: a run whose last step is no validation, under an engine that divides.
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
    """Keep the labelled samples to train on; the number of classes."""
    labels = data.index.require_labels("fine-tuning")
    held_out = [data.val_index.require_labels("fine-tuning")] if data.val_index is not None else []
    count = count_classes(labels, *held_out, classes=classes)
    if fraction != 1 or per_class is not None:
        data.choose(choose_labels(labels, fraction, per_class, seed))
    return count


@torch.no_grad()
def _width(model: nn.Module, data: ShardData) -> int:
    return cast(Any, model).eval().encode(torch.zeros(1, *data.shape)).shape[1]


@rank_zero_only
def _report(
    run: Path, module: Classifier, data: ShardData, engine: Any, about: dict[str, Any]
) -> None:
    """results.json, and the table for people."""
    trained = sum(p.requires_grad for p in module.model.parameters())
    seconds = next(c for c in engine.callbacks if isinstance(c, Throughput)).seconds
    images = module.steps * module.global_batch
    epochs = module.steps / module.steps_per_epoch
    recipe = f"{module.head.kind} head, {trained} encoder tensors trained, {epochs:.4g} epochs"
    if module.ema is not None:
        recipe += f", averaged weights ({module.ema.decay})"
    result = module.scores | about
    result |= {"labels": len(data.index), "recipe": recipe}
    result |= {"minutes": seconds / 60, "img_per_s": images / max(seconds, 1e-9)}
    if module.targets is not None and module.targets.task == "regression":
        # A prediction in the targets' own units is mean + std * output.
        result |= {"target_mean": module.targets.mean, "target_std": module.targets.std}
    path = write_results(run, "finetune", result)
    if module.targets is None:
        draw(run / "pictures", data, module.logits_of_all, module.truth_of_all)
        for picture in (run / "pictures").glob("finetune-*.png"):
            log_picture(engine, picture.stem, np.asarray(Image.open(picture).convert("RGB")))
    print_table({str(about["encoder"]): {k: v for k, v in result.items() if k in FIGURES}})
    name, figure = next(iter(module.scores.items()))
    name = "accuracy" if name == "top1" else name
    say(f"{name} on held-out images: {figure:.4f}  ({path})")


def draw(
    pictures: Path, data: ShardData, logits: Float[Tensor, "n k"], truth: Int64[Tensor, "n"]
) -> None:
    """Confusion matrix and most confused images of the held-out samples, as PNG.

    Args:
        pictures: the folder.
        data: has the images.
        logits: of all held-out samples in order.
        truth: their classes.
    """
    predicted, confidence = logits.argmax(1), logits.softmax(1).amax(1)
    names = class_names(data.val_index.shards) if data.val_index is not None else []
    confusion_matrix(truth, predicted, logits.shape[1], pictures / "finetune-confusion.png", names)
    wrong = (predicted != truth).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:CONFUSED]
    if len(wrong) and len(data.shape) == 3 and data.val_index is not None:
        read = data.evaluation(data.val_index).__getitems__(wrong.tolist())["input"]
        right, taken, sure = (v[wrong].tolist() for v in (truth, predicted, confidence))
        path = pictures / "finetune-most-confused.png"
        most_confused(list(shown(read)), right, taken, sure, path, names)


def finetune_parser(parser: Any) -> Any:
    """`finetune`: options from its signature, sections shared with `pretrain`."""
    sections: set[str | int] = {"data", "optim", "augment", "trainer", "config"}
    parser.add_function_arguments(finetune, skip=sections)
    parser.add_class_arguments(Augmentation, "augment")
    add_experiment(parser)
    return parser


def finetune_command(argv: list[str]) -> int:
    """The verb `finetune`; 0 when it came to its end, 130 when it was stopped."""
    parser = finetune_parser(make_parser("finetune"))
    allow_bare_flags(parser)
    asked = parser.parse_args(argv)
    if asked.seeds < 1:
        raise ValueError(f"seeds {asked.seeds} must be at least 1")
    if asked.seeds == 1:
        return of_rank(run_experiment(finetune, parser, argv))
    results = []
    for seed in range(asked.seed, asked.seed + asked.seeds):
        run = Path(asked.run) / f"seed-{seed}"
        one = [*argv, "--seeds", "1", "--seed", str(seed), "--run", str(run)]
        path = run / "results.json"
        done = asked.resume and path.exists()
        fresh = finetune_parser(make_parser("finetune"))
        if not done and (code := run_experiment(finetune, fresh, one)):
            return of_rank(code)
        if path.exists():
            results.append(json.loads(path.read_text())["finetune"])
    _summarise(Path(asked.run), results)
    return 0


@rank_zero_only
def _summarise(run: Path, results: list[dict[str, Any]]) -> None:
    """Mean and spread over the seeds, in results.json of the folder above the runs."""
    if not results:
        return
    figures = [{k: v for k, v in one.items() if k in FIGURES} for one in results]
    result = spread(figures) | {"seeds": len(results), "recipe": results[0]["recipe"]}
    result |= {"labels": results[0]["labels"], "encoder": results[0]["encoder"]}
    path = write_results(run, "finetune", result)
    print_table({str(result["encoder"]): {k: v for k, v in result.items() if k != "recipe"}})
    say(f"mean and spread over {len(results)} seeds: {path}")
