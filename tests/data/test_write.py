"""Written shards against the files they were made from, read with tarfile, webdataset and PIL."""

import gzip
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import ExifTags, Image

from maepretrain.data.errors import ShardError
from maepretrain.data.shards.index import index_path, open_shards
from maepretrain.data.shards.sources import Arrays, Entry, Idx, ImageFolder, Source, find_source
from maepretrain.data.shards.write import write_shards


def pixels(seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """A picture with smooth colours, so that JPEG keeps it."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, form: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def put(root: Path, name: str, content: bytes | Image.Image) -> bytes:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(root / name)
        return (root / name).read_bytes()
    (root / name).write_bytes(content)
    return content


def images(root: Path, n: int = 12) -> Path:
    """A folder of `n` JPEG images in three classes."""
    for i in range(n):
        put(root, f"class{i % 3}/{i:03d}.jpg", pixels(i))
    return root


def members(dst: Path, split: str = "train") -> dict[str, bytes]:
    """Every member of every shard, by Python's tarfile."""
    found: dict[str, bytes] = {}
    for path in sorted(dst.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found and member.mtime == 0
                found[member.name] = cast(Any, tar.extractfile(member)).read()
    return found


def images_only(dst: Path) -> dict[str, bytes]:
    return {n: c for n, c in members(dst).items() if not n.endswith(".cls")}


def all_bytes(dst: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(dst.iterdir())}


# What is written.


def test_encoded_images_are_copied_byte_for_byte(tmp_path: Path):
    src, exif = tmp_path / "src", Image.Exif()
    exif[0x0112] = 6
    files = {
        "c/baseline.jpg": encoded(pixels(0), "JPEG"),
        "c/progressive.JPEG": encoded(pixels(1), "JPEG", progressive=True, exif=exif),
        "c/cmyk.JPG": encoded(pixels(2, mode="CMYK"), "JPEG"),
        "c/gray.jfif": encoded(pixels(3, mode="L"), "JPEG"),
        "c/pair.jpg": encoded(pixels(4), "MPO", save_all=True, append_images=[pixels(5)]),
        "c/alpha.png": encoded(pixels(6, mode="RGBA"), "PNG"),
        "c/palette.png": encoded(pixels(7, mode="P"), "PNG"),
        "c/lossy.webp": encoded(pixels(8), "WEBP"),
        "c/misnamed.jpg": encoded(pixels(9), "PNG"),
        "c/tail.jpg": encoded(pixels(10), "JPEG") + b"what some editors append",
    }
    for name, content in files.items():
        put(src, name, content)
    assert write_shards(ImageFolder(src), tmp_path / "dst") == []
    extensions = {"lossy": "webp", "alpha": "png", "palette": "png", "misnamed": "png"}
    assert images_only(tmp_path / "dst") == {
        f"c/{Path(name).stem}.{extensions.get(Path(name).stem, 'jpg')}": content
        for name, content in files.items()
    }


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.bmp", pixels(0)),
        ("a.ppm", pixels(1)),
        ("a.pgm", pixels(2, mode="L")),
        ("a.tif", pixels(3)),
        ("a.TIFF", pixels(4, mode="CMYK")),
        ("a.gif", pixels(5, mode="P")),
        ("a.pgm", Image.fromarray(np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10))),
        ("a.tif", Image.fromarray(np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10))),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_other_formats_become_png_without_loss(tmp_path: Path, name: str, image: Image.Image):
    put(tmp_path / "src", name, image)
    assert write_shards(ImageFolder(tmp_path / "src"), tmp_path / "dst") == []
    ((written, content),) = members(tmp_path / "dst").items()
    with Image.open(io.BytesIO(content)) as ours, Image.open(tmp_path / "src" / name) as truth:
        assert (written, ours.format) == ("a.png", "PNG")
        truth = truth.convert("RGB") if truth.mode in {"CMYK", "P"} else truth
        ours = ours.convert("RGB") if ours.mode == "P" else ours
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(truth))


def saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


