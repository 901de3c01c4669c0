"""The verb `plan`: memory, speed and length of a run before it is submitted, from its configuration
alone. Nothing is trained or allocated on a device, and with `--images` no shard is opened.
"""

import argparse
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from maepretrain.checkpoints.encoders import fresh_encoder
from maepretrain.data.module import shard_data
from maepretrain.data.sampler import RunSampler
from maepretrain.evaluate.classifier import EncoderWithHead
from maepretrain.evaluate.classifier_head import ClassifierHead
from maepretrain.evaluate.finetune import finetune_parser
from maepretrain.evaluate.trained_layers import choose_layers
from maepretrain.models.flops import Flops, flops, peak_of
from maepretrain.models.protocol import TrainsPositions
from maepretrain.parsing.errors import UserError
from maepretrain.parsing.parser import allow_bare_flags, make_parser
from maepretrain.planning.memory import SUMMED, in_bytes, measure, memory_rows, weigh
from maepretrain.planning.speed import autocast_type, epoch, speed
from maepretrain.ranks import quiet_lightning
from maepretrain.runs.tables import print_columns
from maepretrain.training.trainer_arguments import in_steps
from maepretrain.workflows.pretrain import pretrain_parser

# Columns of the table; `host` stands beside them where a strategy offloads.
COLUMNS = (*SUMMED, "total", "fits")


def plan(
    config: Any,
    build: Callable[[], nn.Module],
    devices: int,
    memory: str,
    nodes: int = 1,
    mfu: float = 0.4,
    device: str | None = None,
    tflops: float | None = None,
    images: int | None = None,
    decode_img_per_s: float | None = None,
) -> dict[str, Any]:
    """Print what a run needs: memory for each strategy, FLOPs, speed, data, length.

    Args:
        config: parsed options of the run.
        build: makes the model.
        devices: GPUs of a node.
        memory: of one GPU: 80GB (10^9 bytes) or 80GiB (2^30).
        nodes: machines.
        mfu: share of the peak that training reaches; what is recomputed does not count.
        device: the GPU, for its peak: t4, v100, a100, h100, ...
        tflops: its peak in TFLOP/s, in the place of `device`.
        images: how many there are to train on. Default what the index of data.train says.
        decode_img_per_s: samples that one CPU core decodes and crops. Default 699 for one crop of
            an image, as measured on ImageNet-sized JPEGs.

    Returns:
        `rows`, bytes by strategy and column, and the figures that are printed above them. The
        strategies are those that the model runs under.

    Raises:
        ValueError: numbers that are not positive or do not divide, an unknown device, memory or
            precision; images that are neither counted nor found.
    """
    _require_positive(
        devices=devices,
        nodes=nodes,
        mfu=mfu,
        tflops=tflops,
        images=images,
        decode_img_per_s=decode_img_per_s,
    )
    data = config.data
    dtype = autocast_type(config.trainer.precision)
    available = in_bytes(memory)
    peak = tflops or peak_of(device, dtype)
    steps_per_epoch, samples, sample_bytes = epoch(data, images)
    steps = in_steps(config.trainer.as_dict(), steps_per_epoch)["max_steps"]
    accumulation = config.trainer.accumulate_grad_batches or 1
    sampler = RunSampler(data.global_batch, steps, devices * nodes, 0, accumulation)
    n = sampler.micro_batch
    if n % data.crop.per_image:
        raise ValueError(
            f"a micro-batch of {n} is no multiple of {data.crop.per_image} crop.per_image"
        )
    measured = measure(build, data, n, dtype)
    # As large as a micro-batch, without its memory.
    micro_batch = {name: x[:1].expand(n, *x.shape[1:]) for name, x in measured.batch.items()}
    figures: dict[str, Any] = {
        "samples": samples,
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "micro_batch": n,
        "accumulation": accumulation,
        "world": sampler.world_size,
        "weights": weigh(measured.model, averaged=bool(config.get("ema"))),
        "flops": flops(measured.model, micro_batch),
        "peak": peak,
        "mfu": mfu,
    }
    if peak is not None:
        figures |= speed(
            figures["flops"],
            data,
            steps=steps,
            world=sampler.world_size,
            peak=peak,
            mfu=mfu,
            sample_bytes=sample_bytes,
            decode_img_per_s=decode_img_per_s,
        )
    rows = memory_rows(
        measured,
        figures["weights"],
        optimizer=config.optim.optimizer,
        world=sampler.world_size,
        devices=devices,
        available=available,
    )
    show(config, figures, rows, memory)
    return figures | {"rows": rows}


def show(
    config: Any, figures: dict[str, Any], rows: dict[str, dict[str, float]], memory: str
) -> None:
    """Print the plan: lines about the run, and a row of GiB for each strategy."""
    lines = _run_lines(config, figures) | _speed_lines(config.data, figures)
    for name, text in lines.items():
        print(f"{name:<13} {text}")
    headings = {name: name for name in COLUMNS}
    headings["fits"] = f"of {memory}"
    if any(row["host"] for row in rows.values()):
        headings["host"] = "host, a node"
    print_columns("GiB a process", headings, rows, _cell)


def _run_lines(config: Any, figures: dict[str, Any]) -> dict[str, str]:
    f = figures
    cost: Flops = f["flops"]
    batch = config.data.global_batch
    flops_of = (
        f"{cost.forward / 1e9:.4g} G forward, {cost.training / 1e9:.4g} G forward and "
        f"backward of a sample, {cost.training * batch / 1e12:.4g} T a step"
    )
    if cost.recomputed:
        flops_of += f"; {cost.recomputed / 1e9:.4g} G of a sample recomputed"
    return {
        "data": f"{f['samples']:,} samples",
        "batch": f"{batch} = {f['micro_batch']} x {f['world']} processes x {f['accumulation']} "
        "accumulated",
        "length": f"{f['steps']:,} steps, {f['steps'] / f['steps_per_epoch']:.4g} epochs of "
        f"{f['steps_per_epoch']:,}",
        "precision": f"{config.trainer.precision or '32-true'}",
        "parameters": f"{f['weights'].trained // 4:,} trained",
        "FLOPs": flops_of,
    }


def _speed_lines(data: Any, figures: dict[str, Any]) -> dict[str, str]:
    f = figures
    if f["peak"] is None:
        return {"speed": "unknown: give --device or --tflops"}
    loading = f"{f['img_per_s']:,.0f} img/s"
    if f["megabytes_per_s"]:
        loading += f", {f['megabytes_per_s']:,.1f} MB/s"
    loading += (
        f": {f['cores']:,.1f} CPU cores at {f['per_core']:,.0f} img/s each, "
        f"{f['cores'] / f['world']:.1f} a process (data.num_workers is {data.num_workers})"
    )
    return {
        "speed": f"{f['img_per_s']:,.0f} img/s, {data.global_batch / f['img_per_s']:.3g} s a step, "
        f"{f['hours']:,.1f} hours, at MFU {f['mfu']:g} of {f['peak']:g} TFLOP/s",
        "loading": loading,
    }


def _cell(row: dict[str, Any], key: str) -> str:
    if key == "fits":
        return f"{'fits' if row[key] <= 1 else 'too much'}, {row[key]:.0%}"
    size = row[key] / 2**30
    if not size:
        return "-"
    return f"{size:,.2f}" if size >= 0.1 else f"{size:.2g}"


def _require_positive(**numbers: int | float | None) -> None:
    for name, value in numbers.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} {value} must be above 0")


def plan_command(argv: list[str]) -> int:
    """The verb `plan`."""
    quiet_lightning()
    planned(argv)
    return 0


def planned(argv: list[str]) -> dict[str, Any]:
    """Plan the run of a command line: options of `pretrain`, or with `--verb finetune` of
    `finetune`, and those of `plan`.

    Raises:
        UserError: options that the verb does not have.
        ValueError: as of `plan`.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--verb", nargs="?", default="pretrain")
    known, argv = first.parse_known_args(argv)
    if known.verb not in VERBS:
        raise UserError(f"plan is for the verbs {' and '.join(VERBS)}, not {known.verb}")
    add_options, builder = VERBS[known.verb]
    parser = add_options(make_parser("plan"))
    _, _, *options = inspect.signature(plan).parameters
    parser.add_function_arguments(plan, skip={"config", "build"})
    parser.add_argument("--verb", help="whose options the others are: pretrain or finetune")
    allow_bare_flags(parser)
    # What a run needs and a plan does not.
    try:
        config = parser.parse_args(["--run", "RUN", "--data.train", "", *argv])
    except UserError as error:
        raise UserError(f"{error} (among the options of {known.verb}; see --verb)") from error
    return plan(config, builder(config), **{name: config.pop(name) for name in options})


def _pretrained(config: Any) -> Callable[[], nn.Module]:
    parser = make_parser("plan", config=False)
    parser.add_argument("--model", type=nn.Module)
    section = parser.parse_object({"model": config.model})
    return lambda: parser.instantiate(section).model


def _finetuned(config: Any) -> Callable[[], nn.Module]:
    if config.classes is None:
        raise ValueError("plan does not read labels: say how many classes with --classes N")
    if config.label_fraction != 1 or config.labels_per_class is not None:
        raise ValueError(
            "plan chooses no labels: set label_fraction to 1, labels_per_class to null, and say "
            "with --images how many are trained on"
        )
    # Sizes are asked of the data; without an index no shard is opened before it is read.
    options = config.data.as_dict()
    options |= {"train": "https://unread/a.tar", "val": None, "global_batch": 1}
    options["order"] |= {"exact": False, "samples_per_epoch": 1}
    options["crop"]["per_image"] = 1
    data = shard_data(options)

    def build() -> nn.Module:
        model = fresh_encoder(config.encoder, data, config.seed)
        trained = config.trained_blocks
        if trained == -1 and isinstance(model, TrainsPositions):
            model.train_positions()
        code = cast(Any, model).encode(torch.zeros(1, *data.shape))
        head = ClassifierHead(code.shape[1], config.classes, config.head, config.pool, config.heads)
        choose_layers(model, head, trained)
        return EncoderWithHead(model, head).train()  # loaded encoders come in eval mode

    return build


VERBS = {"pretrain": (pretrain_parser, _pretrained), "finetune": (finetune_parser, _finetuned)}
