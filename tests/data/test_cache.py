"""Remote shards: every fault of a server, a disk or a process against the bytes that were served.

Independent truths: the bytes themselves, the servers' logs of what they sent, the kernel's locks.
"""

import errno
import fcntl
import gc
import hashlib
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.servers import NGINX, NO_NGINX, FaultServer, nginx

from maepretrain.data.errors import ShardError
from maepretrain.data.stores import cache as module
from maepretrain.data.stores import locks, remote
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.stores.read_ahead import ReadAhead
from maepretrain.data.stores.remote import basename

BYTES = 300_000


def content(name: str, size: int = BYTES) -> bytes:
    return random.Random(name).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server() -> Iterator[FaultServer]:
    server = FaultServer({f"/{name}.tar": content(name) for name in "abcdefgh"})
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    monkeypatch.setattr(remote, "BLOCK", 1 << 16)
    monkeypatch.setattr(module, "ROOM", 1 << 16)
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", timeout=5.0, attempts=3)


def read(
    cache: ShardCache, url: str, size: int | None = None, checksum: str | None = None
) -> bytes:
    file = cache.open(url, size, checksum)
    try:
        return os.pread(file, 1 << 26, 0)
    finally:
        os.close(file)


def names(cache: ShardCache) -> list[str]:
    """What is in the folder but the lock of the whole cache."""
    return sorted(path.name for path in cache.folder.iterdir() if path.name != "cache.lock")


