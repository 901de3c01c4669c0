"""Differences between two configurations of a run."""

from typing import Any

import yaml

from maepretrain.checkpoints.run_config import with_present_paths
from maepretrain.data.settings import translated

# Options of a resume itself.
RESUME_OPTIONS = frozenset({"resume", "overwrite", "ckpt_path", "same_config"})
# Beginnings of the lines of `changes` that leave a run the same experiment: how long it is, where
# it runs, and what it keeps.
SAME_EXPERIMENT = (
    "allow_reorder:",
    "checkpoint_every",
    "compile:",
    "data.cache",
    "data.num_workers:",
    "keep_every",
    "live_probe:",
    "pictures:",
    "run:",
    "threads:",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.log_every",
    "trainer.max_",
    "trainer.num_nodes",
    "trainer.profiler",
    "trainer.strategy",
)


def changes(before: str, now: str) -> list[str]:
    """`key: old -> new` for every value that differs between two YAML configurations."""
    old = _leaves(before)
    new = _leaves(now)
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in differing if key not in RESUME_OPTIONS
    ]


def changes_of_experiment(before: str, now: str) -> list[str]:
    """The changes that make a run another experiment."""
    return [line for line in changes(before, now) if not line.startswith(SAME_EXPERIMENT)]


def _leaves(text: str) -> dict[str, Any]:
    """All values of a configuration by path, under the names that this version has."""
    config = with_present_paths(yaml.safe_load(text) or {})
    if config.get("data"):
        config["data"] = translated(config["data"])
    return flat(config)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings under their paths, `a.b.c`."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves
