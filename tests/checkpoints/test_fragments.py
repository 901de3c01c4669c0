"""Checkpoints as fragments, without an engine: cut anywhere, damaged anywhere, killed anywhere.

The truth is the whole tensors that were cut.
"""

import itertools
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maepretrain import ranks
from maepretrain.checkpoints.choose import choose
from maepretrain.checkpoints.folder import recover
from maepretrain.checkpoints.fragments import META, WEIGHT, Fragment, is_checkpoint, numbered, save
from maepretrain.checkpoints.saved import Saved, load, read_meta
from maepretrain.checkpoints.whole import WholeCheckpointIO
from maepretrain.runs.folder import RunFolder

SHAPES = {
    "encoder.weight": (5, 7),
    "a:name:with:colons": (11,),
    "scale": (),
    "one": (1,),
    "nothing": (0,),
    "frozen": (4, 2),
    "table": (3, 2, 2),
    "count": (),
}
TRAINED = ["encoder.weight", "a:name:with:colons", "scale", "one", "nothing"]
META_DATA = {"parameter_names": TRAINED, "optimizer_groups": [{"params": [0, 1, 2, 3, 4]}]}

Tensors = dict[str, dict[str, Tensor]]


def whole(seed: int) -> Tensors:
    """Tensors by name and kind: weights, and an optimizer's state of those that are trained."""
    chance = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        found[name] = {WEIGHT: torch.randn(shape, generator=chance)}
        if name in TRAINED:
            found[name] |= {
                "exp_avg": torch.randn(shape, generator=chance),
                "step": torch.tensor(float(seed + number)),
            }
    found["table"] = {WEIGHT: torch.randint(0, 2**62, (3, 2, 2), generator=chance)}
    found["count"] = {WEIGHT: torch.tensor(seed)}
    return found


def cut(tensors: Tensors, ranks: int, chance: torch.Generator) -> list[list[Fragment]]:
    """For each rank a run of each tensor, some of them empty, cut at random places."""
    by_rank: list[list[Fragment]] = [[] for _ in range(ranks)]
    for name, kinds in tensors.items():
        size = torch.Size(SHAPES[name]).numel()
        places = torch.randint(0, size + 1, (ranks - 1,), generator=chance).sort().values.tolist()
        order = torch.randperm(ranks, generator=chance).tolist()
        for rank, start, end in zip(order, [0, *places], [*places, size], strict=True):
            values = {
                kind: value.clone() if kind == "step" else value.reshape(-1)[start:end].clone()
                for kind, value in kinds.items()
            }
            by_rank[rank].append(Fragment(name, start, values, SHAPES[name], True))
    return by_rank


def write(path: Path, by_rank: list[list[Fragment]], **meta: Any) -> None:
    """`save` on every rank: threads that meet as processes do."""
    votes, result = list[bool](), [True]

    def count() -> None:
        result[0] = all(votes)
        votes.clear()

    meeting = threading.Barrier(len(by_rank), count)

    def agree(done: bool) -> bool:
        votes.append(done)
        meeting.wait(60)
        return result[0]

    everything = {"global_step": 1, "shapes": SHAPES} | META_DATA | meta
    with ThreadPoolExecutor(len(by_rank)) as ranks:
        done = [
            ranks.submit(save, path, everything, own, rank=rank, agree=agree)
            for rank, own in enumerate(by_rank)
        ]
    errors = [error for rank in done if (error := rank.exception()) is not None]
    # Where one fails, all say so; its own reason comes first.
    if errors:
        assert len(errors) == len(by_rank)
        raise min(errors, key=lambda error: "another process" in str(error))


def assert_holds(saved: Saved, tensors: Tensors) -> None:
    """Bit for bit."""
    assert saved.shapes == SHAPES
    for name, kinds in tensors.items():
        assert saved.kinds(name) == kinds.keys()
        for kind, value in kinds.items():
            found = saved.whole(kind, name)
            assert found.shape == value.shape
            assert torch.equal(found, value), (kind, name)


def plain(tensors: Tensors) -> dict[str, Any]:
    """The same as Lightning's own strategies save it."""
    state = {
        number: {kind: value for kind, value in tensors[name].items() if kind != WEIGHT}
        for number, name in enumerate(TRAINED)
    }
    return {
        "global_step": 1,
        "parameter_names": TRAINED,
        "state_dict": {name: kinds[WEIGHT] for name, kinds in tensors.items()},
        "optimizer_states": [{"state": state, "param_groups": META_DATA["optimizer_groups"]}],
    }