def held(cache: ShardCache) -> int:
    """Bytes in the folder at one moment: the cache's lock stops evictions and reservations.

    A shard that is renamed meanwhile is counted once.
    """
    with (cache.folder / "cache.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = {}
        for entry in os.scandir(cache.folder):
            try:
                sizes[entry.inode()] = entry.stat().st_size
            except FileNotFoundError:
                continue
        return sum(sizes.values())


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def wait_for_part(cache: ShardCache, size: int) -> None:
    """Until the one `.part` has `size` bytes."""
    wait_until(lambda: any(p.stat().st_size >= size for p in cache.folder.glob("*.part")))


SETUP = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
from maepretrain.data.stores import locks, remote
from maepretrain.data.stores.read_ahead import ReadAhead
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.errors import ShardError
from pathlib import Path
remote.BLOCK, remote.BACKOFF = 1 << 16, 0.01
folder, url, size, checksum = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] or None
cache = ShardCache(folder, timeout=20)
"""
FETCH = SETUP + "cache.fetch(url, size, checksum); print('fetched', flush=True)"


def process(script: str, cache: ShardCache, url: str, data: bytes, known: bool = True) -> Any:
    arguments = [str(cache.folder), url, str(len(data)), sha256(data) if known else ""]
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


# Names


def test_names_differ_by_address_and_version(cache: ShardCache) -> None:
    versions = [
        ("https://h/x/a.tar", None, None),
        ("https://h/y/a.tar", None, None),
        ("https://h/x/a.tar?v=2", None, None),
        ("https://h/x/a.tar", 10, None),
        ("https://h/x/a.tar", 11, None),
        ("https://h/x/a.tar", 10, "0" * 64),
        ("https://h/x/a.tar", 10, "1" * 64),
    ]
    paths = {cache.path(*version) for version in versions}
    assert len(paths) == len(versions)
    assert all(path.name.endswith("-a.tar") for path in paths)


@pytest.mark.parametrize(
    "url",
    [
        "https://h/x/..",
        "https://h/..%2f..%2fetc/passwd",
        "https://h/a\\..\\b\0.tar",
        "https://h/" + "a" * 400,
        "https://h/é ü.tar",
        "https://h/",
        "https://h/a.part",
        "https://h/a.lock",
        "https://user:secret@h/a.tar?token=secret",
        "https://h/a.tar?X-Amz-Signature=secret",
    ],
)
def test_names_stay_in_the_folder_and_hold_no_secrets(cache: ShardCache, url: str) -> None:
    path = cache.path(url)
    assert path.parent == cache.folder
    assert path.resolve().parent == cache.folder.resolve()
    assert len(path.name) < 200
    assert "secret" not in path.name
    assert path.suffix not in {".part", ".lock"}


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MAEPRETRAIN_CACHE", raising=False)
    assert ShardCache().folder == Path.home() / ".cache/maepretrain/shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache().folder == tmp_path / "maepretrain/shards"
    monkeypatch.setenv("MAEPRETRAIN_CACHE", str(tmp_path / "mine"))
    assert ShardCache().folder == tmp_path / "mine"


# Servers and their faults


def test_fetched_once_then_read_from_the_disk(server: FaultServer, cache: ShardCache) -> None:
    data = content("a")
    for _ in range(3):
        assert read(cache, server.url("/a.tar"), len(data), sha256(data)) == data
    assert [(r.status, r.sent) for r in server.requests("/a.tar")] == [(200, len(data))]
    assert names(cache) == [cache.path(server.url("/a.tar"), len(data), sha256(data)).name]


def test_nothing_known_and_an_empty_file(server: FaultServer, cache: ShardCache) -> None:
    server.files["/empty.tar"] = b""
    assert read(cache, server.url("/a.tar")) == content("a")
    assert read(cache, server.url("/empty.tar")) == b""
    assert len(names(cache)) == 2


@pytest.mark.parametrize("fault", ["no_length", "chunked", "no_ranges"])
@pytest.mark.parametrize("known", [True, False])
def test_server_without_length_or_ranges(
    server: FaultServer, cache: ShardCache, fault: str, known: bool
) -> None:
    data = content("a")
    server.fault("/a.tar", fault)
    size, checksum = (len(data), sha256(data)) if known else (None, None)
    assert read(cache, server.url("/a.tar"), size, checksum) == data
    assert [r.sent for r in server.requests("/a.tar")] == [len(data)]


@pytest.mark.parametrize("etag", [True, False])
@pytest.mark.parametrize("fault", ["cut", "cut_without_length", "chunked_cut"])
def test_cut_connection_goes_on_where_it_ended(
    tmp_path: Path, cache: ShardCache, fault: str, etag: bool
) -> None:
    data = content("a")
    server = FaultServer({"/a.tar": data}, etag)
    server.before_cut = lambda start: wait_for_part(cache, start + remote.BLOCK)
    server.fault("/a.tar", fault, 2)
    assert read(cache, server.url("/a.tar"), len(data)) == data
    requests = server.requests("/a.tar")
    assert [request.status for request in requests] == [200, 206, 206]
    assert sum(request.sent for request in requests) <= len(data) + 2 * remote.BLOCK
    server.close()


@pytest.mark.parametrize("fault", ["cut", "chunked_cut"])
def test_cut_is_seen_where_nothing_is_known(
    server: FaultServer, cache: ShardCache, fault: str
) -> None:
    server.fault("/a.tar", fault, 1)
    assert read(cache, server.url("/a.tar")) == content("a")


@pytest.mark.parametrize("fault", ["no_ranges", "wrong_range", "lying_range"])
@pytest.mark.parametrize("checksum", [True, False])
def test_resuming_where_ranges_do_not_work(
    server: FaultServer, cache: ShardCache, fault: str, checksum: bool
) -> None:
    data = content("a")
    server.before_cut = lambda start: wait_for_part(cache, start + remote.BLOCK)
    server.fault("/a.tar", "cut", 1)
    server.fault("/a.tar", fault, 1)
    read_back = read(cache, server.url("/a.tar"), len(data), sha256(data) if checksum else None)
    assert read_back == data


def test_every_try_cut_at_the_same_byte_gives_up(server: FaultServer, cache: ShardCache) -> None:
    """Starting over is no progress: otherwise a server that ignores ranges is asked for ever."""
    server.fault("/a.tar", "no_ranges_cut")
    with pytest.raises(ShardError, match=r"a\.tar: it ended after 150,000 of 300,000 bytes"):
        cache.fetch(server.url("/a.tar"), BYTES)
    assert len(server.requests("/a.tar")) == 4  # one with progress, three without


def test_unavailable_for_a_while(server: FaultServer, cache: ShardCache) -> None:
    server.fault("/a.tar", "503", 2)
    assert read(cache, server.url("/a.tar")) == content("a")
    assert [r.status for r in server.requests("/a.tar")] == [503, 503, 200]


def test_unavailable_for_too_long(server: FaultServer, cache: ShardCache) -> None:
    server.fault("/a.tar", "503")
    with pytest.raises(ShardError, match=r"cannot fetch http://.*/a\.tar: 503 .*\(3 tries\)"):
        cache.fetch(server.url("/a.tar"))
    assert len(server.requests("/a.tar")) == 3
    assert names(cache) == []


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (403, "Forbidden")])
def test_refused_at_once(server: FaultServer, cache: ShardCache, status: int, reason: str) -> None:
    server.fault("/a.tar", str(status))
    with pytest.raises(ShardError) as error:
        cache.fetch(server.url("/a.tar"))
    assert str(error.value) == f"cannot fetch {server.url('/a.tar')}: {status} {reason}"
    assert len(server.requests("/a.tar")) == 1
    assert names(cache) == []


@pytest.mark.parametrize("fault", ["stall", "silent"])
def test_stalled_server_is_tried_again(server: FaultServer, tmp_path: Path, fault: str) -> None:
    data = content("a")
    cache = ShardCache(tmp_path / "cache", timeout=0.3, attempts=3)
    server.fault("/a.tar", fault, 1)
    assert read(cache, server.url("/a.tar"), len(data), sha256(data)) == data


def test_stalled_server_is_given_up(server: FaultServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", timeout=0.2, attempts=2)
    server.fault("/a.tar", "silent")
    with pytest.raises(ShardError, match=r"/a\.tar: nothing came for 0\.2 seconds \(2 tries\)"):
        cache.fetch(server.url("/a.tar"))


def test_compressed_body_is_refused(server: FaultServer, cache: ShardCache) -> None:
    server.fault("/a.tar", "gzip")
    with pytest.raises(ShardError, match=r"/a\.tar: the server compresses it \(gzip\)"):
        cache.fetch(server.url("/a.tar"))


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_unreachable_host(cache: ShardCache, host: str) -> None:
    with pytest.raises(ShardError, match=rf"cannot fetch http://{host}/a\.tar: .*\(3 tries\)"):
        cache.fetch(f"http://{host}/a.tar")


@pytest.mark.parametrize("fault", ["ok", "no_length"])
@pytest.mark.parametrize("size", [BYTES - 1, BYTES + 1])
def test_wrong_size(server: FaultServer, cache: ShardCache, fault: str, size: int) -> None:
    server.fault("/a.tar", fault)
    with pytest.raises(ShardError, match=r"/a\.tar .*bytes.*stale; run `maepretrain shards index`"):
        cache.fetch(server.url("/a.tar"), size)
    assert names(cache) == []


def test_wrong_checksum(server: FaultServer, cache: ShardCache) -> None:
    with pytest.raises(ShardError, match=r"/a\.tar .*checksum.*stale; run `maepretrain shards ind"):
        cache.fetch(server.url("/a.tar"), BYTES, "0" * 64)
    assert [r.sent for r in server.requests("/a.tar")] == [BYTES, BYTES]
    assert names(cache) == []


def leave_part(cache: ShardCache, server: FaultServer, *about: Any) -> Path:
    """Half of a download, as a fetcher that gave up leaves it."""
    url = server.url("/a.tar")
    server.before_cut = lambda start: wait_for_part(cache, start + remote.BLOCK)
    server.fault("/a.tar", "cut", 1)
    server.fault("/a.tar", "503", cache.remote.attempts)
    with pytest.raises(ShardError, match="503"):
        cache.fetch(url, *about)
    part = cache.path(url, *about).with_name(cache.path(url, *about).name + ".part")
    assert part.stat().st_size > 0
    server.log.clear()
    return part


@pytest.mark.parametrize("about", [(), (BYTES,), (BYTES, sha256(content("a")))])
def test_part_of_an_earlier_fetcher_is_used(
    server: FaultServer, cache: ShardCache, about: tuple[Any, ...]
) -> None:
    part = leave_part(cache, server, *about)
    size = part.stat().st_size
    assert read(cache, server.url("/a.tar"), *about) == content("a")
    assert [(r.range, r.sent) for r in server.log] == [(f"bytes={size}-", BYTES - size)]
    assert len(names(cache)) == 1


@pytest.mark.parametrize("about", [(), (BYTES,), (BYTES, sha256(content("new")))])
def test_part_of_another_version_is_thrown_away(
    server: FaultServer, cache: ShardCache, about: tuple[Any, ...]
) -> None:
    leave_part(cache, server, *about)
    server.files["/a.tar"] = content("new")
    assert read(cache, server.url("/a.tar"), *about) == content("new")


def test_part_is_thrown_away_where_nothing_tells_versions(cache: ShardCache) -> None:
    server = FaultServer({"/a.tar": content("a")}, etag=False)
    leave_part(cache, server, BYTES)
    server.files["/a.tar"] = content("new")
    assert read(cache, server.url("/a.tar"), BYTES) == content("new")
    server.close()


@pytest.mark.parametrize("extra", [0, 10])
def test_part_that_is_whole_or_longer(server: FaultServer, cache: ShardCache, extra: int) -> None:
    data = content("a")
    part = leave_part(cache, server, len(data), sha256(data))
    part.write_bytes(data + bytes(extra))
    assert read(cache, server.url("/a.tar"), len(data), sha256(data)) == data
    assert server.log[0].status == 416
    assert sum(request.sent for request in server.log) == (len(data) if extra else 0)


# Secrets


def test_secrets_in_addresses(server: FaultServer, cache: ShardCache, tmp_path: Path) -> None:
    url = f"http://user:hidden@{server.host}/a.tar?token=hidden&X-Amz-Signature=hidden"
    assert read(cache, url) == content("a")
    assert server.log[0].authorization == "Basic dXNlcjpoaWRkZW4="
    missing = url.replace("/a.tar", "/missing.tar")
    refused = url.replace(server.host, "127.0.0.1:1")
    invalid = "http://user:hidden@[bad/a.tar?token=hidden"
    small = ShardCache(tmp_path / "small", 10)
    server.fault("/loop.tar", "redirect")
    loop = url.replace("/a.tar", "/loop.tar")
    tries: list[Callable[[], Any]] = [
        lambda: cache.fetch(missing),
        lambda: cache.fetch(refused),
        lambda: cache.fetch(invalid),
        lambda: cache.fetch(loop),
        lambda: cache.fetch(url, BYTES + 1),
        lambda: cache.fetch(url, BYTES, "0" * 64),
        lambda: small.fetch(url),
    ]
    for attempt in tries:
        with pytest.raises(ShardError) as error:
            attempt()
        assert "hidden" not in str(error.value)
        assert ".tar" in str(error.value)
        assert "\n" not in str(error.value)
    assert "hidden" not in " ".join(names(cache))


# Other stores


def test_small_files_are_not_kept(server: FaultServer, cache: ShardCache) -> None:
    assert cache.small(server.url("/a.tar")) == content("a")
    assert not cache.folder.exists()


@pytest.fixture
def memory() -> Iterator[Any]:
    """A store of fsspec's own that lists and reads ranges, in this process."""
    store = fsspec.filesystem("memory")
    for name in "bac":
        store.pipe(f"/cachetest/{name}.tar", content(name))
    store.pipe("/cachetest/a.tar.idx", b"index")
    yield store
    store.rm("/cachetest", recursive=True)


