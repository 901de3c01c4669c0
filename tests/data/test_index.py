"""Shards of any maker against Python's tarfile, webdataset's reader and the bytes on disk."""

import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.servers import FaultServer

from maepretrain.data.errors import (
    CUT_OFF_INPUT,
    DAMAGED_SHARD,
    EMPTY_SHARD,
    MISSING_INPUT,
    SECOND_FILE,
    WRONG_LABEL_ERROR,
    ShardError,
    Unreadable,
)
from maepretrain.data.shards import index as shards_module
from maepretrain.data.shards.index import (
    Shard,
    index_path,
    make_indexes,
    open_shards,
    read_head,
    summary,
    write_index,
)
from maepretrain.data.shards.parallel import in_processes
from maepretrain.data.shards.patterns import expand
from maepretrain.data.shards.reader import Store
from maepretrain.data.shards.tar import INPUT_EXTENSIONS, WRONG_LABEL, Columns, scan
from maepretrain.data.stores.cache import ShardCache
from maepretrain.files import replacing

Files = dict[str, bytes]
Row = tuple[str, str, bytes, int]


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indexes go that cannot lie beside their shard; open to `unprivileged`."""
    folder = tmp_path_factory.mktemp("kept")
    for place in (folder, *folder.parents):
        if place == Path(tempfile.gettempdir()):
            break
        place.chmod(0o777)
    monkeypatch.setenv("MAEPRETRAIN_CACHE", str(folder))
    return folder / "index"


def image(seed: int, size: int = 300) -> bytes:
    """Bytes that stand for an image: a shard is read without decoding."""
    return np.random.default_rng(seed).bytes(size + seed)


PLAIN: Files = {
    "a.jpg": image(0),
    "a.cls": b"3",
    "b.png": image(1),
    "b.cls": b"0\n",
    "c.webp": image(2, 2000),
}
AWKWARD: Files = {
    "cl.ass/sub.dir/img1.JPEG": image(3),
    "cl.ass/sub.dir/img1.cls": b" 12 ",
    "cl.ass/sub.dir/img2.jpeg": image(4),
    "cl.ass/sub.dir/img2.txt": b"a caption",
    "cl.ass/with blank (1).jpg": image(5),
    "cl.ass/with blank (1).json": b'{"label": 7, "width": 5}',
    f"long/{'folder/' * 30}{'n' * 90}.jpg": image(6),
    f"long/{'folder/' * 30}{'n' * 90}.cls": b"1",
    "uni/çlaß-日本語.png": image(7),
    "uni/çlaß-日本語.cls": b"2",
    "z.jpg": image(8),
    "z.seg.png": image(9),
}
# timm/imagenet-1k-wds on the Hugging Face hub: names and the keys of its JSON.
HUGGING_FACE: Files = {
    "n01440764_10026.cls": b"0",
    "n01440764_10026.jpg": image(10),
    "n01440764_10026.json": b'{"filename": "n01440764_10026.JPEG", "label": 0, "class_id": 1}',
    "n01443537_2819.cls": b"1",
    "n01443537_2819.jpg": image(11),
    "n01443537_2819.json": b'{"filename": "n01443537_2819.JPEG", "label": 1, "class_id": 2}',
}


def by_python(path: Path, files: Files, form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def by_gnu_tar(path: Path, files: Files, form: str = "gnu") -> None:
    """A folder on disk, packed with its sub-folders and a leading `./`."""
    folder = path.with_suffix(".files")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    command = ["tar", f"--format={form}", "--sort=name", "-cf", path, "-C", folder, "."]
    subprocess.run(command, check=True)
    shutil.rmtree(folder)


def by_webdataset(path: Path, files: Files) -> None:
    from webdataset.writer import TarWriter

    samples: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        folder, slash, last = name.rpartition("/")
        key = folder + slash + last.partition(".")[0]
        samples.setdefault(key, {"__key__": key})[last.partition(".")[2]] = content
    form = "PAX_FORMAT" if any(len(name) > 99 for name in files) else None
    with path.open("wb") as file, TarWriter(cast(Any, file), encoder=False, format=form) as tar:
        for sample in samples.values():
            tar.write(sample)


MAKERS: dict[str, Callable[[Path, Files], None]] = {
    "Python, PAX": by_python,
    "Python, GNU": lambda path, files: by_python(path, files, tarfile.GNU_FORMAT),
    "GNU tar": by_gnu_tar,
    "GNU tar, PAX": lambda path, files: by_gnu_tar(path, files, "pax"),
    "webdataset": by_webdataset,
}


def ours(path: Path) -> list[Row]:
    """(key, extension, bytes, label), the bytes read from the file at the indexed place."""
    (shard,) = open_shards(str(path))
    columns, data = shard.columns(), path.read_bytes()
    return [
        (key, INPUT_EXTENSIONS[extension], data[offset : offset + size], int(label))
        for key, extension, offset, size, label in zip(
            columns.keys,
            columns.extension,
            columns.offset,
            columns.size,
            columns.label,
            strict=True,
        )
    ]


def webdatasets(path: Path) -> list[Row]:
    """The same as webdataset reads it: samples with an image, and what it finds beside them."""
    import webdataset

    read = cast(Any, webdataset).WebDataset
    rows = []
    for sample in read(str(path), shardshuffle=False, empty_check=False):
        extension = next((e for e in sample if e in INPUT_EXTENSIONS), None)
        if extension is not None:
            text = sample.get("cls") or str(json.loads(sample.get("json", b"{}")).get("label", -1))
            rows.append((sample["__key__"], extension, sample[extension], int(text)))
    return rows


@pytest.mark.parametrize("files", [PLAIN, AWKWARD, HUGGING_FACE], ids=["plain", "awkward", "timm"])
@pytest.mark.parametrize("maker", MAKERS)
def test_shards_of_any_maker_read_as_webdataset_reads_them(
    tmp_path: Path, maker: str, files: Files
):
    path = tmp_path / "a.tar"
    MAKERS[maker](path, files)
    rows = ours(path)
    assert rows == webdatasets(path)
    # And as the maker knows them: every image, whole.
    contents = {content for _, _, content, _ in rows}
    assert contents == {c for n, c in files.items() if len(c) > 299 and "seg" not in n}


def test_keys_labels_and_bytes_of_awkward_names(tmp_path: Path):
    by_python(tmp_path / "a.tar", AWKWARD)
    long = f"long/{'folder/' * 30}{'n' * 90}"
    assert ours(tmp_path / "a.tar") == [
        ("cl.ass/sub.dir/img1", "jpeg", image(3), 12),
        ("cl.ass/sub.dir/img2", "jpeg", image(4), -1),
        ("cl.ass/with blank (1)", "jpg", image(5), 7),
        (long, "jpg", image(6), 1),
        ("uni/çlaß-日本語", "png", image(7), 2),
        ("z", "jpg", image(8), -1),
    ]


def test_names_that_are_no_utf_8_or_hold_a_newline(tmp_path: Path):
    names = [b"caf\xe9.jpg".decode(errors="surrogateescape"), "two\nlines/a\nb.jpg", "c.jpg"]
    by_python(tmp_path / "a.tar", {name: image(i) for i, name in enumerate(names)})
    assert [row[0] for row in ours(tmp_path / "a.tar")] == [name[:-4] for name in names]
    assert [row[2] for row in ours(tmp_path / "a.tar")] == [image(0), image(1), image(2)]


def test_what_is_passed_over_is_counted(tmp_path: Path):
    files = {
        "a.depth.png": image(0),
        "a.jpg": image(1),
        "b.txt": b"no image",
        "c.v1.jpg": image(2),
        "c.v2.jpg": image(3),
        "folder/._d.jpg": b"macOS leaves these",
        "folder/.hidden": b"",
        "README": b"no extension",
    }
    by_python(tmp_path / "a.tar", files)
    (shard,) = open_shards(str(tmp_path / "a.tar"))
    assert ours(tmp_path / "a.tar") == [("a", "jpg", image(1), -1), ("c", "jpg", image(2), -1)]
    assert (shard.samples, shard.further_inputs) == (2, 2)
    assert shard.errors == {MISSING_INPUT: ["b"]}
    assert summary([shard]).startswith("2 samples in 1 shards (0.0 MB); 1 x sample without input")
    assert "; 2 further images of a sample" in summary([shard])


def test_links_hold_no_image(tmp_path: Path):
    """GNU tar stores the second name of a file as a link, without its bytes."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(image(0))
    (folder / "b.jpg").hardlink_to(folder / "a.jpg")
    (folder / "c.jpg").symlink_to("a.jpg")
    command = ["tar", "--sort=name", "-cf", tmp_path / "a.tar", "-C", folder]
    subprocess.run([*command, "a.jpg", "b.jpg", "c.jpg"], check=True)
    (shard,) = open_shards(str(tmp_path / "a.tar"))
    assert shard.samples == 1 and shard.errors == {MISSING_INPUT: ["b", "c"]}


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ({"cls": b"5"}, 5),
        ({"cls": b" 5\n"}, 5),
        ({"cls": b"007"}, 7),
        ({"CLS": b"5"}, 5),
        ({"cls": b"-1"}, -1),
        ({"json": b'{"label": 5}'}, 5),
        ({"json": b'{"cls": 5}'}, 5),
        ({"json": b'{"label": 5, "cls": 6}'}, 5),
        ({"json": b'{"label": null}'}, -1),
        ({"json": b'{"caption": "a cat"}'}, -1),
        ({"json": b'["boxes", 3]'}, -1),
        ({"cls": b"5", "json": b'{"label": 6}'}, 5),
        ({"cls": b"5", "json": b"broken, and not needed"}, 5),
        ({"cls": b"-1", "json": b'{"label": 6}'}, 6),
        ({"txt": b"5"}, -1),
        ({}, -1),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_labels(tmp_path: Path, files: Files, label: int, first: bool):
    beside = {f"a.{extension}": content for extension, content in files.items()}
    pixels = {"a.jpg": image(0)}
    by_python(tmp_path / "a.tar", beside | pixels if first else pixels | beside)
    assert [row[3] for row in ours(tmp_path / "a.tar")] == [label]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.cls", b"cat\n"),
        ("b.cls", b""),
        ("b.cls", b"1.5"),
        ("b.cls", b"-2"),
        ("b.cls", b"\xff"),
        ("b.cls", b"9" * 30),
        ("b.cls", b"9" * 10_000),
        ("b.json", b'{"label": "cat"}'),
        ("b.json", b'{"label": 1.5}'),
        ("b.json", b'{"label": true}'),
        ("b.json", b'{"label": [1, 2]}'),
        ("b.json", b'{"label": 3'),
        ("b.json", b"[" * 100_000),
    ],
)
def test_a_wrong_label_is_listed_and_its_sample_kept(tmp_path: Path, name: str, content: bytes):
    files = {"a.jpg": image(0), "b.jpg": image(1), name: content, "c.jpg": image(2), "c.cls": b"4"}
    by_python(tmp_path / "s.tar", files)
    assert ours(tmp_path / "s.tar") == [
        ("a", "jpg", image(0), -1),
        ("b", "jpg", image(1), WRONG_LABEL),
        ("c", "jpg", image(2), 4),
    ]
    (shard,) = open_shards(str(tmp_path / "s.tar"))
    assert shard.errors == {WRONG_LABEL_ERROR: ["b"]}
    assert "; 1 x wrong label" in summary([shard])


