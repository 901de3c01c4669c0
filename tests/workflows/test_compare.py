"""`compare`: equal budgets, the figures of each run, and nothing made twice."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.module import ShardData
from maepretrain.data.settings import Crop
from maepretrain.parsing.errors import UserError
from maepretrain.workflows import compare as module

TINY_MAE = {
    "class_path": "MaskedAutoencoder",
    "init_args": {
        "encoder": "vit_tiny_patch16_224",
        "patch_size": 4,
        "encoder_width": 16,
        "encoder_depth": 2,
        "encoder_heads": 2,
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    },
}
DENSE = {
    "class_path": "Autoencoder",
    "init_args": {"coder": {"class_path": "Dense", "init_args": {"widths": [16]}}},
}


@pytest.fixture
def configs(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny MAE and a tiny autoencoder of another normalisation."""
    monkeypatch.setattr(module, "CALIBRATION", (1, 2, 40))
    paths = []
    for name, model, std in (("mae", TINY_MAE, 0.376), ("dense", DENSE, 1.0)):
        data = {
            "train": f"{shards}/train-*.tar",
            "val": f"{shards}/test-*.tar",
            "image_size": 16,
            "channels": 1,
            "crop": {"scale": None},
            "mean": [0.0],
            "std": [std],
            "global_batch": 30,
            "num_workers": 2,
        }
        optim = {"base_lr": 1e-2, "warmup_epochs": 40}
        trainer = {"max_epochs": 1, "accelerator": "cpu", "devices": 1}
        path = tmp_path / f"{name}.yaml"
        whole = {"model": model, "data": data, "optim": optim, "trainer": trainer, "seed": 0}
        path.write_text(yaml.safe_dump(whole))
        paths.append(str(path))
    return paths


@pytest.mark.slow
def test_compare_trains_judges_and_goes_on_where_it_was(
    configs: list[str],
    shards: Path,
    tmp_path: Path,
    run_cli: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    tuning = tmp_path / "tune.yaml"
    trained = {"train": f"{shards}/train-*.tar", "val": f"{shards}/test-*.tar"}
    sizes = {"image_size": 16, "channels": 1, "crop": {"scale": None}, "global_batch": 25}
    optim = {"base_lr": 1e-3, "warmup_epochs": 0}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "devices": 1}
    whole = {"data": trained | sizes, "optim": optim, "trainer": trainer}
    tuning.write_text(yaml.safe_dump(whole))
    words = ["--out", out, "--steps", 7, "--sweep.min_steps", 5, "--sweep.epochs", 1]
    first = ["compare", "-c", *configs, *words, "--seeds", 1]
    assert run_cli(*first, "--data.global_batch", 25) == 0
    assert "fine-tuned" in capsys.readouterr().out
    kept = {
        name: json.loads((out / name / "seed-0/compare.json").read_text())
        for name in ("mae", "dense")
    }
    for name, figures in kept.items():
        assert (figures["steps"], figures["images"]) == (7, 25 * 7)
        state = torch.load(out / name / "seed-0/checkpoints/last.ckpt", weights_only=True)
        assert state["global_step"] == figures["steps"]
        probed = json.loads((out / name / "seed-0/results.json").read_text())["probe"]["rows"]
        assert figures["probe"] == probed["pretrained"]["top1"]
        assert "finetune" not in figures
    assert kept["dense"]["parameters"] == 256 * 16 * 2 + 16 + 256
    assert kept["dense"]["error"] == pytest.approx(
        _error_by_hand(out / "dense/seed-0", shards), rel=1e-5
    )
    assert (out / "reconstructions.png").stat().st_size > 1000

    # Figures of different budgets do not mix in one table.
    words_of_other = [8 if word == 7 else word for word in first]
    assert run_cli(*words_of_other, "--data.global_batch", 25) == 2
    assert "another budget, 7 and not 8" in capsys.readouterr().err

    # More seeds and one more column: what is there is not made again.
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/seed-0/checkpoints/last.ckpt")}
    more = [*first[:-1], 2, "--data.global_batch", 25, "--finetuning", json.dumps([str(tuning)])]
    assert run_cli(*more) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}
    rows = json.loads((out / "results.json").read_text())["compare"]["rows"]
    for name, row in rows.items():
        seeds = [json.loads((out / name / f"seed-{i}/compare.json").read_text()) for i in (0, 1)]
        values = torch.tensor([seed["finetune"] for seed in seeds], dtype=torch.float64)
        assert row["finetune"] == pytest.approx(float(values.mean()))
        assert row["finetune_std"] == pytest.approx(float(values.std()))
        assert seeds[0]["error"] == kept[name]["error"] != seeds[1]["error"]


