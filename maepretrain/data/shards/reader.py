"""The bytes of a sample: one positioned read of a shard, on a local disk or in the node's cache."""

import os
import zlib
from collections import OrderedDict
from typing import Any

from maepretrain.data.errors import CUT_OFF_INPUT, ShardError, Unreadable
from maepretrain.data.shards.index import Shard
from maepretrain.data.shards.tar import TAR_HEADER, Columns
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.stores.remote import is_remote, shown


class Store:
    """Reads inputs of samples with `pread`. One per process.

    Args:
        cache: where remote shards are kept.
        open_files: how many local shards stay open; a remote one is held for one read only, so
            that the cache can always make room.
    """

    def __init__(self, cache: ShardCache | None = None, open_files: int = 64) -> None:
        self.cache, self.open_files = cache or ShardCache(), open_files
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: Shard, columns: Columns, row: int) -> bytes:
        """The bytes of a sample's input.

        Raises:
            Unreadable: the shard ends inside it.
            ShardError: the shard is not the one that was indexed.
            OSError: the disk failed.
        """
        offset, size = int(columns.offset[row]), int(columns.size[row])
        remote = is_remote(shard.url)
        file = (
            self.cache.open(shard.url, shard.bytes, shard.sha256) if remote else self._open(shard)
        )
        try:
            header = os.pread(file, TAR_HEADER, offset - TAR_HEADER)
            data = os.pread(file, size, offset)
        finally:
            if remote:
                os.close(file)
        if len(data) != size:
            raise Unreadable(CUT_OFF_INPUT, f"it has {len(data)} of {size} bytes")
        if zlib.crc32(header) != columns.header[row]:
            raise ShardError(
                f"{shown(shard.url)} was changed after its index was made (byte "
                f"{offset - TAR_HEADER}); run `maepretrain shards index` on it"
            )
        return data

    def _open(self, shard: Shard) -> int:
        file = self._files.pop(shard.url, None)
        if file is None:
            file = os.open(shard.url, os.O_RDONLY)
            if len(self._files) >= self.open_files:
                os.close(self._files.popitem(last=False)[1])
        self._files[shard.url] = file
        return file

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not travel to another process."""
        return self.__dict__ | {"_files": OrderedDict()}