def test_the_second_member_of_one_name_is_listed_and_the_first_read(tmp_path: Path):
    files = {"a.jpg": image(0), "a.JPG": image(1), "b.jpg": image(2)}
    by_python(tmp_path / "s.tar", files)
    assert [row[:3] for row in ours(tmp_path / "s.tar")] == [
        ("a", "jpg", image(0)),
        ("b", "jpg", image(2)),
    ]
    assert open_shards(str(tmp_path / "s.tar"))[0].errors == {SECOND_FILE: ["a.JPG"]}


def test_the_header_before_each_input_is_known_by_its_checksum(tmp_path: Path):
    by_python(tmp_path / "a.tar", AWKWARD)
    data, (_, columns) = (tmp_path / "a.tar").read_bytes(), scan(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        inputs = {m.offset_data for m in tar if len(data[m.offset_data :]) and m.size > 299}
    assert set(columns.offset.tolist()) <= inputs
    truth = [zlib.crc32(data[offset - 512 : offset]) for offset in columns.offset]
    assert columns.header.tolist() == truth and len(set(truth)) == len(truth)


# Damage.


def rows_of(path: Path, columns: Columns) -> list[Row]:
    data = path.read_bytes()
    return [
        (
            columns.keys[i],
            INPUT_EXTENSIONS[columns.extension[i]],
            data[columns.offset[i] : columns.offset[i] + columns.size[i]],
            int(columns.label[i]),
        )
        for i in range(len(columns.offset))
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_of_a_tar_cut_anywhere_whole_samples_are_read(tmp_path: Path, form: int):
    """At any byte, also between two members, where tarfile itself sees nothing wrong. Never a
    partial sample, never one without its label, and never without a word."""
    name = "x" if form == tarfile.USTAR_FORMAT else "n" * 120
    files = {"a.jpg": image(0), "a.cls": b"1", f"{name}.jpg": image(1), f"{name}.cls": b"2"}
    by_python(tmp_path / "whole.tar", files, form)
    data, cut = (tmp_path / "whole.tar").read_bytes(), tmp_path / "cut.tar"
    whole = [("a", "jpg", image(0), 1), (name, "jpg", image(1), 2)]
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [-(-(m.offset_data + m.size) // 512) * 512 for m in tar.getmembers()]
        first, _, second, _ = tar.getmembers()
    assert not data[ends[-1] :].strip(b"\0")
    numbers = set()
    for size in {*range(1, ends[-1], 53), *range(512, ends[-1] + 1, 512), ends[-1] - 1}:
        cut.write_bytes(data[:size])
        if size < first.offset_data:  # not even one header
            with pytest.raises(ShardError, match=r"cut.tar is not a whole, uncompressed tar: "):
                scan(cut)
            continue
        head, columns = scan(cut)
        numbers.add(len(columns.offset))
        assert rows_of(cut, columns) == whole[: len(columns.offset)]
        assert len(head["faults"][DAMAGED_SHARD]) == 1
        assert (EMPTY_SHARD in head["faults"]) == (not len(columns.offset))
        # The first sample is known to be whole once a whole member of the next one follows.
        assert len(columns.offset) == (size >= second.offset_data + second.size)
    assert numbers == {0, 1}
    cut.write_bytes(data[: ends[-1] + 512])
    head, columns = scan(cut)
    assert rows_of(cut, columns) == whole and not head["faults"]


@pytest.mark.parametrize("size", [10_000, -512, -1024])
def test_a_member_that_says_a_wrong_size_is_named(tmp_path: Path, size: int):
    """A negative size would send a reader round in circles."""
    member = tarfile.TarInfo("folder/a.jpg")
    member.size = size
    wrong = member.tobuf(tarfile.GNU_FORMAT) + image(0, 2000)
    (tmp_path / "s.tar").write_bytes(wrong)
    head, columns = scan(tmp_path / "s.tar")
    said = ["it ends inside folder/a.jpg"]
    assert head["faults"] == {DAMAGED_SHARD: said, EMPTY_SHARD: ["it holds no sample"]}
    # After whole samples these are used, but for the last one: more of it may have followed.
    by_python(tmp_path / "t.tar", {f"{name}.jpg": image(1) for name in "abc"})
    with tarfile.open(tmp_path / "t.tar") as tar:
        end = tar.getmembers()[2].offset
    (tmp_path / "t.tar").write_bytes((tmp_path / "t.tar").read_bytes()[:end] + wrong)
    head, columns = scan(tmp_path / "t.tar")
    assert head["faults"] == {DAMAGED_SHARD: said} and columns.keys == ("a",)


def not_a_tar(name: str) -> bytes:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for key in "ab":
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = 600
            file.addfile(member, io.BytesIO(image(0, 600)))
    return {
        "text": b"<html>404 not found</html>" * 100,
        "noise": image(0, 5000),
        "gzip": gzip.compress(tar.getvalue()),
        "two tars": tar.getvalue() * 2,
        "tar and text": tar.getvalue() + b"more",
    }[name]


@pytest.mark.parametrize("name", ["text", "noise", "gzip"])
def test_what_is_no_tar_is_refused(tmp_path: Path, name: str):
    (tmp_path / "s.tar").write_bytes(not_a_tar(name))
    with pytest.raises(ShardError, match=r"s.tar is not a whole, uncompressed tar: "):
        open_shards(str(tmp_path / "s.tar"))
    assert not index_path(tmp_path / "s.tar").exists()


@pytest.mark.parametrize("name", ["two tars", "tar and text"])
def test_what_follows_the_end_of_a_tar_is_listed(tmp_path: Path, name: str):
    (tmp_path / "s.tar").write_bytes(not_a_tar(name))
    (shard,) = open_shards(str(tmp_path / "s.tar"))
    assert shard.samples == 1  # the last one may have lost members
    assert list(shard.errors) == [DAMAGED_SHARD]
    assert "and more follows" in shard.errors[DAMAGED_SHARD][0]


def test_flipped_header_bytes_are_never_silent(tmp_path: Path):
    by_python(tmp_path / "s.tar", PLAIN)
    data = (tmp_path / "s.tar").read_bytes()
    head, columns = scan(tmp_path / "s.tar")
    whole = rows_of(tmp_path / "s.tar", columns)
    with tarfile.open(tmp_path / "s.tar") as tar:
        headers = [range(m.offset, m.offset_data) for m in tar.getmembers()]
    random, said = np.random.default_rng(0), 0
    for place in random.choice([byte for header in headers for byte in header], 300, replace=False):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(random.integers(8))
        (tmp_path / "flipped.tar").write_bytes(flipped)
        try:
            again, columns = scan(tmp_path / "flipped.tar")
        except ShardError:
            said += 1
            continue
        # What is read is right, and the rest is said to be missing.
        rows = rows_of(tmp_path / "flipped.tar", columns)
        assert rows == whole[: len(rows)]
        if DAMAGED_SHARD in again["faults"]:
            said += 1
        else:  # the checksum field may be padded otherwise; nothing else may pass
            assert rows == whole and again == head
    assert said > 290


def test_sparse_members_are_not_read(tmp_path: Path):
    (tmp_path / "a.ppm").write_bytes(b"")
    os.truncate(tmp_path / "a.ppm", 1 << 20)
    command = ["tar", "--sparse", "-cf", tmp_path / "s.tar", "-C", tmp_path, "a.ppm"]
    subprocess.run(command, check=True)
    (shard,) = open_shards(str(tmp_path / "s.tar"))
    assert shard.samples == 0
    assert shard.errors[DAMAGED_SHARD] == ["a.ppm has holes (tar --sparse)"]


def test_texts_are_inputs_where_no_image_is(tmp_path: Path):
    """Beside images they are captions, that of a lost image too; order in the tar is no matter."""
    by_python(tmp_path / "text.tar", {"a.txt": b"one", "a.cls": b"3", "b.md": b"x", "c.txt": b""})
    (shard,) = open_shards(str(tmp_path / "text.tar"))
    assert ours(tmp_path / "text.tar") == [("a", "txt", b"one", 3), ("c", "txt", b"", -1)]
    assert shard.errors == {MISSING_INPUT: ["b"]}
    captioned = {"a.txt": b"one", "a.webp": image(1), "b.txt": b"lost", "c.png": image(2)}
    by_python(tmp_path / "captioned.tar", captioned)
    (shard,) = open_shards(str(tmp_path / "captioned.tar"))
    found = [("a", "webp", image(1), -1), ("c", "png", image(2), -1)]
    assert ours(tmp_path / "captioned.tar") == found
    assert shard.errors == {MISSING_INPUT: ["b"]} and shard.further_inputs == 0


def test_a_tar_without_samples_is_an_empty_shard(tmp_path: Path):
    by_python(tmp_path / "empty.tar", {})
    by_python(tmp_path / "text.tar", {"a.md": b"1"})
    (tmp_path / "zero.tar").touch()
    for shard in open_shards([f"{tmp_path}/{name}.tar" for name in ("empty", "text", "zero")]):
        assert EMPTY_SHARD in shard.errors
        for again in (shard, read_head(shard.path)):
            columns = again.columns()
            assert again.samples == len(columns.offset) == len(columns.keys) == 0


# The index.


def test_the_index_says_what_the_scan_said(tmp_path: Path):
    by_python(tmp_path / "a.tar", AWKWARD)
    head, scanned = scan(tmp_path / "a.tar")
    (made,) = open_shards(str(tmp_path / "a.tar"))
    (read,) = open_shards(str(tmp_path / "a.tar"))
    assert made == read == read_head(tmp_path / "a.tar")
    assert (read.samples, read.bytes) == (head["samples"], (tmp_path / "a.tar").stat().st_size)
    columns = read.columns()
    assert columns.keys == scanned.keys
    for name in ("offset", "size", "header", "label", "extension"):
        np.testing.assert_array_equal(getattr(columns, name), getattr(scanned, name))


def test_many_errors_make_a_long_head(tmp_path: Path):
    """It is read in pieces."""
    by_python(tmp_path / "a.tar", {f"{'n' * 90}{i:03d}.md": b"" for i in range(200)})
    (made,) = open_shards(str(tmp_path / "a.tar"))
    (read,) = open_shards(str(tmp_path / "a.tar"))
    assert made == read and len(read.errors[MISSING_INPUT]) == 200


def test_an_index_is_made_once(tmp_path: Path):
    by_python(tmp_path / "a.tar", PLAIN)
    open_shards(str(tmp_path / "a.tar"))
    before = index_path(tmp_path / "a.tar").stat()
    open_shards(str(tmp_path / "a.tar"))
    assert index_path(tmp_path / "a.tar").stat() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.idx"]


def test_checksum(tmp_path: Path):
    by_python(tmp_path / "a.tar", PLAIN)
    (shard,) = make_indexes([tmp_path / "a.tar"], checksum=True)
    truth = hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    assert shard.sha256 == read_head(tmp_path / "a.tar").sha256 == truth


def test_processes_make_the_same_indexes(tmp_path: Path):
    for name in ("1", "2"):
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            by_python(tmp_path / name / f"{i}.tar", {f"{i}.jpg": image(i), f"{i}.cls": b"%d" % i})
    one, two = (open_shards(str(tmp_path / name / "*.tar"), int(name)) for name in ("1", "2"))
    for a, b in zip(one, two, strict=True):
        assert a.path.name == b.path.name
        assert index_path(a.path).read_bytes() == index_path(b.path).read_bytes()


def test_results_of_processes_come_in_order():
    assert list(in_processes(abs, [-3, -1, -2], 2)) == [3, 1, 2]


def test_a_stale_index_is_refused(tmp_path: Path):
    by_python(tmp_path / "a.tar", PLAIN)
    open_shards(str(tmp_path / "a.tar"))
    by_python(tmp_path / "a.tar", AWKWARD)
    message = r"a.tar.idx is stale: the shard has \d+ bytes, its index says \d+; run `maepretrain "
    with pytest.raises(ShardError, match=message):
        open_shards(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": 99}\n', "a.tar.idx has version 99, not 2; delete it"),
        (b'{"version": 1, "samples": 3}\n', "a.tar.idx has version 1, not 2; delete it"),
        (b"\x00\xff\n", "a.tar.idx is no shard index; delete it"),
        (b"", "a.tar.idx is no shard index; delete it"),
        (b"[1]\n", "a.tar.idx is no shard index; delete it"),
        (b"{}\n", "a.tar.idx is no shard index; delete it"),
        (b'{"version": 2}\n', "a.tar.idx is no shard index; delete it"),
    ],
)
def test_a_foreign_index_is_refused(tmp_path: Path, content: bytes, message: str):
    by_python(tmp_path / "a.tar", PLAIN)
    index_path(tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ShardError, match=message):
        open_shards(str(tmp_path / "a.tar"))


def test_damaged_columns_are_refused(tmp_path: Path):
    by_python(tmp_path / "a.tar", PLAIN)
    open_shards(str(tmp_path / "a.tar"))
    sidecar = index_path(tmp_path / "a.tar")
    whole = sidecar.read_bytes()
    begin = whole.index(b"\n") + 1
    for size in range(begin, len(whole), 7):
        sidecar.write_bytes(whole[:size])
        (shard,) = open_shards(str(tmp_path / "a.tar"))
        with pytest.raises(ShardError, match=r"a.tar.idx is damaged; delete it"):
            shard.columns()


def test_a_missing_shard_is_named(tmp_path: Path):
    with pytest.raises(ShardError, match=r"no such shard: .*gone.tar"):
        read_head(tmp_path / "gone.tar")


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
def read_only() -> Iterator[Path]:
    """A folder with `a.tar`, which `unprivileged` can read and not write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        by_python(folder / "a.tar", PLAIN)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def test_a_folder_that_cannot_be_written_can_be_read(read_only: Path, kept: Path):
    """Its index goes to the cache folder, and is found there."""
    with unprivileged():
        (shard,) = open_shards(str(read_only / "a.tar"))
        assert shard.samples == 3 and shard.columns().keys == ("a", "b", "c")
    assert not index_path(read_only / "a.tar").exists()
    (made,) = kept.iterdir()
    assert shard.sidecar == made
    before = made.stat()
    assert read_head(read_only / "a.tar") == open_shards(str(read_only / "a.tar"))[0] == shard
    assert made.stat() == before


@pytest.mark.parametrize("content", [b"damaged", b'{"version": 1}\n', None])
def test_a_kept_index_that_does_not_fit_is_made_anew(
    read_only: Path, kept: Path, content: bytes | None
):
    """Nobody else can mend it: another version, damage, or a shard that was written since."""
    with unprivileged():
        open_shards(str(read_only / "a.tar"))
    (made,) = kept.iterdir()
    if content is None:
        by_python(read_only / "a.tar", AWKWARD)
        later = made.stat().st_mtime + 10
        os.utime(read_only / "a.tar", (later, later))
    else:
        made.write_bytes(content)
    truth = scan(read_only / "a.tar")[1].keys
    with unprivileged():
        assert open_shards(str(read_only / "a.tar"))[0].columns().keys == truth


def test_an_index_that_was_asked_for_and_cannot_be_written_is_an_error(read_only: Path):
    with unprivileged(), pytest.raises(PermissionError, match=r"a.tar.idx"):
        make_indexes([read_only / "a.tar"], checksum=True)


def test_a_shard_that_cannot_be_read_is_named(read_only: Path):
    (read_only / "a.tar").chmod(0)
    with unprivileged(), pytest.raises(PermissionError, match=r"a.tar"):
        open_shards(str(read_only / "a.tar"))


@contextmanager
def full_disk(left: int) -> Iterator[None]:
    """No file may grow beyond `left` bytes: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path):
    by_python(tmp_path / "a.tar", PLAIN)
    head, columns = scan(tmp_path / "a.tar")
    sidecar = index_path(tmp_path / "a.tar")
    with full_disk(10), pytest.raises(OSError, match=r"a.tar.idx") as caught:
        write_index(sidecar, head, columns)
    assert caught.value.filename == str(sidecar)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_an_error_leaves_what_was_there(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"old")

    def write_and_stop(stop: BaseException) -> None:
        with replacing(tmp_path / "file") as file:
            file.write(b"new")
            raise stop

    for stop in (KeyboardInterrupt(), ValueError()):
        with pytest.raises(type(stop)):
            write_and_stop(stop)
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"new")]


