"""The order of samples against the definition in `order.py`, written out in plain Python."""

import pickle
from collections import Counter
from itertools import count
from math import gcd
from typing import Any

import pytest
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maepretrain.data.order import EpochOrder, Mixture, Order
from maepretrain.data.sampler import RunSampler
from maepretrain.randomness import key, permutation

UNEVEN = [7, 0, 1, 30, 12, 0, 0, 25, 3, 19]
UNEVEN_SAMPLES = [(s, m) for s, count in enumerate(UNEVEN) for m in range(count)]


def epoch_by_definition(
    counts: list[int],
    global_batch: int,
    epoch: int,
    seed: int,
    streams: int,
    block: int,
    tail: str,
    staggered: bool = True,
) -> list[list[tuple[int, int]]]:
    """The (shard, sample) of every step of an epoch, from lists alone."""
    shards = permutation(seed, "shards", len(counts), epoch).tolist()
    sequence = [(s, m) for s in shards for m in range(counts[s])]
    begin = key(seed, "begin", epoch) % len(sequence)
    sequence = sequence[begin:] + sequence[:begin]
    steps, rest = divmod(len(sequence), global_batch)
    if tail == "pad" and rest:
        steps += 1
    while len(sequence) < steps * global_batch:
        sequence += sequence
    length = len(sequence) if tail == "carry" else steps * global_batch
    shuffled = []
    for stream in range(streams):
        ids = sequence[stream * length // streams : (stream + 1) * length // streams]
        # The first block of a stream is shorter by the stream's share of a block.
        first = block - stream * block // streams * staggered
        blocks = [ids[:first], *(ids[i : i + block] for i in range(first, len(ids), block))]
        shuffled.append(
            [
                ids_of_block[k]
                for b, ids_of_block in enumerate(blocks)
                for k in permutation(seed, "block", len(ids_of_block), epoch, stream, b).tolist()
            ]
        )
    share = global_batch // streams
    batches = [
        [place for stream in shuffled for place in stream[step * share : (step + 1) * share]]
        for step in range(steps)
    ]
    if tail == "carry":
        batches.append([place for stream in shuffled for place in stream[steps * share :]])
    return batches


def located(order: Order, positions: range) -> list[tuple[int, int]]:
    shard, sample = order.locate(torch.arange(positions.start, positions.stop))
    return list(zip(shard.tolist(), sample.tolist(), strict=True))


CASES: dict[str, dict[str, Any]] = {
    "defaults": {"global_batch": 8},
    "one stream": {"global_batch": 8, "streams": 1},
    "a stream for each sample": {"global_batch": 8, "streams": 8},
    "three streams": {"global_batch": 12, "streams": 3, "block": 5},
    "blocks of one": {"global_batch": 8, "streams": 4, "block": 1},
    "blocks of two": {"global_batch": 6, "streams": 2, "block": 2},
    "block equal to the stream": {"global_batch": 16, "streams": 2, "block": 48},
    "padded": {"global_batch": 16, "streams": 4, "block": 7, "tail": "pad"},
    "padded, whole epoch": {"global_batch": 97, "tail": "pad"},
    "padded, batch larger than the set": {"global_batch": 256, "tail": "pad"},
    "batch equal to the set": {"global_batch": 97},
    "prime batch": {"global_batch": 13, "block": 4},
    "batch of one": {"global_batch": 1, "block": 10},
    "another seed": {"global_batch": 8, "seed": 12345},
    "carried": {"global_batch": 12, "streams": 4, "block": 5, "tail": "carry"},
    "carried, prime": {"global_batch": 13, "block": 4, "tail": "carry"},
    "carried, nothing left": {"global_batch": 97, "tail": "carry"},
    "carried, batch larger than the set": {"global_batch": 256, "streams": 128, "tail": "carry"},
    "carried, one left for each stream but one": {
        "global_batch": 14,
        "streams": 14,
        "tail": "carry",
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_order_follows_its_definition(case: dict[str, Any]):
    order = EpochOrder(torch.tensor(UNEVEN), **case)
    settings = {"seed": 0, "block": 8192, "tail": "drop", "streams": order.streams} | case
    for epoch in range(3):
        truth = epoch_by_definition(UNEVEN, epoch=epoch, **settings)
        carried = settings["tail"] == "carry"
        assert order.steps_per_epoch == len(truth) - carried
        length = len(UNEVEN_SAMPLES) if carried else len(truth) * order.global_batch
        ours = located(order, range(epoch * length, (epoch + 1) * length))
        assert ours == [place for step in truth for place in step]
        if carried:
            assert sorted(ours) == UNEVEN_SAMPLES


@pytest.mark.parametrize(("batch", "streams"), [(1, 1), (6, 2), (96, 16), (100, 4), (256, 16)])
def test_default_streams(batch: int, streams: int):
    assert EpochOrder(torch.tensor([1000]), batch).streams == streams


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
    orders = [EpochOrder(torch.tensor(UNEVEN), 97, seed, streams=1) for seed in (0, 1)]
    sequences = [located(o, range(e * 97, (e + 1) * 97)) for o in orders for e in range(3)]
    assert len({tuple(sequence) for sequence in sequences}) == 6
    assert len({tuple(sorted(sequence)) for sequence in sequences}) == 1


def test_positions_may_come_in_any_order_and_split():
    """A worker asks for any micro-batch of any epoch; the answer is that of the whole stream."""
    order = EpochOrder(torch.tensor(UNEVEN), 8, streams=4, block=5)
    whole = located(order, range(96 * 4))
    positions = torch.randperm(96 * 4, generator=torch.Generator().manual_seed(0))
    for part in positions.split(37):
        shard, sample = EpochOrder(torch.tensor(UNEVEN), 8, streams=4, block=5).locate(part)
        truth = [whole[p] for p in part.tolist()]
        assert list(zip(shard.tolist(), sample.tolist(), strict=True)) == truth


def test_a_block_keeps_to_few_shards():
    """What blocks are for: the shards that one stream reads at a time."""
    order = EpochOrder(torch.full((100,), 50), 10, streams=1, block=100)
    for first in range(0, 5000, 100):
        assert len({s for s, _ in located(order, range(first, first + 100))}) <= 3


def new_shards(steps: list[list[tuple[int, int]]]) -> list[int]:
    """How many shards each step wants that no step before it did."""
    wanted, seen = [], set[int]()
    for places in steps:
        now = {shard for shard, _ in places}
        wanted.append(len(now - seen))
        seen |= now
    return wanted


@pytest.mark.parametrize("streams", [4, 8, 16])
def test_streams_begin_their_blocks_one_after_the_other(streams: int):
    """Else all of them want new shards in one step, and every rank waits until they are there."""
    counts, batch, block = [64] * 256, 64, 256
    order = EpochOrder(torch.tensor(counts), batch, streams=streams, block=block)
    ours = [located(order, range(p, p + batch)) for p in range(0, len(counts) * 64, batch)]
    together = epoch_by_definition(counts, batch, 0, 0, streams, block, "drop", staggered=False)
    # A block touches five shards, and one stream begins one every fourth step; together, all
    # streams begin theirs in one step. At the start all shards are new.
    most, at_once = (max(new_shards(steps)[20:]) for steps in (ours, together))
    assert most <= 5 and at_once >= 2 * streams


def test_describes_what_an_epoch_leaves_out_or_repeats():
    drop, pad = (EpochOrder(torch.tensor(UNEVEN), 20, tail=tail) for tail in ("drop", "pad"))
    assert drop.describe() == "17 left out of each epoch (no whole batch)"
    assert pad.describe() == "3 repeated in each epoch to fill the last batch"
    for whole in (EpochOrder(torch.tensor(UNEVEN), 97), EpochOrder(torch.tensor([40]), 20)):
        assert whole.describe() == "" and whole.left_over == 0


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
            shard, sample = order.locate(torch.arange(step * 4096, step * 4096 + 4096))
            assert 0 <= shard.min() <= shard.max() < 200_000
            assert 0 <= sample.min() <= sample.max() < 10_000
    assert largest.numel == 200_000
    assert order._block.cache_info().currsize <= 2 * order.streams


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ([10], {"global_batch": 11}, "batch 11 is larger than the 10 samples"),
        ([10], {"global_batch": 8, "streams": 3}, "8 is not divisible by 3 streams"),
        ([10], {"global_batch": 8, "streams": 0}, "8 is not divisible by 0 streams"),
        ([0, 0], {"global_batch": 1}, "hold no samples"),
        ([], {"global_batch": 1}, "hold no samples"),
        ([10], {"global_batch": 0}, "batch 0 and block 8192 must be at least 1"),
        ([10], {"global_batch": 2, "block": 0}, "batch 2 and block 0 must be at least 1"),
    ],
)
def test_refuses(counts: list[int], settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EpochOrder(torch.tensor(counts, dtype=torch.int64), **settings)


# Mixtures.


def source_order(counts: list[int], draws: int, seed: int, streams: int, block: int, n: int):
    """The first n draws of a source, epoch after epoch, each cut where it ends."""
    many = gcd(draws, streams)
    batch, many = (draws, many) if 2 * many >= streams else (streams, streams)
    drawn: list[tuple[int, int]] = []
    for epoch in count():
        if len(drawn) >= n:
            return drawn[:n]
        steps = epoch_by_definition(counts, batch, epoch, seed, many, block, "carry")
        drawn += [place for step in steps for place in step]
    raise AssertionError


SOURCES = {
    "two": ([UNEVEN, [40, 3, 17]], [0.7, 0.3], [45, 19]),
    "equal": ([UNEVEN, [500], [64]], [1.0, 1.0, 2.0], [16, 16, 32]),
    "tiny": ([[11], [1000, 200]], [9.0, 7.0], [36, 28]),
    "one": ([UNEVEN], [5.0], [64]),
    "primes": ([[97], [101, 103], [13]], [31.0, 29.0, 4.0], [31, 29, 4]),
    "remainders": ([[50], [50], [50]], [1.0, 1.0, 1.0], [22, 21, 21]),
}
Sources = tuple[list[list[int]], list[float], list[int]]


def mixture(case: Sources, **more: Any) -> Mixture:
    return Mixture([torch.tensor(counts) for counts in case[0]], case[1], 64, **more)


@pytest.mark.parametrize("case", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("more", [{}, {"seed": 5, "streams": 4, "block": 7}], ids=["", "settings"])
def test_a_mixture_follows_its_definition(case: Sources, more: dict[str, Any]):
    """Every batch holds as many of each source as its weight says, spread over the batch, and the
    draws of a source walk its own epochs: each sample once in each."""
    sources, _, draws = case
    order, steps = mixture(case, **more), 20
    assert order.draws == draws
    seed, streams, block = more.get("seed", 0), more.get("streams", 16), more.get("block", 8192)
    first = [sum(len(counts) for counts in sources[:s]) for s in range(len(sources))]
    expected = [
        source_order(counts, draws[s], key(seed, "source", s), streams, block, steps * draws[s])
        for s, counts in enumerate(sources)
    ]
    in_batch = sorted(((n + 0.5) / d, s, n) for s, d in enumerate(draws) for n in range(d))
    truth = [
        (first[s] + expected[s][step * draws[s] + n][0], expected[s][step * draws[s] + n][1])
        for step in range(steps)
        for _, s, n in in_batch
    ]
    assert located(order, range(64 * steps)) == truth
    of_source = [s for s, counts in enumerate(sources) for _ in counts]
    for step in range(steps):
        times = Counter(of_source[shard] for shard, _ in truth[step * 64 : step * 64 + 64])
        assert times == dict(enumerate(draws))
        half = Counter(of_source[shard] for shard, _ in truth[step * 64 : step * 64 + 32])
        assert all(abs(half[s] - draws[s] / 2) <= 1 for s in range(len(sources)))
    for s, counts in enumerate(sources):
        samples = {(first[s] + k, m) for k, c in enumerate(counts) for m in range(c)}
        drawn = [place for place in truth if of_source[place[0]] == s]
        for begin in range(0, len(drawn) - len(samples) + 1, len(samples)):
            assert set(drawn[begin : begin + len(samples)]) == samples


def test_an_epoch_of_a_mixture_is_a_number_of_draws():
    case = SOURCES["two"]
    assert mixture(case).steps_per_epoch == (97 + 60) // 64
    assert mixture(case, samples_per_epoch=64 * 9 + 63).steps_per_epoch == 9
    said = mixture(case, samples_per_epoch=1000).describe()
    assert said == "a batch is 45 + 19 of the sources, an epoch 960 draws"


def test_mixtures_are_read_alike_by_every_number_of_processes():
    order = mixture(SOURCES["two"])
    whole = located(order, range(64 * 20))
    for world_size in (1, 2, 8):
        read = []
        streams = [iter(RunSampler(64, 20, world_size, rank, 1)) for rank in range(world_size)]
        for parts in zip(*streams, strict=True):
            read += [place for p in parts for place in located(order, range(p[0], p[-1] + 1))]
        assert read == whole


def test_mixtures_pickle_and_answer_in_any_order():
    order = mixture(SOURCES["primes"], block=6)
    whole = located(order, range(64 * 20))
    again = pickle.loads(pickle.dumps(order))
    positions = torch.randperm(64 * 20, generator=torch.Generator().manual_seed(0))
    for part in positions.split(101):
        shard, sample = again.locate(part)
        truth = [whole[p] for p in part.tolist()]
        assert list(zip(shard.tolist(), sample.tolist(), strict=True)) == truth


def test_sources_and_seeds_have_their_own_order():
    case: Sources = ([[64], [64]], [1.0, 1.0], [32, 32])
    one, other = (mixture(case, seed=seed) for seed in (0, 1))
    assert located(one, range(128)) != located(other, range(128))
    members = [[m for s, m in located(one, range(128)) if s == source] for source in (0, 1)]
    assert sorted(members[0]) == sorted(members[1]) and members[0] != members[1]


@pytest.mark.parametrize(
    ("sources", "weights", "settings", "message"),
    [
        ([[10], [10]], [1.0, 0.0], {}, r"weights \[1.0, 0.0\] .* must be positive"),
        ([[10], [10]], [1.0, -1.0], {}, "must be positive"),
        ([[10], [10]], [1.0, float("inf")], {}, "must be positive"),
        ([[10], [10]], [1.0, float("nan")], {}, "must be positive"),
        ([[100], [10]], [1.0, 0.001], {}, r"weight 0.001 of .* gives no sample in a batch of 64"),
        ([[100], [10]], [1.0], {}, "2 sources need as many weights"),
        ([[100], [0]], [1.0, 1.0], {}, "hold no samples"),
        ([[100], [10]], [1.0, 1.0], {"samples_per_epoch": 63}, "of 63 draws holds no batch of 64"),
        ([[100], [10]], [1.0, 1.0], {"samples_per_epoch": 0}, "of 0 draws holds no batch"),
        ([[100], [10]], [1.0, 1.0], {"streams": 0}, "streams 0 must be at least 1"),
        ([[100], [10]], [1.0, 1.0], {"block": 0}, "block 0 must be at least 1"),
    ],
)
def test_mixtures_refused(
    sources: list[list[int]], weights: list[float], settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        Mixture([torch.tensor(counts) for counts in sources], weights, 64, **settings)
