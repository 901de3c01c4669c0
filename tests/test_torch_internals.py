"""What is relied on of torch's private names."""

import pytest
import torch

from maepretrain.torch_internals import (
    DataDependentOutputException,
    FakeTensorMode,
    unscales_gradients,
)


def test_fused_optimizers_take_the_loss_scale_out_themselves() -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    assert unscales_gradients(torch.optim.AdamW(weights, fused=True))
    assert not unscales_gradients(torch.optim.AdamW(weights))
    assert not unscales_gradients(torch.optim.SGD(weights, lr=1))


def test_fake_tensors_have_shapes_and_no_memory_and_refuse_values() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        huge = torch.empty(1 << 20, 1 << 20)  # 4 TiB
        product = huge @ torch.ones(1 << 20, 3)
        assert product.shape == (1 << 20, 3) and product.dtype == torch.float32
        with pytest.raises(DataDependentOutputException):
            bool(product.max() > 0)
