"""`plan` against bytes that are really there on the CPU, tables worked out by hand, and the index
of real shards."""

import inspect
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.autoencoders import CONFIGS
from torch import Tensor, nn

from maepretrain.checkpoints.encoders import fresh_encoder
from maepretrain.data.batch import Batch
from maepretrain.data.module import ShardData
from maepretrain.evaluate.classifier import Classifier
from maepretrain.evaluate.classifier_head import ClassifierHead
from maepretrain.models.autoencoders.coders import Dense
from maepretrain.models.autoencoders.contractive import Contractive
from maepretrain.models.autoencoders.denoising import Denoising
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.parsing.configs import config_words
from maepretrain.planning.memory import BUCKET, STRATEGIES, Weights, in_bytes, state
from maepretrain.planning.plan import planned
from maepretrain.strategies.sharded import require_shardable
from maepretrain.training.optimizer import Optimization

Run = Callable[..., int]
VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "image_size": 64,
    "patch_size": 8,
    "encoder_depth": 3,
}
VIT |= {"decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4}
ONE = ["--devices", "1", "--memory", "1GiB", "--images", "1000"]


def options(arguments: dict[str, Any]) -> list[str]:
    """Arguments of a MaskedAutoencoder as the command line has them."""
    where = {"image_size": "--data.image_size"}
    return [
        word
        for name, value in arguments.items()
        for word in (where.get(name, f"--model.init_args.{name}"), str(value).lower())
    ]


def real_batch(n: int, channels: int, side: int) -> Batch:
    position = torch.arange(n)
    return {
        "input": torch.rand(n, channels, side, side),
        "position": position,
        "label": position % 10,
    }


def really_saved(
    forward: Callable[[], Tensor], known: list[Tensor], bf16: bool
) -> tuple[Tensor, int]:
    """The loss, and the bytes of the storages, by address, that autograd saves for its backward and
    that belong to none of the known tensors."""
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor.detach())  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if bf16:
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward()
        else:
            loss = forward()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    for tensor in known:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return loss, sum(sizes.values())


def real_bytes(
    module: nn.Module, forward: Callable[[], Tensor], inputs: list[Tensor], bf16: bool
) -> dict[str, int]:
    """Bytes of a real training step with AdamW."""
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    loss, saved = really_saved(forward, [*parameters, *module.buffers(), *inputs], bf16)
    optimizer = torch.optim.AdamW(trained)
    loss.backward()
    optimizer.step()
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]

    def size(tensors: Any) -> int:
        return sum(t.untyped_storage().nbytes() for t in tensors)

    return {
        "parameters": size(parameters),
        "gradients": size(p.grad for p in trained),
        "optimizer": size(moments),
        "activations": saved,
    }


def assert_close(row: dict[str, float], real: dict[str, int]) -> None:
    for name, size in real.items():
        assert row[name] == pytest.approx(size, rel=1e-3), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("changed", "n"),
    [
        ({}, 24),
        ({"mask_ratio": 0.5, "image_size": 96, "decoder_depth": 1}, 8),
        ({"encoder": "vit_base_patch16_224", "image_size": 96}, 6),
    ],
)
def test_a_masked_autoencoders_bytes_are_those_of_a_real_step(
    changed: dict[str, Any], n: int, checkpointing: bool, bf16: bool
) -> None:
    arguments: dict[str, Any] = VIT | changed | {"activation_checkpointing": checkpointing}
    asked = ["-c", "data/imagenet", "-c", "recipe/mae_vit", *ONE, "--data.global_batch", str(2 * n)]
    asked += ["--trainer.accumulate_grad_batches", "2"]
    asked += ["--trainer.precision", "bf16-mixed" if bf16 else "32-true"]
    plan = planned([*asked, *options(arguments)])
    model, images = MaskedAutoencoder(**arguments), real_batch(n, 3, arguments["image_size"])
    real = real_bytes(model, lambda: model(images)["loss"], [*images.values()], bf16)
    assert plan["micro_batch"] == n
    assert_close(plan["rows"]["ddp"], real)


