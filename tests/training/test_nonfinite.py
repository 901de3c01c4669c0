"""Losses that are not finite, through the command line on real shards: the truth is a loop written
by hand that leaves those micro-batches out."""

import csv
import io
import math
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from support.autoencoders import IMAGES
from support.autoencoders import options as family_options
from support.noisy import Noisy
from support.recorder import Ranks
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.checkpoints.saved import Saved
from maepretrain.data.module import ShardData
from maepretrain.data.settings import OrderSettings
from maepretrain.evaluate.classifier_head import ClassifierHead
from maepretrain.training.optimizer import Optimization

Run = Callable[..., int]
SAMPLES, LENGTH, BATCH, STEPS, SEED = 48, 8, 8, 6, 3
LR = 0.1
# Finite, as the data layer demands; its square is not.
HUGE = 1e30
# Outputs of a layer that ZeRO-3 divides: it keeps smaller ones whole.
WIDE = 2000


def write_signals(folder: Path, bad: dict[int, float]) -> str:
    """48 signals in two shards, key `s07` for number 7; the value of a bad one is everywhere its
    own."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    signals = chance.standard_normal((SAMPLES, 1, LENGTH)).astype(np.float32)
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for i in range(shard * 24, shard * 24 + 24):
                file = io.BytesIO()
                np.save(file, np.full_like(signals[i], bad[i]) if i in bad else signals[i])
                for name, data in (("npy", file.getvalue()), ("cls", str(i % 3).encode())):
                    member = tarfile.TarInfo(f"s{i:02d}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/train-*.tar"


def shared_options(pattern: str, accumulation: int = 1, optimizer: str = "adamw") -> list[Any]:
    return [
        *("--data.train", pattern, "--seed", SEED, "--threads", 1, "--data.num_workers", 0),
        *("--data.image_size", f"[{LENGTH}]", "--data.channels", 1, "--data.global_batch", BATCH),
        *("--data.mean", "[0]", "--data.std", "[1]", "--optim.optimizer", optimizer),
        *("--optim.base_lr", LR * 256 / BATCH, "--optim.weight_decay", 0),
        *("--optim.warmup_epochs", 0, "--trainer.accelerator", "cpu"),
        *("--trainer.devices", 1, "--trainer.log_every_n_steps", 1),
        *("--trainer.accumulate_grad_batches", accumulation),
        *("--checkpoint_every_steps", 1000),
    ]


@pytest.fixture
def pretrain(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`maepretrain pretrain` of the noisy model on these shards: 6 steps."""
    monkeypatch.delenv("RECORDER_RECORDS", raising=False)

    def run(folder: Path, pattern: str, *more: object, **how: Any) -> int:
        options = [*shared_options(pattern, **how), "--model", "support.noisy.Noisy"]
        options += ["--run", folder]
        return run_cli("pretrain", *options, "--trainer.max_steps", STEPS, *more)

    return run