def test_other_stores_list_and_read_in_blocks(memory: Any, cache: ShardCache) -> None:
    urls = cache.expand("memory://cachetest/*")
    assert urls == [f"memory://cachetest/{name}.tar" for name in "abc"]
    for url, name in zip(urls, "abc", strict=True):
        assert read(cache, url, BYTES, sha256(content(name))) == content(name)
    assert cache.small("memory://cachetest/a.tar.idx") == b"index"
    assert cache.small("memory://cachetest/b.tar.idx") is None
    with pytest.raises(ShardError, match=r"memory://cachetest/no\.tar: there is no such file"):
        cache.fetch("memory://cachetest/no.tar")
    with pytest.raises(ShardError, match="its index is stale"):
        cache.fetch("memory://cachetest/a.tar", BYTES - 1)


def test_other_stores_resume(memory: Any, cache: ShardCache, monkeypatch: Any) -> None:
    asked: list[int] = []
    honest = memory.cat_file

    def flaky(path: str, start: int, end: int) -> bytes:
        asked.append(start)
        if len(asked) == 3:
            raise OSError("connection lost")
        return honest(path, start, end)[: 10 if len(asked) == 5 else None]

    monkeypatch.setattr(memory, "cat_file", flaky)
    assert read(cache, "memory://cachetest/a.tar", BYTES, sha256(content("a"))) == content("a")
    k = remote.BLOCK
    assert asked == [0, k, 2 * k, 2 * k, 3 * k, 3 * k, 4 * k]


