"""Write WebDataset shards from an image folder, a torchvision data set, IDX files or arrays.

The same source and settings give the same bytes: samples are ordered by a hash of (seed, key),
file times are zero. Each shard is written under a temporary name, checked, and renamed; its index
follows. So a stop leaves only whole shards, and the next call goes on where it stopped. Encoded
images are copied byte for byte unless `short_side` asks for smaller ones; `.npy` and `.txt` files
always are.
"""

import gzip
import hashlib
import io
import json
import math
import os
import re
import struct
import tarfile
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from maepretrain.data.arrays import MAGIC, read_array
from maepretrain.data.errors import ShardError
from maepretrain.data.shards.index import (
    Shard,
    in_processes,
    index_path,
    progress,
    read_head,
    summary,
    write_index,
)
from maepretrain.data.shards.tar import scan
from maepretrain.files import replacing

# What a file of an image folder must be called; what it holds is read from its bytes.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp"),
    *(".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".npy"),
)
# Formats that are copied, and the extension they get; PIL calls some cameras' JPEG "MPO". Others
# are stored as PNG, without loss.
COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Entry(NamedTuple):
    """One sample before it is written: its key, its class and where the source finds it."""

    key: str
    label: int
    location: int | str


class Source(ABC):
    """Where samples come from. It travels to worker processes, so it must pickle."""

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """All samples, each with a key of its own."""

    @abstractmethod
    def read(self, entry: Entry) -> tuple[str, bytes]:
        """(extension, encoded bytes) of one sample; any exception where it cannot be read."""


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder of images at any depth, or of `.txt` files where it holds no image; the class is the
    first sub-folder, -1 for files beside it.

    `.npy` arrays, be they images or signals, count as images here. Classes are numbered in sorted
    order, empty ones too: parts of a data set agree on the numbers. Hidden files and folders are no
    images.
    """

    root: Path

    @property
    def classes(self) -> list[str]:
        folders = (path.name for path in self.root.iterdir() if path.is_dir())
        return sorted(name for name in folders if not name.startswith("."))

    def entries(self) -> list[Entry]:
        labels = {name: label for label, name in enumerate(self.classes)}
        files = sorted(_files(self.root))
        paths = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
        kind, suffixes = ("images", IMAGE_SUFFIXES) if paths else ("texts", (".txt",))
        paths = paths or [path for path in files if path.lower().endswith(suffixes)]
        if 0 < len(paths) < len(files):
            others = _others(files, suffixes)
            print(f"{self.root}: {others} are no {kind} by their names and are left out")
        keys = [_key(path) for path in paths]
        times = Counter(keys)
        return [
            Entry(
                key if times[key] == 1 else f"{key}-{_digest(path)}",
                labels[path.partition("/")[0]] if "/" in path else -1,
                path,
            )
            for key, path in zip(keys, paths, strict=True)
        ]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        data = (self.root / str(entry.location)).read_bytes()
        if not str(entry.location).lower().endswith(".txt"):
            return _stored(data)
        if not data:
            raise ValueError("the text is empty")
        return "txt", data


def _files(folder: Path, prefix: str = "", above: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Paths below a folder, through links but not round in circles; a folder must be readable."""
    real = folder.resolve()
    if real in above:
        return
    with os.scandir(folder) as children:
        for child in children:
            if child.name.startswith("."):
                continue
            if child.is_dir():
                yield from _files(Path(child.path), f"{prefix}{child.name}/", above | {real})
            else:
                yield prefix + child.name


def _others(files: list[str], taken: tuple[str, ...]) -> str:
    """How many files of which suffix are not taken."""
    suffixes = (Path(path).suffix or "no suffix" for path in files)
    counts = Counter(s for s in suffixes if s.lower() not in taken)
    shown = ", ".join(f"{suffix}: {n}" for suffix, n in counts.most_common(5))
    return f"{counts.total()} files ({shown})"


def _key(path: str) -> str:
    """The path without its extension; WebDataset ends a key at the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.rpartition(".")[0].replace(".", "_")


def _digest(path: str) -> str:
    """What tells `a.jpg` and `a.png`, or `a.b.jpg` and `a_b.jpg`, apart."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


