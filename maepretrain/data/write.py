"""Write WebDataset shards from an image folder, a torchvision data set, IDX files or arrays.

The same source and settings give the same bytes: samples are ordered by a hash of (seed, key), member times are zero. Each shard
is written under a temporary name, checked, and renamed together with its index, so a stop leaves only whole shards, and the next
call goes on where it stopped. Encoded images are copied byte for byte unless `short_side` asks for smaller ones.
"""

import gzip
import hashlib
import io
import json
import os
import struct
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from rich.progress import track

from maepretrain.data.shards import (
    ShardError,
    in_processes,
    index_path,
    read_head,
    scan,
    summary,
    write_index,
)

COPIED = {".jpg", ".jpeg", ".png", ".webp"}
# Other formats that PIL reads without loss; they are stored as PNG.
CONVERTED = {".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


class Entry(NamedTuple):
    """One sample before it is written: its key, its class and where the source finds it."""

    key: str
    label: int
    place: int | str


class Source(Protocol):
    """Where samples come from. It travels to worker processes, so it must pickle."""

    @property
    def classes(self) -> list[str]: ...

    def entries(self) -> list[Entry]: ...

    def read(self, entry: Entry) -> tuple[str, bytes]:
        """(extension, encoded bytes) of one sample; OSError or ValueError where it cannot be read."""
        ...


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images; the class is the first sub-folder, at any depth below it images are found."""

    root: Path

    @property
    def classes(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def entries(self) -> list[Entry]:
        labels = {name: label for label, name in enumerate(self.classes)}
        paths = sorted(
            (Path(folder) / name).relative_to(self.root)
            for folder, _, names in os.walk(self.root, followlinks=True)
            for name in names
            if Path(name).suffix.lower() in COPIED | CONVERTED
        )
        # A key holds no dot in its last part: the extension starts at the first one.
        stems = [str(path.with_name(path.stem.replace(".", "_"))) for path in paths]
        times = Counter(stems)
        return [
            Entry(
                stem if times[stem] == 1 else f"{stem}_{path.name.replace('.', '_')}",
                labels[path.parts[0]] if len(path.parts) > 1 else -1,
                str(path),
            )
            for stem, path in zip(stems, paths, strict=True)
        ]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        path = self.root / str(entry.place)
        data = path.read_bytes()
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            image.load()  # raises on a damaged file, which must not travel into a shard unseen
            if path.suffix.lower() in COPIED:
                return path.suffix[1:].lower(), data
            return "png", _png(image)


@dataclass(frozen=True)
class Arrays:
    """Images held in memory: uint8 (n, h, w) or (n, h, w, 3), with one label each."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def classes(self) -> list[str]:
        return [str(label) for label in range(int(self.labels.max()) + 1)]

    def entries(self) -> list[Entry]:
        return [Entry(f"{i:08d}", int(label), i) for i, label in enumerate(self.labels)]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        return "png", _png(Image.fromarray(self.images[entry.place]))


@dataclass(frozen=True)
class Idx:
    """A folder of MNIST-style files `PREFIX-images-idx3-ubyte[.gz]`; PREFIX is `train` or `t10k`."""

    root: Path
    prefix: str

    @property
    def classes(self) -> list[str]:
        return self._arrays.classes

    @property
    def _arrays(self) -> Arrays:
        return _read_idx_pair(self.root, self.prefix)

    def entries(self) -> list[Entry]:
        return self._arrays.entries()

    def read(self, entry: Entry) -> tuple[str, bytes]:
        return self._arrays.read(entry)


@lru_cache(1)
def _read_idx_pair(root: Path, prefix: str) -> Arrays:
    images, labels = (
        _read_idx(root, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
    )
    if len(images) != len(labels):
        raise ShardError(f"{root}: {len(images)} {prefix} images but {len(labels)} labels")
    return Arrays(images, labels)


def _read_idx(root: Path, name: str) -> np.ndarray:
    """An IDX file of unsigned bytes: 0 0 8 dimensions, big-endian sizes, then the data (LeCun's MNIST page)."""
    path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ShardError(f"{root} holds no {name} or {name}.gz")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\0\0\x08":
        raise ShardError(f"{path} is no IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    array = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if array.size != np.prod(shape):
        raise ShardError(f"{path} ends early: {array.size} of {np.prod(shape)} bytes")
    return array.reshape(shape)


@dataclass(frozen=True)
class Torchvision:
    """A torchvision data set of (image, class), by class name and root; nothing is downloaded."""

    name: str
    root: str
    split: str

    @property
    def classes(self) -> list[str]:
        return list(getattr(self._set, "classes", []))

    @property
    def _set(self) -> Any:
        return _torchvision_set(self.name, self.root, self.split)

    def entries(self) -> list[Entry]:
        labels = next(
            (
                getattr(self._set, name)
                for name in ("targets", "_labels", "labels")
                if hasattr(self._set, name)
            ),
            None,
        )
        if labels is None:
            labels = [self._set[i][1] for i in track(range(len(self._set)), "reading labels")]
        return [Entry(f"{i:08d}", int(label), i) for i, label in enumerate(labels)]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        return "png", _png(self._set[entry.place][0])


@lru_cache(1)
def _torchvision_set(name: str, root: str, split: str) -> Any:
    import inspect

    from torchvision import datasets

    dataset = getattr(datasets, name, None)
    if dataset is None:
        raise ShardError(f"torchvision.datasets has no {name}")
    parameters = inspect.signature(dataset).parameters
    choice = {"train": split == "train"} if "train" in parameters else {"split": split}
    try:
        return dataset(root, **(choice if set(choice) <= set(parameters) else {}))
    except (RuntimeError, ValueError, OSError) as error:
        raise ShardError(f"torchvision's {name} in {root}: {str(error).strip()}") from error


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def find_source(src: str, root: str | None, split: str) -> Source:
    """The source that `src` names: `torchvision:NAME` (with root), a folder of IDX files or a folder of images.

    Raises:
        ShardError: nothing there that can be read.
    """
    if src.startswith("torchvision:"):
        if root is None:
            raise ShardError(f"{src} needs --root, the folder that holds the data set")
        return Torchvision(src.removeprefix("torchvision:"), root, split)
    folder = Path(src)
    if not folder.is_dir():
        raise ShardError(f"no such folder: {src}")
    if any(folder.glob("*-idx3-ubyte*")):
        prefix = "t10k" if split == "test" else split
        return Idx(folder, prefix)
    return ImageFolder(folder)


@dataclass(frozen=True)
class _Job:
    source: Source
    entries: list[Entry]
    path: Path
    short_side: int | None
    quality: int


def write_shards(
    source: Source,
    dst: Path,
    split: str = "train",
    samples_per_shard: int = 5000,
    short_side: int | None = None,
    quality: int = 92,
    seed: int = 0,
    workers: int = 1,
) -> list[str]:
    """Write `dst/SPLIT-000000.tar`, ... with their indexes and `dst/SPLIT.json`; returns the keys that could not be read.

    Raises:
        ShardError: an empty source, keys that clash, or a folder that holds shards made otherwise.
    """
    entries = source.entries()
    if not entries:
        raise ShardError(f"{source}: no images found")
    keys = {entry.key for entry in entries}
    if len(keys) < len(entries):
        raise ShardError(f"{len(entries) - len(keys)} images would get a key that another one has")
    entries.sort(key=lambda entry: hashlib.sha256(f"{seed}/{entry.key}".encode()).digest())
    parts = [entries[i : i + samples_per_shard] for i in range(0, len(entries), samples_per_shard)]
    names = [f"{split}-{i:06d}.tar" for i in range(len(parts))]
    settings = {
        "source": hashlib.sha256(repr([e[:2] for e in entries]).encode()).hexdigest(),
        "samples_per_shard": samples_per_shard,
        "short_side": short_side,
        "quality": quality if short_side else None,
        "seed": seed,
    }
    dst.mkdir(parents=True, exist_ok=True)
    _claim(
        dst / f"{split}.json", {"settings": settings, "classes": source.classes, "shards": names}
    )
    jobs = [
        _Job(source, part, dst / name, short_side, quality)
        for part, name in zip(parts, names, strict=True)
        if not index_path(dst / name).exists()
    ]
    for _ in track(in_processes(_write_shard, jobs, workers), f"writing {split} shards", len(jobs)):
        pass
    shards = [read_head(dst / name) for name in names]
    print(f"{dst}/{split}-*.tar: {summary(shards)}, {len(source.classes)} classes")
    return _list_unreadable(
        dst / f"{split}.unreadable.txt", [k for s in shards for k in s.unreadable]
    )


def _claim(manifest: Path, content: dict[str, Any]) -> None:
    """Write the manifest, or go on where the same call stopped; another call's shards are not mixed with ours."""
    if manifest.exists():
        if json.loads(manifest.read_text()) != content:
            raise ShardError(
                f"{manifest.parent} holds {manifest.stem} shards of another source or settings; "
                f"delete {manifest.parent}/{manifest.stem}* or take another folder"
            )
        return
    temporary = manifest.with_suffix(f".json.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(manifest)


def _write_shard(job: _Job) -> None:
    from webdataset import TarWriter  # imports torch: only in the processes that write

    temporary = job.path.with_suffix(f".tar.{os.getpid()}.part")
    unreadable: list[str] = []
    try:
        with (
            temporary.open("wb") as file,
            TarWriter(file, mtime=0, encoder=False, format="PAX_FORMAT") as tar,
        ):
            for entry in job.entries:
                try:
                    extension, data = _encoded(job, entry)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise  # the disk's fault, not the image's
                    unreadable.append(f"{entry.place}: {error}".replace("\n", " "))
                    continue
                sample = {"__key__": entry.key, extension: data}
                if entry.label >= 0:
                    sample["cls"] = str(entry.label).encode()
                tar.write(sample)
        head, columns = scan(temporary)
        with temporary.open("rb") as file:
            head["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        temporary.replace(job.path)
    finally:
        temporary.unlink(missing_ok=True)
    # The index comes last: where it is, the shard is whole.
    write_index(job.path, head | {"unreadable": unreadable}, columns)


def _encoded(job: _Job, entry: Entry) -> tuple[str, bytes]:
    extension, data = job.source.read(entry)
    if job.short_side is None:
        return extension, data
    with Image.open(io.BytesIO(data)) as image:
        scale = job.short_side / min(image.size)
        if scale >= 1:
            return extension, data
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        buffer = io.BytesIO()
        small = image.convert("RGB") if image.mode not in {"L", "RGB"} else image
        small.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=job.quality)
    return "jpg", buffer.getvalue()


def _list_unreadable(listing: Path, unreadable: Sequence[str]) -> list[str]:
    if unreadable:
        listing.write_text("\n".join(unreadable) + "\n")
    return list(unreadable)
