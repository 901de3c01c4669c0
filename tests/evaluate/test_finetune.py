"""Fine-tuning and probes through the command line: what is trained, what is refused, stop and go
on."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.recorder import Ranks
from support.runs import pretrain_tiny_model, weights

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.evaluate.classifier import Classifier

Run = Callable[..., int]
LONG = ["--optim.base_lr", 0.1, "--trainer.max_epochs", 15]
EVERYTHING = [
    *("--augment.mixup", 0.8, "--augment.cutmix", 1.0, "--augment.erasing", 0.5),
    *("--augment.randaugment", "rand-m9-mstd0.5-inc1", "--ema", 0.9, "--drop_path", 0.3),
    *("--label_smoothing", 0.1, "--optim.layer_decay", 0.5, "--head", "fc_norm"),
]


@pytest.fixture(scope="module")
def encoder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny pretraining, long enough that fine-tuning beats chance."""
    run = tmp_path_factory.mktemp("encoder") / "run"
    assert pretrain_tiny_model(shards, run, "--trainer.max_epochs", 5) == 0
    return run


def options(shards: Path, encoder: Path | str) -> list[object]:
    return [
        *("-c", "data/fashion_mnist", "-c", "eval/finetune_small", "--encoder", encoder),
        *("--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"),
        *("--data.image_size", 16, "--data.crop.scale", "null", "--data.crop.flip", 0),
        *("--data.num_workers", 0, "--data.global_batch", 24, "--trainer.log_every_n_steps", 1),
    ]


@pytest.fixture
def finetune(shards: Path, encoder: Path, run_cli: Run) -> Run:
    """`maepretrain finetune` of the tiny encoder on 150 digits, 50 held out; 6 steps an epoch."""
    return lambda run, *more: run_cli("finetune", *options(shards, encoder), "--run", run, *more)


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())["finetune"]


def changed(run: Path, encoder: Path) -> set[str]:
    """Names of the encoder's weights that a run left other than it found them."""
    before, after = weights(encoder), weights(run)
    common = before.keys() & after.keys()
    assert any(name.startswith("model.encoder.blocks.1") for name in common)
    return {name for name in common if not torch.equal(before[name], after[name])}


def test_finetuning_a_run_beats_chance_and_says_so(
    tmp_path: Path, finetune: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path / "tuned", *LONG) == 0
    found = result(tmp_path / "tuned")
    assert found["top1"] > 0.4  # 50 images, chance .1
    assert (found["labels"], found["n"], found["seed"]) == (150, 50, 0)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split("  ")[0] for line in lines] == ["fine-tuned", "recipe", "results"]
    assert f"top-1 {found['top1']:.4f} on 50 held-out images, 150 labelled" in lines[0]
    assert found["recipe"] in lines[1]
    assert str(tmp_path / "tuned/results.json") in lines[2]
    assert "verbose" not in (tmp_path / "tuned/config.yaml").read_text()
    names = {path.name for path in (tmp_path / "tuned/pictures").iterdir()}
    assert names == {"finetune-confusion.png", "finetune-most-confused.png"}
    few = [
        "--scratch",
        "true",
        "--optim.layer_decay",
        "1.0",
        "--label_fraction",
        0.5,
        "--trainer.max_epochs",
        1,
    ]
    assert finetune(tmp_path / "few", *few) == 0
    assert result(tmp_path / "few")["labels"] == 75
    assert result(tmp_path / "few")["scratch"] is True


@pytest.mark.parametrize(
    ("head", "pool"),
    [("linear", "cls"), ("batchnorm", "mean"), ("attentive", "mean")],
)
def test_a_frozen_encoder_does_not_change_by_one_bit(
    tmp_path: Path, encoder: Path, finetune: Run, head: str, pool: str
) -> None:
    frozen = ["--trained_blocks", 0, "--optim.layer_decay", 1, "--head", head, "--pool", pool]
    assert finetune(tmp_path / "probe", *frozen, "--heads", 4, "--trainer.max_epochs", 1) == 0
    assert changed(tmp_path / "probe", encoder) == set()
    assert weights(tmp_path / "probe")["head.linear.weight"].std() > 3e-5  # it has trained


