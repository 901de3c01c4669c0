"""The order of samples against the definition in `order.py`, written out in plain Python."""

import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maepretrain.data.order import EpochOrder
from maepretrain.randomness import permutation

UNEVEN = [7, 0, 1, 30, 12, 0, 0, 25, 3, 19]


def epoch_by_definition(
    counts: list[int],
    global_batch: int,
    epoch: int,
    seed: int,
    lanes: int,
    block: int,
    tail: str,
) -> list[list[tuple[int, int]]]:
    """The (shard, member) of every step of an epoch, from lists alone."""
    shards = permutation(seed, "shards", len(counts), epoch).tolist()
    sequence = [(s, m) for s in shards for m in range(counts[s])]
    steps, rest = divmod(len(sequence), global_batch)
    if tail == "pad" and rest:
        steps += 1
    while len(sequence) < steps * global_batch:
        sequence += sequence
    length = steps * global_batch // lanes
    shuffled = []
    for lane in range(lanes):
        ids = sequence[lane * length : (lane + 1) * length]
        # The first block of a lane is shorter by the lane's share of a block.
        first = block - lane * block // lanes
        blocks = [ids[:first], *(ids[i : i + block] for i in range(first, length, block))]
        shuffled.append(
            [
                ids_of_block[k]
                for b, ids_of_block in enumerate(blocks)
                for k in permutation(seed, "block", len(ids_of_block), epoch, lane, b).tolist()
            ]
        )
    share = global_batch // lanes
    return [
        [place for lane in shuffled for place in lane[step * share : (step + 1) * share]]
        for step in range(steps)
    ]


def located(order: EpochOrder, positions: range) -> list[tuple[int, int]]:
    shard, member = order.locate(torch.arange(positions.start, positions.stop))
    return list(zip(shard.tolist(), member.tolist(), strict=True))