def test_recomputing_needs_the_largest_block_once() -> None:
    asked = [
        "-c",
        "data/imagenet",
        "-c",
        "recipe/mae_vit",
        *ONE,
        "--data.global_batch",
        "4",
        "--trainer.precision",
        "32",
    ]
    # Of three decoder blocks the middle one computes everything for all tokens.
    deep: dict[str, Any] = VIT | {"decoder_depth": 3}
    once = planned([*asked, *options(deep | {"activation_checkpointing": True})])["rows"]["ddp"]
    model = MaskedAutoencoder(**deep)
    sizes = []
    # The class token and the visible quarter of 64 patches, and all of them.
    for block, tokens, width in (
        (model.encoder.blocks[0], 1 + 16, 192),
        (model.decoder_blocks[1], 1 + 64, 128),
    ):
        x = torch.rand(4, tokens, width, requires_grad=True)
        known = [x, *block.parameters()]
        sizes.append(really_saved(lambda b=block, x=x: b(x).sum(), known, False)[1])
    assert once["working"] == pytest.approx(max(sizes), rel=0.02)
    assert planned([*asked, *options(deep)])["rows"]["ddp"]["working"] == 0


def test_attention_keeps_no_matrix_of_tokens_by_tokens() -> None:
    """By hand: of a block of width d, a token keeps two inputs of norms and their outputs (4 d), q,
    k, v (3 d), what attention gives (d), and the MLP's hidden values before and after GELU (8 d);
    less than 1 d of statistics. With 1024 tokens a matrix for each head would be 21 d."""
    sizes = {"image_size": 256, "mask_ratio": 0.75}
    asked = [
        "-c",
        "data/imagenet",
        "-c",
        "recipe/mae_vit",
        *ONE,
        "--data.global_batch",
        "2",
        "--trainer.precision",
        "32",
    ]
    kept = [
        planned([*asked, *options(VIT | sizes | {"decoder_depth": depth})])["rows"]["ddp"]
        for depth in (3, 4)
    ]
    block = (kept[1]["activations"] - kept[0]["activations"]) / (2 * 1025 * 128 * 4)
    assert 16 <= block < 18


@pytest.mark.parametrize("bf16", [False, True])
def test_denoisings_bytes_are_those_of_a_real_step(bf16: bool) -> None:
    """Its likelihood looks at values: two small batches are counted, and extended."""
    asked = [
        "-c",
        "data/fashion_mnist",
        "-c",
        "recipe/denoising",
        *ONE,
        "--data.global_batch",
        "50",
    ]
    row = planned([*asked, "--trainer.precision", "bf16-mixed" if bf16 else "32-true"])["rows"]
    coder = Dense(28, 1, [512, 128], activation="relu", likelihood="bernoulli")
    model, images = Denoising(coder, "masking", 0.5), real_batch(50, 1, 28)
    real = real_bytes(model, lambda: model(images)["loss"], [*images.values()], bf16)
    assert_close(row["ddp"], real)


@pytest.mark.parametrize(
    ("head", "trained_blocks", "ema", "bf16"),
    [
        ("fc_norm", -1, 0.0, True),
        ("linear", 2, 0.0, False),
        ("attentive", 0, 0.0, True),
        ("fc_norm", -1, 0.9, False),
    ],
)
def test_a_classifiers_bytes_are_those_of_a_real_step(
    head: Any, trained_blocks: int, ema: float, bf16: bool, shards: Path
) -> None:
    data = ShardData(f"{shards}/train-*.tar", global_batch=6, num_workers=0, image_size=96)
    assert_classifier("timm:vit_tiny_patch16_224", data, head, trained_blocks, ema, bf16)


@pytest.mark.parametrize("trained_blocks", [-1, 0])
def test_fine_tuning_a_run_trains_its_positions_and_recomputes_nothing_frozen(
    trained_blocks: int, shards: Path, tmp_path: Path, run_cli: Run, capsys: Any
) -> None:
    pattern = f"{shards}/train-*.tar"
    asked = [
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        "--run",
        "r",
        "--data.train",
        pattern,
        "--print_config",
    ]
    with pytest.raises(SystemExit):
        run_cli("pretrain", *asked, "--model.init_args.activation_checkpointing", "true")
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    size: dict[str, Any] = {"image_size": 32, "channels": 1, "mean": (0.3,), "std": (0.4,)}
    data = ShardData(pattern, global_batch=10, num_workers=0, **size)
    assert_classifier(str(tmp_path), data, "linear", trained_blocks, 0.0, False)