def test_partial_tuning_trains_the_last_blocks_and_the_final_norm(
    tmp_path: Path, encoder: Path, finetune: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--trained_blocks", 1, "--trainer.max_epochs", 1]
    assert finetune(tmp_path / "one", *short, "--verbose") == 0
    last = [n for n in weights(encoder) if n.startswith(("model.encoder.blocks.1.",))]
    norm = ["model.encoder.norm.weight", "model.encoder.norm.bias"]
    assert changed(tmp_path / "one", encoder) == {*last, *norm}
    numbers = sum(weights(encoder)[name].numel() for name in [*last, *norm])
    assert f"trained       {numbers:,} of the encoder's" in capsys.readouterr().out


def test_full_tuning_trains_everything_but_the_decoder(
    tmp_path: Path, encoder: Path, finetune: Run
) -> None:
    assert finetune(tmp_path / "all", "--trainer.max_epochs", 1) == 0
    names = {n for n in weights(encoder) if n.startswith("model.encoder.")}
    assert changed(tmp_path / "all", encoder) == names


@pytest.mark.parametrize("more", [[], ["--ema", 0.5], ["--scratch", "--optim.layer_decay", 1]])
def test_a_fine_tuned_run_is_an_encoder(
    tmp_path: Path, encoder: Path, finetune: Run, run_cli: Run, more: list[Any]
) -> None:
    """Its tensors are the ones the classifier ended with, averaged where it averages; a probe of it
    and a second fine-tuning run."""
    assert finetune(tmp_path / "tuned", *more, "--trainer.max_epochs", 1) == 0
    state = weights(tmp_path / "tuned")
    prefix = "ema.module.model." if "--ema" in more else "model."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    loaded = cast(Any, load_encoder(str(tmp_path / "tuned"))).eval()
    found = loaded.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    before = cast(Any, load_encoder(str(encoder))).eval()
    assert not torch.equal(loaded.encode(images), before.encode(images))
    if not more:
        short = ["--sweep.min_steps", 30, "--sweep.epochs", 1, "--blocks", "[-1]"]
        assert run_cli("probe", "--encoder", tmp_path / "tuned", *short) == 0
        again = ["--encoder", tmp_path / "tuned", "--trainer.max_epochs", 1]
        assert finetune(tmp_path / "again", *again) == 0
        assert cast(Any, load_encoder(str(tmp_path / "again"))).width == 32


def test_a_folder_of_neither_kind_of_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ValueError, match="no pretraining run, nor a fine-tuning one") as caught:
        load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C during the step with this number."""

    def stop(step: int) -> None:
        whole = Classifier.training_step

        def interrupted(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == step:
                signal.raise_signal(signal.SIGINT)
            return whole(self, batch, batch_idx)

        monkeypatch.setattr(Classifier, "training_step", interrupted)

    return stop


@pytest.mark.slow
def test_resume_with_everything_on_equals_never_stopped(
    tmp_path: Path, finetune: Run, stop_at: Callable[[int], None]
) -> None:
    more = [*EVERYTHING, "--trainer.max_epochs", 2]
    assert finetune(tmp_path / "whole", *more) == 0
    stop_at(4)
    assert finetune(tmp_path / "cut", *more) == 130
    stopped = torch.load(tmp_path / "cut/checkpoints/last.ckpt", weights_only=True)
    assert stopped["global_step"] == 5
    assert finetune(tmp_path / "cut", *more, "--resume") == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert any(name.startswith("ema.module.model.encoder") for name in whole)
    assert [n for n in whole if not torch.equal(whole[n], cut[n])] == []
    figures = [result(tmp_path / name)["mean_per_class"] for name in ("whole", "cut")]
    assert figures[0] == figures[1]
    # The time before the stop counts, and the speed is that of the whole run: 12 steps of 24.
    seconds = 60 * result(tmp_path / "cut")["minutes"]
    assert seconds > stopped["callbacks"]["Throughput"]["seconds"] > 0
    assert result(tmp_path / "cut")["img_per_s"] == pytest.approx(12 * 24 / seconds)


def test_seeds_give_mean_and_spread_and_go_on_where_they_stopped(
    tmp_path: Path, finetune: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--trainer.max_epochs", 2, "--optim.base_lr", 0.1, "--labels_per_class", 5]
    assert finetune(tmp_path, *short, "--seeds", 2, "--seed", 3) == 0
    runs = [result(tmp_path / f"seed-{seed}") for seed in (3, 4)]
    assert [run["seed"] for run in runs] == [3, 4]
    assert runs[0]["labels"] == 50
    found = result(tmp_path)
    assert found["top1"] == pytest.approx((runs[0]["top1"] + runs[1]["top1"]) / 2)
    assert found["top1_std"] == pytest.approx(abs(runs[0]["top1"] - runs[1]["top1"]) / 2**0.5)
    assert found["seeds"] == 2
    saved = (tmp_path / "seed-3/checkpoints/last.ckpt").stat().st_mtime_ns
    (tmp_path / "seed-4/results.json").unlink()
    assert finetune(tmp_path, *short, "--seeds", 2, "--seed", 3, "--resume") == 0
    assert (tmp_path / "seed-3/checkpoints/last.ckpt").stat().st_mtime_ns == saved
    assert result(tmp_path)["top1"] == found["top1"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--trained_blocks", 3], "trained_blocks 3 must be -1 (all) to 2"),
        (["--trained_blocks", 0], "layer_decay 0.75 changes nothing"),
        (["--head", "batchnorm"], "for a frozen encoder: set trained_blocks to 0"),
        (["--head", "fc_norm", "--pool", "cls"], 'leave pool at "mean"'),
        (["--head", "attentive", "--heads", 5], "5 attention heads do not divide a width of 32"),
        (["--drop_path", 1.0], "drop_path 1.0 must be in [0, 1)"),
        (["--ema", 1.0], "ema 1.0 must be a decay between 0 and 1"),
        (["--augment.mixup", -1], "must not be negative"),
        (["--augment.mixup", 1, "--data.global_batch", 25], "even micro-batch, not 25 images"),
        (["--augment.randaugment", "rand-x9"], "RandAugment policy 'rand-x9'"),
        (["--classes", 5], "label 9 is out of range: 5 classes end at 4"),
        (["--labels_per_class", 1000], "1000 are needed"),
        (["--labels_per_class", 2], "global batch 24"),
        (["--seeds", 0], "seeds 0 must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    tmp_path: Path, finetune: Run, capsys: pytest.CaptureFixture[str], more: list[Any], line: str
) -> None:
    assert finetune(tmp_path / "run", *more) == 2
    error = capsys.readouterr().err.strip()
    assert line in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_seeds_on_two_processes_give_the_table_of_one(
    tmp_path: Path, shards: Path, encoder: Path, finetune: Run
) -> None:
    """SGD, as Adam would turn rounding into steps; stopped after the first seed and gone on."""
    short = ["--trainer.max_epochs", 2, "--optim.optimizer", "sgd", "--optim.base_lr", 0.3]
    short += ["--seeds", 2, "--seed", 3]
    assert finetune(tmp_path / "one", *short) == 0
    argv = ["finetune", *options(shards, encoder), "--run", tmp_path / "two", *short]
    ranks = Ranks(tmp_path / "log", argv, 2)
    assert ranks.wait() == [0, 0], ranks.output()
    found = {name: result(tmp_path / name) for name in ("one", "two")}
    for figure in ("top1", "top1_std", "mean_per_class", "n", "seeds", "labels"):
        assert found["two"][figure] == pytest.approx(found["one"][figure]), figure
    (tmp_path / "two/results.json").unlink()
    (tmp_path / "two/seed-4/results.json").unlink()
    kept = (tmp_path / "two/seed-3/results.json").stat().st_mtime_ns
    again = Ranks(tmp_path / "log again", [*argv, "--resume"], 2)
    assert again.wait() == [0, 0], again.output()
    assert (tmp_path / "two/seed-3/results.json").stat().st_mtime_ns == kept
    assert result(tmp_path / "two")["top1"] == found["two"]["top1"]


@pytest.mark.slow
def test_a_probe_on_three_processes_equals_one_and_counts_every_sample_once(
    tmp_path: Path, shards: Path, encoder: Path, finetune: Run
) -> None:
    """50 held-out samples on 3 processes: two are left over. The head's BatchNorm sees the global
    batch."""
    probe = ["--trained_blocks", 0, "--optim.layer_decay", 1, "--head", "batchnorm"]
    probe += ["--optim.optimizer", "sgd", "--optim.base_lr", 3, "--trainer.max_epochs", 8]
    probe += ["--optim.weight_decay", 0, "--trainer.accelerator", "cpu"]
    assert finetune(tmp_path / "one", *probe) == 0
    argv = ["finetune", *options(shards, encoder), "--run", tmp_path / "three", *probe, "--verbose"]
    ranks = Ranks(tmp_path / "log", argv, 3)
    assert ranks.wait() == [0, 0, 0], ranks.output()
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    for name in one:
        assert torch.allclose(one[name], three[name], atol=2e-5), name
    found = [result(tmp_path / name) for name in ("one", "three")]
    for figure in ("top1", "top5", "mean_per_class", "n"):
        assert found[0][figure] == found[1][figure]
    assert found[1]["n"] == 50
    assert found[1]["top1"] > 0.2
    assert "held out      50 samples in 2 shards (0.1 MB)\n" in ranks.output()


@pytest.mark.slow
def test_everything_at_once_runs_on_two_processes(
    tmp_path: Path, shards: Path, encoder: Path
) -> None:
    more = [*EVERYTHING, "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu"]
    argv = ["finetune", *options(shards, encoder), "--run", tmp_path / "two", *more]
    ranks = Ranks(tmp_path / "log", argv, 2)
    assert ranks.wait() == [0, 0], ranks.output()
    assert result(tmp_path / "two")["n"] == 50