def _stored(data: bytes) -> tuple[str, bytes]:
    """(extension, bytes) to store: JPEG, PNG, WebP and .npy as they are, other formats as PNG."""
    if data.startswith(MAGIC):
        read_array(data)  # as load() below
        return "npy", data
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # raises on a damaged file, which must not travel into a shard unseen
        extension = COPIED.get(image.format or "")
        return (extension, data) if extension else ("png", _png(image))


def _png(image: Image.Image) -> bytes:
    if image.mode == "I":  # 16-bit gray in some formats
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError("32-bit pixels do not fit into a PNG")
        image = Image.fromarray(pixels.astype(np.uint16))
    elif image.mode in {"CMYK", "YCbCr", "LAB", "HSV", "RGBX"}:
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Arrays(Source):
    """Images held in memory: uint8 (n, h, w) or (n, h, w, 3), with one label each."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ShardError(f"{len(self.images)} images but {len(self.labels)} labels")

    @property
    def classes(self) -> list[str]:
        return [str(label) for label in range(int(self.labels.max()) + 1)]

    def entries(self) -> list[Entry]:
        return [Entry(f"{i:08d}", int(label), i) for i, label in enumerate(self.labels)]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        return "png", _png(Image.fromarray(self.images[entry.location]))


@dataclass(frozen=True)
class Idx(Source):
    """A folder of MNIST-style files `PREFIX-images-idx3-ubyte[.gz]`, as `train` or `t10k`."""

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
    images = _read_idx(root, f"{prefix}-images", 3)
    labels = _read_idx(root, f"{prefix}-labels", 1)
    try:
        return Arrays(images, labels)
    except ShardError as error:
        raise ShardError(f"{root}, {prefix}: {error}") from error


def _read_idx(root: Path, name: str, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes (LeCun's MNIST page).

    0, 0, 8, the number of dimensions, their big-endian sizes, then the data.
    """
    names = [f"{name}-idx{dimensions}-ubyte", f"{name}.idx{dimensions}-ubyte"]
    path = next(
        (root / n for n in [*names, *(f"{n}.gz" for n in names)] if (root / n).is_file()), None
    )
    if path is None:
        raise ShardError(f"{root} holds no {names[0]} or {names[0]}.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ShardError(f"{path} is not a whole gzip file: {error}") from error
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < start:
        raise ShardError(f"{path} is no IDX file of unsigned bytes in {dimensions} dimensions")
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    if len(data) - start != math.prod(shape):
        raise ShardError(
            f"{path} holds {len(data) - start} bytes of data, its header says {math.prod(shape)}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


@dataclass(frozen=True)
class Torchvision(Source):
    """A torchvision data set of (image, class), by class name and root; nothing is downloaded.

    Where it is a list of files their bytes are copied, else its images are stored as PNG.
    """

    name: str
    root: str
    split: str

    @property
    def classes(self) -> list[str]:
        return [str(name) for name in getattr(self._set, "classes", [])]

    @property
    def _set(self) -> Any:
        return _torchvision_set(self.name, self.root, self.split)

    @property
    def _samples(self) -> list[Any] | None:
        """Paths or (path, class) where the data set is a list of files."""
        names = ("samples", "_samples", "imgs", "_image_files", "_images")
        samples = _first_attribute(self._set, names)
        first = samples[0] if isinstance(samples, list) and samples else None
        path = first[0] if isinstance(first, tuple) else first
        return samples if isinstance(path, str | Path) else None

    def entries(self) -> list[Entry]:
        labels = _first_attribute(self._set, ("targets", "_labels", "labels"))
        if labels is None and self._samples and isinstance(self._samples[0], tuple):
            labels = [sample[1] for sample in self._samples]
        if labels is None:
            labels = [
                self._set[i][1]
                for i in progress(range(len(self._set)), "reading labels", len(self._set))
            ]
        try:
            return [Entry(f"{i:08d}", int(label), i) for i, label in enumerate(labels)]
        except (TypeError, ValueError) as error:
            raise ShardError(f"torchvision's {self.name} has no class numbers: {error}") from error

    def read(self, entry: Entry) -> tuple[str, bytes]:
        if self._samples is None:
            return "png", _png(self._set[entry.location][0])
        sample = self._samples[int(entry.location)]
        return _stored(Path(sample[0] if isinstance(sample, tuple) else sample).read_bytes())


def _first_attribute(dataset: Any, names: Sequence[str]) -> Any:
    return next((getattr(dataset, name) for name in names if hasattr(dataset, name)), None)


@lru_cache(1)
def _torchvision_set(name: str, root: str, split: str) -> Any:
    import inspect

    from torchvision import datasets

    dataset = getattr(datasets, name, None)
    if not isinstance(dataset, type):
        raise ShardError(f"torchvision.datasets has no {name}")
    parameters = inspect.signature(dataset).parameters
    choice = {"train": split == "train"} if "train" in parameters else {"split": split}
    try:
        return dataset(root, **(choice if set(choice) <= set(parameters) else {}))
    except (RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
        raise ShardError(f"torchvision's {name} in {root}: {str(error).strip()}") from error


def find_source(src: str, root: str | None, split: str) -> Source:
    """The source that `src` names.

    `torchvision:NAME` (with root), a folder of IDX files or a folder of images.

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
    if any(folder.glob("*[-.]idx3-ubyte*")):
        return Idx(folder, "t10k" if split in {"test", "val"} else split)
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
    """Write `dst/SPLIT-000000.tar`, ... with their indexes and `dst/SPLIT.json`.

    Returns a line for each image that could not be read; `dst/SPLIT.unreadable.txt` holds them too.

    Raises:
        ShardError: an empty source, a setting out of range, or a folder that holds other shards.
        OSError: a full disk or a missing permission, with the name of the file.
    """
    _check_settings(split, samples_per_shard, short_side, quality)
    if isinstance(source, ImageFolder) and dst.resolve().is_relative_to(source.root.resolve()):
        raise ShardError(f"{dst} lies inside the images' folder {source.root}; take another folder")
    entries = _ordered(source, seed)
    if short_side is not None:
        _check_all_images(entries)
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
    _claim(dst, split, {"settings": settings, "classes": source.classes, "shards": names})
    jobs = [
        _Job(source, part, dst / name, short_side, quality)
        for part, name in zip(parts, names, strict=True)
        if not (index_path(dst / name).exists() and (dst / name).exists())
    ]
    written = in_processes(_write_shard, jobs, workers)
    for _ in progress(written, f"writing {split} shards", len(jobs)) if jobs else ():
        pass
    _sweep(dst, set(names))
    shards = [read_head(dst / name) for name in names]
    print(f"{dst}/{split}-*.tar: {summary(shards)}, {len(source.classes)} classes")
    return _list_unreadable(dst / f"{split}.unreadable.txt", shards)


def _sweep(dst: Path, names: set[str]) -> None:
    """Remove what processes that were killed left of these shards."""
    for part in dst.glob("*.part"):
        if part.name.partition(".tar")[0] + ".tar" in names:
            part.unlink()


def _check_settings(
    split: str, samples_per_shard: int, short_side: int | None, quality: int
) -> None:
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise ShardError(f"split {split!r} must be letters, digits, '_', '-' and '.'")
    if samples_per_shard < 1:
        raise ShardError(f"samples_per_shard {samples_per_shard} must be at least 1")
    if short_side is not None and short_side < 1:
        raise ShardError(f"short_side {short_side} must be at least 1")
    if not 1 <= quality <= 100:
        raise ShardError(f"quality {quality} must be 1 to 100")


def _check_all_images(entries: list[Entry]) -> None:
    for suffix, kind in ((".npy", "arrays"), (".txt", "texts")):
        found = [
            entry.location for entry in entries if str(entry.location).lower().endswith(suffix)
        ]
        if found:
            raise ShardError(
                f"short_side makes images smaller, not {kind}, and {len(found)} files are "
                f"{suffix}: {found[0]}, ...; leave out short_side"
            )


def _ordered(source: Source, seed: int) -> list[Entry]:
    """The entries in the order of a hash of (seed, key)."""
    entries = source.entries()
    if not entries:
        folder = getattr(source, "root", type(source).__name__)
        raise ShardError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}) or .txt files")
    times = Counter(entry.key for entry in entries)
    if len(times) < len(entries):
        raise ShardError(f"two images would get the key {times.most_common(1)[0][0]}")
    return sorted(entries, key=lambda e: hashlib.sha256(os.fsencode(f"{seed}/{e.key}")).digest())


def _claim(dst: Path, split: str, content: dict[str, Any]) -> None:
    """Write the manifest, or go on where the same call stopped; never mix with other shards."""
    manifest = dst / f"{split}.json"
    if not manifest.exists():
        ours = re.compile(re.escape(split) + r"-\d+\.tar")
        foreign = next((path for path in dst.iterdir() if ours.fullmatch(path.name)), None)
        if foreign is not None:
            raise ShardError(f"{foreign} was not written by this call; take another folder")
        with replacing(manifest) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
        return
    try:
        same = json.loads(manifest.read_bytes()) == content
    except ValueError:
        same = False
    if not same:
        raise ShardError(
            f"{dst} holds {split} shards of another source or settings; delete {dst}/{split}* or "
            f"take another folder"
        )


def _write_shard(job: _Job) -> None:
    unreadable: list[str] = []
    with replacing(job.path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for entry in job.entries:
                try:
                    extension, data = _encoded(job, entry)
                except Exception as error:  # PIL's readers raise anything on damaged bytes
                    unreadable.append(_complaint(entry, error))
                    continue
                if entry.label >= 0:
                    _add(tar, f"{entry.key}.cls", str(entry.label).encode())
                _add(tar, f"{entry.key}.{extension}", data)
        file.flush()
        temporary = Path(file.name)
        head, columns = scan(temporary)
        assert head["samples"] + len(unreadable) == len(job.entries), "samples that do not read"
        with temporary.open("rb") as written:
            head["sha256"] = hashlib.file_digest(written, "sha256").hexdigest()
    # The index comes last: where it is, the shard is whole.
    write_index(index_path(job.path), head | {"unreadable": unreadable}, columns)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add what webdataset's TarWriter would; importing it loads torch, in every process."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(data), 0o444, 0
    header.uname = header.gname = "bigdata"
    tar.addfile(header, io.BytesIO(data))


def _complaint(entry: Entry, error: Exception) -> str:
    """The line about an unreadable image; raises where the disk failed, not the image."""
    gone = isinstance(error, FileNotFoundError)  # a link that leads nowhere
    if isinstance(error, OSError) and error.errno is not None and not gone:
        error.filename = error.filename or str(entry.location)
        raise error
    message = str(error).partition(" <_io.BytesIO")[0]  # PIL names the buffer, by its address
    return " ".join(f"{entry.location}: {type(error).__name__}: {message}".split())


def _encoded(job: _Job, entry: Entry) -> tuple[str, bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extension, data = job.source.read(entry)
        return (extension, data) if job.short_side is None else _smaller(job, extension, data)


def _smaller(job: _Job, extension: str, data: bytes) -> tuple[str, bytes]:
    """The image as JPEG with `short_side`, or as it is where it is no larger."""
    assert job.short_side is not None
    with Image.open(io.BytesIO(data)) as image:
        scale = job.short_side / min(image.size)
        if scale >= 1:
            return extension, data
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        buffer = io.BytesIO()
        pixels = _gray_or_rgb(image).resize(size, Image.Resampling.BICUBIC)
        pixels.save(buffer, "JPEG", quality=job.quality, exif=_orientation(image))
    return "jpg", buffer.getvalue()


def _orientation(image: Image.Image) -> bytes:
    """EXIF of the orientation tag alone, for a reader that turns images; nothing where upright."""
    tag, exif = ExifTags.Base.Orientation, Image.Exif()
    with suppress(Exception):  # PIL's reader raises anything on a damaged tag
        exif[tag] = image.getexif()[tag]
        return exif.tobytes() if exif[tag] in range(2, 9) else b""
    return b""


def _gray_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        from maepretrain.data.images import eight_bit  # imports torch: for the rare 16-bit image

        image = eight_bit(image)
    return image if image.mode in {"L", "RGB"} else image.convert("RGB")


def _list_unreadable(listing: Path, shards: list[Shard]) -> list[str]:
    unreadable = [line for shard in shards for line in shard.unreadable]
    if unreadable:
        with replacing(listing) as file:
            file.write("".join(f"{line}\n" for line in unreadable).encode(errors="surrogateescape"))
    return unreadable
