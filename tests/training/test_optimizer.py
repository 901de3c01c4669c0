"""Optimizer and schedule against numbers worked out by hand and facebookresearch/mae's formula."""

import math

import pytest
import torch
from torch import nn

from maepretrain.strategies.zero import ZeRO
from maepretrain.training.optimizer import Optimization, check_groups, describe


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


def test_learning_rate_and_numbers_of_each_layer_by_hand() -> None:
    """As facebookresearch/mae's `lr_decay.py`: decay^(depth + 1) for the embedding, 1 for norm and
    head."""
    sizes = (3, 4, 5, 2)  # embedding, two blocks, norm
    layers = [[nn.Parameter(torch.ones(n, n)), nn.Parameter(torch.ones(n))] for n in sizes]
    head = nn.Parameter(torch.ones(10, 2))
    optim = Optimization(base_lr=1.0, layer_decay=0.75, weight_decay=0.05)
    groups = optim.groups(layers, [head])
    found = [
        (g["lr_scale"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups
    ]
    assert found == [
        *((0.75**3, 0.05, 9), (0.75**3, 0.0, 3)),
        *((0.75**2, 0.05, 16), (0.75**2, 0.0, 4)),
        *((0.75, 0.05, 25), (0.75, 0.0, 5)),
        *((1.0, 0.05, 4), (1.0, 0.0, 2)),
        (1.0, 0.05, 20),
    ]
    lines = describe(groups, optim.lr(256))
    assert lines[0] == "1 tensors, 9 numbers, weight decay 0.05, lr 0.422"
    assert lines[-1] == "lr of 4 layers from 0.422 to 1"


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_layer_decay_that_changes_nothing_is_refused(frozen: int) -> None:
    layers = [[nn.Parameter(torch.ones(2, 2), requires_grad=i >= frozen)] for i in range(2)]
    optim, head = Optimization(layer_decay=0.5), nn.Parameter(torch.ones(2))
    if frozen:
        with pytest.raises(ValueError, match=r"layer_decay 0.5 changes nothing"):
            optim.groups(layers, [head])
    else:
        assert len(optim.groups(layers, [head])) == 3
    with pytest.raises(ValueError, match=r"layer_decay 0.5 changes nothing"):
        optim.groups([], [head])


def test_groups_and_trained_parameters_add_up() -> None:
    one, two = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    groups = Optimization().groups([[one]], [two])
    check_groups(groups, [one, two])
    check_groups(groups, [one, two, nn.Parameter(torch.ones(1), requires_grad=False)])
    for wrong in ([one], [one, two, nn.Parameter(torch.ones(1))]):
        with pytest.raises(ValueError, match="do not add up"):
            check_groups(groups, wrong)
    with pytest.raises(ValueError, match="do not add up"):
        check_groups(Optimization().groups([[one], [one]], [two]), [one, two])


def official_lars(
    parameters: list[torch.Tensor], gradients: list[torch.Tensor], lr: float, steps: int
) -> list[torch.Tensor]:
    """facebookresearch/mae's `lars.py` without weight decay: matrices by their trust ratio, vectors
    by plain momentum."""
    moved = [p.clone() for p in parameters]
    momenta = [torch.zeros_like(p) for p in parameters]
    for _ in range(steps):
        for p, g, m in zip(moved, gradients, momenta, strict=True):
            update = g * (0.001 * p.norm() / g.norm()) if p.ndim > 1 else g
            m.mul_(0.9).add_(update)
            p.sub_(lr * m)
    return moved


def test_lars_without_weight_decay_adapts_matrices_as_the_official_code() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)]
    gradients = [torch.randn(p.shape, generator=generator) for p in start]
    optim = Optimization("lars", base_lr=0.1, weight_decay=0.0, momentum=0.9)
    parameters = [nn.Parameter(p.clone()) for p in start]
    optimizer = optim.make(optim.groups([], parameters), global_batch=256)
    for _ in range(3):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    expected = official_lars(start, gradients, lr=0.1, steps=3)
    for ours, theirs in zip(parameters, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_lars_under_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="lars needs the norm of each tensor"):
        Optimization("lars").check_strategy(ZeRO.__name__)
    Optimization("lars").check_strategy("DDPStrategy")
    Optimization("adamw").check_strategy(ZeRO.__name__)