def test_arrays_are_copied_byte_for_byte(tmp_path: Path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    files = {
        "a/bands.npy": saved(np.ones((5, 4, 13), np.float32)),
        "b/fortran.NPY": saved(np.asfortranarray(np.ones((5, 4), ">i2"))),
        "b/tokens.v1.npy": saved(np.arange(9)),
        "b/misnamed.jpg": saved(np.zeros((5, 4), np.uint8)),
        "alone.npy": saved(np.zeros(3, bool)),
        "b/picture.jpg": encoded(pixels(0), "JPEG"),
    }
    for name, content in files.items():
        put(src, name, content)
    assert write_shards(ImageFolder(src), dst, workers=2) == []
    written = members(dst)
    keys = {name: name.rpartition(".")[0].replace(".", "_") for name in files}
    assert {n: c for n, c in written.items() if not n.endswith(".cls")} == {
        f"{keys[name]}.{'jpg' if 'picture' in name else 'npy'}": content
        for name, content in files.items()
    }
    labels = {name: written.get(f"{key}.cls") for name, key in keys.items()}
    assert labels == {name: {"a": b"0", "b": b"1"}.get(name[: name.find("/")]) for name in files}
    (shard,) = open_shards(str(dst / "train-*.tar"))
    assert shard.samples == 6


def test_unreadable_arrays_are_listed(tmp_path: Path):
    src, dst = images(tmp_path / "src"), tmp_path / "dst"
    broken = {
        "class0/short.npy": (saved(np.ones(9))[:-1], "71 bytes of data, its header says 72"),
        "class0/nan.npy": (saved(np.array([1, np.nan])), "NaN, infinity"),
        "class1/complex.npy": (saved(np.ones(3, complex)), "dtype complex128"),
        "class1/objects.npy": (saved(np.array([None])), "dtype object"),
        "class2/header.npy": (saved(np.ones(9))[:30], "no header of a .npy file"),
        "class2/page.npy": (b"<html>404</html>", "cannot identify"),
    }
    for name, (content, _) in broken.items():
        put(src, name, content)
    complaints = dict(line.split(": ", 1) for line in write_shards(ImageFolder(src), dst))
    assert complaints.keys() == broken.keys()
    for name, (_, message) in broken.items():
        assert message in complaints[name], name
    assert len(images_only(dst)) == 12


def test_a_folder_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Byte for byte, whatever they hold; an empty one is listed."""
    src, odd = tmp_path / "src", bytes(range(256))
    for name, text in (("a/one.txt", b"one"), ("b/odd.TXT", odd), ("b/none.txt", b"")):
        put(src, name, text)
    put(src, "notes.md", b"x")
    (line,) = write_shards(ImageFolder(src), tmp_path / "dst")
    assert line == "b/none.txt: ValueError: the text is empty"
    with tarfile.open(tmp_path / "dst/train-000000.tar") as tar:
        found = {m.name: cast(Any, tar.extractfile(m)).read() for m in tar}
    assert found == {"a/one.txt": b"one", "a/one.cls": b"0", "b/odd.txt": odd, "b/odd.cls": b"1"}
    assert "1 files (.md: 1) are no texts by their names" in capsys.readouterr().out
    with pytest.raises(ShardError, match=r"smaller, not texts, and 3 files are \.txt: "):
        write_shards(ImageFolder(src), tmp_path / "small", short_side=8)


@pytest.mark.parametrize("name", ["class0/a.npy", "B.NPY"])
def test_short_side_refuses_arrays(tmp_path: Path, name: str):
    src = images(tmp_path / "src")
    put(src, name, saved(np.zeros((50, 50), np.uint8)))
    message = f"short_side makes images smaller, not arrays, and 1 files are .npy: {name}, "
    with pytest.raises(ShardError, match=message):
        write_shards(ImageFolder(src), tmp_path / "dst", short_side=5)
    assert not (tmp_path / "dst").exists()


def test_classes_are_the_sorted_first_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    src = tmp_path / "src"
    for name in ("zebra/1.jpg", "Ant/deep/er/2.jpg", "ant/3.jpg", "b.dotted/4.jpg", "5.jpg"):
        put(src, name, pixels(0))
    for hidden in (".git/6.jpg", "ant/.7.jpg", "ant/._3.jpg", "ant/.thumbnails/8.jpg"):
        put(src, hidden, pixels(0))
    put(src, "ant/notes.txt", b"not an image")
    put(src, "ant/phone.HEIC", b"not read")
    (src / "empty").mkdir()
    write_shards(ImageFolder(src), tmp_path / "dst")
    # Sorted as Python and torchvision sort: capitals first; an empty folder keeps its number.
    classes = ["Ant", "ant", "b.dotted", "empty", "zebra"]
    assert json.loads((tmp_path / "dst/train.json").read_text())["classes"] == classes
    labels = {n: int(c) for n, c in members(tmp_path / "dst").items() if n.endswith(".cls")}
    assert labels == {
        "Ant/deep/er/2.cls": 0,
        "ant/3.cls": 1,
        "b.dotted/4.cls": 2,
        "zebra/1.cls": 4,
    }
    assert sorted(images_only(tmp_path / "dst")) == [
        *("5.jpg", "Ant/deep/er/2.jpg", "ant/3.jpg", "b.dotted/4.jpg", "zebra/1.jpg")
    ]
    printed = capsys.readouterr().out
    assert "2 files (.txt: 1, .HEIC: 1) are no images by their names and are left out" in printed
    assert "5 samples in 1 shards" in printed and "5 classes" in printed


def test_classes_are_torchvisions(tmp_path: Path):
    from torchvision.datasets import ImageFolder as TorchvisionFolder

    root = images(tmp_path / "src")
    truth = TorchvisionFolder(str(root))
    assert ImageFolder(root).classes == truth.classes
    ours = {str(root / str(e.location)): e.label for e in ImageFolder(root).entries()}
    assert ours == dict(truth.samples)


NAMES = [
    *("c/img.v1.jpg", "c/img.v2.jpg", "c/img_v2.jpg", "c/img.jpg", "c/img.png", "c/img.JPG"),
    *("c/a.b.c.jpg", "c.d/a.jpg", "c.d/e.f/a.b.jpg", "c/ blank .jpg", "c/trailing..jpg"),
    *("c/jpg.jpg", "c/ünïcödé-日本.jpg", "c/new\nline.jpg", "c/cls.cls.jpg", "c/%s{0}*?[1].jpg"),
    f"c/{'long' * 50}.jpg",
]


def test_every_name_becomes_a_sample_of_its_own_for_webdataset_and_for_us(tmp_path: Path):
    import webdataset

    src, dst = tmp_path / "src", tmp_path / "dst"
    contents = {
        name: put(src, name, encoded(pixels(i), "PNG" if name.endswith("png") else "JPEG"))
        for i, name in enumerate(NAMES)
    }
    assert len(set(contents.values())) == len(NAMES)
    write_shards(ImageFolder(src), dst)
    read = cast(Any, webdataset).WebDataset
    theirs = {
        sample["__key__"]: sample.get("jpg") or sample["png"]
        for sample in read(str(dst / "train-000000.tar"), shardshuffle=False)
    }
    assert sorted(theirs.values()) == sorted(contents.values())
    (shard,) = open_shards(str(dst / "train-000000.tar"))
    assert shard.columns().keys == tuple(theirs)
    assert (shard.errors, shard.further_inputs) == ({}, 0)
    # Names that need no change keep theirs; a dot becomes an underscore.
    assert {"c.d/a", "c.d/e.f/a_b", "c/a_b_c", "c/img_v1", "c/ünïcödé-日本"} <= theirs.keys()
    assert "c/img" not in theirs  # of three: each says which one it is


def test_names_that_are_no_utf_8(tmp_path: Path):
    name = os.fsdecode(b"caf\xe9.jpg")
    content = put(tmp_path / "src", name, encoded(pixels(0), "JPEG"))
    put(tmp_path / "src", os.fsdecode(b"broken-\xe9.jpg"), b"no image")
    unreadable = write_shards(ImageFolder(tmp_path / "src"), tmp_path / "dst")
    assert members(tmp_path / "dst") == {name: content}
    assert len(unreadable) == 1
    assert (tmp_path / "dst/train.unreadable.txt").read_bytes().startswith(b"broken-\xe9.jpg: ")


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path: Path):
    put(tmp_path / "elsewhere", "deep/1.jpg", pixels(1))
    put(tmp_path / "src", "b/2.jpg", pixels(2))
    (tmp_path / "src/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "src/b/up").symlink_to(tmp_path / "src")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    entries = ImageFolder(tmp_path / "src").entries()
    assert [(e.location, e.label) for e in entries] == [("a/deep/1.jpg", 0), ("b/2.jpg", 1)]


def test_shards_are_webdatasets_to_the_byte(tmp_path: Path):
    from webdataset.writer import TarWriter

    src, dst = images(tmp_path / "src"), tmp_path / "dst"
    for name in ("deep/" * 30 + "long.png", "ünï/cödé.webp", "no class.jpg"):
        put(src, name, pixels(99))
    write_shards(ImageFolder(src), dst)
    classes = json.loads((dst / "train.json").read_text())["classes"]
    truth = io.BytesIO()
    with TarWriter(cast(Any, truth), mtime=0, encoder=False, format="PAX_FORMAT") as tar:
        for name in images_only(dst):
            key, _, extension = name.rpartition(".")
            sample = {"__key__": key, extension: (src / name).read_bytes()}
            if "/" in key:
                sample["cls"] = b"%d" % classes.index(key.partition("/")[0])
            tar.write(sample)
    assert (dst / "train-000000.tar").read_bytes() == truth.getvalue()


def test_gnu_tar_and_webdataset_read_what_is_written(tmp_path: Path):
    import webdataset

    src, dst = images(tmp_path / "src"), tmp_path / "dst"
    write_shards(ImageFolder(src), dst, samples_per_shard=5)
    for path in dst.glob("*.tar"):
        subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
    for i in range(12):
        name = f"class{i % 3}/{i:03d}"
        assert (tmp_path / f"{name}.jpg").read_bytes() == (src / f"{name}.jpg").read_bytes()
        assert (tmp_path / f"{name}.cls").read_bytes() == b"%d" % (i % 3)
    dataset = cast(Any, webdataset).WebDataset(
        str(dst / "train-{000000..000002}.tar"), shardshuffle=False
    )
    rows = list(dataset.decode("rgb8").to_tuple("__key__", "jpg", "cls"))
    assert len(rows) == 12
    for key, array, label in rows:
        with Image.open(src / f"{key}.jpg") as image:
            np.testing.assert_array_equal(array, np.asarray(image))
        assert label == int(key[5])


# The same bytes, again and elsewhere.


def test_the_same_source_gives_the_same_bytes(tmp_path: Path):
    first = images(tmp_path / "src")
    (tmp_path / "copy").mkdir()
    for i in reversed(range(12)):  # another order on disk, other times
        name = f"class{i % 3}/{i:03d}.jpg"
        put(tmp_path / "copy", name, (first / name).read_bytes())
    for src, dst in ((first, "1"), (first, "2"), (tmp_path / "copy", "3")):
        write_shards(ImageFolder(src), tmp_path / dst, samples_per_shard=5)
    assert all_bytes(tmp_path / "1") == all_bytes(tmp_path / "2") == all_bytes(tmp_path / "3")
    assert len(all_bytes(tmp_path / "1")) == 3 * 2 + 1


def test_processes_give_the_same_bytes(tmp_path: Path):
    src = images(tmp_path / "src")
    put(src, "class0/broken.jpg", b"no image")
    results = [
        write_shards(
            ImageFolder(src), tmp_path / f"{n}", samples_per_shard=4, short_side=8, workers=n
        )
        for n in (1, 2)
    ]
    assert results[0] == results[1] and len(results[0]) == 1
    assert all_bytes(tmp_path / "1") == all_bytes(tmp_path / "2")


def test_the_order_is_shuffled_by_the_seed(tmp_path: Path):
    src, orders = images(tmp_path / "src", 30), []
    for seed in (0, 1):
        write_shards(ImageFolder(src), tmp_path / f"{seed}", seed=seed, samples_per_shard=7)
        orders.append([name[:-4] for name in images_only(tmp_path / f"{seed}")])
    assert sorted(orders[0]) == sorted(orders[1]) and len(orders[0]) == 30
    assert orders[0] != orders[1]
    for order in orders:
        # Fewer neighbours of one class than a sorted folder has (27 of 29).
        assert sum(a[:6] == b[:6] for a, b in pairwise(order)) < 18


@pytest.mark.parametrize(("n", "per_shard"), [(1, 5), (5, 5), (6, 5), (12, 1), (12, 100)])
def test_shards_are_filled(tmp_path: Path, n: int, per_shard: int):
    write_shards(ImageFolder(images(tmp_path / "src", n)), tmp_path / "dst", "val", per_shard)
    shards = open_shards(str(tmp_path / "dst" / "val-*.tar"))
    sizes = [min(per_shard, n - i) for i in range(0, n, per_shard)]
    assert [shard.samples for shard in shards] == sizes
    assert [s.path.name for s in shards] == [f"val-{i:06d}.tar" for i in range(len(sizes))]


# Stopped and resumed.


@dataclass(frozen=True)
class Interrupted(Source):
    """An image folder whose reader is stopped by the user once `at` images were read."""

    folder: ImageFolder
    at: int
    reads: list[str]

    @property
    def classes(self) -> list[str]:
        return self.folder.classes

    def entries(self) -> list[Entry]:
        return self.folder.entries()

    def read(self, entry: Entry) -> tuple[str, bytes]:
        if len(self.reads) == self.at:
            raise KeyboardInterrupt
        self.reads.append(entry.key)
        return self.folder.read(entry)


@pytest.mark.parametrize("at", [0, 1, 4, 5, 9, 11])
def test_a_stop_leaves_whole_shards_and_the_next_call_goes_on(tmp_path: Path, at: int):
    folder = ImageFolder(images(tmp_path / "src"))
    write_shards(folder, tmp_path / "truth", samples_per_shard=4)
    dst, truth = tmp_path / "dst", all_bytes(tmp_path / "truth")
    with pytest.raises(KeyboardInterrupt):
        write_shards(Interrupted(folder, at, []), dst, samples_per_shard=4)
    whole = at // 4
    names = {f"train-{i:06d}.tar{suffix}" for i in range(whole) for suffix in ("", ".idx")}
    assert all_bytes(dst) == {name: truth[name] for name in {"train.json", *names}}
    finished = {name: (dst / name).stat() for name in names}
    again = Interrupted(folder, 99, [])
    write_shards(again, dst, samples_per_shard=4)
    assert all_bytes(dst) == truth
    assert len(again.reads) == 12 - 4 * whole
    assert {name: (dst / name).stat() for name in names} == finished


@pytest.mark.parametrize("gone", ["train-000001.tar", "train-000001.tar.idx"])
def test_a_missing_shard_or_index_is_written_again(tmp_path: Path, gone: str):
    folder, dst = ImageFolder(images(tmp_path / "src")), tmp_path / "dst"
    write_shards(folder, dst, samples_per_shard=4)
    truth = all_bytes(dst)
    (dst / gone).unlink()
    again = Interrupted(folder, 99, [])
    write_shards(again, dst, samples_per_shard=4)
    assert all_bytes(dst) == truth and len(again.reads) == 4


@pytest.mark.slow
def test_a_killed_process_leaves_whole_shards(tmp_path: Path):
    src, dst = images(tmp_path / "src", 90), tmp_path / "dst"
    code = (
        "from pathlib import Path; from maepretrain.data.shards.write import *; "
        f"write_shards(ImageFolder(Path({str(src)!r})), Path({str(dst)!r}), samples_per_shard=1)"
    )
    write_shards(ImageFolder(src), tmp_path / "truth", samples_per_shard=1)
    truth = all_bytes(tmp_path / "truth")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while len(list(dst.glob("*.idx")) if dst.exists() else []) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {n: c for n, c in all_bytes(dst).items() if not n.endswith(".part")}
    assert 3 * 2 < len(left) < len(truth) and left.items() <= truth.items()
    # What a kill in the middle of a shard leaves is removed by the next call.
    (dst / "train-000050.tar.0123456789ab.part").write_bytes(b"half")
    (dst / "other-000050.tar.0123456789ab.part").write_bytes(b"of another call")
    write_shards(ImageFolder(src), dst, samples_per_shard=1)
    other = all_bytes(dst).keys() - truth.keys()
    assert other == {"other-000050.tar.0123456789ab.part"}
    assert all_bytes(dst).items() >= truth.items()


def test_other_settings_or_sources_are_refused(tmp_path: Path):
    src, dst = images(tmp_path / "src"), tmp_path / "dst"
    write_shards(ImageFolder(src), dst, samples_per_shard=4)
    before = all_bytes(dst)
    for change in ({"seed": 1}, {"samples_per_shard": 5}, {"short_side": 8}):
        settings: dict[str, Any] = {"samples_per_shard": 4} | change
        with pytest.raises(ShardError, match=r"train shards of another source or settings; delete"):
            write_shards(ImageFolder(src), dst, **settings)
    put(src, "class0/more.jpg", pixels(99))
    with pytest.raises(ShardError, match=r"train shards of another source or settings; delete"):
        write_shards(ImageFolder(src), dst, samples_per_shard=4)
    assert all_bytes(dst) == before
    # Another split is another set of shards; quality matters only where images are encoded.
    write_shards(ImageFolder(src), dst, "val")
    (src / "class0/more.jpg").unlink()
    write_shards(ImageFolder(src), dst, samples_per_shard=4, quality=50)
    assert before.items() <= all_bytes(dst).items()


def test_shards_of_others_are_not_overwritten(tmp_path: Path):
    src, dst = images(tmp_path / "src"), tmp_path / "dst"
    put(dst, "train-000003.tar", b"somebody's")
    with pytest.raises(ShardError, match=r"train-000003.tar was not written by this call"):
        write_shards(ImageFolder(src), dst)
    assert all_bytes(dst) == {"train-000003.tar": b"somebody's"}
    write_shards(ImageFolder(src), dst, "train-2")
    put(dst, "val.json", b"{ not json")
    with pytest.raises(ShardError, match=r"val shards of another source or settings"):
        write_shards(ImageFolder(src), dst, "val")


# What cannot be read or written.


def test_unreadable_images_are_listed_and_the_rest_is_written(tmp_path: Path):
    src, dst = images(tmp_path / "src"), tmp_path / "dst"
    jpeg = encoded(pixels(0, (200, 200)), "JPEG")
    png = bytearray(encoded(pixels(0), "PNG"))
    png[60] ^= 1
    broken = {
        "class0/half.jpg": jpeg[: len(jpeg) // 2],
        "class0/empty.jpg": b"",
        "class1/page.png": b"<html>404</html>",
        "class1/flipped.png": bytes(png),
        "class2/float.tif": encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"),
        "lone.webp": encoded(pixels(0), "WEBP")[:30],
    }
    for name, content in broken.items():
        put(src, name, content)
    (src / "class2/dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    names = {*broken, "class2/dangling.jpg"}
    unreadable = write_shards(ImageFolder(src), dst, samples_per_shard=5)
    assert {line.partition(": ")[0] for line in unreadable} == names
    assert len(unreadable) == len(names) and not any("\n" in line for line in unreadable)
    assert (dst / "train.unreadable.txt").read_text().splitlines() == unreadable
    assert len(images_only(dst)) == 12
    shards = open_shards(str(dst / "train-*.tar"))
    assert sum(shard.samples for shard in shards) == 12
    assert sorted(line for shard in shards for line in shard.unreadable) == sorted(unreadable)
    # Also when nothing is left to write.
    assert write_shards(ImageFolder(src), dst, samples_per_shard=5) == unreadable


def test_no_listing_where_all_is_well(tmp_path: Path):
    assert write_shards(ImageFolder(images(tmp_path / "src")), tmp_path / "dst") == []
    assert not (tmp_path / "dst/train.unreadable.txt").exists()


def test_images_that_are_all_unreadable(tmp_path: Path):
    put(tmp_path / "src", "a.jpg", b"")
    assert len(write_shards(ImageFolder(tmp_path / "src"), tmp_path / "dst")) == 1
    (shard,) = open_shards(str(tmp_path / "dst/train-*.tar"))
    assert shard.samples == 0


@contextmanager
def unprivileged() -> Iterator[None]:
    """Tests may run as root, to whom permissions do not apply."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder for everyone; pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        images(Path(name) / "src")
        yield Path(name)


@pytest.mark.parametrize("closed", ["src/class1/001.jpg", "src/class1"])
def test_a_missing_permission_to_read_is_an_error_that_names_the_path(public: Path, closed: str):
    mode = (public / closed).stat().st_mode
    (public / closed).chmod(0)
    with unprivileged(), pytest.raises(PermissionError) as caught:
        write_shards(ImageFolder(public / "src"), public / "dst")
    assert caught.value.filename == str(public / closed)
    assert not list(public.glob("dst/*.tar*"))
    (public / closed).chmod(mode)


def test_a_missing_permission_to_write_is_an_error_that_names_the_path(public: Path):
    (public / "dst").mkdir()
    (public / "dst").chmod(0o555)
    with unprivileged(), pytest.raises(PermissionError, match=r"dst/train.json"):
        write_shards(ImageFolder(public / "src"), public / "dst")


@contextmanager
def full_disk(left: int) -> Iterator[None]:
    """No file may grow beyond `left` bytes: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_an_error_that_names_the_shard(tmp_path: Path, workers: int):
    source = ImageFolder(images(tmp_path / "src"))
    write_shards(source, tmp_path / "truth", samples_per_shard=6)
    with full_disk(8000), pytest.raises(OSError) as caught:
        write_shards(source, tmp_path / "dst", samples_per_shard=6, workers=workers)
    assert caught.value.filename == str(tmp_path / "dst/train-000000.tar")
    assert list(all_bytes(tmp_path / "dst")) == ["train.json"]
    write_shards(source, tmp_path / "dst", samples_per_shard=6)
    assert all_bytes(tmp_path / "dst") == all_bytes(tmp_path / "truth")


# Smaller images.


def test_short_side_makes_larger_images_smaller_and_copies_the_rest(tmp_path: Path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    sizes = {"wide": (90, 60), "tall": (40, 200), "even": (30, 30), "small": (29, 400)}
    files = {k: put(src, f"{k}.png", pixels(i, s)) for i, (k, s) in enumerate(sizes.items())}
    write_shards(ImageFolder(src), dst, short_side=30, quality=80)
    written = members(dst)
    assert written["even.png"] == files["even"] and written["small.png"] == files["small"]
    for name, size in (("wide", (45, 30)), ("tall", (30, 150))):
        with Image.open(src / f"{name}.png") as image:
            truth = encoded(image.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=80)
        assert written[f"{name}.jpg"] == truth


def test_short_side_keeps_the_brightness_of_every_mode(tmp_path: Path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    shades = np.linspace(0, 255, 3600).reshape(60, 60)
    gray = Image.fromarray(shades.astype(np.uint8))
    for mode in ("L", "RGB", "RGBA", "LA", "P", "CMYK"):
        put(src, f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}", gray.convert(mode))
    put(src, "16.png", Image.fromarray((shades * 257).astype(np.uint16)))
    put(src, "16.pgm", Image.fromarray((shades * 257).astype(np.uint16)))
    assert write_shards(ImageFolder(src), dst, short_side=20) == []
    truth = np.asarray(gray.resize((20, 20), Image.Resampling.BICUBIC)).astype(float)
    assert len(members(dst)) == 8
    for name, content in members(dst).items():
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.size) == ("JPEG", (20, 20)), name
            assert np.abs(np.asarray(image.convert("L")) - truth).mean() < 2, name


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_short_side_keeps_the_orientation_and_no_other_tag(tmp_path: Path, form: str):
    """The pixels stay as they are; only a reader that is asked to turns them."""
    exif, name = Image.Exif(), f"a.{form.lower()}"
    exif[ExifTags.Base.Artist] = "somebody"
    for orientation in range(10):
        src, dst = tmp_path / f"src{orientation}", tmp_path / f"dst{orientation}"
        exif[ExifTags.Base.Orientation] = orientation
        put(src, name, encoded(pixels(0, (60, 40)), form, exif=exif))
        write_shards(ImageFolder(src), dst, short_side=20)
        (content,) = members(dst).values()
        with Image.open(io.BytesIO(content)) as ours:
            assert ours.size == (30, 20)
            turned = {ExifTags.Base.Orientation: orientation} if 2 <= orientation <= 8 else {}
            assert dict(ours.getexif()) == turned


def test_short_side_of_a_damaged_tag(tmp_path: Path):
    put(tmp_path / "src", "a.jpg", encoded(pixels(0), "JPEG", exif=b"Exif\0\0nonsense"))
    assert write_shards(ImageFolder(tmp_path / "src"), tmp_path / "dst", short_side=5) == []
    assert len(members(tmp_path / "dst")) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard 0 must be at least 1"),
        ({"short_side": 0}, "short_side 0 must be at least 1"),
        ({"quality": 101}, "quality 101 must be 1 to 100"),
        ({"quality": 0}, "quality 0 must be 1 to 100"),
        ({"split": ""}, "split '' must be letters"),
        ({"split": "a/b"}, "split 'a/b' must be letters"),
        ({"split": "tr{a}in*"}, "split .* must be letters"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: Any, message: str):
    with pytest.raises(ShardError, match=message):
        write_shards(ImageFolder(images(tmp_path / "src", 1)), tmp_path / "dst", **settings)
    assert not (tmp_path / "dst").exists()


def test_a_folder_without_images_is_refused(tmp_path: Path):
    put(tmp_path / "src", "class/.hidden.jpg", pixels(0))
    put(tmp_path / "src", "class/text.md", b"")
    with pytest.raises(ShardError, match=rf"{tmp_path}/src holds no images \(.jpg, "):
        write_shards(ImageFolder(tmp_path / "src"), tmp_path / "dst")


def test_shards_are_not_written_among_the_images(tmp_path: Path):
    src = images(tmp_path / "src")
    for dst in (src, src / "shards"):
        with pytest.raises(ShardError, match=r"lies inside the images' folder"):
            write_shards(ImageFolder(src), dst)


def test_two_samples_of_one_key_are_refused(tmp_path: Path):
    class Twice(Arrays):
        def entries(self) -> list[Entry]:
            return [Entry("a", 0, 0), Entry("b", 0, 1), Entry("a", 0, 2)]

    with pytest.raises(ShardError, match="two images would get the key a"):
        write_shards(Twice(DIGITS, CLASSES), tmp_path / "dst")


# Arrays, IDX files, torchvision.


@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 6, 4, 3)])
def test_arrays(tmp_path: Path, shape: tuple[int, ...]):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_shards(Arrays(array, np.array([2, 0, -1, 1, 2])), tmp_path)
    written = members(tmp_path)
    for i, label in enumerate([b"2", b"0", None, b"1", b"2"]):
        with Image.open(io.BytesIO(written[f"{i:08d}.png"])) as image:
            np.testing.assert_array_equal(np.asarray(image), array[i])
        assert written.get(f"{i:08d}.cls") == label
    assert json.loads((tmp_path / "train.json").read_text())["classes"] == ["0", "1", "2"]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


DIGITS = np.random.default_rng(1).integers(0, 256, (7, 5, 4), dtype=np.uint8)
CLASSES = np.array([0, 3, 1, 1, 2, 0, 3], dtype=np.uint8)


def idx_folder(root: Path, prefix: str = "train", zipped: bool = False, sign: str = "-") -> Path:
    for kind, array in (("images", DIGITS), ("labels", CLASSES)):
        name, content = f"{prefix}-{kind}{sign}idx{array.ndim}-ubyte", idx(array)
        put(root, name + ".gz" * zipped, gzip.compress(content) if zipped else content)
    return root


@pytest.mark.parametrize(
    ("prefix", "split"), [("train", "train"), ("t10k", "test"), ("t10k", "val"), ("x", "x")]
)
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("sign", ["-", "."])
def test_idx_files(tmp_path: Path, prefix: str, split: str, zipped: bool, sign: str):
    source = find_source(str(idx_folder(tmp_path / "src", prefix, zipped, sign)), None, split)
    assert isinstance(source, Idx)
    write_shards(source, tmp_path / "dst", split)
    written = members(tmp_path / "dst", split)
    assert len(written) == 14
    for i in range(7):
        with Image.open(io.BytesIO(written[f"{i:08d}.png"])) as image:
            np.testing.assert_array_equal(np.asarray(image), DIGITS[i])
        assert int(written[f"{i:08d}.cls"]) == CLASSES[i]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", None, "holds no train-labels-idx1-ubyte or .*.gz"),
        ("train-labels-idx1-ubyte", idx(CLASSES[:6]), "src, train: 7 images but 6 labels"),
        ("train-images-idx3-ubyte", idx(DIGITS)[:-1], "139 bytes of data, its header says 140"),
        ("train-images-idx3-ubyte", idx(DIGITS) + b"x", "141 bytes of data, its header says 140"),
        ("train-images-idx3-ubyte", idx(CLASSES), "no IDX file of unsigned bytes in 3 dimensions"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03", "no IDX file of unsigned bytes in 3"),
        ("train-images-idx3-ubyte", b"", "no IDX file of unsigned bytes in 3 dimensions"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x03" + b"\0" * 12, "no IDX file of unsigned bytes"),
    ],
)
def test_damaged_idx_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
):
    idx_folder(tmp_path / "src")
    (tmp_path / "src" / name).unlink()
    if content is not None:
        put(tmp_path / "src", name, content)
    with pytest.raises(ShardError, match=message) as caught:
        write_shards(Idx(tmp_path / "src", "train"), tmp_path / "dst")
    assert str(tmp_path / "src") in str(caught.value)


@pytest.mark.parametrize("content", [gzip.compress(idx(DIGITS))[:-20], b"no gzip"])
def test_damaged_gzip_files_are_refused(tmp_path: Path, content: bytes):
    idx_folder(tmp_path, zipped=True)
    put(tmp_path, "train-images-idx3-ubyte.gz", content)
    with pytest.raises(ShardError, match=r"train-images-idx3-ubyte.gz is not a whole gzip file"):
        Idx(tmp_path, "train").entries()


def test_torchvisions_mnist(tmp_path: Path):
    """A data set that holds arrays: the pixels are stored without loss."""
    idx_folder(tmp_path / "root/MNIST/raw", "train")
    idx_folder(tmp_path / "root/MNIST/raw", "t10k")
    source = find_source("torchvision:MNIST", str(tmp_path / "root"), "test")
    write_shards(source, tmp_path / "dst", "test")
    written = members(tmp_path / "dst", "test")
    for i in range(7):
        with Image.open(io.BytesIO(written[f"{i:08d}.png"])) as image:
            np.testing.assert_array_equal(np.asarray(image), DIGITS[i])
        assert int(written[f"{i:08d}.cls"]) == CLASSES[i]
    assert len(json.loads((tmp_path / "dst/test.json").read_text())["classes"]) == 10


def test_torchvisions_food101(tmp_path: Path):
    """A data set that lists JPEG files: their bytes are copied."""
    root = tmp_path / "root/food-101"
    names = ["pie/1", "cake/2", "pie/3"]
    files = [put(root, f"images/{n}.jpg", pixels(i)) for i, n in enumerate(names)]
    put(
        root,
        "meta/train.json",
        json.dumps({"pie": ["pie/1", "pie/3"], "cake": ["cake/2"]}).encode(),
    )
    source = find_source("torchvision:Food101", str(tmp_path / "root"), "train")
    write_shards(source, tmp_path / "dst")
    # Food101 lists pie first and numbers classes in sorted order.
    assert source.classes == ["cake", "pie"]
    assert members(tmp_path / "dst") == {
        "00000000.jpg": files[0],
        "00000000.cls": b"1",
        "00000001.jpg": files[2],
        "00000001.cls": b"1",
        "00000002.jpg": files[1],
        "00000002.cls": b"0",
    }


def test_torchvisions_image_folder(tmp_path: Path):
    """A data set of (path, class), damaged files included."""
    root = images(tmp_path / "src", 6)
    put(root, "class0/zz.jpg", b"no image")
    source = find_source("torchvision:ImageFolder", str(root), "train")
    (line,) = write_shards(source, tmp_path / "dst")
    assert line.startswith("2: UnidentifiedImageError")
    paths = [root / f"class{c}/{i:03d}.jpg" for c in range(3) for i in (c, c + 3)]
    assert sorted(images_only(tmp_path / "dst").values()) == sorted(p.read_bytes() for p in paths)


@pytest.mark.parametrize(
    ("src", "root", "message"),
    [
        ("torchvision:MNIST", None, "torchvision:MNIST needs --root"),
        ("torchvision:MNIST", "/nowhere", "torchvision's MNIST in /nowhere: Dataset not found"),
        ("torchvision:NoSuchSet", "/nowhere", "torchvision.datasets has no NoSuchSet"),
        ("torchvision:vision", "/nowhere", "torchvision.datasets has no vision"),
        ("torchvision:CocoDetection", "/nowhere", "torchvision's CocoDetection in /nowhere: "),
        ("torchvision:STL10", "/nowhere", "torchvision's STL10 in /nowhere: "),
    ],
)
def test_torchvision_sets_that_are_not_there(
    tmp_path: Path, src: str, root: str | None, message: str
):
    with pytest.raises(ShardError, match=message) as caught:
        write_shards(find_source(src, root, "train"), tmp_path / "dst")
    assert "\n" not in str(caught.value)


def test_a_source_that_is_not_there(tmp_path: Path):
    with pytest.raises(ShardError, match=r"no such folder: .*gone"):
        find_source(str(tmp_path / "gone"), None, "train")


def test_a_folder_of_images_is_found(tmp_path: Path):
    assert find_source(str(images(tmp_path)), None, "train") == ImageFolder(tmp_path)


def test_writing_does_not_import_torch(tmp_path: Path):
    """`maepretrain --help` answers at once, and each of many processes is small."""
    put(tmp_path / "arrays", "a.npy", saved(np.zeros(3)))
    code = (
        "import sys; from pathlib import Path; from maepretrain.data.shards.write import *; "
        f"write_shards(ImageFolder(Path({str(images(tmp_path / 'src'))!r})), "
        f"Path({str(tmp_path / 'dst')!r}), short_side=5); "
        f"write_shards(ImageFolder(Path({str(tmp_path / 'arrays')!r})), "
        f"Path({str(tmp_path / 'dst')!r}), 'arrays'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert len(images_only(tmp_path / "dst")) == 12
    assert len(members(tmp_path / "dst", "arrays")) == 1


def test_indexes_are_those_of_a_scan(tmp_path: Path):
    """Written shards read the same without their index."""
    write_shards(ImageFolder(images(tmp_path / "src")), tmp_path, samples_per_shard=5)
    for shard in open_shards(str(tmp_path / "train-*.tar")):
        with_index = shard.columns()
        index_path(shard.path).unlink()
        (again,) = open_shards(str(shard.path))
        scanned = again.columns()
        assert with_index.keys == scanned.keys
        for name in ("offset", "size", "label", "extension"):
            np.testing.assert_array_equal(getattr(with_index, name), getattr(scanned, name))