CASES: dict[str, dict[str, Any]] = {
    "defaults": {"global_batch": 8},
    "one lane": {"global_batch": 8, "lanes": 1},
    "a lane for each sample": {"global_batch": 8, "lanes": 8},
    "three lanes": {"global_batch": 12, "lanes": 3, "block": 5},
    "blocks of one": {"global_batch": 8, "lanes": 4, "block": 1},
    "blocks of two": {"global_batch": 6, "lanes": 2, "block": 2},
    "block equal to the lane": {"global_batch": 16, "lanes": 2, "block": 48},
    "padded": {"global_batch": 16, "lanes": 4, "block": 7, "tail": "pad"},
    "padded, whole epoch": {"global_batch": 97, "tail": "pad"},
    "padded, batch larger than the set": {"global_batch": 256, "tail": "pad"},
    "batch equal to the set": {"global_batch": 97},
    "prime batch": {"global_batch": 13, "block": 4},
    "batch of one": {"global_batch": 1, "block": 10},
    "another seed": {"global_batch": 8, "seed": 12345},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_order_follows_its_definition(case: dict[str, Any]):
    order = EpochOrder(torch.tensor(UNEVEN), **case)
    settings = {"seed": 0, "block": 8192, "tail": "drop", "lanes": order.lanes} | case
    for epoch in range(3):
        truth = epoch_by_definition(UNEVEN, epoch=epoch, **settings)
        assert order.steps_per_epoch == len(truth)
        length = len(truth) * order.global_batch
        ours = located(order, range(epoch * length, (epoch + 1) * length))
        assert ours == [place for step in truth for place in step]


@pytest.mark.parametrize(("batch", "lanes"), [(1, 1), (6, 2), (96, 16), (100, 4), (256, 16)])
def test_default_lanes(batch: int, lanes: int):
    assert EpochOrder(torch.tensor([1000]), batch).lanes == lanes


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("block", [3, 8192])
def test_every_sample_once_up_to_the_tail(seed: int, block: int):
    order = EpochOrder(torch.tensor(UNEVEN), 8, seed, block=block)
    everything = {(s, m) for s, count in enumerate(UNEVEN) for m in range(count)}
    assert order.left_over == 97 - 96
    missing = []
    for epoch in range(12):
        seen = located(order, range(epoch * 96, (epoch + 1) * 96))
        assert len(set(seen)) == 96 and set(seen) < everything
        missing += everything - set(seen)
    # What is dropped is not the same in every epoch.
    assert len(set(missing)) > 3


def test_pad_repeats_as_few_samples_as_fill_the_batch():
    order = EpochOrder(torch.tensor(UNEVEN), 20, tail="pad")
    assert order.steps_per_epoch == 5 and order.left_over == -3
    times = Counter(located(order, range(100)))
    assert len(times) == 97
    assert sorted(times.values()) == [1] * 94 + [2] * 3


def test_epochs_and_seeds_differ():
    orders = [EpochOrder(torch.tensor(UNEVEN), 97, seed, lanes=1) for seed in (0, 1)]
    sequences = [located(o, range(e * 97, (e + 1) * 97)) for o in orders for e in range(3)]
    assert len({tuple(sequence) for sequence in sequences}) == 6
    assert len({tuple(sorted(sequence)) for sequence in sequences}) == 1


def test_positions_may_come_in_any_order_and_split():
    """A worker asks for any micro-batch of any epoch; the answer is that of the whole stream."""
    order = EpochOrder(torch.tensor(UNEVEN), 8, lanes=4, block=5)
    whole = located(order, range(96 * 4))
    positions = torch.randperm(96 * 4, generator=torch.Generator().manual_seed(0))
    for part in positions.split(37):
        shard, member = EpochOrder(torch.tensor(UNEVEN), 8, lanes=4, block=5).locate(part)
        truth = [whole[p] for p in part.tolist()]
        assert list(zip(shard.tolist(), member.tolist(), strict=True)) == truth


def test_a_block_keeps_to_few_shards():
    """What blocks are for: the shards that one lane reads at a time."""
    order = EpochOrder(torch.full((100,), 50), 10, lanes=1, block=100)
    for first in range(0, 5000, 100):
        assert len({s for s, _ in located(order, range(first, first + 100))}) <= 3


def test_pickles_without_what_it_remembers():
    order = EpochOrder(torch.tensor(UNEVEN), 8, seed=4, block=5)
    before = located(order, range(300))
    assert located(pickle.loads(pickle.dumps(order)), range(300)) == before


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(made) if is_tensor(t))])
        return made


def test_huge_data_sets_are_located_lazily():
    """2 billion samples: only the permutations of the shards and of few blocks are ever made."""
    order = EpochOrder(torch.full((200_000,), 10_000), 4096)
    with LargestTensor() as largest:
        for step in (0, 1, 250_000, 10**9):
            shard, member = order.locate(torch.arange(step * 4096, step * 4096 + 4096))
            assert 0 <= shard.min() <= shard.max() < 200_000
            assert 0 <= member.min() <= member.max() < 10_000
    assert largest.numel == 200_000
    assert order._block.cache_info().currsize <= 2 * order.lanes


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ([10], {"global_batch": 11}, "batch 11 is larger than the 10 samples"),
        ([10], {"global_batch": 8, "lanes": 3}, "8 is not divisible by 3 lanes"),
        ([10], {"global_batch": 8, "lanes": 0}, "8 is not divisible by 0 lanes"),
        ([0, 0], {"global_batch": 1}, "hold no samples"),
        ([], {"global_batch": 1}, "hold no samples"),
        ([10], {"global_batch": 0}, "batch 0 and block 8192 must be at least 1"),
        ([10], {"global_batch": 2, "block": 0}, "batch 2 and block 0 must be at least 1"),
    ],
)
def test_refuses(counts: list[int], settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EpochOrder(torch.tensor(counts, dtype=torch.int64), **settings)
