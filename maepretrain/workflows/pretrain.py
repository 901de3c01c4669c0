"""Pretraining: any model of the project, one optimizer, one schedule, in one run folder."""

from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from maepretrain.checkpoints.run_config import MODELS, add_model
from maepretrain.compression.autoencoder import Compression
from maepretrain.compression.residual_coder import ResidualCoder
from maepretrain.data.module import ShardData
from maepretrain.evaluate.live import LiveEvaluation
from maepretrain.models.protocol import Reconstructs, TakesSmaller, declared, require
from maepretrain.parsing.parser import make_parser
from maepretrain.runs.folder import RunFolder
from maepretrain.training.callbacks.last_checkpoint import LastCheckpoint
from maepretrain.training.callbacks.pictures import ReconstructionGrid
from maepretrain.training.experiment import add_experiment, of_rank, run_experiment
from maepretrain.training.fit import fit
from maepretrain.training.nonfinite import NonFinite
from maepretrain.training.optimizer import Optimization
from maepretrain.training.pretrain import Pretrain
from maepretrain.training.trainer_arguments import in_steps, set_threads


def pretrain(
    model: nn.Module,
    data: ShardData,
    optim: Optimization,
    trainer: dict[str, Any],
    run: Path,
    seed: int = 0,
    resume: bool = False,
    ckpt_path: str = "auto",
    allow_reorder: bool = False,
    same_config: bool = False,
    overwrite: bool = False,
    checkpoint_every_steps: int = 1000,
    checkpoint_every_minutes: float = 10.0,
    keep_every_steps: int | None = None,
    pictures: int = 8,
    live_probe: int = 0,
    nonfinite: int = 10,
    compile: bool = False,
    threads: int | None = None,
    config: str = "",
) -> bool:
    """Pretrain a model on shards.

    Args:
        model: any model of maepretrain.
        data: shards in, batches out.
        optim: optimizer and schedule.
        trainer: arguments of Lightning's Trainer.
        run: the run folder; the only record of the run.
        seed: seed of initial values and dropout (model and data have their own).
        resume: go on from the run folder's last checkpoint; start where there is none.
        ckpt_path: the checkpoint that a resume takes: last, best, a path, or auto, which is last
            or, where that cannot be read, the one of most steps.
        allow_reorder: resume although another global batch, index or other data settings change
            the order of samples: from the same number of samples on.
        same_config: with resume: refuse a run folder whose configuration differs in more than the
            length of the run and where it runs, as job scripts do.
        overwrite: delete the run that the folder holds.
        checkpoint_every_steps: optimizer steps between two saves of last.ckpt.
        checkpoint_every_minutes: time between two saves, whatever the steps; what a kill can lose.
        keep_every_steps: also keep a checkpoint for good every so many steps.
        pictures: held-out images drawn at each validation; 0 for none.
        live_probe: training samples of the labelled bank on which a linear probe and k-NN are
            fitted at each validation; 0 for none.
        nonfinite: micro-batches in a row with a non-finite loss after which the run stops. Each
            trains nothing; its samples are listed in RUN/nonfinite.csv.
        compile: torch.compile the model.
        threads: compute threads of each process on the CPU; small models lose by more than one.
            Default torch's choice.
        config: the resolved configuration as YAML, for the run folder.

    Returns:
        True when the run came to its end, False when it was stopped on the way.

    Raises:
        ValueError: a run folder that holds another run, sizes that do not divide, a stream that
            cannot be resumed, losses or weights that are not finite.
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
        folder,
        every_steps=checkpoint_every_steps,
        every_minutes=checkpoint_every_minutes,
        keep_every_steps=keep_every_steps,
    )
    _check_low_resolution(model, data)
    data.allow_reorder = allow_reorder
    # Mistakes that show without shards have been refused: from here on shards are opened.
    if declared(model, "needs_labels"):
        _require_labels(data, type(model).__name__)
    arguments = in_steps(trainer, data.order.steps_per_epoch)
    if live_probe and data.val_index is None:
        raise ValueError("live_probe needs held-out shards: set data.val")
    with folder:
        callbacks: list[L.Callback] = [guard]
        if data.val_index is not None:
            callbacks += _held_out_callbacks(model, folder.path, pictures, live_probe)
        if compile:
            model.compile()
        module = Pretrain(model, optim, data, arguments["max_steps"], seed, guard)
        ended, _ = fit(module, data, arguments, folder, callbacks, last)
        if ended:
            folder.mark(state="done")
        return ended


def _check_low_resolution(model: nn.Module, data: ShardData) -> None:
    """Refuse small images at first where the model cannot take them."""
    small = data.low_resolution
    if small is None:
        return
    refusal = "takes no smaller images: leave out data.low_resolution"
    require(model, TakesSmaller, refusal).check_smaller(small.height, small.width)


def _require_labels(data: ShardData, purpose: str) -> None:
    """Give a model that reads `label` only samples whose label can be used."""
    for index in (data.index, data.val_index):
        if index is not None:
            index.require_labels(purpose)
    data.labelled = True


def _held_out_callbacks(
    model: nn.Module, run: Path, pictures: int, live_probe: int
) -> list[L.Callback]:
    """The callbacks that need held-out images: the best checkpoint, pictures, live evaluation."""
    callbacks: list[L.Callback] = [
        ModelCheckpoint(
            run / "checkpoints", "best", monitor="val_loss", enable_version_counter=False
        )
    ]
    if pictures and isinstance(model, Reconstructs):
        callbacks.append(ReconstructionGrid(run, pictures))
    if live_probe:
        callbacks.append(LiveEvaluation(live_probe))
    return callbacks


def pretrain_parser(parser: ArgumentParser) -> ArgumentParser:
    """`pretrain`: its sections come from the signatures of the classes, its options from
    `pretrain()`."""
    sections: set[str | int] = {"model", "data", "optim", "trainer", "config"}
    parser.add_function_arguments(pretrain, skip=sections)
    add_experiment(parser)
    add_model(parser, (*MODELS, Compression, ResidualCoder))
    return parser


def pretrain_command(argv: list[str]) -> int:
    """The verb `pretrain`; 0 when it came to its end, 130 when it was stopped."""
    return of_rank(run_experiment(pretrain, pretrain_parser(make_parser("pretrain")), argv))
