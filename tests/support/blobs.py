"""Points around five centres."""

import torch
from torch import Tensor


def blobs(n: int, seed: int, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (n,), generator=generator)
    centres = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 1.2 * torch.randn(n, width, generator=generator), labels