def batches(pattern: str, accumulation: int = 1, ranks: int = 1) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of a run, those of all ranks joined."""
    readers = []
    for rank in range(ranks):
        data = ShardData(
            pattern,
            global_batch=BATCH,
            image_size=[LENGTH],
            channels=1,
            mean=(0.0,),
            std=(1.0,),
            num_workers=0,
            max_errors=1.0,
            order=OrderSettings(seed=SEED),
        )
        data.plan(STEPS, ranks, accumulation)
        readers.append(data.train_dataloader())
        cast(Any, data.sampler).rank = rank
    for parts in zip(*readers, strict=True):
        yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Truth(NamedTuple):
    """What a run should have come to.

    Args:
        state: weights and buffers.
        losses: of each step, over its good micro-batches.
        left_out: the positions of the micro-batches that trained nothing, by step.
    """

    state: dict[str, Tensor]
    losses: list[float]
    left_out: list[tuple[int, list[int]]]


def by_hand(
    network: nn.Module,
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    pattern: str,
    accumulation: int = 1,
    optimizer: str = "adamw",
    ranks: int = 1,
) -> Truth:
    """Training in a plain loop in which a micro-batch without a finite loss leaves no trace."""
    trained = [p for p in network.parameters() if p.requires_grad]
    make: Any = {
        "adamw": lambda: torch.optim.AdamW(
            trained, lr=LR, betas=(0.9, 0.95), weight_decay=0, fused=True
        ),
        "sgd": lambda: torch.optim.SGD(trained, lr=LR, momentum=0.9, nesterov=True),
    }
    descent = make[optimizer]()
    schedule = Optimization(cast(Any, optimizer), LR * 256 / BATCH, warmup_epochs=0.0)
    losses, left_out, good = [], [], []
    for i, batch in enumerate(batches(pattern, accumulation, ranks)):
        step, micro_batch = divmod(i, accumulation)
        if micro_batch == 0:
            descent.zero_grad(set_to_none=False)
            for p in trained:
                p.grad = torch.zeros_like(p)
            good = []
        torch.manual_seed((SEED * 1_000_003 + i) * 4099)
        before = {name: b.clone() for name, b in network.named_buffers()}
        loss = loss_of(batch)
        if math.isfinite(loss.item()):
            (loss / accumulation).backward()
            good.append(loss.detach())
        else:
            left_out.append((step, batch["position"].tolist()))
            for name, b in network.named_buffers():
                b.copy_(before[name])
        if micro_batch + 1 == accumulation:
            for group in descent.param_groups:
                group["lr"] = schedule.lr_at(step, STEPS, SAMPLES // BATCH, BATCH)
            descent.step()
            losses.append(float(sum(good[1:], good[0]) / len(good)) if good else math.nan)
    return Truth(network.state_dict(), losses, left_out)


def noisy_by_hand(pattern: str, plain: bool = False, **how: Any) -> Truth:
    """The noisy model in that loop; a plain one is wide and without dropout and running
    mean."""
    torch.manual_seed(SEED)
    model = Noisy([LENGTH], 1, 0.0, 0.0, width=WIDE) if plain else Noisy([LENGTH])
    return by_hand(model, lambda batch: model(batch)["loss"], pattern, **how)


def state(run: Path, prefix: str = "model.") -> dict[str, Tensor]:
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}


def cut_back(run: Path, step: int) -> None:
    """Leave the run as it stood when this step was saved; later ones are taken away."""
    for kept in sorted((run / "checkpoints").glob("step=*.ckpt")):
        if kept.name == f"step={step}.ckpt":
            shutil.copy(kept, run / "checkpoints/last.ckpt")
        elif kept.name > f"step={step}.ckpt":
            kept.unlink()


def assert_equal(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    assert [name for name in found if not torch.equal(found[name], truth[name])] == []


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "nonfinite.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
        assert reader.fieldnames == ["step", "rank", "position", "key", "shard"]
    return found


def keys_of_order(pattern: str, positions: list[int]) -> list[str]:
    """Keys at these positions, found by what the signals are."""
    plain = {
        tuple(np.load(io.BytesIO(data)).ravel().tolist()): key
        for shard in sorted(Path(pattern).parent.glob("train-*.tar"))
        for key, data in members(shard)
    }
    at = {
        position: plain[tuple(signal.ravel().tolist())]
        for batch in batches(pattern)
        for position, signal in zip(batch["position"].tolist(), batch["input"], strict=True)
    }
    return [at[position] for position in positions]


def members(shard: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        inputs = [member for member in tar.getmembers() if member.name.endswith(".npy")]
        return [(m.name[:-4], cast(Any, tar.extractfile(m)).read()) for m in inputs]


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("maepretrain: error: "), error
    return error[0]


# One process.


@pytest.mark.parametrize("bad", [{}, {17: HUGE}, {5: -HUGE, 17: HUGE, 40: 3e38}], ids=len)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_equals_a_loop_that_leaves_bad_micro_batches_out(
    tmp_path: Path, pretrain: Run, bad: dict[int, float], accumulation: int, optimizer: str
) -> None:
    """Weights, running mean and losses bit for bit; without a bad one, of an ordinary run."""
    pattern = write_signals(tmp_path / "shards", bad)
    how: Any = {"accumulation": accumulation, "optimizer": optimizer}
    assert pretrain(tmp_path / "run", pattern, **how) == 0
    truth = noisy_by_hand(pattern, **how)
    assert bool(truth.left_out) == bool(bad) and len(truth.left_out) <= len(bad)
    assert_equal(state(tmp_path / "run"), truth.state)
    np.testing.assert_array_equal(column(tmp_path / "run", "loss"), truth.losses)
    if not bad:
        assert not (tmp_path / "run/nonfinite.csv").exists()
        assert "skipped" not in (tmp_path / "run/metrics.csv").read_text()
        return
    listed = [(int(row["step"]), int(row["position"])) for row in rows(tmp_path / "run")]
    assert listed == [(step, p) for step, positions in truth.left_out for p in positions]
    found = [row["key"] for row in rows(tmp_path / "run")]
    assert found == keys_of_order(pattern, [p for _, p in listed])
    assert set(found) >= {f"s{i:02d}" for i in bad}
    for row in rows(tmp_path / "run"):
        assert row["rank"] == "0"
        assert Path(row["shard"]).name == f"train-{int(int(row['key'][1:]) >= 24)}.tar"
    assert column(tmp_path / "run", "skipped")[-1] == len(truth.left_out)


def test_the_first_one_is_said(
    tmp_path: Path, pretrain: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {i: HUGE for i in range(0, SAMPLES, 5)}
    pattern = write_signals(tmp_path / "shards", bad)
    assert pretrain(tmp_path / "run", pattern, "--nonfinite", 99) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("left out      a micro-batch of step") for line in said) == 1


def test_a_listed_sample_is_the_one_that_was_read(tmp_path: Path, pretrain: Run) -> None:
    """The data layer refuses NaN and reads the next sample of the shard instead, which is huge."""
    pattern = write_signals(tmp_path / "shards", {16: math.nan, 17: HUGE})
    more = ["--data.max_errors", 1]
    assert pretrain(tmp_path / "run", pattern, *more) == 0
    found = [row["key"] for row in rows(tmp_path / "run")]
    assert "s16" not in found and found.count("s17") == 2
    assert_equal(state(tmp_path / "run"), noisy_by_hand(pattern).state)


def test_a_stream_without_an_index_lists_what_it_knows(tmp_path: Path, pretrain: Run) -> None:
    pattern = write_signals(tmp_path / "shards", {i: HUGE for i in range(4)})
    plain = ["--data.order.exact", "false", "--data.order.samples_per_epoch", SAMPLES]
    assert pretrain(tmp_path / "run", pattern, *plain) == 0
    found = rows(tmp_path / "run")
    assert found and len(found) % BATCH == 0
    for row in found:
        assert int(row["position"]) // BATCH == int(row["step"])
        assert row["key"] == row["shard"] == ""


# The end of a run.


def test_too_many_in_a_row_end_the_run_and_mended_shards_go_on(
    tmp_path: Path, pretrain: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the third step on every sample is bad; three in a row are one too many."""
    good = write_signals(tmp_path / "good", {})
    run, every = tmp_path / "run", ["--keep_every_steps", 1]
    assert pretrain(run, good, *every) == 0
    truth = state(run)
    cut_back(run, 2)
    first = [p for step, b in enumerate(batches(good)) if step < 2 for p in b["position"].tolist()]
    kept = {int(key[1:]) for key in keys_of_order(good, first)}
    bad = {i: HUGE for i in range(SAMPLES) if i not in kept}
    shards = tmp_path / "shards"
    pattern = write_signals(shards, bad)
    before = (run / "checkpoints/last.ckpt").read_bytes()
    options = ["--resume", "--nonfinite", 3]
    capsys.readouterr()
    assert pretrain(run, pattern, *options) == 2
    line = only_line(capsys)
    assert "3 micro-batches in a row had a loss that is not finite, the last in step 4" in line
    assert f"{run}/nonfinite.csv" in line and "--resume" in line and "--nonfinite" in line
    assert (run / "checkpoints/last.ckpt").read_bytes() == before
    assert [int(row["step"]) for row in rows(run)] == sorted([2, 3, 4] * BATCH)
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    # More of them are tolerated: the file goes on.
    assert pretrain(run, pattern, "--resume", "--nonfinite", 5) == 0
    listed = [int(row["step"]) for row in rows(run)]
    assert listed == sorted([2, 3, 4] * BATCH) + sorted([2, 3, 4, 5] * BATCH)
    assert column(run, "skipped") == [1, 2, 3, 4]
    shutil.rmtree(run)
    stopped.rename(run)
    # Mended: as if nothing had been.
    shutil.rmtree(shards)
    assert write_signals(shards, {}) == pattern
    assert pretrain(run, pattern, *options) == 0
    assert_equal(state(run), truth)
    # A run folder with the list is one, and another run leaves nothing of it.
    assert pretrain(run, pattern, "--overwrite") == 0
    assert not (run / "nonfinite.csv").exists()