# The limit


def aged(cache: ShardCache, server: FaultServer, names: str) -> None:
    """Fetch shards, the first used longest ago."""
    for age, name in enumerate(reversed(names)):
        path = cache.fetch(server.url(f"/{name}.tar"), BYTES)
        os.utime(path, (1e9 - age, 1e9 - age))


def present(cache: ShardCache, server: FaultServer) -> str:
    return "".join(n for n in "abcdefgh" if cache.path(server.url(f"/{n}.tar"), BYTES).exists())


def test_the_shards_used_longest_ago_make_room(server: FaultServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit=3 * BYTES)
    aged(cache, server, "abc")
    assert present(cache, server) == "abc"
    read(cache, server.url("/a.tar"), BYTES)  # used now
    cache.fetch(server.url("/d.tar"), BYTES)
    assert present(cache, server) == "acd"
    cache.limit = BYTES
    cache.fetch(server.url("/e.tar"), BYTES)
    assert present(cache, server) == "e"


def test_what_others_put_into_the_folder_stays(server: FaultServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit=BYTES)
    (cache.folder / "index").mkdir(parents=True)
    mine = [cache.folder / "thesis.txt", cache.folder / "index" / f"{'0' * 32}-a.idx"]
    for path in mine:
        path.write_bytes(bytes(BYTES))
        os.utime(path, (1, 1))
    for name in "abc":
        cache.fetch(server.url(f"/{name}.tar"))
    assert all(path.exists() for path in mine)


def test_an_open_shard_is_not_evicted(server: FaultServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit=2 * BYTES)
    aged(cache, server, "ab")
    file = cache.open(server.url("/a.tar"), BYTES)
    os.utime(cache.path(server.url("/a.tar"), BYTES), (1, 1))
    cache.fetch(server.url("/c.tar"), BYTES)
    assert present(cache, server) == "ac"
    os.close(file)
    os.utime(cache.path(server.url("/a.tar"), BYTES), (1, 1))
    cache.fetch(server.url("/d.tar"), BYTES)
    assert present(cache, server) == "cd"


def test_all_is_in_use(server: FaultServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit=2 * BYTES)
    files = [cache.open(server.url(f"/{name}.tar"), BYTES) for name in "ab"]
    with pytest.raises(ShardError) as error:
        cache.fetch(server.url("/c.tar"), BYTES)
    for part in ("c.tar", "300,000", "600,000", "--data.cache.gigabytes", str(cache.folder)):
        assert part in str(error.value)
    assert present(cache, server) == "ab"
    assert len(names(cache)) == 2
    for file in files:
        os.close(file)
    cache.fetch(server.url("/c.tar"), BYTES)


def test_room_is_waited_for(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 30)
    cache = ShardCache(tmp_path / "cache", limit=BYTES)
    file = cache.open(server.url("/a.tar"), BYTES)
    waits = threading.Event()
    honest = time.sleep
    monkeypatch.setattr(module.time, "sleep", lambda s: (waits.set(), honest(s)))
    thread = threading.Thread(target=cache.fetch, args=(server.url("/b.tar"), BYTES))
    thread.start()
    assert waits.wait(30)
    os.close(file)
    thread.join(30)
    assert present(cache, server) == "b"


