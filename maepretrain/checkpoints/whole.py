"""Checkpoints of one file that take their name when they are whole."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import distributed as dist

from maepretrain.checkpoints.folder import partial_of, take_name
from maepretrain.checkpoints.saved import Saved
from maepretrain.files import replacing


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that take their name when they are whole, in the same folder.

    Lightning's own go through the system's temporary folder: where that is another disk, a full
    disk or a kill leaves half a file under the name of the last good checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save to a temporary name beside `path` and rename."""
        whole = Path(path)
        whole.parent.mkdir(parents=True, exist_ok=True)
        # A sharded checkpoint's folder cannot be replaced by a file in one step.
        target = partial_of(whole) if whole.is_dir() else whole
        with replacing(target) as file:
            torch.save(checkpoint, file)
        if target != whole:
            take_name(target, whole)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A checkpoint of any strategy, as whole tensors; on every process the one of rank zero."""
        chosen = [str(path)]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen)
        return Saved(Path(chosen[0])).plain()
