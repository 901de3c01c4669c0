"""Sections of the options under `data`, and where options of older versions are now."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Crop:
    """The cut of an image.

    Args:
        scale: area of the random crop as a share of the image; null resizes the whole image.
        ratio: aspect ratio of the random crop.
        flip: probability of a horizontal flip.
        per_image: crops of each image, from one decode. They count as samples of the batch and
            for the learning rate; an epoch shows each image that often.
        val_share: side of the centre crop in validation as a share of the image's fitting side.
            Default .875 (256 then 224), or 1 where training sees whole images (scale null).
    """

    scale: tuple[float, float] | None = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    per_image: int = 1
    val_share: float | None = None


@dataclass(frozen=True)
class LowResolution:
    """Smaller and cheaper images at first.

    Args:
        image_size: size of the images in the first epochs.
        epochs: epochs, or a part of one, after which images have `data.image_size`.
    """

    image_size: int | list[int] | None = None
    epochs: float = 0.0


@dataclass(frozen=True)
class OrderSettings:
    """In which order samples are read.

    Args:
        seed: seed of order and crops.
        streams: equal sample ranges read side by side; must divide the images of a batch. Default
            their greatest common divisor with 16.
        block: samples shuffled together inside a stream.
        tail: "drop" leaves out what is no whole batch at an epoch's end, "pad" repeats samples.
        samples_per_epoch: draws that make an epoch of a mixture (default as many as it has
            samples), or with exact false.
        exact: false reads with webdataset's own pipeline: for sources without an index. Shuffling
            is approximate, and a resume does not go on with the samples that were due.
        allow_pipe: let `pipe:COMMAND` patterns run their command in a shell (with exact false).
    """

    seed: int = 0
    streams: int | None = None
    block: int = 8192
    tail: Literal["drop", "pad"] = "drop"
    samples_per_epoch: int | None = None
    exact: bool = True
    allow_pipe: bool = False


@dataclass(frozen=True)
class CacheSettings:
    """Where remote shards are kept.

    Args:
        folder: one per node, on its own disk; default $MAEPRETRAIN_CACHE or
            ~/.cache/maepretrain/shards.
        gigabytes: what it may take; the least recently used shards go first.
    """

    folder: Path | None = None
    gigabytes: float = 100.0


SECTIONS: dict[str, type] = {
    "crop": Crop,
    "low_resolution": LowResolution,
    "order": OrderSettings,
    "cache": CacheSettings,
}

# Options of older versions, and what they are called now.
MOVED_OPTIONS = {
    "scale": "crop.scale",
    "ratio": "crop.ratio",
    "flip": "crop.flip",
    "crops_per_image": "crop.per_image",
    "val_share": "crop.val_share",
    "low_image_size": "low_resolution.image_size",
    "low_epochs": "low_resolution.epochs",
    "seed": "order.seed",
    "lanes": "order.streams",
    "streams": "order.streams",
    "block": "order.block",
    "tail": "order.tail",
    "samples_per_epoch": "order.samples_per_epoch",
    "exact": "order.exact",
    "allow_pipe": "order.allow_pipe",
    "cache": "cache.folder",
    "cache_gb": "cache.gigabytes",
    "max_faults": "max_errors",
}


def translated(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under `data` of any version's config.yaml, as this version has them."""
    now: dict[str, Any] = {}
    for name, value in options.items():
        is_section = name in SECTIONS and isinstance(value, Mapping)
        new_name = name if is_section else MOVED_OPTIONS.get(name, name)
        section, _, option = new_name.rpartition(".")
        if section:
            now.setdefault(section, {})[option] = value
        elif is_section:
            now.setdefault(name, {}).update(value)
        else:
            now[new_name] = value
    return now


def without(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Nested options without some of them, named as `order.seed` or by a whole section."""
    names = set(names)
    kept: dict[str, Any] = {}
    for name, value in options.items():
        if name in names:
            continue
        if isinstance(value, Mapping) and name in SECTIONS:
            prefix = f"{name}."
            inside = [other.removeprefix(prefix) for other in names if other.startswith(prefix)]
            value = without(value, inside)
        kept[name] = value
    return kept


def with_sections(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options as the arguments of `ShardData`: each section is an object of its class."""
    arguments = dict(options)
    for name, section in SECTIONS.items():
        if isinstance(arguments.get(name), Mapping):
            arguments[name] = section(**arguments[name])
    return arguments
