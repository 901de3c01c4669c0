"""What stores are asked, and what is made of their answers and faults, without any cache."""

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest
from support.servers import FaultServer

from maepretrain.data.errors import ShardError
from maepretrain.data.stores import remote as module
from maepretrain.data.stores.remote import Remote, Retry, StartOver, basename, is_remote

CONTENT = random.Random("a").randbytes(300_000)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    server = FaultServer({"/a.tar": CONTENT})
    yield server
    server.close()


@pytest.fixture
def memory() -> Iterator[Any]:
    """A store of fsspec's own that lists and reads ranges, in this process."""
    store = fsspec.filesystem("memory")
    for name in ("b.tar", "a.tar", "c.tar", "a.tar.idx"):
        store.pipe(f"/storetest/{name}", CONTENT)
    yield store
    store.rm("/storetest", recursive=True)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Remote:
    monkeypatch.setattr(module, "BACKOFF", 0.01)
    monkeypatch.setattr(module, "BLOCK", 1 << 16)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return Remote(timeout=5.0, attempts=3)


# Addresses


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("https://h/a.tar", True),
        ("s3://b/a.tar", True),
        ("hf://datasets/u/r/a.tar", True),
        ("/data/a.tar", False),
        ("a.tar", False),
        ("file:///data/a.tar", False),
        ("FILE:///data/a.tar", False),
        ("pipe:curl https://h/a.tar", False),
        ("data/https://a.tar", False),
    ],
)
def test_what_is_remote(url: str, remote: bool) -> None:
    assert is_remote(url) is remote


def test_basename() -> None:
    assert basename("https://u:p@h/x/a.tar?token=1/2") == "a.tar"


# Bytes


@pytest.mark.parametrize("start", [0, 1, 100_000, 299_999, 300_000])
def test_the_rest_of_a_file(server: FaultServer, memory: Any, remote: Remote, start: int) -> None:
    for url in (server.url("/a.tar"), "memory://storetest/a.tar"):
        with remote.ask(url, start) as answer:
            assert (answer.start, answer.total) == (start, len(CONTENT))
            assert b"".join(answer.blocks) == CONTENT[start:]


def test_tags_tell_versions(server: FaultServer, memory: Any, remote: Remote) -> None:
    def tag(url: str) -> str:
        with remote.ask(url) as answer:
            return answer.tag

    urls = server.url("/a.tar"), "memory://storetest/a.tar"
    first = [tag(url) for url in urls]
    assert [tag(url) for url in urls] == first
    server.files["/a.tar"] = CONTENT[::-1]
    memory.pipe("/storetest/a.tar", CONTENT[::-1])
    for url, old in zip(urls, first, strict=True):
        assert old
        assert tag(url) != old


@pytest.mark.parametrize(
    ("fault", "error"),
    [("wrong_range", StartOver), ("503", Retry), ("404", ShardError), ("gzip", ShardError)],
)
def test_one_try_tells_what_helps(
    server: FaultServer, remote: Remote, fault: str, error: type[Exception]
) -> None:
    server.fault("/a.tar", fault)
    with pytest.raises(error), remote.ask(server.url("/a.tar"), 10):
        pass
    assert len(server.log) == 1


def test_progress_earns_new_tries(remote: Remote) -> None:
    done: list[int] = []

    def work() -> None:
        done.append(min(len(done), 5))
        raise Retry("cut")

    with pytest.raises(ShardError, match=r"^cannot fetch s3://b/a\.tar: cut \(3 tries\)$"):
        remote.persist("s3://u:p@b/a.tar?token=1", work, lambda: max(done, default=0))
    assert done == [0, 1, 2, 3, 4, 5, 5, 5, 5]  # the first 5 is the last progress


def test_pickles(remote: Remote) -> None:
    asked = Remote(3.0, 2, {"headers": {"X-Test": "1"}})
    assert pickle.loads(pickle.dumps(asked)) == asked != remote


def test_random_numbers_are_left_alone(server: FaultServer, remote: Remote) -> None:
    server.fault("/a.tar", "503", 2)
    random.seed(3)
    expected = random.Random(3).random()
    assert remote.small(server.url("/a.tar")) == CONTENT
    assert random.random() == expected


# Small files and lists


def test_small_file(server: FaultServer, remote: Remote) -> None:
    server.files["/a.tar.idx"] = b"index"
    server.fault("/a.tar.idx", "503", 1)
    assert remote.small(server.url("/a.tar.idx")) == b"index"
    assert remote.small(server.url("/b.tar.idx")) is None
    server.fault("/c.tar.idx", "403")
    assert remote.small(server.url("/c.tar.idx")) is None
    server.fault("/d.tar.idx", "503")
    with pytest.raises(ShardError, match=r"d\.tar\.idx: 503"):
        remote.small(server.url("/d.tar.idx"))


def test_http_cannot_be_listed(server: FaultServer, remote: Remote) -> None:
    for pattern in ("/*.tar", "/a-?.tar", "/a-[0-9].tar", "/*.tar?token=hidden"):
        with pytest.raises(ShardError, match=r"cannot be listed: name shards with br") as error:
            remote.expand(server.url(pattern))
        assert "hidden" not in str(error.value)
    for plain in (server.url("/a.tar"), server.url("/a.tar?token=1"), "http://[::1]/a.tar"):
        assert remote.expand(plain) == [plain]
    assert server.log == []


def test_other_stores_are_listed(memory: Any, remote: Remote) -> None:
    urls = [f"memory://storetest/{name}.tar" for name in "abc"]
    assert remote.expand("memory://storetest/*") == urls
    assert remote.expand("memory://storetest/[ab].tar") == urls[:2]
    assert remote.expand("memory://storetest/none-*.tar") == []


ASKS: list[Callable[[Remote, str], Any]] = [
    Remote.small,
    lambda remote, url: remote.expand(url.replace("a.tar", "*a.tar")),
]


@pytest.mark.parametrize("ask", ASKS, ids=["small", "expand"])
@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("s3://b/a.tar", "s3fs", "s3"),
        ("gs://b/a.tar", "gcsfs", "gs"),
        ("hf://datasets/u/r/a.tar", "huggingface_hub", "hf"),
    ],
)
def test_missing_package_is_named(
    remote: Remote,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[Remote, str], Any],
    url: str,
    package: str,
    extra: str,
) -> None:
    registry = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(registry, url.partition("://")[0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ShardError, match=rf"a\.tar: pip install 'maepretrain\[{extra}\]'"):
        ask(remote, url)


def test_unknown_protocol(remote: Remote) -> None:
    with pytest.raises(ShardError, match=r"cannot fetch nosuch://h/a\.tar: Protocol not known"):
        remote.small("nosuch://h/a.tar")