def test_a_good_micro_batch_ends_the_row(tmp_path: Path, pretrain: Run) -> None:
    """Bad ones at every second step: never two in a row."""
    good = write_signals(tmp_path / "good", {})
    odd = [p for s, b in enumerate(batches(good)) if s % 2 for p in b["position"][:1].tolist()]
    bad = {int(key[1:]): HUGE for key in keys_of_order(good, odd)}
    pattern = write_signals(tmp_path / "shards", bad)
    assert pretrain(tmp_path / "run", pattern, "--nonfinite", 2) == 0
    assert column(tmp_path / "run", "skipped") == [1, 1, 2, 2, 3]


def test_counts_go_along_in_checkpoints(tmp_path: Path, pretrain: Run) -> None:
    """A row that a resume cuts in two is still one, and the count goes on."""
    pattern = write_signals(tmp_path / "shards", {i: HUGE for i in range(SAMPLES)})
    run = tmp_path / "run"
    assert pretrain(run, pattern, "--keep_every_steps", 1, "--nonfinite", 99) == 0
    assert column(run, "skipped") == [1, 2, 3, 4, 5, 6]
    assert all(math.isnan(loss) for loss in column(run, "loss"))
    cut_back(run, 4)
    assert pretrain(run, pattern, "--resume", "--nonfinite", 99) == 0
    assert column(run, "skipped") == [1, 2, 3, 4, 5, 6]
    cut_back(run, 2)
    assert pretrain(run, pattern, "--resume", "--nonfinite", 4) == 2
    assert max(int(row["step"]) for row in rows(run)[-BATCH:]) == 3


