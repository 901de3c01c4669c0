"""`shards check` finds each kind of damage, and `shards order` prints what a rank reads."""

import csv
import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.servers import FaultServer

from maepretrain.data.check import _repeated, check_shards
from maepretrain.data.check_shard import Criteria
from maepretrain.data.order import EpochOrder
from maepretrain.data.samples import Samples, ShardIndex
from maepretrain.data.shards.index import index_path, make_indexes, open_shards
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.transforms import Augment

Run = Callable[..., int]
Files = list[tuple[str, bytes]]
Row = tuple[str, str, str]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAEPRETRAIN_CACHE", str(tmp_path / "kept"))


def png(number: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def sample(number: int, label: str | None = "") -> Files:
    """Key and label are the number, or the label as given; None is none."""
    files = [(f"{number:03d}.png", png(number))]
    text = str(number) if label == "" else label
    return files if text is None else [*files, (f"{number:03d}.cls", text.encode())]


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def clean(folder: Path) -> list[Path]:
    """Samples 0 to 11 in three shards."""
    return [
        write_tar(folder / f"{s}.tar", [f for n in range(4 * s, 4 * s + 4) for f in sample(n)])
        for s in range(3)
    ]


def found(folder: Path, asked: Criteria | None = None) -> list[Row]:
    report = check_shards([f"{folder}/*.tar"], asked or Criteria())
    return [(error.kind, Path(error.shard).name, error.key) for error in report.errors]


def notes(folder: Path, asked: Criteria, world_size: int = 1, num_workers: int = 1) -> list[str]:
    return check_shards([f"{folder}/*.tar"], asked, world_size, num_workers).notes


# A shard.


@pytest.mark.parametrize("indexed", [False, True])
def test_clean_shards(
    tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str], indexed: bool
):
    paths = clean(tmp_path)
    if indexed:
        make_indexes(paths, checksum=True)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    options = ("--world_size", 2, "--global-batch", 4, "--classes", 12, "--workers", 1)
    assert run_cli("shards", "check", f"{tmp_path}/*.tar", *options) == 0
    size = sum(path.stat().st_size for path in paths) / 1e6
    *said, totals = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"12 samples in 3 shards \({size:.1f} MB\), labels 0..11, 12 classes, "
        r"checked in [0-9.]+ s",
        totals,
    )
    assert said == (
        [] if indexed else ["3 shards have no index; `maepretrain shards index` makes it"]
    )
    # Nothing is written.
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def input_of(path: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmember(name)


def damage(folder: Path, name: str) -> None:
    """One thing wrong with the second of three shards (4 to 7)."""
    paths = clean(folder)
    path = paths[1]
    start = [f for n in (4, 5) for f in sample(n)]
    end = [f for n in (6, 7) for f in sample(n)]
    if name == "stale size":
        make_indexes(paths, checksum=True)
        write_tar(path, [*start, *end, ("more.txt", bytes(20_000))])
    elif name == "stale keys":
        make_indexes(paths)
        write_tar(path, [*start, *end[:2], ("00x.png", png(7)), ("00x.cls", b"7")])
    elif name == "stale order":
        make_indexes(paths)
        write_tar(path, [*end, *start])
    elif name == "stale label":
        make_indexes(paths)
        write_tar(path, [*start, *end[:3], ("007.cls", b"9")])
    elif name == "stale header":
        make_indexes(paths)
        with tarfile.open(path, "w") as tar:
            for file, content in [*start, *end]:
                member = tarfile.TarInfo(file)
                member.size, member.mtime = len(content), 99 if file == "006.png" else 0
                tar.addfile(member, io.BytesIO(content))
    elif name == "other version":
        make_indexes(paths)
        index_path(path).write_bytes(b'{"version": 1}\n')
    elif name == "damaged index":
        make_indexes(paths)
        whole = index_path(path).read_bytes()
        index_path(path).write_bytes(whole[: whole.index(b"\n") + 9])
    elif name == "checksum":
        make_indexes(paths, checksum=True)
        member = input_of(path, "005.cls")
        flip(path, member.offset_data + 3)  # padding: no other check would see it
    elif name == "truncated":
        path.write_bytes(path.read_bytes()[: input_of(path, "007.png").offset_data + 10])
    elif name == "no tar":
        path.write_bytes(b"<html>404</html>" * 100)
    elif name == "zero bytes":
        path.write_bytes(b"")
    elif name == "empty":
        write_tar(path, [])
    elif name == "no input":
        write_tar(path, [*start, ("005x.cls", b"3"), *end])
    elif name == "second member":
        write_tar(path, [*start, ("005.PNG", png(9)), *end])
    elif name == "noise":
        write_tar(path, [*start, (end[0][0], b"\x89PNG\r\n\x1a\nnoise"), *end[1:]])
    elif name == "flipped pixel":
        flip(path, input_of(path, "006.png").offset_data + 60)
    elif name == "array of other channels":
        write_tar(path, [*start, ("006.npy", npy(np.zeros((5, 4, 4)))), *end[1:]])
    elif name == "float array":
        write_tar(path, [*start, ("006.npy", npy(np.zeros((3, 8, 9)))), *end[1:]])
    elif name == "wrong label":
        write_tar(path, [*start, *sample(6, "cat"), *sample(7)])
    elif name == "no label":
        write_tar(path, [*start, *sample(6, None), *sample(7)])
    elif name == "label out of range":
        write_tar(path, [*start, *sample(6, "12"), *sample(7)])
    elif name == "key twice in a shard":
        write_tar(path, [*start, *sample(4), *end])
    elif name == "key in two shards":
        write_tar(path, [*start, *sample(3), *end])


DAMAGED: dict[str, list[Row]] = {
    "stale size": [
        ("stale index", "1.tar", "1.tar.idx is stale: the shard has * bytes"),
        ("sample without input", "1.tar", "more"),
    ],
    "stale keys": [("stale index", "1.tar", "it lists 4 samples, the shard holds 4, or their *")],
    "stale order": [("stale index", "1.tar", "it lists 4 samples, *")],
    "stale label": [("stale index", "1.tar", "007")],
    "stale header": [("stale index", "1.tar", "006")],
    "other version": [("stale index", "1.tar", "1.tar.idx has version 1, not 2; delete it")],
    "damaged index": [("stale index", "1.tar", "1.tar.idx is damaged; delete it")],
    "checksum": [("wrong checksum", "1.tar", "its index says *")],
    "truncated": [("damaged shard", "1.tar", "it ends inside 007.png")],
    "no tar": [("unusable shard", "1.tar", "1.tar is not a whole, uncompressed tar")],
    "zero bytes": [("empty shard", "1.tar", "it holds no sample")],
    "empty": [("empty shard", "1.tar", "it holds no sample")],
    "no input": [("sample without input", "1.tar", "005x")],
    "second member": [("second member of one name", "1.tar", "005.PNG")],
    "noise": [("unreadable input", "1.tar", "006")],
    "flipped pixel": [("unreadable input", "1.tar", "006")],
    "array of other channels": [("unreadable input", "1.tar", "006")],
    "float array": [("inputs of several types", "1.tar", "1 are torch.float32, most others *")],
    "wrong label": [("wrong label", "1.tar", "006")],
    "no label": [("shard with unlabelled samples", "1.tar", "1 of 4 have no label")],
    "label out of range": [("label out of range", "1.tar", "006")],
    "key twice in a shard": [("key twice in a shard", "1.tar", "004")],
    "key in two shards": [("key in two shards", "1.tar", "003")],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_each_kind_of_damage_is_found_and_nothing_else(tmp_path: Path, name: str):
    damage(tmp_path, name)
    rows = found(tmp_path, Criteria(classes=12))
    assert [row[:2] for row in rows] == [row[:2] for row in DAMAGED[name]]
    for (_, _, said), (_, _, expected) in zip(rows, DAMAGED[name], strict=True):
        if " " in expected:
            assert all(part in said for part in expected.split("*"))
        else:
            assert said == expected
        assert "\n" not in said


def test_processes_find_the_same(tmp_path: Path):
    damage(tmp_path, "noise")
    write_tar(tmp_path / "3.tar", [*sample(2), *sample(50, "77")])
    asked = Criteria(classes=12, decode=False)
    one, two = (check_shards([f"{tmp_path}/*.tar"], asked, workers=w) for w in (1, 2))
    assert one.errors == two.errors and one.notes == two.notes and len(one.errors) == 2


def test_without_decoding_only_what_bytes_say(tmp_path: Path):
    damage(tmp_path, "noise")
    assert found(tmp_path, Criteria(decode=False)) == []


def test_checking_headers_does_not_import_torch(tmp_path: Path):
    clean(tmp_path)
    code = (
        "import sys; from maepretrain.data.check import *; "
        f"check_shards(['{tmp_path}/*.tar'], Criteria(decode=False)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_inputs_are_decoded_as_training_decodes_them(tmp_path: Path):
    """Channels and lengths that fit one set do not fit another."""
    arrays = {"a": np.zeros((2, 30)), "b": np.ones((2, 20)), "c": np.ones((30, 2))}
    write_tar(tmp_path / "s.tar", [(f"{k}.npy", npy(a)) for k, a in arrays.items()])
    assert found(tmp_path, Criteria(2)) == found(tmp_path, Criteria(2, length=20)) == []
    short = [("unreadable input", "s.tar", "b")]
    assert found(tmp_path, Criteria(2, length=21)) == short
    assert [row[2] for row in found(tmp_path, Criteria(3))] == ["a", "b", "c"]
    assert notes(tmp_path, Criteria(2, length=21))[0].endswith(
        "s.tar, b: its length 20 is below 21"
    )
    write_tar(tmp_path / "s.tar", [("a.png", png(1, "L")), ("b.npy", npy(np.zeros((4, 4))))])
    assert [row[2] for row in found(tmp_path, Criteria(5))] == ["a", "b"]
    assert [row[2] for row in found(tmp_path, Criteria(3))] == ["b"]


def test_texts_are_decoded_as_training_decodes_them(tmp_path: Path):
    texts = {"a": b"a text", "b": b"", "c": b"short"}
    write_tar(tmp_path / "s.tar", [(f"{k}.txt", text) for k, text in texts.items()])
    for length in (None, 6, 100):
        assert found(tmp_path, Criteria(1, length=length)) == [("unreadable input", "s.tar", "b")]
    assert notes(tmp_path, Criteria(1))[0].endswith("s.tar, b: the text is empty")


def test_unlabelled_sets_are_no_error(tmp_path: Path):
    write_tar(tmp_path / "s.tar", [*sample(1, None), *sample(2, None)])
    report = check_shards([f"{tmp_path}/s.tar"], Criteria())
    assert report.errors == [] and ", no labels, " in report.totals


def test_keys_twice_are_found_by_their_hashes():
    random = np.random.default_rng(0)
    keys = random.integers(0, 2**64, 5000, dtype=np.uint64)
    twice = keys[random.choice(5000, 40, replace=False)]
    parts = np.split(np.concatenate([keys, twice, twice[:7]]), [10, 10, 3000])
    np.testing.assert_array_equal(_repeated([p.tobytes() for p in parts]), np.unique(twice))
    assert len(_repeated([])) == len(_repeated([b"", keys.tobytes()])) == 0


def test_many_duplicates_of_one_key(tmp_path: Path):
    for s in range(3):
        write_tar(tmp_path / f"{s}.tar", [*sample(1), *sample(s + 5), *sample(1)])
    assert sorted(found(tmp_path)) == [
        ("key in two shards", "1.tar", "001"),
        ("key in two shards", "2.tar", "001"),
        ("key twice in a shard", "0.tar", "001"),
        ("key twice in a shard", "1.tar", "001"),
        ("key twice in a shard", "2.tar", "001"),
    ]


# The run.


@pytest.mark.parametrize(
    ("world_size", "global_batch", "said"),
    [
        (1, 12, []),
        (12, 12, []),
        (4, 8, []),
        (1, 13, ["global batch 13 is larger than the 12 samples"]),
        (5, 12, ["global batch 12 is not divisible by 5 processes"]),
        (
            5,
            24,
            [
                "global batch 24 is larger than the 12 samples",
                "global batch 24 is not divisible by 5 processes",
            ],
        ),
        (12, None, []),
        (13, None, ["12 samples are too few for 13 processes"]),
    ],
)
def test_batch_and_processes(
    tmp_path: Path, world_size: int, global_batch: int | None, said: list[str]
):
    clean(tmp_path)
    report = check_shards(
        [f"{tmp_path}/*.tar"], Criteria(decode=False), world_size, global_batch=global_batch
    )
    assert [(f.kind, f.shard, f.key) for f in report.errors] == [
        ("batch and processes", "", sentence) for sentence in said
    ]


def test_what_is_good_to_know(tmp_path: Path):
    make_indexes(clean(tmp_path))
    asked = Criteria(decode=False)
    assert notes(tmp_path, asked, world_size=3) == []
    assert notes(tmp_path, asked, world_size=2, num_workers=2) == [
        "4 readers share 3 shards: that is well, a batch is cut by samples"
    ]
    assert check_shards([f"{tmp_path}/*.tar"], asked, global_batch=5).notes == [
        '2 samples are left out of each epoch (tail "drop")'
    ]
    assert notes(tmp_path, Criteria(classes=14, decode=False)) == [
        "2 of 14 classes have no sample: 12, 13"
    ]
    write_tar(tmp_path / "9.tar", [*sample(20, "9223372036854775807"), ("020.b.png", b"")])
    assert notes(tmp_path, asked) == [
        "9,223,372,036,854,775,795 of 9,223,372,036,854,775,808 classes have no sample: "
        "12, 13, 14, 15, 16, 17, 18, 19, 20, 21, ...",
        "1 shards have no index; `maepretrain shards index` makes it",
        "1 further images of a sample are passed over (KEY.a.png)",
    ]


# The command.


def test_the_table_the_list_and_the_exit_code(
    tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
):
    damage(tmp_path, "noise")
    odd = b'[bold]\xff, "x"'.decode(errors="surrogateescape")
    write_tar(tmp_path / "0a.tar", [(f"{odd}.png", b"x"), *sample(2), *sample(3)])
    listing = tmp_path / "errors.csv"
    options = ("--classes", 3, "--workers", 1, "--list", listing)
    assert run_cli("shards", "check", f"{tmp_path}/*.tar", *options) == 1
    out = capsys.readouterr().out
    # One row for each kind, with the first of them.
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    rows = [row for row in rows if row]
    assert rows == [
        ["label out of range", "10", f"{tmp_path}/0.tar", "003"],
        ["unreadable input", "2", f"{tmp_path}/0a.tar", '[bold]\\udcff, "x"'],
        ["shard with unlabelled samples", "1", f"{tmp_path}/0a.tar", "1 of 3 have no label"],
        ["key in two shards", "2", f"{tmp_path}/0a.tar", "002"],
    ]
    with listing.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        head, *listed = csv.reader(file)
    assert head == ["kind", "shard", "key", "position", "replaced_by"]
    kinds = [row[0] for row in listed]
    assert {kind: str(kinds.count(kind)) for kind in kinds} == {row[0]: row[1] for row in rows}
    assert ["unreadable input", f"{tmp_path}/0a.tar", odd, "", ""] in listed


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nowhere/*.tar"], "no shard matches nowhere/*.tar"),
        ([], "patterns"),
        (["{folder}/*.tar", "--world_size", "0"], "world_size 0 must be at least 1"),
        (["{folder}/*.tar", "--global-batch", "-1"], "global_batch -1 must be at least 1"),
        (["{folder}/*.tar", "--classes", "0"], "classes 0 must be at least 1"),
        (["{folder}/*.tar", "--workers", "0"], "workers 0 must be at least 1"),
        (["{folder}/*.tar", "--workers", "1", "--list", "{folder}/no/f.csv"], "no/f.csv"),
    ],
)
def test_mistakes_end_with_2(
    tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
):
    clean(tmp_path)
    assert run_cli("shards", "check", *(a.format(folder=tmp_path) for a in argv)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("maepretrain: error: ") and line in error


# Remote shards.


@pytest.fixture
def server() -> Iterator[FaultServer]:
    server = FaultServer()
    yield server
    server.close()


def test_remote_shards_are_checked_through_the_cache(tmp_path: Path, server: FaultServer):
    damage(tmp_path, "noise")
    paths = sorted(tmp_path.glob("*.tar"))
    make_indexes(paths, checksum=True)
    for path in [*paths, *map(index_path, paths)]:
        server.files[f"/{path.name}"] = path.read_bytes()
    flipped = bytearray(server.files["/2.tar"])
    flipped[input_of(paths[2], "009.cls").offset_data + 3] ^= 0xFF
    server.files["/2.tar"] = bytes(flipped)
    urls = [f"http://{server.host}/{name}.tar" for name in ("0", "1", "2", "gone")]
    cache = ShardCache(tmp_path / "cache", timeout=5.0, attempts=1)
    report = check_shards(urls, Criteria(), cache=cache)
    rows = [(error.kind, error.shard, error.key) for error in report.errors]
    assert [row[:2] for row in rows] == [
        ("unreadable input", urls[1]),
        ("unusable shard", urls[2]),
        ("unusable shard", urls[3]),
    ]
    assert rows[0][2] == "006" and "does not have the checksum" in rows[1][2]
    assert "there is no such file" in rows[2][2] or "404" in rows[2][2]
    assert report.totals.startswith("8 samples in 4 shards")


# shards order.


def printed(capsys: pytest.CaptureFixture[str]) -> list[tuple[int, int, str, str]]:
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return [(int(step), int(position), shard, key) for step, position, shard, key in lines]


def test_order_prints_what_the_ranks_read(
    shards: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
):
    pattern, read = f"{shards}/train-*.tar", []
    common = ("--global-batch", 24, "--world-size", 2, "--epoch", 2, "--seed", 5, "--block", 20)
    for rank in (0, 1):
        assert run_cli("shards", "order", pattern, *common, "--rank", rank) == 0
        rows = printed(capsys)
        # Rank r reads the r-th half of every step of 24.
        assert [row[:2] for row in rows] == [
            (step, (2 * 6 + step) * 24 + rank * 12 + i) for step in range(6) for i in range(12)
        ]
        read += rows
    index = ShardIndex(open_shards(pattern))
    order = EpochOrder(index.counts, 24, 5, block=20)
    samples = Samples(index, 1, Augment(8, 8), order, 5)
    read.sort(key=lambda row: row[1])
    assert [row[2:] for row in read] == samples.names([row[1] for row in read])
    assert len({row[2:] for row in read}) == 144  # of 150: the tail is dropped
    assert run_cli("shards", "order", pattern, *common, "--rank", 1, "--step", 3) == 0
    assert printed(capsys) == [row for row in read if row[0] == 3][12:]
    # Other streams read the same samples in another order; underscores are as good as dashes.
    options = ("--global_batch", 150, "--streams", 5)
    assert run_cli("shards", "order", pattern, *options) == 0
    assert len({row[2:] for row in printed(capsys)}) == 150
    options = ("--global_batch", 80, "--tail", "pad", "--crops_per_image", 2, "--step", 3)
    assert run_cli("shards", "order", pattern, *options) == 0
    rows = printed(capsys)
    assert [row[1] for row in rows] == list(range(240, 320))
    assert [row[2:] for row in rows[::2]] == [row[2:] for row in rows[1::2]]


def test_order_prints_a_line_for_any_key(
    tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
):
    name = b"a\t\n\xff.png".decode(errors="surrogateescape")
    write_tar(tmp_path / "a.tar", [(name, png(0)), ("b.png", png(1))])
    assert run_cli("shards", "order", f"{tmp_path}/a.tar", "--global_batch", 2) == 0
    assert {row[3] for row in printed(capsys)} == {"a\\t\\n\\udcff", "b"}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "global_batch"),
        (["--global-batch", "151"], "global batch 151 is larger than the 150 samples"),
        (["--global-batch", "24", "--world-size", "5"], "24 is not divisible by 5 processes"),
        (["--global-batch", "24", "--world-size", "2", "--rank", "2"], "rank 2 must be 0 to 1"),
        (["--global-batch", "24", "--rank", "-1"], "rank -1 must be 0 to 0"),
        (["--global-batch", "24", "--step", "6"], "step 6: an epoch has steps 0 to 5"),
        (["--global-batch", "24", "--step", "-1"], "an epoch has steps 0 to 5"),
        (["--global-batch", "24", "--epoch", "-1"], "epoch -1"),
        (["--global-batch", "24", "--streams", "5"], "24 is not divisible by 5 streams"),
        (["--global-batch", "24", "--tail", "keep"], "tail"),
    ],
)
def test_mistakes_of_order_are_one_line(
    shards: Path, run_cli: Run, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
):
    assert run_cli("shards", "order", f"{shards}/train-*.tar", *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("maepretrain: error: ") and line in error and error.count("\n") == 1


def test_index_is_made_anew(shards: Path, tmp_path: Path, run_cli: Run) -> None:
    """What `check` and a run ask for when an index is stale."""
    for path in shards.glob("train-*.tar"):
        shutil.copy(path, tmp_path)
    write_tar(tmp_path / "train-000000.tar", sample(0))
    assert run_cli("shards", "index", f"{tmp_path}/*.tar", "--workers", 1) == 0
    assert run_cli("shards", "check", f"{tmp_path}/*.tar", "--workers", 1) == 0