@pytest.fixture
def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# Cut anywhere.


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_any_cut_holds_the_whole(tmp_path: Path, ranks: int, chance: torch.Generator) -> None:
    for seed in range(8):
        tensors = whole(seed)
        write(tmp_path / "one.ckpt", cut(tensors, ranks, chance), global_step=seed)
        saved = Saved(tmp_path / "one.ckpt")
        assert_holds(saved, tensors)
        assert saved.meta["global_step"] == seed
        weights = saved.weights()
        assert weights.keys() == SHAPES.keys()
        assert all(torch.equal(weights[name], tensors[name][WEIGHT]) for name in SHAPES)
        names = {f"rank-{rank:05d}.safetensors" for rank in range(ranks)}
        assert {file.name for file in (tmp_path / "one.ckpt").iterdir()} == names | {META}


def test_any_range_is_read_across_runs(tmp_path: Path, chance: torch.Generator) -> None:
    tensors = whole(0)
    write(tmp_path / "one.ckpt", cut(tensors, 5, chance))
    saved = Saved(tmp_path / "one.ckpt")
    for name in ("encoder.weight", "table"):
        flat = tensors[name][WEIGHT].reshape(-1)
        for start in range(len(flat) + 1):
            for end in range(start, len(flat) + 1):
                assert torch.equal(saved.read(WEIGHT, name, start, end - start), flat[start:end])


def test_what_overlaps_is_read_once(tmp_path: Path) -> None:
    flat = torch.arange(10.0)
    starts = [(0, 4), (2, 9), (3, 5), (6, 10)]
    own = [Fragment("w", a, {WEIGHT: flat[a:b].clone()}, (10,), True) for a, b in starts]
    write(tmp_path / "one.ckpt", [own[:2], own[2:]], shapes={"w": (10,)})
    assert torch.equal(Saved(tmp_path / "one.ckpt").whole(WEIGHT, "w"), flat)


def test_only_what_is_to_be_written_is(tmp_path: Path) -> None:
    ours, theirs = torch.zeros(3), torch.ones(3)
    ranks = [
        [Fragment("w", 0, {WEIGHT: ours}, (3,), False)],
        [Fragment("w", 0, {WEIGHT: theirs}, (3,), True)],
    ]
    write(tmp_path / "one.ckpt", ranks, shapes={"w": (3,)})
    assert torch.equal(Saved(tmp_path / "one.ckpt").whole(WEIGHT, "w"), theirs)


@pytest.mark.parametrize("source", ["sharded", "plain"])
def test_any_engine_is_filled_from_either(
    tmp_path: Path, source: str, chance: torch.Generator
) -> None:
    """Into memory that is cut otherwise, through views; scalars with an axis and without."""
    for seed in range(5):
        tensors, path = whole(seed), tmp_path / f"{seed}.ckpt"
        if source == "plain":
            torch.save(plain(tensors), path)
        else:
            write(path, cut(tensors, 3, chance))
        saved = Saved(path)
        saved.check(SHAPES)
        memory: Tensors = {
            name: {kind: torch.zeros_like(value) for kind, value in kinds.items()}
            for name, kinds in tensors.items()
        }
        for name, kinds in memory.items():
            size = torch.Size(SHAPES[name]).numel()
            middle = int(torch.randint(0, size + 1, (), generator=chance))
            for start, end in ((0, middle), (middle, size)):
                views = {
                    kind: value if kind == "step" else value.view(-1)[start:end]
                    for kind, value in kinds.items()
                }
                load([Fragment(name, start, views, SHAPES[name], True)], saved)
        without_axis = torch.tensor(0), torch.tensor(0.0)
        load([Fragment("count", 0, {WEIGHT: without_axis[0]}, (), True)], saved)
        load([Fragment("scale", 0, {"exp_avg": without_axis[1]}, (), True)], saved)
        assert torch.equal(without_axis[0], tensors["count"][WEIGHT])
        assert torch.equal(without_axis[1], tensors["scale"]["exp_avg"])
        for name, kinds in tensors.items():
            for kind, value in kinds.items():
                assert torch.equal(memory[name][kind], value), (name, kind)


