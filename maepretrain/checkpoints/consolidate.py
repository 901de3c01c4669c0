"""The verb `consolidate`: one file of a run's weights, whichever strategy wrote its checkpoint."""

from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from maepretrain.checkpoints.choose import choose
from maepretrain.checkpoints.weights import read_state
from maepretrain.files import replacing


def consolidate(run: Path, ckpt_path: str = "auto", out: Path | None = None) -> int:
    """Write one fp32 safetensors file of a run's weights, whichever strategy divided them.

    Args:
        run: the run folder.
        ckpt_path: last, best, a path, or auto, which is last or, where that cannot be read, the one
            of most steps.
        out: the file; default RUN/model.safetensors, which `--encoder` takes.

    Raises:
        ValueError: no checkpoint, or one that cannot be read.
    """
    path = choose(run / "checkpoints", ckpt_path)
    if path is None:
        raise ValueError(f"{run} holds no checkpoint")
    file = out or run / "model.safetensors"
    state, _ = read_state(path)
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        single = tensor.float() if tensor.is_floating_point() else tensor
        weights[name] = single.contiguous()
    with replacing(file) as opened:
        opened.write(save(weights))
    numbers = sum(tensor.numel() for tensor in weights.values())
    print(f"{file}: {len(weights)} tensors, {numbers:,} numbers, of {path}")
    return 0
