"""What is relied on of torch's private names."""

import torch

from maepretrain.torch_internals import unscales_gradients


def test_fused_optimizers_take_the_loss_scale_out_themselves() -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    assert unscales_gradients(torch.optim.AdamW(weights, fused=True))
    assert not unscales_gradients(torch.optim.AdamW(weights))
    assert not unscales_gradients(torch.optim.SGD(weights, lr=1))