# Patterns.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a-000", "a-001", "a-010", "b-000", "[odd]{1}"):
        by_python(tmp_path / f"{name}.tar", {})
    (tmp_path / "a-000.tar.idx").touch()
    (tmp_path / ".a-hidden.tar").touch()
    (tmp_path / "a-folder.tar").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("a-000.tar", ["a-000"]),
        ("a-{000..001}.tar", ["a-000", "a-001"]),
        ("a-{001,000}.tar", ["a-001", "a-000"]),
        ("{b,a}-*.tar", ["b-000", "a-000", "a-001", "a-010"]),
        ("a-*.tar", ["a-000", "a-001", "a-010"]),
        ("a-0*", ["a-000", "a-001", "a-010"]),
        ("a-?1?.tar", ["a-010"]),
        ("a-00[01].tar", ["a-000", "a-001"]),
        (["b-000.tar", "a-000.tar"], ["b-000", "a-000"]),
        ("[odd]{1}.tar", ["[odd]{1}"]),
        ("~/a-000.tar", ["a-000"]),
        ("~/a-*.tar", ["a-000", "a-001", "a-010"]),
        ("./a-000.tar", ["a-000"]),
    ],
)
def test_patterns(folder: Path, patterns: str | list[str], names: list[str]):
    paths = expand(patterns)
    assert [Path(path).resolve() for path in paths] == [folder / f"{name}.tar" for name in names]


