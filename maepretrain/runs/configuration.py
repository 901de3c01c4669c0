"""Differences between two configurations of a run."""

from typing import Any

import yaml


def changes(before: str, now: str) -> list[str]:
    """`key: old -> new` for every value that differs between two YAML configurations."""
    old, new = (flat(yaml.safe_load(text) or {}) for text in (before, now))
    ignored = {"resume", "overwrite", "ckpt_path", "same_config"}
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in ignored
    ]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings under their paths, `a.b.c`."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves
