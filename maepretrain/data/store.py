"""Bytes of a member: one positioned read of a shard that stays open."""

import os
from collections import OrderedDict
from pathlib import Path


class LocalStore:
    """Reads members of local shards with `pread`; the last used shards stay open. One per process.

    Args:
        open_files: how many shards stay open.
    """

    def __init__(self, open_files: int = 64) -> None:
        self.open_files = open_files
        self._files: OrderedDict[Path, int] = OrderedDict()

    def read(self, shard: Path, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; OSError where the shard is shorter than its index says."""
        file = self._files.pop(shard, None)
        if file is None:
            file = os.open(shard, os.O_RDONLY)
            if len(self._files) >= self.open_files:
                os.close(self._files.popitem(last=False)[1])
        self._files[shard] = file
        data = os.pread(file, size, offset)
        if len(data) != size:
            raise OSError(f"{shard} ends inside a member: {len(data)} of {size} bytes at {offset}")
        return data

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        """Open files do not travel to another process."""
        return {"open_files": self.open_files, "_files": OrderedDict()}