def test_the_list_stays_where_no_checkpoint_was_written(
    tmp_path: Path, pretrain: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = write_signals(tmp_path / "shards", {i: HUGE for i in range(SAMPLES)})
    assert pretrain(tmp_path / "run", pattern, "--nonfinite", 2) == 2
    assert "2 micro-batches in a row" in only_line(capsys)
    assert {p.name for p in (tmp_path / "run").iterdir()} - {".lock"} == {"nonfinite.csv"}
    assert len(rows(tmp_path / "run")) == 2 * BATCH


@pytest.mark.parametrize("least", [0, -1])
def test_fewer_than_one_are_refused(
    tmp_path: Path, pretrain: Run, capsys: pytest.CaptureFixture[str], least: int
) -> None:
    pattern = write_signals(tmp_path / "shards", {})
    assert pretrain(tmp_path / "run", pattern, "--nonfinite", least) == 2
    assert f"nonfinite {least} must be at least 1" in only_line(capsys)
    assert not (tmp_path / "run").exists()


# Weights that are not finite.


def test_a_checkpoint_of_broken_weights_stops_at_once(
    tmp_path: Path, pretrain: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern, run = write_signals(tmp_path / "shards", {}), tmp_path / "run"
    assert pretrain(run, pattern, "--trainer.max_steps", 3) == 0
    last = run / "checkpoints/last.ckpt"
    saved = torch.load(last, weights_only=True)
    saved["state_dict"]["model.linear.bias"][0] = math.nan
    torch.save(saved, last)
    before = last.read_bytes()
    capsys.readouterr()
    assert pretrain(run, pattern, "--resume") == 2
    line = only_line(capsys)
    assert "the loss of step 3 is not finite, nor is it for inputs of zeros" in line
    assert f"they came so from {last}: go on from an earlier checkpoint" in line
    assert last.read_bytes() == before
    assert len(rows(run)) == BATCH


@pytest.mark.parametrize("every", [1, 1000], ids=["not saved", "noticed"])
def test_broken_weights_do_not_take_the_place_of_the_last_good_ones(
    tmp_path: Path, pretrain: Run, capsys: pytest.CaptureFixture[str], every: int
) -> None:
    """A learning rate beyond all measure breaks the weights in a step whose loss is finite."""
    pattern, run = write_signals(tmp_path / "shards", {}), tmp_path / "run"
    assert pretrain(run, pattern, "--trainer.max_steps", 3) == 0
    last = run / "checkpoints/last.ckpt"
    before = last.read_bytes()
    capsys.readouterr()
    broken = ["--resume", "--optim.base_lr", 1e45, "--checkpoint_every_steps", every]
    assert pretrain(run, pattern, *broken) == 2
    line = only_line(capsys)
    assert f"go on from {last} with --resume, and a lower --optim.base_lr" in line
    said = "the weights after step 3 are not finite and were not saved"
    assert (said if every == 1 else "the loss of step 4 is not finite, nor") in line
    assert last.read_bytes() == before
    assert pretrain(run, pattern, "--resume") == 0


def test_weights_that_begin_broken(
    tmp_path: Path, pretrain: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = write_signals(tmp_path / "shards", {})
    assert pretrain(tmp_path / "run", pattern, "--model.spread", ".inf") == 2
    line = only_line(capsys)
    assert "the loss of step 0 is not finite" in line and "they were so from the start" in line


# Fine-tuning.


@pytest.fixture
def encoder(tmp_path: Path, run_cli: Run) -> Path:
    """A small autoencoder of signals."""
    options = [
        "-c",
        "data/fashion_mnist",
        "-c",
        "recipe/autoencoder",
        "--model.coder.widths",
        "[6, 4]",
        "--data.val",
        "null",
    ]
    options += shared_options(write_signals(tmp_path / "encoder shards", {}))
    run = tmp_path / "encoder"
    assert run_cli("pretrain", *options, "--trainer.max_steps", STEPS, "--run", run) == 0
    return run


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_fine_tuning_leaves_them_out_too(
    tmp_path: Path, encoder: Path, run_cli: Run, head: Any, accumulation: int
) -> None:
    """All of the encoder, or a frozen one under a head with running statistics."""
    pattern = write_signals(tmp_path / "shards", {17: 3e38, 30: -3e38})
    options = [
        "-c",
        "data/fashion_mnist",
        "-c",
        "eval/finetune_small",
        *shared_options(pattern, accumulation),
    ]
    frozen = head == "batchnorm"
    options += ["--optim.layer_decay", 1, "--head", head]
    options += ["--trained_blocks", 0 if frozen else -1, "--encoder", encoder]
    options += ["--data.val", "null", "--data.crop.scale", "null", "--label_smoothing", 0]
    options += ["--optim.betas", "[0.9, 0.95]", "--optim.min_lr", 0]
    run = tmp_path / "tuned"
    assert run_cli("finetune", *options, "--trainer.max_steps", STEPS, "--run", run) == 0

    model = cast(Any, load_encoder(str(encoder)))
    inside = {id(p) for layer in model.layers() for p in layer} if not frozen else set()
    for p in model.parameters():
        p.requires_grad_(id(p) in inside)
    model.train(not frozen)
    torch.manual_seed(SEED)
    network = nn.ModuleDict({"model": model, "head": ClassifierHead(4, 3, head)})

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(network["head"](model.encode(batch["input"])), batch["label"])

    truth = by_hand(network, loss_of, pattern, accumulation)
    assert truth.left_out and len(truth.left_out) < STEPS
    assert_equal({k: v for k, v in state(run, "").items() if k in truth.state}, truth.state)
    np.testing.assert_array_equal(column(run, "loss"), truth.losses)
    listed = [(int(row["step"]), int(row["position"])) for row in rows(run)]
    assert listed == [(step, p) for step, positions in truth.left_out for p in positions]
    found = [row["key"] for row in rows(run)]
    assert found == keys_of_order(pattern, [p for _, p in listed])


def test_fine_tuning_stops_after_some_in_a_row(
    tmp_path: Path, encoder: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = write_signals(tmp_path / "shards", {i: 3e38 for i in range(SAMPLES)})
    options = [
        "-c",
        "data/fashion_mnist",
        "-c",
        "eval/finetune_small",
        *shared_options(pattern),
        "--head",
        "linear",
    ]
    options += ["--encoder", encoder, "--optim.layer_decay", 1, "--nonfinite", 2]
    options += ["--data.val", "null", "--data.crop.scale", "null", "--trainer.max_steps", STEPS]
    capsys.readouterr()
    assert run_cli("finetune", *options, "--run", tmp_path / "tuned") == 2
    assert "2 micro-batches in a row had a loss that is not finite" in only_line(capsys)
    assert len(rows(tmp_path / "tuned")) == 2 * BATCH


# Other models, other processes.


@pytest.mark.parametrize(
    "name",
    [
        "data/digits+recipe/mae_digits",
        "data/fashion_mnist+recipe/stacked",
        "data/fashion_mnist+recipe/predictive_sparse",
    ],
)
def test_inputs_beyond_float32_move_no_weight(
    name: str, shards: Path, tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps, each with a checkpoint."""
    run = tmp_path / "run"
    more = ["--data.std", "[1.0e-40]", "--optim.weight_decay", "0", "--pictures", "0"]
    more += ["--nonfinite", "3", "--keep_every_steps", "1"]
    assert run_cli(*family_options(name, shards, run, 4), *more) == 2
    assert "3 micro-batches in a row had a loss that is not finite" in only_line(capsys)
    one, two = (
        torch.load(run / f"checkpoints/step={step}.ckpt", weights_only=True)["state_dict"]
        for step in (1, 2)
    )
    assert_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IMAGES, "data/digits+recipe/mae_digits"])
def test_zeros_give_every_model_a_gradient_of_zeros(
    name: str, shards: Path, tmp_path: Path, run_cli: Run
) -> None:
    """0 times an infinite slope at zero would be NaN."""
    assert run_cli(*family_options(name, shards, tmp_path / "run", 1)) == 0
    model = load_encoder(str(tmp_path / "run")).train()
    position, label = torch.arange(30), torch.arange(30) % 10
    batch = {"input": torch.zeros(30, 1, 16, 16), "position": position, "label": label}
    loss = model(batch)["loss"]
    assert loss.isfinite() and loss.requires_grad
    (0 * loss).backward()
    slopes = [p.grad for p in model.parameters() if p.grad is not None]
    assert slopes and all(bool((slope == 0).all()) for slope in slopes)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_bad_sample_of_one_rank_is_left_out_by_both(
    tmp_path: Path, engine: str, accumulation: int
) -> None:
    pattern = write_signals(tmp_path / "shards", {17: HUGE})
    how: Any = {"accumulation": accumulation, "optimizer": "sgd"}
    argv = ["pretrain", *shared_options(pattern, **how), "--run", tmp_path / "run"]
    argv += ["--model", "support.noisy.Noisy", "--model.dropout", 0, "--model.momentum", 0]
    argv += ["--model.width", WIDE, "--trainer.max_steps", STEPS]
    ranks = Ranks(tmp_path / "log", argv, 2, strategy=engine)
    assert ranks.wait() == [0, 0], ranks.output()
    one, two = ((tmp_path / f"log/{r}.weights").read_text().split() for r in range(2))
    assert len(one) == len(two) == STEPS * accumulation + 1  # the pass of zeros
    if engine != "zero3":  # whose ranks gather weights later
        assert one == two and len(set(one)) == STEPS
    truth = noisy_by_hand(pattern, plain=True, ranks=2, **how)
    saved = Saved(tmp_path / "run/checkpoints/last.ckpt").plain()["state_dict"]
    found = {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}
    assert found.keys() == truth.state.keys()
    for name in found:
        torch.testing.assert_close(found[name], truth.state[name], rtol=0, atol=1e-6)
    assert column(tmp_path / "run", "loss") == pytest.approx(truth.losses, rel=1e-6, nan_ok=True)
    ((step, positions),) = truth.left_out
    listed = rows(tmp_path / "run")
    assert sorted(int(row["position"]) for row in listed) == sorted(positions)
    assert {row["rank"] for row in listed} == {"0", "1"}
    assert {row["step"] for row in listed} == {str(step)}
    named = {int(row["position"]): row["key"] for row in listed}
    assert [named[p] for p in positions] == keys_of_order(pattern, positions)


@pytest.mark.slow
def test_ranks_stop_together(tmp_path: Path) -> None:
    pattern = write_signals(tmp_path / "shards", {i: HUGE for i in range(SAMPLES)})
    argv = ["pretrain", *shared_options(pattern), "--run", tmp_path / "run", "--nonfinite", 3]
    argv += ["--model", "support.noisy.Noisy"]
    ranks = Ranks(tmp_path / "log", [*argv, "--trainer.max_steps", STEPS], 2)
    assert ranks.wait() == [2, 2], ranks.output()
    errors = [line for line in ranks.output().splitlines() if "error" in line]
    assert len(errors) == 2 and all("3 micro-batches in a row" in line for line in errors)
    assert "Traceback" not in ranks.output()
    assert len(rows(tmp_path / "run")) == 3 * BATCH
