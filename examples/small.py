"""Shared by the examples and by tests: real digits as tensors, and training without Lightning."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maepretrain.workflows.quickstart import digits


def digit_images() -> tuple[Float[Tensor, "n 1 8 8"], Float[Tensor, "m 1 8 8"]]:
    """Scikit-learn's digits in 0..1: 1,437 to train on and 360 held out."""
    train, test = (torch.from_numpy(part.images).float()[:, None] / 255 for part in digits())
    return train, test


def fit(
    model: nn.Module, images: Float[Tensor, "n c *size"], steps: int, lr: float, batch: int = 100
) -> list[float]:
    """Train with Adam on batches drawn without replacement.

    Returns:
        The loss of each step.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.int64)
    losses = []
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        chosen = order[:batch]
        order = order[batch:]
        position = torch.arange(step * batch, (step + 1) * batch)[: len(chosen)]
        loss = model({"input": images[chosen], "position": position})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
