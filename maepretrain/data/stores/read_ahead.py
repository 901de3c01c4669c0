"""Shards that come next, fetched in the background."""

import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from maepretrain.data.stores.cache import ShardCache

# Address, size and checksum of a shard, as for `ShardCache.open`.
Wanted = tuple[str, int | None, str | None]


class ReadAhead:
    """Fetches the shards that come next, in background threads that end with the process.

    Errors are dropped: whoever needs the shard meets them again.

    Args:
        cache: where the shards go.
        threads: how many are fetched at once.
    """

    def __init__(self, cache: ShardCache, threads: int = 2) -> None:
        self.cache = cache
        self.threads = threads
        self._start_anew()

    def want(self, shards: Sequence[Wanted]) -> None:
        """Fetch these (url, size, sha256), nearest first, in place of what was wanted before.

        What is there, or is being fetched, costs nothing, and is marked as used.
        """
        if self._process != os.getpid():  # threads and held locks do not survive a fork
            self._start_anew()
        with self._lock:
            self._queue = deque(dict.fromkeys(shards))
            for _ in range(min(self.threads - self._running, len(self._queue))):
                self._running += 1
                threading.Thread(target=self._work, name="read-ahead", daemon=True).start()

    def close(self) -> None:
        """Want nothing more; what is being fetched goes on to its end. `want` begins anew."""
        self.want(())

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()  # a signal handler may close what it interrupts
        self._queue: deque[Wanted] = deque()
        self._fetching: set[Wanted] = set()
        self._running = 0

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._running -= 1
                    return
                shard = self._queue.popleft()
                if shard in self._fetching:
                    continue
                self._fetching.add(shard)
            with suppress(Exception):
                self.cache.fetch(*shard)
            with self._lock:
                self._fetching.discard(shard)

    def __reduce__(self) -> tuple[type["ReadAhead"], tuple[ShardCache, int]]:
        """Threads do not travel to another process."""
        return ReadAhead, (self.cache, self.threads)
