"""Real ranks on gloo: every sample exactly once whatever the processes, and after any stop.

The truth is the run that was never stopped, on one process, and the numbers in the images.
"""

import csv
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.recorder import HANGS, Ranks, Record, kill_trees, read_reads, read_records
from support.recorder_runs import BATCH, LEFT_OUT, OPTIONS, SAMPLES, STEPS_PER_EPOCH, write_pictures
from support.runs import by_step

pytestmark = pytest.mark.slow

TWO_EPOCHS = ["--trainer.max_epochs", 2]
KEEP_ALL = ["--keep_every_steps", 1]


class On(NamedTuple):
    """The processes of a run."""

    ranks: int = 1
    workers: int = 0
    accumulation: int = 1

    def __str__(self) -> str:
        return f"{self.ranks}x{self.workers}x{self.accumulation}"


@dataclass
class Part:
    """What one start of a run did, until it ended or was killed."""

    records: list[Record]
    output: str
    codes: Sequence[int | None]
    log: Path

    @property
    def content(self) -> list[tuple[int, int, int, int]]:
        """(position, image, crop, mask) in the order of the positions."""
        return [record[:4] for record in self.records]

    @property
    def images(self) -> list[int]:
        return [record.image for record in self.records]

    def losses(self, batch: int = BATCH) -> dict[int, float]:
        """The loss of each step over its whole global batch."""
        of_step: dict[int, list[float]] = {}
        for record in self.records:
            of_step.setdefault(record.position // batch, []).append(record.loss)
        return {step: math.fsum(losses) / len(losses) for step, losses in of_step.items()}


_logs = itertools.count()


def start(
    run: Path, shards: Path, on: On, *options: object, hold: tuple[int, int] | None = None
) -> Ranks:
    """Start a run on these processes; with `hold` one of them stops for good."""
    data = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    argv = ["pretrain", *OPTIONS, *data, "--data.num_workers", on.workers, "--run", run]
    argv += ["--trainer.accumulate_grad_batches", on.accumulation, *options]
    return Ranks(run.parent / f"{run.name}-log-{next(_logs)}", argv, on.ranks, hold)


def pretrain(run: Path, shards: Path, on: On, *options: object, batch: int = BATCH) -> Part:
    """A run to its end, with an equal number of passes on every rank."""
    ranks = start(run, shards, on, *options)
    codes = ranks.wait()
    part = Part(read_records(ranks.log), ranks.output(), codes, ranks.log)
    assert codes == [0] * on.ranks, part.output
    assert_equal_steps(part.records, on, batch)
    return part


def refused(run: Path, shards: Path, *options: object) -> str:
    """The one line with which a run of one process is refused."""
    ranks = start(run, shards, On(), *options)
    assert ranks.wait() == [2], ranks.output()
    assert not read_records(ranks.log)
    *before, error = ranks.output().splitlines()
    assert error.startswith("maepretrain: error: ") and "Traceback" not in "".join(before)
    return error


def assert_equal_steps(records: list[Record], on: On, batch: int) -> None:
    """All ranks took the same number of passes, equally large, at the steps that were due."""
    passes = Counter((record.rank, record.forward) for record in records)
    n = len({record.forward for record in records})
    assert passes.keys() == set(itertools.product(range(on.ranks), range(n)))
    assert set(passes.values()) == {batch // on.ranks // on.accumulation}
    first = records[0].position // batch
    for record in records:
        assert record.position // batch == first + record.forward // on.accumulation


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images in 43, 43, 43, 21 and none to train on, and 50 held out."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, "train", range(SAMPLES), 43)
    write_pictures(folder, "test", range(1000, 1050), 43)
    with tarfile.open(folder / "train-000002a.tar", "w"):
        pass
    return folder


class Kept(NamedTuple):
    """A run of two epochs that was never stopped, with a checkpoint of every step."""

    run: Path
    part: Part

    def cut(self, to: Path, step: int) -> Path:
        """A copy of the run as it stood when this step was saved."""
        shutil.copytree(self.run, to)
        (to / f"checkpoints/step={step}.ckpt").replace(to / "checkpoints/last.ckpt")
        return to


@pytest.fixture(scope="module")
def never_stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[On], Kept]:
    """Two epochs on some processes; each kind of run is made once."""
    folder, made = tmp_path_factory.mktemp("never-stopped"), {}

    def get(on: On) -> Kept:
        if on not in made:
            run = folder / str(on)
            made[on] = Kept(run, pretrain(run, shards, on, *TWO_EPOCHS, *KEEP_ALL))
        return made[on]

    return get


@pytest.fixture(scope="module")
def whole(never_stopped: Callable[[On], Kept]) -> Kept:
    """The truth: one process, which also loads."""
    return never_stopped(On())


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def assert_same_weights(a: Path, b: Path, tolerance: float) -> None:
    one, two = checkpoint(a)["state_dict"], checkpoint(b)["state_dict"]
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=tolerance)


