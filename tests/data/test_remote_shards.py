"""Shards behind a real HTTP server: the same samples as from a disk, each byte fetched once."""

import csv
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.servers import FaultServer

from maepretrain.data.errors import ShardError
from maepretrain.data.module import ShardData
from maepretrain.data.order import EpochOrder
from maepretrain.data.samples import Samples, ShardIndex
from maepretrain.data.settings import CacheSettings, Crop
from maepretrain.data.shards.index import index_path, open_shards
from maepretrain.data.shards.reader import Store
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.stores.remote import shown
from maepretrain.data.transforms import Augment

NAMES = [f"train-{i:06d}.tar" for i in range(4)]


@pytest.fixture
def server(shards: Path) -> Iterator[FaultServer]:
    """The digits' shards, without their indexes."""
    server = FaultServer({f"/{name}": (shards / name).read_bytes() for name in NAMES})
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", timeout=5.0, attempts=1)


def add_indexes(server: FaultServer, shards: Path) -> None:
    for name in NAMES:
        server.files[f"/{name}.idx"] = index_path(shards / name).read_bytes()


def samples_of(pattern: str, cache: ShardCache) -> Samples:
    index = ShardIndex(open_shards(pattern, cache=cache))
    order = EpochOrder(index.counts, 24, seed=1)
    return Samples(index, 1, Augment(8, 8), order, seed=1, store=Store(cache))


def body_bytes(server: FaultServer, name: str) -> int:
    return sum(request.sent for request in server.requests(f"/{name}"))


@pytest.mark.parametrize("indexed", [True, False])
def test_remote_samples_are_the_local_ones_and_come_once(
    server: FaultServer, shards: Path, cache: ShardCache, indexed: bool
):
    if indexed:
        add_indexes(server, shards)
    remote = samples_of(server.url("/train-{000000..000003}.tar"), cache)
    local = samples_of(f"{shards}/train-*.tar", cache)
    positions = list(range(300))
    assert [key for _, key in remote.names(positions)] == [key for _, key in local.names(positions)]
    got, truth = remote.__getitems__(positions), local.__getitems__(positions)
    assert all(torch.equal(got[name], truth[name]) for name in truth)
    for name in NAMES:
        assert body_bytes(server, name) == (shards / name).stat().st_size


def test_an_index_made_on_the_way_is_kept(server: FaultServer, cache: ShardCache):
    """Also in the next run, when the shards themselves were evicted."""
    pattern = server.url("/train-{000000..000003}.tar")
    first = open_shards(pattern, cache=cache)
    for file in cache.folder.glob("*.tar"):
        file.unlink()
    before = [len(server.requests(f"/{name}")) for name in NAMES]
    assert open_shards(pattern, cache=cache) == first
    assert [len(server.requests(f"/{name}")) for name in NAMES] == before


def test_a_changed_shard_is_refused(server: FaultServer, shards: Path, cache: ShardCache):
    """Same name and size, other bytes: only the checksum can tell."""
    add_indexes(server, shards)
    remote = samples_of(server.url(f"/{NAMES[0]}"), cache)
    body = bytearray(server.files[f"/{NAMES[0]}"])
    body[700] ^= 1
    server.files[f"/{NAMES[0]}"] = bytes(body)
    with pytest.raises(ShardError, match=r"train-000000.tar.* checksum"):
        remote[0]


@pytest.mark.parametrize("fault", ["404", "403"])
def test_a_shard_that_is_refused_is_one_line(
    server: FaultServer, pretrain_tiny: Callable[..., int], tmp_path: Path, fault: str,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    server.fault(f"/{NAMES[2]}", fault)
    where = [
        "--data.train",
        server.url("/train-{000000..000003}.tar"),
        "--data.cache.folder",
        tmp_path,
    ]
    assert pretrain_tiny(tmp_path / "run", *where) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and NAMES[2] in error and fault in error
    assert not (tmp_path / "run").exists()


def losses(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file) if row["loss"]]


def test_pretraining_from_a_server_is_bit_equal_with_a_cache_smaller_than_an_epoch(
    server: FaultServer, shards: Path, pretrain_tiny: Callable[..., int], tmp_path: Path
):
    add_indexes(server, shards)
    cache = tmp_path / "cache"
    room = 2.5 * max((shards / name).stat().st_size for name in NAMES) / 1e9
    pattern = server.url("/train-{000000..000003}.tar")
    remote = [
        "--data.train",
        pattern,
        "--data.cache.folder",
        cache,
        "--data.cache.gigabytes",
        f"{room:.9f}",
    ]
    epochs = ["--trainer.max_epochs", "2", "--data.num_workers", "2"]
    assert pretrain_tiny(tmp_path / "remote", *remote, *epochs) == 0
    assert pretrain_tiny(tmp_path / "local", *epochs) == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "local") != []
    assert sum(file.stat().st_size for file in cache.glob("*.tar")) <= room * 1e9
    assert any(len(server.requests(f"/{name}")) > 1 for name in NAMES)


def test_shards_that_come_next_are_fetched_ahead(server: FaultServer, shards: Path, tmp_path: Path):
    """Nobody has asked for a sample yet when all of them come."""
    add_indexes(server, shards)
    data = ShardData(
        server.url("/train-{000000..000003}.tar"), global_batch=24, image_size=8, channels=1,
        mean=(0.0,), std=(1.0,), num_workers=0, crop=Crop(scale=None),
        cache=CacheSettings(tmp_path / "cache"),
    )  # fmt: skip
    data.plan(12, 1, 1)
    sampler = data.train_dataloader().batch_sampler
    assert sampler is not None
    next(iter(sampler))
    patience = time.monotonic() + 60
    while time.monotonic() < patience and not all(server.requests(f"/{name}") for name in NAMES):
        time.sleep(0.01)
    assert all(server.requests(f"/{name}") for name in NAMES)
    data.teardown("fit")


def test_lists_and_messages_hold_no_secrets(server: FaultServer, cache: ShardCache):
    """A signed address in errors.csv would give the bucket to whoever reads the run folder."""
    signed = server.url(f"/{NAMES[0]}").replace("//", "//user:hidden@") + "?token=hidden"
    server.files[f"/{NAMES[0]}?token=hidden"] = server.files[f"/{NAMES[0]}"]
    assert shown(signed) == server.url(f"/{NAMES[0]}")
    assert shown("/data/a?b@c.tar") == "/data/a?b@c.tar"
    samples = samples_of(server.url(f"/{NAMES[0]}") + "?token=hidden", cache)
    batch = samples.__getitems__([0, 1])
    batch["error"][1, 0] = 1  # as if the second one had been replaced
    (error,) = samples.pop_errors(batch)
    assert error.shard == server.url(f"/{NAMES[0]}") and "hidden" not in str(error)


def test_local_and_remote_shards_mix(server: FaultServer, shards: Path, cache: ShardCache):
    shutil.copy(shards / NAMES[0], cache.folder.parent / "here.tar")
    patterns = [str(cache.folder.parent / "here.tar"), server.url(f"/{NAMES[1]}")]
    index = ShardIndex(open_shards(patterns, cache=cache))
    samples = Samples(index, 1, Augment(8, 8), EpochOrder(index.counts, 4), store=Store(cache))
    keys = {key for _, key in samples.names(list(range(84)))}
    truth = {
        k for name in NAMES[:2] for s in open_shards(str(shards / name)) for k in s.columns().keys
    }
    assert keys <= truth and len(keys) == 84
    samples.__getitems__(list(range(84)))