def assert_classifier(
    encoder: str, data: ShardData, head: Any, trained_blocks: int, ema: float, bf16: bool
) -> None:
    n, channels, side, _ = data.global_batch, *data.shape
    asked = [
        "--verb",
        "finetune",
        "-c",
        "data/imagenet",
        "-c",
        "eval/finetune_vit",
        "--encoder",
        encoder,
        *ONE,
    ]
    asked += ["--classes", "10", "--head", head, "--heads", "3", "--ema", str(ema)]
    asked += ["--trained_blocks", str(trained_blocks), "--data.global_batch", str(n)]
    asked += ["--data.image_size", str(side), "--data.channels", str(channels)]
    asked += [f"--data.mean={list(data.mean)}", f"--data.std={list(data.std)}"]
    plan = planned([*asked, "--trainer.precision", "bf16-mixed" if bf16 else "32-true"])
    model: Any = fresh_encoder(encoder, data, 0)
    if trained_blocks == -1 and isinstance(model, MaskedAutoencoder):
        model.train_positions()
    recipe: dict[str, Any] = {"trained_blocks": trained_blocks, "ema": ema}
    head = ClassifierHead(model.width, 10, head, heads=3)
    module = Classifier(model, head, Optimization(), data, 10, **recipe)
    images = real_batch(n, channels, side)
    real = real_bytes(
        module,
        lambda: module._loss(module.logits(images["input"]), images["label"]),
        [*images.values()],
        bf16,
    )
    assert_close(plan["rows"]["ddp"], real)


def test_strategies_divide_what_their_papers_say() -> None:
    """12 numbers of which 8 are trained, AdamW, 4 processes, a largest block of 3; in bytes."""
    whole, trained, block = 48, 32, 12
    weights = Weights(whole, trained, block)
    expected = {  # parameters, gradients, optimizer, working, host
        "ddp": (48, 32, 64, 32, 0),
        "fsdp2": (12, 8, 16, 24, 0),
        "zero1": (48 + 8, 32, 16, 2 * BUCKET, 0),
        "zero2": (48 + 8, 8, 16, 2 * BUCKET, 0),
        "zero3": (12, 8, 16, 24 + BUCKET, 0),
        "zero3_offload": (0, 0, 0, 24 + BUCKET, 12 + 8 + 8 + 16),
    }
    columns = ("parameters", "gradients", "optimizer", "working", "host")
    assert STRATEGIES.keys() == expected.keys()
    for name, sizes in expected.items():
        row = state(STRATEGIES[name], weights, 2, 4)
        assert tuple(row[column] for column in columns) == sizes, name
    assert state(STRATEGIES["ddp"], weights, 1, 1)["optimizer"] == trained  # SGD
    assert state(STRATEGIES["ddp"], weights, 1, 1)["working"] == 0  # nobody to talk to


def test_deepspeeds_bucket_is_the_engines() -> None:
    zero = pytest.importorskip("maepretrain.strategies.zero")
    assert inspect.signature(zero.ZeRO.__init__).parameters["bucket"].default * 4 == BUCKET