# The order.


def test_each_epoch_shows_each_sample_at_most_once(
    tmp_path: Path, shards: Path, whole: Kept
) -> None:
    images, per_epoch = whole.part.images, STEPS_PER_EPOCH * BATCH
    assert [record.position for record in whole.part.records] == list(range(2 * per_epoch))
    epochs = images[:per_epoch], images[per_epoch:]
    for epoch in epochs:
        assert len(set(epoch)) == per_epoch == SAMPLES - LEFT_OUT
        assert set(epoch) < set(range(SAMPLES))
    assert epochs[0] != epochs[1]
    assert f"{LEFT_OUT} left out of each epoch" in whole.part.output
    # Every crop and mask has its own random numbers; crops of so small an image may be equal.
    for field, least in (("crop", 0.95), ("mask", 1.0)):
        values = [getattr(record, field) for record in whole.part.records]
        assert len(set(values)) >= least * len(values)
    other = pretrain(tmp_path / "other", shards, On(), "--trainer.max_steps", 3, "--seed", 4)
    for one, two in zip(whole.part.records, other.records, strict=False):
        assert one.mask != two.mask
    assert other.images != images[: 3 * BATCH]


@pytest.mark.parametrize(
    "on", [On(1, 2), On(2, 0), On(2, 2), On(4, 0), On(4, 2), On(2, 0, 3)], ids=str
)
def test_processes_do_not_change_what_a_step_trains_on(
    never_stopped: Callable[[On], Kept], whole: Kept, on: On
) -> None:
    """Order, crops and masks bit for bit; losses and weights but for the order of summation."""
    run, part = never_stopped(on)
    assert part.content == whole.part.content
    assert part.losses() == pytest.approx(whole.part.losses(), abs=2e-6)
    assert_same_weights(run, whole.run, 1e-6)
    if on == On(1, 2):
        assert by_step(run, "loss") == by_step(whole.run, "loss")