@pytest.mark.parametrize("fault", ["ok", "no_length"])
def test_a_shard_larger_than_the_cache(server: FaultServer, tmp_path: Path, fault: str) -> None:
    cache = ShardCache(tmp_path / "cache", limit=BYTES - 1)
    server.fault("/a.tar", fault)
    with pytest.raises(
        ShardError, match=r"a\.tar .* larger than .*299,999.*--data\.cache\.gigabytes"
    ):
        cache.fetch(server.url("/a.tar"))
    assert names(cache) == []


def test_unknown_size_makes_room_as_blocks_arrive(server: FaultServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit=BYTES + BYTES // 2)
    aged(cache, server, "a")
    server.fault("/b.tar", "chunked")
    assert read(cache, server.url("/b.tar")) == content("b")
    assert present(cache, server) == ""
    assert len(names(cache)) == 1


def test_dead_part_is_evicted_and_a_live_one_is_not(server: FaultServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit=BYTES, timeout=20.0, attempts=3)
    part = leave_part(cache, server, BYTES)
    cache.fetch(server.url("/b.tar"), BYTES)
    assert not part.exists()
    assert present(cache, server) == "b"
    assert len(names(cache)) == 1  # the part's lock is gone too
    server.cure("/a.tar")
    server.fault("/a.tar", "hold")
    fetcher = process(
        FETCH.replace("timeout=20", f"limit={BYTES}, timeout=20"),
        cache,
        server.url("/a.tar"),
        content("a"),
    )
    try:
        live = cache.path(server.url("/a.tar"), BYTES, sha256(content("a")))
        live = live.with_name(live.name + ".part")
        wait_until(lambda: live.exists() and live.stat().st_size)
        with pytest.raises(ShardError, match="no room"):
            cache.fetch(server.url("/c.tar"), BYTES)
        server.release.set()
        assert fetcher.communicate(timeout=60)[0] == "fetched\n"
    finally:
        fetcher.kill()
        fetcher.wait()


def hammer(folder: Path, urls: list[str], seed: int, problems: Any) -> None:
    remote.BLOCK, remote.BACKOFF = 1 << 16, 0.01
    cache = ShardCache(folder, limit=3 * BYTES + 1000, timeout=20.0)
    order = random.Random(seed)
    for _ in range(40):
        url = order.choice(urls)
        name = basename(url)[0]
        if read(cache, url, BYTES, sha256(content(name))) != content(name):
            problems.put(f"wrong bytes of {url}")
        if held(cache) > cache.limit:
            problems.put(f"{held(cache)} bytes in the cache")
    problems.put("done")


def test_a_cache_smaller_than_an_epoch_works_for_ever(server: FaultServer, tmp_path: Path) -> None:
    """Three processes read eight shards; there is room for three."""
    cache = ShardCache(tmp_path / "cache")
    cache.folder.mkdir()
    urls = [server.url(f"/{name}.tar") for name in "abcdefgh"]
    context = multiprocessing.get_context("fork")
    problems = context.Queue()
    started = [
        context.Process(target=hammer, args=(cache.folder, urls, seed, problems))
        for seed in range(3)
    ]
    for one in started:
        one.start()
    said = [problems.get(timeout=60) for _ in started]
    for one in started:
        one.join(60)
    assert said == ["done"] * 3
    assert [one.exitcode for one in started] == [0] * 3
    assert not [name for name in names(cache) if not name.endswith(".tar")]
    assert len(names(cache)) == 3


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_full_disk_evicts(server: FaultServer, small_disk: Path) -> None:
    cache = ShardCache(small_disk / "cache", timeout=20.0)
    aged(cache, server, "abc")
    for name in "defgh":
        data = content(name)
        assert read(cache, server.url(f"/{name}.tar"), BYTES, sha256(data)) == data
    assert present(cache, server) == ""
    assert len(names(cache)) == 3
    (small_disk / "others").write_bytes(bytes(BYTES // 3))
    cache.fetch(server.url("/a.tar"), BYTES)
    assert present(cache, server) == "a"


def test_full_disk_with_nothing_to_evict(server: FaultServer, small_disk: Path) -> None:
    cache = ShardCache(small_disk / "cache", timeout=20.0)
    files = [cache.open(server.url(f"/{name}.tar"), BYTES) for name in "abc"]
    with pytest.raises(ShardError) as error:
        cache.fetch(server.url("/d.tar"), BYTES)
    assert str(error.value).startswith(f"cannot keep {server.url('/d.tar')} in {cache.folder}: No ")
    assert "bytes are free" in str(error.value)
    assert present(cache, server) == "abc"
    assert len(names(cache)) == 3
    for file in files:
        os.close(file)


def test_write_error_names_the_shard_and_leaves_no_part(
    server: FaultServer, cache: ShardCache
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES // 2, before[1]))
    try:
        with pytest.raises(ShardError, match=rf"a\.tar in .*{os.strerror(errno.EFBIG)}"):
            cache.fetch(server.url("/a.tar"), BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(cache) == []


def test_folder_that_cannot_be_made(server: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match=r"cannot keep .*a\.tar in .*Not a directory"):
        ShardCache(tmp_path / "file" / "cache").fetch(server.url("/a.tar"))


# Several processes


@pytest.mark.parametrize("known", [True, False])
def test_two_processes_fetch_a_shard_once(
    server: FaultServer, cache: ShardCache, known: bool
) -> None:
    server.fault("/a.tar", "hold")
    data = content("a")
    both = [process(FETCH, cache, server.url("/a.tar"), data, known) for _ in range(2)]
    try:
        # One has half of the shard; the other waits for its lock, as the kernel lists.
        wait_until(lambda: len(waiting(cache)) == 1)
        server.release.set()
        assert [one.communicate(timeout=60) for one in both] == [("fetched\n", "")] * 2
    finally:
        for one in both:
            one.kill()
            one.wait()
    assert [r.sent for r in server.requests("/a.tar")] == [len(data)]
    assert len(names(cache)) == 1


def waiting(cache: ShardCache) -> list[int]:
    """The processes that wait for the lock of a shard, as the kernel lists them."""
    inodes = {str(path.stat().st_ino) for path in cache.folder.glob("*-*.lock")}
    lines = Path("/proc/locks").read_text().splitlines()
    rows = [line.split() for line in lines if "->" in line]
    return [int(row[5]) for row in rows if row[6].rpartition(":")[2] in inodes]


def test_killed_fetcher_is_followed_by_one_that_resumes(
    server: FaultServer, cache: ShardCache
) -> None:
    server.fault("/a.tar", "hold", 1)
    data = content("a")
    url = server.url("/a.tar")
    part = cache.path(url, len(data), sha256(data))
    part = part.with_name(part.name + ".part")
    first = process(FETCH, cache, url, data)
    second = None
    try:
        wait_until(lambda: part.exists() and part.stat().st_size >= remote.BLOCK)
        second = process(FETCH, cache, url, data)
        wait_until(lambda: len(waiting(cache)) == 1)
        first.kill()
        assert second.communicate(timeout=60) == ("fetched\n", "")
    finally:
        for one in (first, second):
            if one is not None:
                one.kill()
                one.communicate()
    last = server.requests("/a.tar")[-1]
    assert last.range is not None
    start = int(last.range.removeprefix("bytes=").rstrip("-"))
    assert remote.BLOCK <= start <= len(data) // 2
    assert last.sent == len(data) - start
    assert read(cache, url, len(data), sha256(data)) == data
    assert len(names(cache)) == 1


def test_waiting_for_a_fetcher_ends_with_ctrl_c(server: FaultServer, cache: ShardCache) -> None:
    server.fault("/a.tar", "hold")
    data = content("a")
    both = [process(FETCH, cache, server.url("/a.tar"), data) for _ in range(2)]
    try:
        wait_until(lambda: len(waiting(cache)) == 1)
        pid = waiting(cache)[0]
        waits = next(one for one in both if one.pid == pid)
        waits.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in waits.communicate(timeout=20)[1]
        fetches = next(one for one in both if one.pid != pid)
        fetches.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in fetches.communicate(timeout=20)[1]
    finally:
        for one in both:
            one.kill()
            one.communicate()


FORK = (
    SETUP
    + """
import multiprocessing, threading, time
cache.small(url + '.idx')  # a session in the parent
thread = threading.Thread(target=cache.fetch, args=(url, size, checksum), daemon=True)
thread.start()  # and a download that holds the lock when the child is made
while not any(path.stat().st_size for path in folder.glob('*.part')):
    time.sleep(0.01)
def work():
    assert cache.small(url + '.idx') == b'index', 'child'
    print('child', flush=True)
    sys.stdin.close()
    time.sleep(600)
child = multiprocessing.get_context('fork').Process(target=work, daemon=False)
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""
)


def test_a_forked_worker_uses_the_store_and_keeps_no_lock(
    server: FaultServer, cache: ShardCache
) -> None:
    """The parent is killed in mid-download; its worker lives, and another process takes over."""
    server.files["/a.tar.idx"] = b"index"
    server.fault("/a.tar", "hold", 1)
    data = content("a")
    parent = process(FORK, cache, server.url("/a.tar"), data)
    worker = 0
    try:
        worker = int(parent.stdout.readline())
        assert parent.stdout.readline() == "child\n"
        parent.kill()
        after = process(FETCH, cache, server.url("/a.tar"), data)
        try:
            assert after.communicate(timeout=30) == ("fetched\n", "")
        finally:
            after.kill()
            after.wait()
        os.kill(worker, 0)  # it lives still
    finally:
        parent.kill()
        if worker:
            os.kill(worker, signal.SIGKILL)
        parent.communicate()


def test_a_lock_that_was_deleted_is_no_lock(cache: ShardCache) -> None:
    """Its last holder deletes it while another waits: the other takes the one that is there."""
    cache.folder.mkdir()
    path = cache.folder / "0-a.tar.lock"
    links: list[int] = []

    def wait() -> None:
        with locks.exclusive(path) as lock:
            links.append(os.fstat(lock).st_nlink)

    thread = threading.Thread(target=wait)
    with locks.exclusive(path):
        thread.start()
        wait_until(lambda: waiting(cache))
        path.unlink()
    thread.join(30)
    assert links == [1]


def test_a_shard_takes_its_name_under_the_lock_of_the_cache(
    server: FaultServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise who adds up the folder meanwhile may see it under neither name."""
    honest = Path.rename

    def rename(self: Path, target: Path) -> Path:
        with (cache.folder / "cache.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return honest(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert read(cache, server.url("/a.tar")) == content("a")


def in_child(work: Callable[[], Any]) -> Any:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=lambda: results.put(work()))
    child.start()
    try:
        return results.get(timeout=30)
    finally:
        child.join(30)


def test_parent_and_forked_child_both_fetch(server: FaultServer, cache: ShardCache) -> None:
    assert read(cache, server.url("/a.tar")) == content("a")

    def child() -> bytes:
        gc.collect()  # must not tear down what the parent still uses
        return read(cache, server.url("/b.tar"))

    assert in_child(child) == content("b")
    assert read(cache, server.url("/c.tar")) == content("c")
    assert len(server.requests("/c.tar")) == 1  # the parent's open connection still answers


def spawned(cache: ShardCache, url: str, results: Any) -> None:
    results.put(read(cache, url))


@pytest.mark.slow
def test_spawned_worker(server: FaultServer, cache: ShardCache) -> None:
    read(cache, server.url("/a.tar"))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=spawned, args=(cache, server.url("/b.tar"), results))
    child.start()
    assert results.get(timeout=60) == content("b")
    child.join(60)


def test_pickles(server: FaultServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10**6, 3.0, 2, {"headers": {"X-Test": "1"}})
    read(cache, server.url("/a.tar"))
    ahead = ReadAhead(cache, 1)
    ahead.want([(server.url("/a.tar"), None, None)])
    copy, copied = pickle.loads(pickle.dumps(cache)), pickle.loads(pickle.dumps(ahead))
    assert vars(copy) == vars(cache) == vars(copied.cache)
    assert copied.threads == 1
    ahead.close()


def test_evicted_while_it_is_opened(
    server: FaultServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, another process deletes it: it is fetched again."""
    path = cache.fetch(server.url("/a.tar"))
    honest = locks.flock

    def late(file: int, how: int) -> None:
        if how == locks.LOCK_SH and len(server.log) == 1:
            path.unlink(missing_ok=True)
        honest(file, how)

    monkeypatch.setattr(locks, "flock", late)
    file = cache.open(server.url("/a.tar"))
    assert os.fstat(file).st_nlink == 1
    assert os.pread(file, BYTES + 1, 0) == content("a")
    os.close(file)
    assert len(server.log) == 2


# Reading ahead


def test_read_ahead(server: FaultServer, cache: ShardCache) -> None:
    ahead = ReadAhead(cache)
    wanted = [(server.url(f"/{name}.tar"), BYTES, None) for name in "aabcab"]
    ahead.want(wanted)
    wait_until(lambda: present(cache, server) == "abc")
    ahead.want(wanted)
    assert in_child(lambda: _ahead_in_child(ahead, cache, server)) == "abcd"
    ahead.close()
    assert sorted(request.path for request in server.log) == [
        "/a.tar",
        "/b.tar",
        "/c.tar",
        "/d.tar",
    ]


def _ahead_in_child(ahead: ReadAhead, cache: ShardCache, server: FaultServer) -> str:
    ahead.want([(server.url("/d.tar"), BYTES, None)])
    wait_until(lambda: present(cache, server) == "abcd")
    return present(cache, server)


def test_read_ahead_takes_the_nearest_first_and_forgets(
    server: FaultServer, cache: ShardCache
) -> None:
    server.fault("/a.tar", "hold")
    ahead = ReadAhead(cache, threads=1)
    urls = {name: (server.url(f"/{name}.tar"), BYTES, None) for name in "abcde"}
    ahead.want([urls["a"], urls["b"]])
    wait_until(lambda: cache.folder.exists() and any(cache.folder.glob("*.part")))
    ahead.want([urls["a"], urls["d"], urls["c"]])  # b is no longer wanted
    server.release.set()
    wait_until(lambda: present(cache, server) == "acd")
    assert [request.path for request in server.log] == ["/a.tar", "/d.tar", "/c.tar"]
    ahead.close()
    wait_until(lambda: "read-ahead" not in {thread.name for thread in threading.enumerate()})


def test_read_ahead_does_not_wait_for_itself(server: FaultServer, cache: ShardCache) -> None:
    server.fault("/a.tar", "hold")
    ahead = ReadAhead(cache, threads=2)
    first, second = ((server.url(f"/{name}.tar"), BYTES, None) for name in "ab")
    ahead.want([first])
    wait_until(lambda: cache.folder.exists() and any(cache.folder.glob("*.part")))
    ahead.want([first, second])
    wait_until(lambda: present(cache, server) == "b")
    server.release.set()
    wait_until(lambda: present(cache, server) == "ab")
    ahead.close()


def test_read_ahead_drops_errors(server: FaultServer, cache: ShardCache) -> None:
    ahead = ReadAhead(cache, threads=1)
    missing, there = server.url("/missing.tar"), server.url("/a.tar")
    ahead.want([(missing, None, None), (there, BYTES, None)])
    wait_until(lambda: present(cache, server) == "a")
    ahead.close()
    with pytest.raises(ShardError, match="404"):
        cache.fetch(missing)


@pytest.mark.parametrize("end", ["", "KeyboardInterrupt"])
def test_read_ahead_lets_the_process_end(server: FaultServer, cache: ShardCache, end: str) -> None:
    """In the middle of a download that stalls, and without a word."""
    server.fault("/a.tar", "stall")
    script = SETUP + (
        "ahead = ReadAhead(cache); ahead.want([(url, size, checksum)]); import time\n"
        "while not list(folder.glob('*.part')): time.sleep(0.01)\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        f"    time.sleep({600 if end else 0})\n"
        "except KeyboardInterrupt: pass\n"
    )
    one = process(script, cache, server.url("/a.tar"), content("a"))
    try:
        assert one.stdout.readline() == "ready\n"
        if end:
            one.send_signal(signal.SIGINT)
        assert one.communicate(timeout=15) == ("", "")
        assert one.returncode == 0
    finally:
        one.kill()
        one.wait()


# Real servers


@pytest.mark.skipif(NGINX is None, reason=NO_NGINX)
def test_nginx(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    data = content("a", 5_000_000)
    (root / "a.tar").write_bytes(data)
    cache = ShardCache(tmp_path / "cache", timeout=20.0)
    with nginx(tmp_path / "nginx", root) as server:
        url = f"{server.url}/a.tar"
        assert read(cache, url, len(data), sha256(data)) == data
        assert cache.small(f"{url}.idx") is None
        with pytest.raises(ShardError, match="404 Not Found"):
            cache.fetch(f"{server.url}/b.tar")
        requests = server.requests(3)
    assert requests[0].sent == len(data)
    assert [r.status for r in requests] == [200, 404, 404]


@pytest.mark.skipif(NGINX is None, reason=NO_NGINX)
def test_nginx_take_over(tmp_path: Path) -> None:
    """Killed in mid-download; the next fetcher asks nginx for the rest, by its ETag."""
    root = tmp_path / "root"
    root.mkdir()
    data = content("a", 1_000_000)
    (root / "a.tar").write_bytes(data)
    cache = ShardCache(tmp_path / "cache", timeout=20.0)
    with nginx(tmp_path / "nginx", root, rate="400k") as server:
        url = f"{server.url}/a.tar"
        part = cache.path(url, len(data))
        part = part.with_name(part.name + ".part")
        first = process(FETCH, cache, url, data, known=False)
        try:
            wait_until(lambda: part.exists() and part.stat().st_size >= remote.BLOCK)
        finally:
            first.kill()
            first.communicate()
        size = part.stat().st_size
        assert 0 < size < len(data)
        assert read(cache, url, len(data)) == data
        requests = server.requests(2)
    assert sorted((r.status, r.range, r.sent) for r in requests if r.range) == [
        (206, f"bytes={size}-", len(data) - size)
    ]


@pytest.mark.slow
def test_s3(tmp_path: Path) -> None:
    pytest.importorskip("s3fs", reason="pip install s3fs")
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    store = moto.ThreadedMotoServer("127.0.0.1", 0)
    store.start()
    try:
        host, port = store.get_host_and_port()
        options = {"endpoint_url": f"http://{host}:{port}", "key": "k", "secret": "s"}
        s3 = fsspec.filesystem("s3", **options)
        s3.mkdir("bucket")
        for name in "ab":
            s3.pipe(f"bucket/x/{name}.tar", content(name))
        s3.pipe("bucket/x/a.tar.idx", b"index")
        cache = ShardCache(tmp_path / "cache", timeout=30.0, attempts=2, storage_options=options)
        urls = [f"s3://bucket/x/{name}.tar" for name in "ab"]
        assert cache.expand("s3://bucket/x/*.tar") == urls
        assert read(cache, urls[0], BYTES, sha256(content("a"))) == content("a")
        assert in_child(lambda: read(cache, urls[1], BYTES)) == content("b")
        assert cache.small(f"{urls[0]}.idx") == b"index"
        assert cache.small(f"{urls[1]}.idx") is None
        with pytest.raises(ShardError, match=r"s3://bucket/x/c\.tar: there is no such file"):
            cache.fetch("s3://bucket/x/c.tar")
        s3.pipe("bucket/x/a.tar", content("new", BYTES + 5))
        with pytest.raises(ShardError, match="its index is stale"):
            cache.fetch(urls[0], BYTES, "0" * 64)
    finally:
        store.stop()