def test_absolute_patterns(folder: Path):
    a = [str(folder / "a-000.tar"), str(folder / "a-001.tar")]
    assert expand(f"{folder}/a-{{000..001}}.tar") == a
    assert expand(f"{folder}/b-*.tar") == [str(folder / "b-000.tar")]
    assert expand(f"file://{folder}/b-*.tar") == [str(folder / "b-000.tar")]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("c-*.tar", r"^no shard matches c-\*.tar$"),
        ("gone.tar", r"^no shard matches gone.tar$"),
        ("a-{000..002}.tar", r"^no shard matches a-002.tar of a-\{000..002\}.tar$"),
        ("a-{000..002.tar", r"^a-\{000..002.tar: a brace is not closed or not opened$"),
        ("a-000..002}.tar", r"^a-000..002\}.tar: a brace is not closed or not opened$"),
        (".", r"^. is a folder; name its shards: \*.tar$"),
        ("a-folder.tar", r"^a-folder.tar is a folder; name its shards: a-folder.tar/\*.tar$"),
        ("pipe:cat a-000.tar", r"^pipe:cat a-000.tar: what a command prints has no index"),
        ("https://h/a-*.tar", r"https://h/a-\*.tar: http\(s\) cannot be listed"),
        ([], r"^no shards are named: the patterns are \[\]$"),
        ("", r"is a folder|no shard matches"),
        (["a-000.tar", "a-*.tar"], r"^1 shards are named more than once"),
        ("{a-000,./a-000}.tar", r"^1 shards are named more than once"),
    ],
)
def test_patterns_that_name_nothing_are_refused(patterns: str | list[str], message: str):
    with pytest.raises(ShardError, match=message):
        expand(patterns)


