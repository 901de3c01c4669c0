"""Shared by the tests of models whose batches several processes may share."""

import copy

import torch
from torch import Tensor, nn


def assert_halves_average_to_the_whole(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """The mean of the gradients of two halves of a batch, which DDP computes, is the gradient of
    the batch; and every parameter has one, without which DDP waits for ever."""
    gradients = []
    half = len(batch["input"]) // 2
    for part in (slice(None), slice(half), slice(half, None)):
        one = copy.deepcopy(model)
        one({name: value[part] for name, value in batch.items()})["loss"].backward()
        missing = [name for name, p in one.named_parameters() if p.grad is None]
        assert not missing
        gradients.append({name: p.grad for name, p in one.named_parameters()})
    whole, first, second = gradients
    for name, gradient in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, gradient, atol=1e-6, rtol=1e-4)
