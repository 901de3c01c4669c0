"""Real processes under every engine: the same numbers, a divided memory, one checkpoint for all.

The truth is one process, or DDP, which divides nothing; and the run that was never stopped.
"""

import csv
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from support.recorder import (
    HANGS,
    Held,
    Ranks,
    kill_trees,
    read_held,
    read_positions,
    read_reads,
)
from support.runs import TINY

from maepretrain.checkpoints.fragments import is_sharded
from maepretrain.checkpoints.saved import Saved, read_meta

STEPS, BATCH, KEEP = 20, 24, 7
CLIP = ["--trainer.gradient_clip_val", "0.5"]
RECIPE = [
    *("--trainer.max_steps", str(STEPS), "--trainer.accumulate_grad_batches", "2"),
    # So much that a bias which is decayed, and must not be, shows.
    *("--optim.weight_decay", "0.5", "--optim.warmup_epochs", "1"),
    *("--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"),
    *("--data.num_workers", "0"),
]
MAE = ["pretrain", "-c", "data/digits", "-c", "recipe/mae_digits", *TINY, *RECIPE]
DENOISING = [
    *(
        "pretrain",
        "-c",
        "data/fashion_mnist",
        "-c",
        "recipe/denoising",
        "--data.image_size",
        "16",
        "--data.global_batch",
        "24",
    ),
    *("--model.coder.widths", "[37, 11]", *RECIPE),
]
# Held-out loss, pictures, a linear probe and k-NN in the middle of training and at its end.
EVALUATED = [
    *("--trainer.max_steps", "8", "--trainer.check_val_every_n_epoch", "1"),
    *("--pictures", "2", "--live_probe", "40"),
]
ODD = [
    *("pretrain", "--model", "support.recorder.Odd"),
    *("--data.image_size", "16", "--data.channels", "1"),
    *("--data.global_batch", "24", "--data.mean", "[0.3]", "--data.std", "[0.4]"),
    *("--optim.base_lr", "0.1", "--threads", "1", *RECIPE),
]
# A small model stays whole at stage 3 otherwise, as the odd one does here.
DIVIDED = ["--trainer.strategy.init_args.keep_whole", "0"]
ENGINES = ["zero1", "zero2", "zero3", "fsdp2"]


class On(NamedTuple):
    """The processes of a run and what divides the work among them."""

    engine: str = "ddp"
    ranks: int = 1

    def __str__(self) -> str:
        return f"{self.engine}-{self.ranks}"


class Part(NamedTuple):
    """What one start of a run left behind."""

    run: Path
    log: Path
    output: str

    def losses(self) -> dict[int, float]:
        return column(self.run, "loss")

    def held(self) -> list[Held]:
        """By rank, at the end."""
        return [saves[-1] for saves in read_held(self.log)]


def column(run: Path, name: str) -> dict[int, float]:
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


_logs = itertools.count()


def start(run: Path, shards: Path, on: On, *options: object, **how: Any) -> Ranks:
    """Start a run on these processes."""
    evaluates = "--live_probe" in options or "finetune" in options
    held_out = f"{shards}/test-*.tar" if evaluates else "null"
    argv = [*options, "--data.train", f"{shards}/train-*.tar", "--data.val", held_out, "--run", run]
    settings = DIVIDED if on.engine == "zero3" and "support.recorder.Odd" not in options else []
    log = run.parent / f"{run.name}-log-{next(_logs)}"
    return Ranks(log, argv, on.ranks, strategy=on.engine, settings=settings, **how)


def train(run: Path, shards: Path, on: On, *options: object) -> Part:
    """A run to its end."""
    ranks = start(run, shards, on, *options)
    assert ranks.wait() == [0] * on.ranks, ranks.output()
    return Part(run, ranks.log, ranks.output())


def assert_equal_losses(found: dict[int, float], truth: dict[int, float], atol: float) -> None:
    assert found.keys() == truth.keys()
    worst = max(abs(found[step] - truth[step]) for step in truth)
    print(f"largest difference {worst:.2g}")
    assert worst <= atol


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    """Without the biases of attention's keys: no loss depends on them, so their gradient is a
    rounding error, of which Adam makes a full step."""
    found = Saved(run / "checkpoints" / f"{name}.ckpt").weights()
    for key, value in found.items():
        if key.endswith("qkv.bias"):
            found[key] = torch.cat(value.chunk(3)[::2])
    return found