def test_addresses_are_taken_as_they_are():
    urls = ["https://h/a/b-000.tar?key=1", "https://h/a/b-001.tar?key=1"]
    assert expand("https://h/a/b-{000..001}.tar?key=1") == urls


# Remote shards.


@pytest.fixture
def server() -> Iterator[FaultServer]:
    server = FaultServer()
    yield server
    server.close()


def served(server: FaultServer, folder: Path, *names: str) -> list[str]:
    for name in names:
        server.files[f"/{name}"] = (folder / name).read_bytes()
    return [f"http://{server.host}/{name}" for name in names]


def test_a_remote_shard_is_read_through_its_index(tmp_path: Path, server: FaultServer):
    by_python(tmp_path / "a.tar", AWKWARD)
    make_indexes([tmp_path / "a.tar"], checksum=True)
    local = read_head(tmp_path / "a.tar")
    url, _ = served(server, tmp_path, "a.tar", "a.tar.idx")
    (shard,) = open_shards(url, cache=ShardCache(tmp_path / "cache"))
    assert (shard.url, shard.sidecar) != (local.url, local.sidecar)
    assert replace(shard, url=local.url, sidecar=local.sidecar) == local
    assert shard.columns().keys == local.columns().keys
    assert [request.path for request in server.log] == ["/a.tar.idx"]
    # The other processes of the node do not ask again.
    assert open_shards(url, cache=ShardCache(tmp_path / "cache")) == [shard]
    assert len(server.log) == 1