def test_fragments_become_what_lightning_loads(tmp_path: Path, chance: torch.Generator) -> None:
    tensors = whole(3)
    write(tmp_path / "one.ckpt", cut(tensors, 3, chance))
    (tmp_path / "plain").mkdir()
    torch.save(plain(tensors), tmp_path / "plain" / "one.ckpt")
    found, truth = (Saved(tmp_path / f).plain() for f in ("one.ckpt", "plain/one.ckpt"))
    assert found["state_dict"].keys() == truth["state_dict"].keys()
    for name, value in truth["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
    (ours,), (theirs,) = found["optimizer_states"], truth["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert ours["state"][number].keys() == state.keys()
        for kind, value in state.items():
            assert torch.equal(ours["state"][number][kind], value)


def test_parameters_are_numbered_through_all_groups() -> None:
    groups = [{"params": [None], "lr": 1.0}, {"params": [None, None], "lr": 2.0}]
    found = list(numbered(groups, [3, 2]))
    assert found == [{"lr": 1.0, "params": [0, 1, 2]}, {"lr": 2.0, "params": [3, 4]}]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (SHAPES | {"new": (2,)}, r"new has shape none there and \(2,\) here"),
        ({k: v for k, v in SHAPES.items() if k != "one"}, r"one has shape \(1,\) there and none"),
        (SHAPES | {"table": (2, 3, 2)}, r"table has shape \(3, 2, 2\) there and \(2, 3, 2\) here"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, own: dict[str, tuple[int, ...]], said: str, chance: torch.Generator
) -> None:
    write(tmp_path / "one.ckpt", cut(whole(0), 2, chance))
    with pytest.raises(ValueError, match=said):
        Saved(tmp_path / "one.ckpt").check(own)


# Damaged anywhere.


def damage(what: str, path: Path) -> str:
    """Spoil a checkpoint of two ranks; the file that is to be named."""
    meta, second = path / META, path / "rank-00001.safetensors"
    if what == "no meta":
        meta.unlink()
        return META
    if what == "meta cut off":
        meta.write_bytes(meta.read_bytes()[:-100])
        return META
    if what == "meta overwritten":
        meta.write_bytes(b"half of it")
        return META
    if what == "meta of no checkpoint":
        torch.save({"weights": torch.zeros(3)}, meta)
        return META
    if what == "no file":
        second.unlink()
    if what == "file cut off":
        second.write_bytes(second.read_bytes()[:-1])
    if what == "file empty":
        second.write_bytes(b"")
    if what == "head overwritten":
        second.write_bytes(b"\xff" * second.stat().st_size)
    return second.name


DAMAGES = [
    *("no meta", "meta cut off", "meta overwritten", "meta of no checkpoint"),
    *("no file", "file cut off", "file empty", "head overwritten"),
]


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_one_line_that_names_the_file(
    tmp_path: Path, what: str, chance: torch.Generator
) -> None:
    path = tmp_path / "last.ckpt"
    write(path, cut(whole(0), 2, chance))
    named = damage(what, path)
    with pytest.raises(ValueError) as caught:
        Saved(path)
    text = str(caught.value)
    assert str(path) in text and named in text and "\n" not in text, text


@pytest.mark.parametrize("what", [what for what in DAMAGES if what != "head overwritten"])
def test_a_resume_leaves_out_what_is_damaged(
    tmp_path: Path, what: str, chance: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "step=3.ckpt", cut(whole(0), 2, chance), global_step=3)
    write(tmp_path / "last.ckpt", cut(whole(1), 2, chance), global_step=5)
    assert choose(tmp_path, "auto") == tmp_path / "last.ckpt"
    named = damage(what, tmp_path / "last.ckpt")
    assert choose(tmp_path, "auto") == tmp_path / "step=3.ckpt"
    assert named in capsys.readouterr().out
    damage(what, tmp_path / "step=3.ckpt")
    with pytest.raises(ValueError, match=r"nor any other of .*; put one that can in its place"):
        choose(tmp_path, "auto")


def test_numbers_that_nobody_wrote_are_named(tmp_path: Path) -> None:
    flat = torch.arange(10.0)
    own = [Fragment("w", a, {WEIGHT: flat[a:b]}, (10,), True) for a, b in ((0, 3), (5, 10))]
    write(tmp_path / "one.ckpt", [own], shapes={"w": (10,), "v": (2,)})
    saved = Saved(tmp_path / "one.ckpt")
    assert torch.equal(saved.read(WEIGHT, "w", 6, 4), flat[6:])
    for start, count, where in ((0, 10, 3), (3, 1, 3), (5, 6, 10), (2, 2, 3)):
        with pytest.raises(ValueError, match=rf"one\.ckpt has no weight of w from {where} on"):
            saved.read(WEIGHT, "w", start, count)
    for kind, name in ((WEIGHT, "v"), ("exp_avg", "w")):
        with pytest.raises(ValueError, match=f"no {kind} of {name} from 0 on"):
            saved.whole(kind, name)
        with pytest.raises(ValueError, match=f"no {kind} of {name} from 0 on"):
            load([Fragment(name, 0, {kind: torch.zeros(2)}, (2,), True)], saved)


# Killed anywhere, and full disks.


def old_checkpoint(kind: str, path: Path) -> None:
    chance = torch.Generator().manual_seed(1)
    if kind == "sharded":
        write(path, cut(whole(1), 3, chance), global_step=1)
    if kind == "plain":
        WholeCheckpointIO().save_checkpoint(plain(whole(1)), path)


def new_checkpoint(kind: str, path: Path) -> None:
    chance = torch.Generator().manual_seed(2)
    if kind == "sharded":
        write(path, cut(whole(2), 2, chance), global_step=2)
    else:
        WholeCheckpointIO().save_checkpoint(plain(whole(2)) | {"global_step": 2}, path)


def killed_at(moment: int, work: Callable[[], None]) -> bool:
    """Work in a process that is killed when Python is about to do its n-th thing to a file.

    Returns:
        Whether it came to this moment.
    """
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return status != 0
    done = 0

    def hook(event: str, _: Any) -> None:
        nonlocal done
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
            if done == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    try:
        sys.addaudithook(hook)
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("new", ["sharded", "plain"])
@pytest.mark.parametrize("old", ["nothing", "sharded", "plain"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, old: str, new: str) -> None:
    """A process that killed none first imports what it needs."""
    new_checkpoint(new, tmp_path / "first" / "last.ckpt")
    found: set[int] = set()
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        folder.mkdir()
        path = folder / "last.ckpt"
        old_checkpoint(old, path)
        killed = killed_at(moment, lambda path=path: new_checkpoint(new, path))
        # Before rank zero has mended anything the others may look.
        assert (choose(folder, "auto") is None) == (old == "nothing" and not path.exists())
        recover(folder)
        assert [file.name for file in folder.iterdir()] in ([], ["last.ckpt"])
        chosen = choose(folder, "auto")
        assert chosen in (None, path)
        step = 0
        if chosen is not None:
            saved = Saved(chosen)
            step = int(saved.meta["global_step"])
            assert_holds(saved, whole(step))
        found.add(step)
        assert step or old == "nothing"
        new_checkpoint(new, path)  # a next one is not in the way of what was left
        assert_holds(Saved(path), whole(2))
        if not killed:
            assert step == 2 and moment > 3
            break
    assert found == {0 if old == "nothing" else 1, 2}


@pytest.mark.parametrize("limit", [1, 300, 2000])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files, which all of a rank's tensors, or only meta.pt, do not keep."""
    path = tmp_path / "last.ckpt"
    old_checkpoint("sharded", path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = [Fragment("w", 0, {WEIGHT: torch.zeros(4)}, (4,), True)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(path, [small, small], shapes={"w": (4,)}, long=list(range(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert choose(tmp_path, "auto") == path
    recover(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_one_rank_that_cannot_write_stops_all(tmp_path: Path) -> None:
    """And none is left waiting, whatever the reason."""
    path = tmp_path / "last.ckpt"
    old_checkpoint("sharded", path)
    broken = Fragment("w", 0, {WEIGHT: torch.zeros(4, device="meta")}, (4,), True)
    whole_one = Fragment("w", 0, {WEIGHT: torch.zeros(4)}, (4,), True)
    for held in ([[whole_one], [broken]], [[broken], [whole_one]]):
        with pytest.raises(NotImplementedError):
            write(path, held, shapes={"w": (4,)})
    assert_holds(Saved(path), whole(1))


def test_half_a_checkpoint_is_none(tmp_path: Path, chance: torch.Generator) -> None:
    write(tmp_path / "last.ckpt", cut(whole(0), 2, chance))
    assert is_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt" / META).unlink()
    assert not is_checkpoint(tmp_path / "last.ckpt")
    assert not is_checkpoint(tmp_path / "none.ckpt")


def test_other_ranks_wait_until_rank_zero_has_mended_the_folder(
    tmp_path: Path, chance: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts all at once: none may go on from another checkpoint than rank zero does."""
    folder = tmp_path / "checkpoints"
    write(folder / "last.ckpt", cut(whole(0), 2, chance))
    (folder / "last.ckpt").rename(folder / ".last.ckpt.old")
    write(folder / "next.ckpt", cut(whole(1), 2, chance))
    (folder / "next.ckpt").rename(folder / ".last.ckpt.partial")
    monkeypatch.setattr(ranks.rank_zero_only, "rank", 1)

    def mend() -> None:
        time.sleep(0.3)
        recover(folder)

    with ThreadPoolExecutor(1) as rank_zero:
        mended = rank_zero.submit(mend)
        with RunFolder(
            tmp_path, resume=True, overwrite=False, config="seed: 0\n", ckpt_path="last"
        ) as run:
            assert run.resume_from == folder / "last.ckpt"
            assert read_meta(folder / "last.ckpt")["global_step"] == 1
        mended.result()
    shutil.rmtree(folder)
    with RunFolder(tmp_path, resume=True, overwrite=False, config="seed: 0\n") as run:
        assert run.resume_from is None
