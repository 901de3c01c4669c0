"""Settings that must be equal for a stopped run to go on with the samples that were due."""

import zlib
from typing import Any

from maepretrain.data.samples import ShardIndex


def fingerprint(index: ShardIndex) -> int:
    """A checksum of the shards' names and counts: another order of patterns is another run."""
    names = "\n".join(shard.name for shard in index.shards)
    return zlib.crc32(names.encode(errors="surrogateescape") + index.counts.numpy().tobytes())


def changes(state_dict: dict[str, Any], identity: dict[str, Any]) -> str:
    """The values of an identity that differ from those in a checkpoint; empty where none does."""
    # Checkpoints of older versions have another name for the streams.
    before = {"streams": state_dict.get("lanes")} | state_dict
    changed = [
        f"{name} was {before.get(name)} and is {now}"
        for name, now in identity.items()
        if before.get(name) != now
    ]
    return ", ".join(changed)
