"""Optimizer and schedule against numbers worked out by hand and facebookresearch/mae's formula."""

import math

import pytest
import torch
from torch import nn

from maepretrain.optim import Optimization, describe


def test_learning_rate_scales_with_the_global_batch() -> None:
    assert Optimization(base_lr=1.5e-4).lr(4096) == pytest.approx(2.4e-3)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.0),  # warm-up starts at 0 ...
        (5, 0.5),  # ... is half way up after half of it ...
        (10, 1.0),  # ... and ends at the peak
        (40, 0.2 + 0.8 * (1 + math.cos(math.pi / 3)) / 2),  # a third of the cosine
        (55, 0.6),  # its middle, between 1 and .2
        (100, 0.2),
        (120, 0.2),  # nothing happens past the end
    ],
)
def test_schedule_by_hand(step: int, lr: float) -> None:
    optim = Optimization(base_lr=1.0, warmup_epochs=2.0, min_lr=0.2)
    assert optim.lr_at(step, steps=100, steps_per_epoch=5, global_batch=256) == pytest.approx(lr)


def test_warm_up_longer_than_the_run_only_climbs() -> None:
    optim = Optimization(base_lr=1.0, warmup_epochs=40.0)
    lrs = [optim.lr_at(s, steps=10, steps_per_epoch=5, global_batch=256) for s in range(10)]
    assert lrs == pytest.approx([s / 200 for s in range(10)])


def test_vectors_are_not_decayed_and_nothing_is_lost() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = Optimization(weight_decay=0.05).groups([], model.parameters())
    sizes = {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in groups}
    assert sizes == {0.05: 12 + 8, 0.0: 4 + 4 + 4 + 2}
    assert [line.split(",")[0] for line in describe(groups, 1.0)] == ["2 tensors", "4 tensors"]


def test_layer_decay_scales_each_layer_below_the_next() -> None:
    layers = [[nn.Parameter(torch.ones(2, 2))] for _ in range(3)]
    head = nn.Parameter(torch.ones(2, 2))
    groups = Optimization(layer_decay=0.5).groups(layers, [head])
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert [scales[id(layer[0])] for layer in layers] == [0.25, 0.5, 1.0]
    assert scales[id(head)] == 1.0


def test_frozen_parameters_get_no_group() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert Optimization().groups([], [frozen]) == []


def test_fused_adamw_equals_the_plain_loop() -> None:
    torch.manual_seed(0)
    start, optim = torch.randn(5, 5), Optimization(base_lr=0.1, weight_decay=0.3)
    ours, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = optim.make(optim.groups([], [ours]), global_batch=256)
    b = torch.optim.AdamW([plain], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3, foreach=False)
    for _ in range(5):
        for parameter, optimizer in ((ours, a), (plain, b)):
            parameter.grad = parameter.detach().sin()
            optimizer.step()
    assert torch.allclose(ours, plain, atol=1e-6)


def test_a_resumed_optimizer_takes_the_configured_values() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    old, new = Optimization(weight_decay=0.1), Optimization(weight_decay=0.2, betas=(0.8, 0.9))
    before = old.make(old.groups([], [parameter]), 256)
    after = new.make(new.groups([], [parameter]), 256)
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["weight_decay"] == 0.1  # what loading alone would leave
    new.refresh(after, new.groups([], [parameter]))
    assert after.param_groups[0]["weight_decay"] == 0.2
    assert after.param_groups[0]["betas"] == (0.8, 0.9)