def assert_equal_weights(one: Path, two: Path, name: str = "last") -> None:
    first, second = weights(one, name), weights(two, name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(
            value, second[key], rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


Get = Callable[[str, On], Part]
Tuned = Callable[[On], Part]
RECIPES = {
    "mae": [*MAE, *CLIP, "--keep_every_steps", KEEP],
    "evaluated": [*MAE, *EVALUATED],
    "denoising": [*DENOISING, *CLIP],
    "mae in bfloat16": [*MAE, *CLIP, "--trainer.precision", "bf16-mixed"],
    "unclipped": MAE,
    "odd": [*ODD, *CLIP, "--keep_every_steps", 3],
}


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Get:
    """A run that was never stopped; each kind of run is made once."""
    folder, made = tmp_path_factory.mktemp("engines"), dict[tuple[str, On], Part]()

    def get(recipe: str, on: On) -> Part:
        if (recipe, on) not in made:
            run = folder / f"{recipe}-{on}".replace(" ", "-")
            made[recipe, on] = train(run, shards, on, *RECIPES[recipe])
        return made[recipe, on]

    return get


# The same numbers.


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", *ENGINES])
@pytest.mark.parametrize("recipe", ["mae", "denoising"])
def test_every_engine_trains_as_one_process_does(trained: Get, recipe: str, engine: str) -> None:
    one, two = trained(recipe, On()), trained(recipe, On(engine, 2))
    assert len(one.losses()) == STEPS
    assert_equal_losses(two.losses(), one.losses(), 1e-6)
    assert column(two.run, "lr") == pytest.approx(column(one.run, "lr"))
    norms = column(one.run, "grad_norm")
    assert len(norms) == STEPS
    assert column(two.run, "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert_equal_weights(two.run, one.run)


@pytest.mark.slow
def test_the_clipping_of_these_runs_bites(trained: Get) -> None:
    clipped, free = (trained(recipe, On()).losses() for recipe in ("mae", "unclipped"))
    assert max(abs(clipped[step] - free[step]) for step in free) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_computes_in_bfloat16_as_ddp_does(trained: Get, engine: str) -> None:
    two, truth = (trained("mae in bfloat16", On(name, 2)) for name in (engine, "ddp"))
    assert_equal_losses(two.losses(), truth.losses(), 5e-4)
    full = trained("mae", On()).losses()
    assert max(abs(loss - full[step]) for step, loss in two.losses().items()) > 1e-5
    saved = weights(two.run)
    assert all(value.dtype == torch.float32 for value in saved.values())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", *ENGINES])
def test_evaluation_under_every_engine_is_that_of_one_process(trained: Get, engine: str) -> None:
    """And training goes on after it as it would without."""
    one, two = trained("evaluated", On()), trained("evaluated", On(engine, 2))
    assert_equal_losses(two.losses(), one.losses(), 1e-6)
    for name, tolerance in (("val_loss", 1e-6), ("val_probe", 0.021), ("val_knn", 0.021)):
        found, truth = column(two.run, name), column(one.run, name)
        assert len(truth) == 1 and found == pytest.approx(truth, abs=tolerance), name
    assert_equal_weights(two.run, one.run, "best")
    assert len(list((two.run / "pictures").glob("step-*.png"))) == 1


# Divided memory.


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_each_process_holds_its_share(trained: Get, engine: str) -> None:
    (whole,) = trained("mae", On()).held()
    part = trained("mae", On(engine, 2))
    divided = engine in ("zero3", "fsdp2")
    for held in part.held():
        assert held.optimizer == pytest.approx(whole.optimizer / 2, rel=0.02)
        assert held.stepped == pytest.approx(whole.stepped / 2, rel=0.02)
        expected = whole.parameters / 2 if divided else whole.parameters
        assert held.parameters == pytest.approx(expected, rel=0.02)
    # Each writes what it holds, and together they write everything once.
    sizes = [bytes_by_kind(file) for file in rank_files(part.run / "checkpoints/last.ckpt")]
    assert len(sizes) == 2
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        share = [size[kind] for size in sizes]
        assert sum(share) == whole.parameters
        assert max(share) == pytest.approx(whole.parameters / 2, rel=0.02)


@pytest.mark.slow
def test_ddp_holds_everything(trained: Get) -> None:
    (whole,) = trained("mae", On()).held()
    assert trained("mae", On("ddp", 2)).held() == [whole, whole]
    assert not is_sharded(trained("mae", On("ddp", 2)).run / "checkpoints/last.ckpt")


def rank_files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("rank-*.safetensors"))


def bytes_by_kind(file: Path) -> Counter[str]:
    """Of what is trained."""
    trained = read_meta(file.parent)["parameter_names"]
    sizes: Counter[str] = Counter()
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  a file of safetensors is no dict
            kind, name, _ = key.split(":")
            if name in trained:
                tensor = tensors.get_tensor(key)
                sizes[kind] += tensor.numel() * tensor.element_size()
    return sizes


# One checkpoint for all.

PAIRS = [
    # The same again.
    (On("zero1", 2), On("zero1", 2), []),
    (On("zero3", 2), On("zero3", 2), []),
    (On("fsdp2", 2), On("fsdp2", 2), []),
    # Fewer and more processes.
    (On("zero3", 2), On("zero3", 1), []),
    (On("zero1", 2), On("zero1", 3), []),
    (On("ddp", 1), On("zero3", 2), []),
    (On("zero2", 2), On("ddp", 1), []),
    (On("fsdp2", 2), On("zero2", 1), []),
    (On("zero1", 2), On("fsdp2", 3), []),
    # Another engine.
    (On("zero3", 2), On("zero1", 2), []),
    (On("zero2", 2), On("zero3", 2), []),
    (On("fsdp2", 2), On("ddp", 2), []),
    # Another accumulation.
    (On("zero3", 2), On("zero2", 2), ["--trainer.accumulate_grad_batches", 3]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "options"),
    PAIRS,
    ids=[f"{a}-to-{b}{'-accumulating' if more else ''}" for a, b, more in PAIRS],
)
def test_any_engine_goes_on_where_any_other_stopped(
    trained: Get, shards: Path, tmp_path: Path, before: On, after: On, options: Sequence[object]
) -> None:
    truth = trained("mae", On())
    run = cut(trained("mae", before).run, tmp_path / "run", KEEP)
    part = train(run, shards, after, *RECIPES["mae"], *options, "--resume")
    assert_equal_losses(part.losses(), truth.losses(), 1e-6)
    assert_equal_weights(run, truth.run)
    assert_equal_weights(run, truth.run, f"step={2 * KEEP}")
    # No sample again, none left out.
    assert Counter(samples(part)) == Counter(samples(truth)[KEEP * BATCH :])
    for held in part.held():
        assert set(held.steps) == {STEPS} and not held.shared
        assert [group["weight_decay"] for group in held.groups] == [0.5, 0.0]
        assert {group["lr_scale"] for group in held.groups} == {1.0}
        assert len({group["lr"] for group in held.groups}) == 1


def cut(run: Path, to: Path, step: int) -> Path:
    """A copy of the run as it stood when this step was saved."""
    kept = f"step={step}.ckpt"
    (to / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv"):
        shutil.copy(run / name, to)
    one = run / "checkpoints" / kept
    copy = shutil.copytree if is_sharded(one) else shutil.copy
    copy(one, to / "checkpoints" / kept)
    return to


def samples(part: Part) -> list[tuple[str, int, int]]:
    """Where the samples lay that were read, in order where one process did; without headers."""
    return [read for read in read_reads(part.log) if read[0].startswith("train") and read[2] != 512]


@pytest.mark.slow
def test_a_run_that_changes_its_engine_four_times_equals_one_that_does_not(
    trained: Get, shards: Path, tmp_path: Path
) -> None:
    """With a frozen layer, a number that is a parameter, and a buffer that counts."""
    truth = trained("odd", On())
    part = truth
    assert read_positions(truth.log) == list(range(STEPS * BATCH))
    chain = [On("zero1", 2), On("fsdp2", 2), On("zero3", 2), On("zero2", 3), On("ddp", 2)]
    for step, on in zip(range(3, STEPS, 3), chain, strict=False):
        run = cut(part.run, tmp_path / str(on), step)
        part = train(run, shards, on, *RECIPES["odd"], "--resume")
        assert read_positions(part.log) == list(range(step * BATCH, STEPS * BATCH))
        assert_equal_losses(part.losses(), truth.losses(), 1e-6)
        assert_equal_weights(run, truth.run)
    assert (
        Saved(truth.run / "checkpoints/last.ckpt").shapes
        == Saved(part.run / "checkpoints/last.ckpt").shapes
    )


# Fine-tuning.

# Three epochs; an average of weights, and a learning rate of its own for each layer. Nothing is
# drawn by process: no dropped paths, no mixing.
FINETUNE = [
    *(
        "finetune",
        "-c",
        "data/fashion_mnist",
        "-c",
        "eval/finetune_small",
        "--data.image_size",
        "16",
    ),
    *(
        "--data.global_batch",
        "24",
        "--data.crop.scale",
        "null",
        "--data.crop.flip",
        "0",
        *RECIPE,
        *CLIP,
    ),
    *("--trainer.max_steps", "18", "--trainer.check_val_every_n_epoch", "3"),
    *("--optim.layer_decay", "0.5", "--ema", "0.9", "--head", "fc_norm"),
]
EVERY = ["--checkpoint_every_steps", 7]


@pytest.fixture(scope="module")
def tuned(shards: Path, trained: Get, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Fine-tuning of the encoder that one process trained; each kind of run is made once."""
    folder, made = tmp_path_factory.mktemp("tuned"), dict[On, Part]()

    def get(on: On) -> Part:
        if on not in made:
            made[on] = train(folder / str(on), shards, on, *FINETUNE, *encoder(trained))
        return made[on]

    return get


def encoder(trained: Get) -> list[object]:
    return ["--encoder", trained("mae", On()).run]


def top1(run: Path) -> float:
    return json.loads((run / "results.json").read_text())["finetune"]["top1"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", *ENGINES])
def test_every_engine_finetunes_as_one_process_does(tuned: Tuned, engine: str) -> None:
    one, two = tuned(On()), tuned(On(engine, 2))
    assert_equal_losses(two.losses(), one.losses(), 1e-6)
    assert_equal_weights(two.run, one.run)
    assert any(name.startswith("ema.") for name in weights(two.run))
    assert column(two.run, "val_loss") == pytest.approx(column(one.run, "val_loss"), abs=1e-6)
    assert top1(two.run) == pytest.approx(top1(one.run), abs=0.021)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (On("zero3", 2), On("zero3", 1)),
        (On("zero1", 2), On("fsdp2", 2)),
        (On("fsdp2", 2), On("zero2", 2)),
        (On("zero2", 2), On("ddp", 1)),
    ],
    ids=str,
)
def test_finetuning_goes_on_under_any_engine(
    trained: Get, tuned: Tuned, shards: Path, tmp_path: Path, before: On, after: On
) -> None:
    """Killed in its second save, at step 14: each group keeps its own learning rate."""
    truth, run = tuned(On()), tmp_path / "run"
    options = [*FINETUNE, *encoder(trained), *EVERY]
    ranks = start(run, shards, before, *options, die=(1, 1))
    codes = ranks.wait()
    assert codes[1] == -9 and codes[0] == 2, ranks.output()
    part = train(run, shards, after, *options, "--resume")
    assert_equal_losses(part.losses(), truth.losses(), 1e-6)
    assert_equal_weights(run, truth.run)
    assert Counter(samples(part)) == Counter(samples(truth)[7 * BATCH :])
    (whole,) = truth.held()
    assert len({group["lr_scale"] for group in whole.groups}) > 2
    for held in part.held():
        assert held.groups == whole.groups
        assert set(held.steps) == {18} and not held.shared


# Killed.


def steps_done(run: Path) -> int:
    """By the run's own record, which may be read while it is written anew for another column."""
    path = run / "metrics.csv"
    text = path.read_text() if path.exists() else ""
    rows = csv.DictReader(text.splitlines()) if text.endswith("\n") else []
    return sum(bool(row.get("loss")) for row in rows)


def await_steps(ranks: Ranks, run: Path, steps: int) -> None:
    """Until the run has come so far."""
    deadline = time.monotonic() + HANGS
    while steps_done(run) < steps:
        alive = all(process.is_alive() for process in ranks.processes)
        if not alive or time.monotonic() > deadline:
            ranks.kill()
            raise AssertionError(f"never came to step {steps}:\n{ranks.output()}")
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "victim"), [("ddp", 1), ("ddp", 0), ("zero1", 1), ("zero3", 0), ("fsdp2", 1)]
)
def test_one_killed_process_stops_the_other(
    shards: Path, tmp_path: Path, engine: str, victim: int
) -> None:
    """With one line, and not after half an hour of waiting."""
    run = tmp_path / "run"
    endless = [*ODD, *CLIP, "--trainer.max_steps", 1_000_000]
    ranks = start(run, shards, On(engine, 2), *endless)
    await_steps(ranks, run, 3)
    process = ranks.processes[victim]
    assert process.pid is not None
    kill_trees([process.pid])
    began = time.monotonic()
    codes = ranks.wait()
    print(f"stopped after {time.monotonic() - began:.1f} s")
    assert codes[victim] == -9 and codes[1 - victim] == 2, ranks.output()
    errors = [line for line in ranks.output().splitlines() if "error:" in line]
    assert errors == [
        "maepretrain: error: another process of this run ended; its own message says why"
    ]
    assert "Traceback" not in ranks.output()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp2"])
def test_killed_again_and_again_while_it_saves(
    trained: Get, shards: Path, tmp_path: Path, engine: str
) -> None:
    """A checkpoint at each step; one rank ends at any moment of a save, or all at any time."""
    truth, run, chance = trained("odd", On()), tmp_path / "run", random.Random(engine)
    options = [*ODD, *CLIP, "--checkpoint_every_steps", 1, "--resume"]
    for rank, moments in ((0, 16), (1, 6), (None, 0)):
        before = steps_done(run)
        die = None if rank is None else (rank, chance.randrange(1, moments))
        ranks = start(run, shards, On(engine, 2), *options, die=die)
        if rank is None:
            await_steps(ranks, run, before + 1)
            time.sleep(chance.random() / 10)
            ranks.kill()
        else:
            codes = ranks.wait()
            assert codes[rank] == -9 and codes[1 - rank] not in (0, None), ranks.output()
    part = train(run, shards, On(engine, 2), *options)
    positions = read_positions(part.log)
    assert positions == list(range(positions[0], STEPS * BATCH))
    # A row that was not yet written when all were killed is lost, and no other.
    found = part.losses()
    assert len(found) >= STEPS - 3 and set(range(positions[0] // BATCH, STEPS)) <= found.keys()
    assert_equal_losses(found, {step: truth.losses()[step] for step in found}, 1e-6)
    assert_equal_weights(run, truth.run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


# Refused.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options", "said"),
    [
        (
            "zero1",
            ["-c", "data/fashion_mnist", "-c", "recipe/variational"],
            "Variational does not run under ZeRO-1",
        ),
        (
            "fsdp2",
            ["-c", "data/fashion_mnist", "-c", "recipe/variational"],
            "Variational does not run under FSDP2",
        ),
        ("zero2", ["--trainer.precision", "16-mixed"], "precision 16-mixed under ZeRO: take"),
        ("zero2", ["--trainer.precision", "bf16-true"], "precision bf16-true under ZeRO: take"),
        ("zero3_offload", [], "offload moves memory from a GPU, and this machine has none"),
        (
            "zero1",
            ["--trainer.gradient_clip_algorithm", "value"],
            "does not support clipping gradients by value",
        ),
        ("zero3", ["--optim.optimizer", "lars"], "optimizer lars needs the norm of each tensor"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    shards: Path, tmp_path: Path, engine: str, options: list[str], said: str
) -> None:
    if engine == "zero3_offload" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = tmp_path / "run"
    ranks = start(run, shards, On(engine), *MAE, *CLIP, "--data.val", "null", *options)
    assert ranks.wait() == [2], ranks.output()
    *before, error = ranks.output().splitlines()
    assert error.startswith("maepretrain: error: ") and said in error
    assert "Traceback" not in "".join(before)
    assert not (run / "checkpoints").exists()


# As a user starts it.


@pytest.mark.slow
def test_lightning_starts_the_processes_and_nothing_is_compiled(
    trained: Get, shards: Path, tmp_path: Path
) -> None:
    run, compiled = tmp_path / "run", tmp_path / "compiled"
    compiled.mkdir()
    command = [*MAE, *CLIP, "--data.train", f"{shards}/train-*.tar", "--run", str(run)]
    command += ["-c", "overlay/zero1", "--trainer.devices", "2", "--trainer.max_steps", "3"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DS_") and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "maepretrain", *command],
        env=environment | {"TORCH_EXTENSIONS_DIR": str(compiled)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=HANGS)
    finally:
        if process.poll() is None:
            kill_trees([process.pid])
    assert process.returncode == 0, output
    assert len(rank_files(run / "checkpoints/last.ckpt")) == 2
    assert not list(compiled.iterdir())
