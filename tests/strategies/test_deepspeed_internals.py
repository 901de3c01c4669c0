"""What is relied on of DeepSpeed's undocumented attributes: parts of parameters, found again by
their values, on one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from maepretrain.strategies.deepspeed_internals import (
    disable_kernels,
    external_parameters,
    held_by_stage_3,
    part_of_group,
    part_of_parameter,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Reader(nn.Module):
    """Reads the weight of a child without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 5)
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.child.weight, self.child.bias)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """One process group for all: DeepSpeed remembers its own groups inside it."""
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 29611}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("DS_BUILD_OPS", "0")
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        for name, value in values.items():
            patch.setenv(name, str(value))
        dist.init_process_group("gloo", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def engine(model: nn.Module, stage: int) -> Any:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def test_kernels_are_listed_where_they_are_emptied() -> None:
    import deepspeed

    assert isinstance(deepspeed.ops.__compatible_ops__, dict)
    disable_kernels()
    assert deepspeed.ops.__compatible_ops__ == {}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parts_hold_the_numbers_of_their_parameter(stage: int) -> None:
    disable_kernels()
    model = Reader()
    before = {name: p.detach().clone().flatten() for name, p in model.named_parameters()}
    wrapped = engine(model, stage)
    part_of = part_of_parameter if stage == 3 else part_of_group
    for name, parameter in model.named_parameters():
        part = part_of(wrapped.optimizer, parameter)
        if name == "frozen":
            assert part.flat is None
            continue
        assert part.flat is not None
        found = part.flat.detach()[part.offset : part.offset + part.length]
        assert torch.equal(found, before[name][part.start : part.start + part.length])
        assert part.length == len(before[name])
        assert bool(held_by_stage_3(parameter)) == (stage == 3)


@pytest.mark.usefixtures("group")
def test_parameters_that_are_read_without_their_module_are_noted() -> None:
    disable_kernels()
    model = Reader()
    wrapped = engine(model, 3)
    wrapped(torch.ones(2, 3))
    assert {id(p) for p in external_parameters(model)} <= {id(p) for p in model.parameters()}
    assert external_parameters(model)