def _error_by_hand(run: Path, shards: Path) -> float:
    sizes = {"image_size": 16, "channels": 1, "mean": (0.0,), "std": (1.0,)}
    data = ShardData(f"{shards}/test-*.tar", crop=Crop(scale=None), global_batch=1, **sizes)
    images = data.evaluation(data.index).__getitems__(list(range(len(data.index))))["input"]
    weights = {k.removeprefix("coder."): v for k, v in load_encoder(str(run)).state_dict().items()}
    x = images.flatten(1) / 255
    code = (x @ weights["encoder.0.weight"].T + weights["encoder.0.bias"]).relu()
    decoded = code @ weights["decoder.0.weight"].T + weights["decoder.0.bias"]
    return float((decoded.clamp(0, 1) - x).square().mean())


def test_a_budget_in_seconds_becomes_steps_and_warm_up_takes_a_tenth_at_most(
    configs: list[str], tmp_path: Path, run_cli: Callable[..., int]
) -> None:
    words = ["--cpu_seconds", 0.4, "--sweep.min_steps", 2, "--sweep.epochs", 1, "--seeds", 1]
    assert run_cli("compare", "-c", configs[1], "--out", tmp_path / "out", *words) == 0
    run = tmp_path / "out/dense/seed-0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    steps = json.loads((run / "compare.json").read_text())["steps"]
    assert config["optim"]["warmup_epochs"] == pytest.approx(0.1 * steps / 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "ae/nothing"], "no config file ae/nothing"),
        (
            ["-c", "data/digits+recipe/mae_digits", "./mae/mae_digits.yaml"],
            "two configs of the same name",
        ),
        (
            ["-c", "data/digits+recipe/mae_digits", "--seeds", "0"],
            "seeds 0 and steps None must be at least 1",
        ),
        (
            ["-c", "data/digits+recipe/mae_digits", "--cpu_seconds", "0"],
            "cpu_seconds 0.0 above 0",
        ),
        (
            ["-c", "data/digits+recipe/mae_digits", "--steps", "0"],
            "steps 0 must be at least 1",
        ),
        (["-c", "data/digits+recipe/mae_digits", "--budget", "3"], "budget"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    run_cli: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mae").mkdir()
    (tmp_path / "mae/mae_digits.yaml").write_text("seed: 0\n")
    assert run_cli("compare", *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_joined_configs_are_words_and_a_folder(tmp_path: Path) -> None:
    joined = "data/fashion_mnist+recipe/sparse+model.penalty=kl"
    configs = ["-c", "data/fashion_mnist", "-c", "recipe/sparse"]
    assert module.words_of(joined) == [*configs, "--model.penalty", "kl"]
    assert module.name_of(joined) == "sparse+model.penalty=kl"
    assert module.name_of("data/digits+recipe/mae_digits+run=a/b") == "mae_digits+run=a_b"
    file = tmp_path / "a+b.yaml"
    file.write_text("seed: 0\n")
    assert module.words_of(str(file)) == ["-c", str(file)]
    assert module.name_of(str(file)) == "a+b"
    with pytest.raises(UserError, match="no config file recipe/spars "):
        module.words_of("data/digits+recipe/spars")