def test_a_whole_plan(run_cli: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-B on ImageNet, 8 A100s of two nodes: 1,281,167 // 4096 = 312 steps an epoch."""
    asked = [
        "-c",
        "data/imagenet",
        "-c",
        "recipe/mae_vit",
        "--devices",
        "4",
        "--nodes",
        "2",
        "--memory",
        "40GB",
    ]
    asked += ["--images", "1281167"]
    plan = planned([*asked, "--device", "A100"])
    assert (plan["steps_per_epoch"], plan["steps"], plan["micro_batch"]) == (312, 249_600, 512)
    rate = 8 * 312e12 * 0.4 / plan["flops"].training
    assert plan["img_per_s"] == pytest.approx(rate)
    assert plan["hours"] == pytest.approx(249_600 * 4096 / rate / 3600)
    assert plan["cores"] == pytest.approx(rate / 699, rel=2e-3)
    ddp, offload = plan["rows"]["ddp"], plan["rows"]["zero3_offload"]
    numbers = ddp["gradients"] / 4
    assert 111e6 < numbers < 112e6  # ViT-B is 86 M, its decoder 26 M
    parts = ("parameters", "gradients", "optimizer", "activations", "working")
    assert ddp["total"] == sum(ddp[part] for part in parts)
    assert ddp["fits"] == ddp["total"] / 40e9
    # Weights, fp32 copy, gradients and two moments, of which a node holds a half.
    assert offload["host"] == pytest.approx((4 + 4 + 4 + 8) * numbers / 2)
    # FSDP2 gathers an encoder block, 12 d^2 and vectors: 7,087,872 numbers; and its gradient.
    assert plan["rows"]["fsdp2"]["working"] == 2 * 7_087_872 * 4

    capsys.readouterr()
    assert run_cli("plan", *asked, "--device", "a100") == 0
    out = capsys.readouterr().out
    assert "249,600 steps, 800 epochs of 312" in out
    assert f"{plan['hours']:,.1f} hours, at MFU 0.4 of 312 TFLOP/s" in out
    (line,) = (line for line in out.splitlines() if line.startswith(" ddp "))
    assert f" {ddp['total'] / 2**30:.2f} fits, {ddp['fits']:.0%}" in line
    assert f" {ddp['activations'] / 2**30:.2f} " in line

    assert run_cli("plan", *asked, "--memory", "20GB") == 0
    out = capsys.readouterr().out
    assert f" too much, {ddp['total'] / 20e9:.0%}" in out
    assert "unknown: give --device or --tflops" in out


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        (["-c", "data/fashion_mnist", "-c", "recipe/contractive"], Contractive),
        (["-c", "data/fashion_mnist", "-c", "recipe/denoising"], Denoising),
        (["-c", "data/digits", "-c", "recipe/mae_digits"], MaskedAutoencoder),
    ],
)
def test_strategies_are_those_that_the_engines_take(asked: list[str], model: type) -> None:
    rows = planned([*asked, *ONE])["rows"]
    module = nn.Module()
    module.model = cast(Any, model).__new__(model)
    try:
        require_shardable(module, "ZeRO")
    except ValueError:
        assert rows.keys() == {"ddp"}
    else:
        assert rows.keys() == STRATEGIES.keys()


def test_speed_follows_what_is_asked() -> None:
    asked = [
        "-c",
        "data/imagenet",
        "-c",
        "recipe/mae_vit",
        "--devices",
        "1",
        "--memory",
        "1GB",
        "--images",
        "9000",
    ]
    asked += [*options(VIT), "--trainer.max_epochs", "3"]
    base = planned([*asked, "--tflops", "100"])
    half = planned([*asked, "--tflops", "100", "--mfu", ".2"])
    assert half["img_per_s"] == pytest.approx(base["img_per_s"] / 2)
    assert base["steps"] == 3 * (9000 // 4096)
    fp32 = planned([*asked, "--device", "a100", "--trainer.precision", "32-true"])
    assert fp32["peak"] == 19.5
    again = planned([*asked, "--tflops", "100", "--model.init_args.activation_checkpointing=true"])
    done = (base["flops"].training + again["flops"].recomputed) / base["flops"].training
    assert again["img_per_s"] == pytest.approx(base["img_per_s"] / done)
    crops = planned([*asked, "--tflops", "100", "--data.crop.per_image", "2"])
    # 1,169 crops a second and core with two crops of an image, in benchmarks/RESULTS.md.
    assert crops["cores"] == pytest.approx(base["img_per_s"] / 1169, rel=0.01)
    assert crops["steps"] == 3 * (9000 // 2048)
    own = planned([*asked, "--tflops", "100", "--decode_img_per_s", "50"])
    assert own["cores"] == own["img_per_s"] / 50
    wanted = planned([*asked, "--optim.optimizer", "sgd"])["rows"]["ddp"]
    assert wanted["optimizer"] == wanted["gradients"]


def test_images_are_counted_by_the_index(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        "--devices",
        "2",
        "--memory",
        "1GB",
        "--tflops",
        "1",
    ]
    asked += ["--data.global_batch", "24"]
    pattern = f"{shards}/train-*.tar"
    indexed = planned([*asked, "--data.train", pattern, "--data.val", "nowhere.tar"])
    assert f", {indexed['megabytes_per_s']:,.1f} MB/s: " in capsys.readouterr().out
    told = planned([*asked, "--images", "150"])
    assert (indexed["samples"], indexed["steps"]) == (told["samples"], told["steps"])
    assert (told["samples"], told["steps"]) == (150, 140 * (150 // 24))
    size = sum(path.stat().st_size for path in shards.glob("train-*.tar")) / 150
    assert indexed["megabytes_per_s"] == pytest.approx(indexed["img_per_s"] * size / 1e6)
    assert told["megabytes_per_s"] is None


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_has_a_plan(name: str) -> None:
    plan = planned(
        [*config_words(name), *ONE, "--data.global_batch", "8", "--data.order.streams", "1"]
    )
    ddp = plan["rows"]["ddp"]
    assert min(ddp[column] for column in ("parameters", "gradients", "activations")) > 0
    assert plan["flops"].training > plan["flops"].forward > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80e9), ("80 GiB", 80 * 2**30), ("512m", 512e6), ("1.5tb", 1.5e12), ("7", 7)],
)
def test_memory_is_read(text: str, size: float) -> None:
    assert in_bytes(text) == size


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"memory": "80 gigabytes"}, "memory 80 gigabytes must be a number and a unit"),
        ({"memory": "0GB"}, "memory 0GB must be"),
        ({"memory": "1.2.3GB"}, "memory 1.2.3GB must be"),
        ({"devices": "0"}, "devices 0 must be above 0"),
        ({"nodes": "-1"}, "nodes -1 must be above 0"),
        ({"mfu": "0"}, "mfu 0.0 must be above 0"),
        ({"devices": "3"}, "batch 4096 is not divisible by 3 processes x 1 accumulation"),
        ({"device": "abacus"}, "device abacus is none of t4, v100"),
        ({"images": "1000"}, "global batch 4096 is larger than the 1000 samples"),
        ({"trainer.max_epochs": "null"}, "length of the run is missing: set trainer.max_epochs"),
        ({"trainer.precision": "64-true"}, "precision 64-true: plan knows"),
        ({"data.crop.per_image": "3"}, "no multiple of 3 crop.per_image"),
        ({"devices": "4096", "data.crop.per_image": "2"}, "micro-batch of 1 is no multiple of 2"),
        ({"verb": "probe"}, "plan is for the verbs pretrain and finetune, not probe"),
        ({"verb": "finetune"}, "among the options of finetune"),
        ({"data.train": "nowhere.tar", "images": None}, "no shard matches nowhere.tar"),
        ({"images": None}, "how many images are there? --images N"),
        ({"memory": None}, "memory"),
    ],
)
def test_mistakes_are_one_line(
    changed: dict[str, str | None], line: str, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"devices": "1", "memory": "80GB", "images": "9000"} | changed
    words = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    assert run_cli("plan", "-c", "data/imagenet", "-c", "recipe/mae_vit", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("maepretrain: error: ")
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ([], "say how many classes with --classes N"),
        (["--classes", "10", "--label_fraction", ".1"], "plan chooses no labels"),
        (["--classes", "10", "--labels_per_class", "4"], "plan chooses no labels"),
    ],
)
def test_a_fine_tuning_plan_looks_at_no_labels(
    more: list[str], line: str, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "--verb=finetune",
        "-c",
        "data/imagenet",
        "-c",
        "eval/finetune_vit",
        "--encoder",
        "timm:deit_tiny",
    ]
    assert run_cli("plan", *asked, *ONE, "--data.global_batch", "8", *more) == 2
    assert line in capsys.readouterr().err


def test_every_option_is_documented(run_cli: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli("plan", "--help")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "GPUs of a node",
        "share of the peak",
        "that one CPU core decodes",
        "whose options",
    ):
        assert words in shown


def test_the_model_is_neither_made_nor_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-H in fp32 is 2.6 GB of parameters, and a micro-batch of 4096 keeps terabytes."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = peak()
    plan = planned(
        [
            "-c",
            "data/imagenet",
            "-c",
            "recipe/mae_vit",
            "--model.encoder",
            "vit_huge_patch14_224",
            *ONE[:-1],
            "5000",
        ]
    )
    assert cast(float, plan["rows"]["ddp"]["activations"]) > 2**39
    assert peak() - before < 300_000  # KiB
