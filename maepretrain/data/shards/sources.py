"""Sources of samples to write: image folders, torchvision data sets, IDX files and arrays."""

import gzip
import hashlib
import io
import math
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maepretrain.data.arrays import MAGIC, read_array
from maepretrain.data.errors import ShardError
from maepretrain.data.shards.parallel import progress

# Suffixes of an image folder's files; their formats are read from their bytes.
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
    ".gif",
    ".npy",
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
    """Numbers of the files that are not taken, by suffix."""
    suffixes = (Path(path).suffix or "no suffix" for path in files)
    counts = Counter(s for s in suffixes if s.lower() not in taken)
    shown = ", ".join(f"{suffix}: {n}" for suffix, n in counts.most_common(5))
    return f"{counts.total()} files ({shown})"


def _key(path: str) -> str:
    """The path without its extension; WebDataset ends a key at the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.rpartition(".")[0].replace(".", "_")


def _digest(path: str) -> str:
    """A digest that tells `a.jpg` and `a.png`, or `a.b.jpg` and `a_b.jpg`, apart."""
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