def test_a_remote_shard_without_an_index_is_fetched_once(tmp_path: Path, server: FaultServer):
    by_python(tmp_path / "a.tar", PLAIN)
    (url,) = served(server, tmp_path, "a.tar")
    cache = ShardCache(tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:  # as four ranks that start together
        shards = [shard for (shard,) in pool.map(lambda _: open_shards(url, cache=cache), range(4))]
    assert shards == shards[:1] * 4
    assert shards[0].sha256 == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    store, columns = Store(cache), shards[0].columns()
    assert [store.read(shards[0], columns, i) for i in range(3)] == [
        image(0),
        image(1),
        PLAIN["c.webp"],
    ]
    assert [r.path for r in server.log if r.status == 200] == ["/a.tar"]


# The store.


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_store_reads_bytes_with_few_files_open(tmp_path: Path):
    for i in range(5):
        by_python(tmp_path / f"{i}.tar", {f"{k}.jpg": image(10 * i + k) for k in range(4)})
    shards = open_shards(f"{tmp_path}/*.tar")
    columns, before = [shard.columns() for shard in shards], open_files()
    store = Store(open_files=2)
    for place in np.random.default_rng(0).permutation(20):
        i, k = divmod(int(place), 4)
        assert store.read(shards[i], columns[i], k) == image(10 * i + k)
        assert open_files() <= before + 2
    travelled = pickle.loads(pickle.dumps(store))
    assert travelled.read(shards[0], columns[0], 1) == image(1)
    store.close()
    travelled.close()
    assert open_files() == before
    assert store.read(shards[1], columns[1], 2) == image(12)
    del store, travelled
    assert open_files() == before


def indexed(path: Path) -> tuple[Shard, Columns]:
    (shard,) = open_shards(str(path))
    return shard, shard.columns()


def test_a_shard_that_ends_early_is_an_error_of_the_sample(tmp_path: Path):
    by_python(tmp_path / "a.tar", {"a.jpg": image(0), "b.jpg": image(1)})
    shard, columns = indexed(tmp_path / "a.tar")
    os.truncate(tmp_path / "a.tar", int(columns.offset[1]) + 7)
    store = Store()
    assert store.read(shard, columns, 0) == image(0)
    with pytest.raises(Unreadable, match=r"it has 7 of 301 bytes") as caught:
        store.read(shard, columns, 1)
    assert caught.value.kind == CUT_OFF_INPUT


@pytest.mark.parametrize("change", ["order", "name", "shift"])
def test_other_bytes_of_the_same_size_are_refused_at_the_first_read(tmp_path: Path, change: str):
    """The index cannot see it beforehand; a wrong image with a right label would be the worst."""
    files = {"a.jpg": image(0, 600), "b.jpg": image(0, 600), "c.jpg": image(0, 300)}
    by_python(tmp_path / "a.tar", files)
    shard, columns = indexed(tmp_path / "a.tar")
    a, b, c = files.items()
    other = {
        "order": dict([b, a, c]),
        "name": dict([a, ("B.jpg", b[1]), c]),
        "shift": dict([c, a, b]),
    }[change]
    by_python(tmp_path / "a.tar", other)
    assert (tmp_path / "a.tar").stat().st_size == shard.bytes
    assert read_head(tmp_path / "a.tar") == shard
    with pytest.raises(
        ShardError, match=r"a.tar was changed after its index was made \(byte \d+\)"
    ):
        for row in range(3):
            Store().read(shard, columns, row)


def test_a_shard_that_is_gone_is_named(tmp_path: Path):
    by_python(tmp_path / "gone.tar", PLAIN)
    shard, columns = indexed(tmp_path / "gone.tar")
    (tmp_path / "gone.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"gone.tar"):
        Store().read(shard, columns, 0)


def test_many_heads_are_read_in_order(tmp_path: Path):
    """More than one thread reads at a time; one of them meets a shard without an index."""
    by_python(tmp_path / "0.tar", {})
    (first,) = open_shards(str(tmp_path / "0.tar"))
    for i in range(1, 600):
        (tmp_path / f"{i}.tar").hardlink_to(first.path)
        if i != 555:
            index_path(tmp_path / f"{i}.tar").hardlink_to(first.sidecar)
    names = [str(tmp_path / f"{i}.tar") for i in range(600)]
    assert [shard.url for shard in open_shards(names)] == names
    assert index_path(tmp_path / "555.tar").read_bytes() == first.sidecar.read_bytes()


def test_reading_shards_does_not_import_torch():
    """Processes that only index start in a fraction of a second."""
    code = f"import sys, {shards_module.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
