"""Pictures of held-out images at each validation."""

from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from jaxtyping import UInt8
from lightning.pytorch.loggers import TensorBoardLogger

from maepretrain.data.batch import Batch
from maepretrain.plots.images import reconstruction_grid
from maepretrain.ranks import run_on_all


class ReconstructionGrid(L.Callback):
    """Draws held-out images at each validation: original, masked, reconstruction, pasted.

    Args:
        run: the run folder; pictures go to `pictures/step-NNNNNNNN.png` and to TensorBoard.
        images: how many.
    """

    def __init__(self, run: Path, images: int) -> None:
        self.folder = run / "pictures"
        self.images = images

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx:
            return
        module = cast(Any, pl_module)
        reconstruction = run_on_all(trainer, "reconstruct", batch["input"][: self.images])
        if not trainer.is_global_zero:
            return
        rows = [module.normalise.undo(row.float()).cpu() for row in reconstruction]
        path = self.folder / f"step-{trainer.global_step:08d}.png"
        picture = reconstruction_grid(rows, list(type(reconstruction)._fields), path)
        log_picture(trainer, "reconstruction", picture)


def log_picture(trainer: L.Trainer, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """Add a picture to TensorBoard, beside the scalars of the last step."""
    # They carry the number of steps before it: a resume drops what has a later one.
    step = trainer.global_step - 1
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step, dataformats="HWC")
