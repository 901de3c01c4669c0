"""Write WebDataset shards from an image folder, a torchvision data set, IDX files or arrays.

The same source and settings give the same bytes: samples are ordered by a hash of (seed, key),
file times are zero. Each shard is written under a temporary name, checked, and renamed; its index
follows. So a stop leaves only whole shards, and the next call goes on where it stopped. Encoded
images are copied byte for byte unless `short_side` asks for smaller ones; `.npy` and `.txt` files
always are.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from maepretrain.data.errors import ShardError
from maepretrain.data.shards.index import Shard, index_path, read_head, summary, write_index
from maepretrain.data.shards.parallel import in_processes, progress
from maepretrain.data.shards.sources import IMAGE_SUFFIXES, Entry, ImageFolder, Source
from maepretrain.data.shards.tar import scan
from maepretrain.files import replacing


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
        from maepretrain.data.decode import eight_bit  # imports torch: for the rare 16-bit image

        image = eight_bit(image)
    return image if image.mode in {"L", "RGB"} else image.convert("RGB")


def _list_unreadable(listing: Path, shards: list[Shard]) -> list[str]:
    unreadable = [line for shard in shards for line in shard.unreadable]
    if unreadable:
        with replacing(listing) as file:
            file.write("".join(f"{line}\n" for line in unreadable).encode(errors="surrogateescape"))
    return unreadable