@pytest.mark.parametrize("on", [On(), On(2, 2), On(2, 0, 3)], ids=str)
def test_the_logged_loss_is_that_of_the_global_batch(
    never_stopped: Callable[[On], Kept], on: On
) -> None:
    run, part = never_stopped(on)
    assert by_step(run, "loss") == pytest.approx(part.losses(), abs=2e-6)


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All images in one shard, and fewer held out than ranks."""
    folder = tmp_path_factory.mktemp("one-shard")
    write_pictures(folder, "train", range(SAMPLES), SAMPLES)
    write_pictures(folder, "test", range(1000, 1003), 3)
    return folder


def test_more_ranks_than_shards(tmp_path: Path, one_shard: Path) -> None:
    one, four = (
        pretrain(tmp_path / str(on), one_shard, on, "--trainer.max_epochs", 1)
        for on in (On(), On(4, 1))
    )
    assert four.content == one.content
    assert len(set(one.images)) == SAMPLES - LEFT_OUT


def test_no_sample_is_left_out_of_every_epoch(tmp_path: Path, one_shard: Path) -> None:
    part = pretrain(tmp_path / "run", one_shard, On(), "--trainer.max_epochs", 6)
    assert set(part.images) == set(range(SAMPLES))


@pytest.mark.parametrize("on", [On(), On(4, 0)], ids=str)
def test_padding_repeats_what_is_said(tmp_path: Path, shards: Path, on: On) -> None:
    part = pretrain(tmp_path / "run", shards, on, *TWO_EPOCHS, "--data.order.tail", "pad")
    padded = (STEPS_PER_EPOCH + 1) * BATCH
    assert f"{padded - SAMPLES} repeated in each epoch" in part.output
    assert len(part.images) == 2 * padded
    for epoch in (part.images[:padded], part.images[padded:]):
        times = Counter(epoch)
        assert times.keys() == set(range(SAMPLES))
        assert Counter(times.values()) == {1: 2 * SAMPLES - padded, 2: padded - SAMPLES}


# Stop and go on.


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        (On(), 4, On(2, 2)),
        (On(2, 2), 6, On(1, 0, 3)),
        (On(4, 0), 5, On(2, 0, 2)),
        (On(2, 0, 3), 9, On(4, 0, 2)),
        (On(4, 2), 1, On(1, 2, 2)),
        (On(2, 2), 11, On()),
    ],
    ids=[
        "mid-epoch",
        "after validation",
        "near the end",
        "second epoch",
        "first step",
        "last step",
    ],
)
def test_resume_on_other_processes(
    tmp_path: Path,
    shards: Path,
    never_stopped: Callable[[On], Kept],
    whole: Kept,
    before: On,
    step: int,
    after: On,
) -> None:
    run = never_stopped(before).cut(tmp_path / "run", step)
    part = pretrain(run, shards, after, *TWO_EPOCHS, "--resume")
    assert part.content == whole.part.content[step * BATCH :]
    rest = {s: loss for s, loss in whole.part.losses().items() if s >= step}
    assert part.losses() == pytest.approx(rest, abs=2e-6)
    assert_same_weights(run, whole.run, 1e-6)
    assert by_step(run, "lr") == by_step(whole.run, "lr")
    if after.ranks < 4:  # which leaves 2 of the 50 held-out images out
        assert by_step(run, "val_loss") == pytest.approx(by_step(whole.run, "val_loss"), abs=2e-6)
    assert checkpoint(run)["global_step"] == 2 * STEPS_PER_EPOCH


@pytest.mark.parametrize("step", [5, 6, 8])
@pytest.mark.parametrize("on", [On(2, 2), On(2, 0, 3)], ids=str)
def test_resume_on_the_same_processes_is_bit_equal(
    tmp_path: Path, shards: Path, never_stopped: Callable[[On], Kept], on: On, step: int
) -> None:
    kept = never_stopped(on)
    run = kept.cut(tmp_path / "run", step)
    part = pretrain(run, shards, on, *TWO_EPOCHS, "--resume")
    assert part.records[0].position == step * BATCH
    assert_same_weights(run, kept.run, 0)
    for name in ("loss", "val_loss", "lr"):
        assert by_step(run, name) == by_step(kept.run, name)
    assert list(by_step(run, "loss")) == list(range(2 * STEPS_PER_EPOCH))


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_twice_every_sample_trains_the_surviving_weights_once(
    tmp_path: Path, shards: Path, whole: Kept, seed: int
) -> None:
    """kill -9 of ranks and loader workers at random steps, each time other processes go on."""
    chance, run, every, epochs = random.Random(seed), tmp_path / "run", 3, 4
    options = ["--trainer.max_epochs", epochs, "--checkpoint_every_steps", every, "--resume"]
    history: list[Record] = []
    done = 0
    for on in chance.sample([On(2, 2), On(4, 0), On(1, 2), On(2, 0, 2)], 2):
        step = chance.randrange(done + every, done + 9)
        hold = (chance.randrange(on.ranks), (step - done) * on.accumulation)
        ranks = start(run, shards, on, *options, hold=hold)
        ranks.kill_at_hold()
        begin, done = done, checkpoint(run)["global_step"]
        assert done == begin + (step - begin) // every * every or step % every == 0
        records = read_records(ranks.log)
        assert records[0].position == begin * BATCH
        assert records[-1].position >= step * BATCH  # what is lost and comes again
        history += [record for record in records if record.position < done * BATCH]
    last = pretrain(run, shards, On(2, 0), *options)
    history += last.records
    per_epoch = STEPS_PER_EPOCH * BATCH
    assert [record.position for record in history] == list(range(epochs * per_epoch))
    for epoch in range(epochs):
        images = [record.image for record in history[epoch * per_epoch :][:per_epoch]]
        assert len(set(images)) == per_epoch
    assert [record[:4] for record in history[: 2 * per_epoch]] == whole.part.content
    assert list(by_step(run, "loss")) == list(range(epochs * STEPS_PER_EPOCH))


def test_a_resume_deep_in_a_run_reads_nothing_of_what_lies_before(
    tmp_path: Path, shards: Path, whole: Kept, run_cli: Callable[..., int], capfd: Any
) -> None:
    run, steps, left = whole.cut(tmp_path / "run", 5), 6_000_000, 4
    state = checkpoint(run)
    state["ShardData"]["consumed"] = (steps - left) * BATCH
    state["global_step"] = steps - left
    torch.save(state, run / "checkpoints/last.ckpt")
    part = pretrain(run, shards, On(2, 2), "--trainer.max_steps", steps, "--resume")
    positions = [record.position for record in part.records]
    assert positions == list(range((steps - left) * BATCH, steps * BATCH))
    # What `shards order` says of the last four steps of the last epoch.
    capfd.readouterr()
    pattern, epoch = f"{shards}/train-*.tar", steps // STEPS_PER_EPOCH - 1
    order = ["--epoch", epoch, "--seed", 3, "--block", 7]
    assert run_cli("shards", "order", pattern, *order, "--global_batch", BATCH) == 0
    keys = [line.split()[-1] for line in capfd.readouterr().out.splitlines()]
    assert [f"{image:08d}" for image in part.images] == keys[-left * BATCH :]
    # Bytes: only those of the samples that were trained on, each once.
    place_of = places(shards)
    due = Counter(place_of[f"{image:08d}"] for image in part.images)
    read = Counter(one for one in read_reads(part.log) if one[0].startswith("train"))
    assert {one: n for one, n in read.items() if one[2] != tarfile.BLOCKSIZE} == due
    headers = {(shard, offset - tarfile.BLOCKSIZE) for shard, offset, _ in due}
    assert {one[:2] for one in read if one[2] == tarfile.BLOCKSIZE} == headers


def places(folder: Path) -> dict[str, tuple[str, int, int]]:
    """(shard, offset, bytes) of the training image of each key."""
    found = {}
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            found |= {
                Path(member.name).stem: (path.name, member.offset_data, member.size)
                for member in tar
                if member.name.endswith(".png")
            }
    return found


# Errors.


def spoil(shards: Path, to: Path, keys: Sequence[str]) -> Path:
    """A copy of the shards in which these images are overwritten with zeros."""
    shutil.copytree(shards, to)
    found = places(to)
    for key in keys:
        shard, offset, size = found[key]
        with (to / shard).open("r+b") as file:
            file.seek(offset)
            file.write(bytes(size))
    return to


def keys_by_shard(folder: Path) -> dict[str, list[str]]:
    by_shard: dict[str, list[str]] = {}
    for key, (shard, _, _) in places(folder).items():
        by_shard.setdefault(shard, []).append(key)
    return by_shard


@pytest.fixture(scope="module")
def instead(shards: Path) -> dict[str, str]:
    """Which images are spoiled, and the next readable one of its shard for each."""
    a, b, c, d = keys_by_shard(shards).values()
    return {
        **{a[10]: a[12], a[11]: a[12]},  # two in a row
        **{b[42]: b[1], b[0]: b[1]},  # round the shard's end
        **{c[5]: c[6], d[20]: d[0], d[3]: d[4]},
    }


def listed(run: Path) -> list[tuple[str, ...]]:
    with (run / "errors.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["kind", "shard", "key", "position", "replaced_by"]
    return sorted(tuple(row) for row in rows)


@pytest.mark.parametrize("on", [On(), On(2, 2), On(4, 0)], ids=str)
def test_spoiled_images_are_replaced_and_listed_once(
    tmp_path: Path, shards: Path, whole: Kept, instead: dict[str, str], on: On
) -> None:
    folder, run = spoil(shards, tmp_path / "spoiled", list(instead)), tmp_path / "run"
    part = pretrain(run, folder, on, *TWO_EPOCHS, *KEEP_ALL)
    replaced = {int(key): int(other) for key, other in instead.items()}
    assert part.images == [replaced.get(image, image) for image in whole.part.images]
    for now, before in zip(part.content, whole.part.content, strict=True):
        assert now == before or before[1] in replaced
    shard_of = {key: folder / shard for key, (shard, *_) in places(folder).items()}
    rows = listed(run)
    assert rows[0][:2] == ("empty shard", str(folder / "train-000002a.tar"))
    drawn = [key for key in instead if int(key) in whole.part.images]
    assert rows[1:] == sorted(
        (
            "unreadable input",
            str(shard_of[key]),
            key,
            str(whole.part.images.index(int(key))),
            instead[key],
        )
        for key in drawn
    )
    Kept(run, part).cut(tmp_path / "cut", 3)
    again = pretrain(tmp_path / "cut", folder, On(2, 0), *TWO_EPOCHS, "--resume")
    assert again.content == part.content[3 * BATCH :]
    assert listed(tmp_path / "cut") == rows


def test_too_many_errors_stop_all_ranks(tmp_path: Path, shards: Path) -> None:
    """Lightning's own launcher, as a user starts it."""
    keys = [f"{n:08d}" for n in range(0, SAMPLES, 6)]
    folder = spoil(shards, tmp_path / "spoiled", keys)
    command = [sys.executable, "-m", "maepretrain", "pretrain", *OPTIONS, "--trainer.devices", "2"]
    command += ["--data.train", f"{folder}/train-*.tar", "--run", str(tmp_path / "run")]
    command += ["--trainer.strategy", "ddp", "--trainer.max_epochs", "50"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = process.communicate(timeout=HANGS)
    finally:
        if process.poll() is None:
            kill_trees([process.pid])
    assert process.returncode not in (0, None)
    stops = [line for line in errors.splitlines() if line.startswith("maepretrain: error:")]
    assert any("more than the 10 that are tolerated" in line for line in stops), errors
    assert "Traceback" not in errors
    assert len(listed(tmp_path / "run")) > 10


# Another order.


def lr_at(step: int, steps: int, per_epoch: int, batch: int) -> float:
    """One epoch of warm-up to base_lr 1 x batch / 256, half a cosine to 0."""
    if step < per_epoch:
        return batch / 256 * step / per_epoch
    return batch / 256 * (1 + math.cos(math.pi * (step - per_epoch) / (steps - per_epoch))) / 2


def test_another_batch_is_refused_and_nothing_changes(
    tmp_path: Path, shards: Path, whole: Kept
) -> None:
    run = whole.cut(tmp_path / "run", 5)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = [*TWO_EPOCHS, "--data.global_batch", 16, "--resume"]
    assert "global_batch was 24 and is 16" in refused(run, shards, *options)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("on", [On(), On(2, 0, 2)], ids=str)
def test_another_batch_goes_on_at_the_same_sample(
    tmp_path: Path, shards: Path, whole: Kept, on: On
) -> None:
    """After 5 batches of 24, batches of 16 go on at 128, the next whole batch after 120."""
    run = whole.cut(tmp_path / "run", 5)
    options = [*TWO_EPOCHS, "--data.global_batch", 16, "--resume"]
    part = pretrain(run, shards, on, *options, "--allow_reorder", batch=16)
    assert "another order of samples from sample 128 on" in part.output
    assert [record.position for record in part.records] == list(range(128, 2 * 9 * 16))
    assert checkpoint(run)["global_step"] == 18
    fresh = pretrain(tmp_path / "fresh", shards, On(), *options[:-1], batch=16)
    assert part.content == fresh.content[128:]
    rates = by_step(run, "lr")
    assert {step: rates[step] for step in range(8, 18)} == pytest.approx(
        {step: lr_at(step, 18, 9, 16) for step in range(8, 18)}
    )


def test_other_shards_go_on_at_the_same_sample(tmp_path: Path, shards: Path, whole: Kept) -> None:
    run, fewer = whole.cut(tmp_path / "run", 5), tmp_path / "fewer"
    shutil.copytree(shards, fewer)
    for path in fewer.glob("train-000000.tar*"):
        path.unlink()
    steps = (SAMPLES - 43) // BATCH  # an epoch
    options = ["--trainer.max_epochs", 3, "--resume"]
    assert f"samples was {SAMPLES} and is {SAMPLES - 43}" in refused(run, fewer, *options)
    part = pretrain(run, fewer, On(2, 0), *options, "--allow_reorder")
    assert [r.position for r in part.records] == list(range(5 * BATCH, 3 * steps * BATCH))
    fresh = pretrain(tmp_path / "fresh", fewer, On(), *options[:-1])
    assert part.content == fresh.content[5 * BATCH :]
    gone = {int(key) for key in keys_by_shard(shards)["train-000000.tar"]}
    assert not gone & set(part.images)


# Several crops of an image, and several sources.


def test_crops_of_an_image_count_as_samples(tmp_path: Path, shards: Path) -> None:
    options = ["--data.crop.per_image", 2, "--trainer.max_epochs", 1]
    one, two = (pretrain(tmp_path / str(on), shards, on, *options) for on in (On(), On(2, 1, 2)))
    assert two.content == one.content
    images = SAMPLES // (BATCH // 2) * (BATCH // 2)
    assert Counter(Counter(one.images).values()) == {2: images}
    assert one.images[::2] == one.images[1::2]
    assert len({record.crop for record in one.records}) > 0.95 * 2 * images
    steps = 2 * images // BATCH
    assert f"{steps} steps, 1 epochs of {steps}" in one.output
    assert f"lr            {BATCH / 256:.4g} = base_lr 1 x {BATCH} / 256" in one.output


def test_a_mixture_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    """14 of 20 samples from a, 6 from b; 96 and 48 images, each once before any comes again."""
    write_pictures(tmp_path, "train", range(96), 25)
    write_pictures(tmp_path / "b", "train", range(200, 248), 13)
    write_pictures(tmp_path, "test", range(1000, 1010), 10)
    mixture = f'{{"{tmp_path}/train-*.tar": 0.7, "{tmp_path}/b/train-*.tar": 0.3}}'
    options = ["--data.train", mixture, "--data.global_batch", 20]
    options += ["--data.order.samples_per_epoch", 140, *TWO_EPOCHS, *KEEP_ALL]
    runs = {on: tmp_path / str(on) for on in (On(), On(2, 2), On(4, 0))}
    parts = {on: pretrain(run, tmp_path, on, *options, batch=20) for on, run in runs.items()}
    truth = parts[On()]
    assert len(truth.records) == 2 * 140
    for on in runs:
        assert parts[on].content == truth.content
    for begin in range(0, 280, 20):
        assert sum(image < 200 for image in truth.images[begin : begin + 20]) == 14
    for source in (range(96), range(200, 248)):
        drawn = [image for image in truth.images if image in source]
        for begin in range(0, len(drawn) - len(source) + 1, len(source)):
            assert set(drawn[begin : begin + len(source)]) == set(source)
    for before, step, after in ((On(2, 2), 3, On(4, 0)), (On(4, 0), 9, On(1, 2, 2))):
        run = Kept(runs[before], parts[before]).cut(tmp_path / f"cut-{step}", step)
        part = pretrain(run, tmp_path, after, *options, "--resume", batch=20)
        assert part.content == truth.content[step * 20 :]
