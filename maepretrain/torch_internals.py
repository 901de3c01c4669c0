"""Private names of torch: each use of one, and why no public name serves.

No other module may use them; `test_torch_internals.py` states what is relied on.
"""

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Tensors without memory or values, and the error of a forward that looks at values all the same.
# Their place in torch's namespaces is private; FLOPs and memory of a run are counted on them.
__all__ = ["DataDependentOutputException", "FakeTensorMode", "local_slice", "unscales_gradients"]


def local_slice(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this process's part of a divided tensor, and the indices of its first number.

    `to_local()` gives the part alone; where it begins has no public name.
    """
    shape, begin = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(shape), tuple(begin)


def unscales_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer divides gradients by the loss scale itself, as fused ones do.

    torch's GradScaler asks it in the same way.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
