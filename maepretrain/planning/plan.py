"""The verb `plan`: memory, speed and length of a run before it is submitted, from its configuration
alone. Nothing is trained or allocated on a device, and with `--images` no shard is opened.

Bytes per process of W = devices x nodes, for P bytes of parameters, T of them trained (fp32: the
project trains fp32 parameters under autocast) and s optimizer states (AdamW 2):

    strategy        parameters    gradients  optimizer  working
    ddp             P             T          s T        T
    fsdp2           P/W           T/W        s T/W      2 B
    zero1           P + T/W       T          s T/W      2 buckets
    zero2           P + T/W       T/W        s T/W      2 buckets
    zero3           P/W           T/W        s T/W      2 B + bucket
    zero3_offload   -             -          -          2 B + bucket

ZeRO-1 and 2 keep an fp32 copy of the partition, T/W, in fp32 runs too; ZeRO-3 does so where it
offloads, which puts P/W + T/W + T/W + s T/W of each process into the host's memory. Working memory
is DDP's buckets (gradients are no views of them by default), DeepSpeed's, and for B bytes of the
largest block its gathered parameters and its whole gradient. With activation checkpointing, the
largest block's recomputed activations are working memory as well.

Activations are what autograd keeps between forward and backward: the forward runs once over fake
tensors, and each storage that is saved counts once; parameters, buffers and the batch do not.
Attention is fused, as flash attention is on GPUs: it keeps q, k, v, its output and the logsumexp,
not the n x n matrix. Autocast keeps its 16-bit copies of the weights. Not counted: the CUDA
context, temporaries, fragmentation; leave a tenth of the memory for them.
"""

import argparse
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maepretrain.checkpoints.encoders import fresh_encoder
from maepretrain.data.batch import Batch
from maepretrain.data.module import shard_data
from maepretrain.data.normalise import Normalise
from maepretrain.data.order import EpochOrder
from maepretrain.data.sampler import RunSampler
from maepretrain.evaluate.classifier import EncoderWithHead
from maepretrain.evaluate.classifier_head import ClassifierHead
from maepretrain.evaluate.finetune import finetune_parser
from maepretrain.evaluate.trained_layers import choose_layers
from maepretrain.models.flops import Flops, flops, imitate, peak_of
from maepretrain.models.mae.decoders import CrossBlock
from maepretrain.models.protocol import TrainsPositions, as_taken, declared
from maepretrain.parsing.errors import UserError
from maepretrain.parsing.parser import allow_bare_flags, make_parser
from maepretrain.ranks import quiet_lightning
from maepretrain.runs.tables import print_columns
from maepretrain.torch_internals import DataDependentOutputException, FakeTensorMode
from maepretrain.training.trainer_arguments import in_steps
from maepretrain.workflows.pretrain import pretrain_parser


@dataclass(frozen=True)
class Strategy:
    """What a strategy divides among the processes, whether it keeps a copy of the partition, how
    many buckets it fills; the table above.
    """

    parameters: bool
    gradients: bool
    optimizer: bool
    copy: bool = False
    buckets: int = 0
    offload: bool = False


STRATEGIES = {
    "ddp": Strategy(False, False, False),
    "fsdp2": Strategy(True, True, True),
    "zero1": Strategy(False, False, True, copy=True, buckets=2),
    "zero2": Strategy(False, True, True, copy=True, buckets=2),
    "zero3": Strategy(True, True, True, buckets=1),
    "zero3_offload": Strategy(True, True, True, copy=True, buckets=1, offload=True),
}
# Bytes of one of DeepSpeed's: engines/zero.py's `bucket`, in fp32.
BUCKET = 50_000_000 * 4
# fp32 numbers that an optimizer keeps for each parameter.
STATES = {"adamw": 2, "sgd": 1, "lars": 1}
# CPU seconds of one image in benchmarks/RESULTS.md (JPEG, 500 x 375 to 224): 1 / 699 with one crop,
# 1 / 1169 a crop with two.
DECODE_SECONDS, CROP_SECONDS = 1150e-6, 281e-6
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{unit}I": 2 ** (10 * i) for i, unit in enumerate("KMGT", 1)}
COLUMNS = ("parameters", "gradients", "optimizer", "activations", "working", "total", "fits")


class Weights(NamedTuple):
    """Bytes of all parameters, of the trained ones, and of the largest block of a model."""

    parameters: int
    trained: int
    block: int


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
    positive = {"devices": devices, "nodes": nodes, "mfu": mfu, "tflops": tflops}
    for name, value in (
        positive | {"images": images, "decode_img_per_s": decode_img_per_s}
    ).items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} {value} must be above 0")
    data, dtype = config.data, autocast_type(config.trainer.precision)
    available, peak = in_bytes(memory), tflops or peak_of(device, dtype)
    steps_per_epoch, samples, size = epoch(data, images)
    steps = in_steps(config.trainer.as_dict(), steps_per_epoch)["max_steps"]
    accumulation = config.trainer.accumulate_grad_batches or 1
    sampler = RunSampler(data.global_batch, steps, devices * nodes, 0, accumulation)
    n = sampler.micro_batch
    if n % data.crop.per_image:
        raise ValueError(
            f"a micro-batch of {n} is no multiple of {data.crop.per_image} crop.per_image"
        )
    model, batch, activations, recomputed = measured(build, data, n, dtype)
    # As large as a micro-batch, without its memory.
    micro_batch = {name: x[:1].expand(n, *x.shape[1:]) for name, x in batch.items()}
    cost = flops(model, micro_batch)
    figures = {
        "samples": samples,
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "micro_batch": n,
        "accumulation": accumulation,
        "world": sampler.world_size,
        "weights": weigh(model, averaged=bool(config.get("ema"))),
        "flops": cost,
        "peak": peak,
        "mfu": mfu,
    }
    if peak is not None:
        rate = sampler.world_size * peak * 1e12 * mfu / (cost.training + cost.recomputed)
        core = decode_img_per_s or 1 / (DECODE_SECONDS / data.crop.per_image + CROP_SECONDS)
        figures |= {
            "img_per_s": rate,
            "hours": steps * data.global_batch / rate / 3600,
            "per_core": core,
            "cores": rate / core,
            "megabytes_per_s": size and rate / data.crop.per_image * size / 1e6,
        }
    # As engines/sharded.py has it: other models would be refused.
    divisible = declared(model, "shardable")
    rows: dict[str, dict[str, float]] = {}
    for name, strategy in STRATEGIES.items():
        if divisible or not strategy.optimizer:
            states = STATES[config.optim.optimizer]
            row = state(strategy, figures["weights"], states, sampler.world_size)
            row |= {"activations": float(activations), "working": row["working"] + recomputed}
            total = sum(row[column] for column in COLUMNS[:5])
            row |= {"total": total, "fits": total / available, "host": row["host"] * devices}
            rows[name] = row
    show(config, figures, rows, memory)
    return figures | {"rows": rows}


def in_bytes(text: str) -> int:
    """Bytes of "80GB" (10^9), "80GiB" (2^30), "512MB", ...

    Raises:
        ValueError: anything else, or nothing at all.
    """
    found = re.fullmatch(r"([0-9.]+) ?([KMGT]I?|)B?", text.strip().upper())
    try:
        size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"memory {text} must be a number and a unit, such as 80GB or 80GiB")
    return size


def autocast_type(precision: Any) -> torch.dtype | None:
    """The type that a precision of Lightning's casts to, None for fp32; of 16 bits both are as
    wide.

    Raises:
        ValueError: one that the project does not train with.
    """
    if precision in (None, 32, "32", "32-true"):
        return None
    if precision in (16, "16", "16-mixed", "bf16", "bf16-mixed"):
        return torch.bfloat16
    raise ValueError(f"precision {precision}: plan knows 32-true, bf16-mixed and 16-mixed")


def epoch(data: Any, images: int | None) -> tuple[int, int, float | None]:
    """Steps of an epoch, samples to train on, and bytes of a sample where the index knows.

    Args:
        data: the options under `data`.
        images: how many there are; None asks the index of `data.train`.

    Raises:
        ValueError: neither is given; shards that cannot be read; fewer samples than a batch.
    """
    if images is not None:
        if data.global_batch % data.crop.per_image:
            raise ValueError(
                f"global batch {data.global_batch} is no multiple of {data.crop.per_image} "
                "crop.per_image"
            )
        order = EpochOrder(
            torch.tensor([images]),
            data.global_batch // data.crop.per_image,
            seed=data.order.seed,
            streams=data.order.streams,
            block=data.order.block,
            tail=data.order.tail,
        )
        return order.steps_per_epoch, images, None
    if not data.train:
        raise ValueError("how many images are there? --images N, or their shards as --data.train")
    opened = shard_data(data.as_dict() | {"val": None})
    shards, draws = opened.index.shards, opened.order.steps_per_epoch * opened.global_batch
    if opened.unindexed is not None:
        return opened.order.steps_per_epoch, draws, None
    size = sum(shard.bytes for shard in shards) / sum(shard.samples for shard in shards)
    return opened.order.steps_per_epoch, len(opened.index), size


def measured(
    build: Callable[[], nn.Module], data: Any, n: int, dtype: torch.dtype | None
) -> tuple[nn.Module, Batch, int, int]:
    """The model, a small batch for it, the bytes that a forward of `n` samples keeps, and those of
    the largest block that activation checkpointing recomputes."""
    with torch.device("meta"):
        model = build()
    small = make_batch(data, 2)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return model, small, *kept(imitate(model, "cpu"), make_batch(data, n), dtype)
    except DataDependentOutputException:  # its forward looks at values: such models are small
        model = build()
        two, _ = kept(model, small, dtype)
        four, _ = kept(model, make_batch(data, 4), dtype)
        return model, small, two + (n - 2) * (four - two) // 2, 0


def make_batch(data: Any, n: int) -> Batch:
    """Random images or signals in the place of a batch."""
    size = data.image_size
    sides = [size, size] if isinstance(size, int) else size
    pixels = torch.randint(0, 256, (n, data.channels, *sides), dtype=torch.uint8)
    return {
        "input": Normalise(tuple(data.mean), tuple(data.std))(pixels),
        "position": torch.arange(n),
        "label": torch.zeros(n, dtype=torch.int64),
    }


def kept(model: nn.Module, batch: Batch, dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes that a forward keeps for its backward, and those of the largest recomputed block."""
    blocks: dict[tuple[Any, ...], tuple[nn.Module, list[Any]]] = {}

    def remember(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes = [x.shape if isinstance(x, Tensor) else x for x in inputs]
        floats = (isinstance(x, Tensor) and x.is_floating_point() for x in inputs)
        given = [
            x.detach().requires_grad_() if f else x for x, f in zip(inputs, floats, strict=True)
        ]
        blocks[type(block), *shapes] = block, given

    batch = as_taken(model, batch)
    recomputes = any(declared(m, "activation_checkpointing") for m in model.modules())
    found = [b for b in model.modules() if recomputes and isinstance(b, Block | CrossBlock)]
    hooks = [block.register_forward_pre_hook(remember) for block in found]
    known = [*model.parameters(), *model.buffers()]
    total = saved_bytes(lambda: model(batch)["loss"], [*known, *batch.values()], dtype)
    for hook in hooks:
        hook.remove()
    parts = []
    for block, inputs in blocks.values():
        given = [*known, *(x for x in inputs if isinstance(x, Tensor))]
        parts.append(saved_bytes(lambda b=block, x=inputs: b(*x), given, dtype))
    return total, max(parts, default=0)


def saved_bytes(
    forward: Callable[[], Tensor], known: list[Tensor], dtype: torch.dtype | None
) -> int:
    """Bytes that autograd saves in a forward, each storage once, those of `known` tensors left
    out."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype is not None):
        forward()
    for tensor in known:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def weigh(model: nn.Module, averaged: bool = False) -> Weights:
    """Bytes of a model's parameters; an average of the weights is a second, frozen copy."""
    size = _bytes(model.parameters())
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential))
    # As engines/fsdp.py divides a model: blocks are of more than one layer.
    blocks = [b for inner in lists for b in inner if sum(1 for _ in b.parameters()) > 2]
    largest = max((_bytes(block.parameters()) for block in blocks), default=size)
    return Weights(size * (2 if averaged else 1), trained, largest)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def state(strategy: Strategy, weights: Weights, states: int, world: int) -> dict[str, float]:
    """Bytes of a process by column, and its share of `host`, the node's memory; the module's table.

    Args:
        strategy: one of STRATEGIES.
        weights: of the model.
        states: numbers that the optimizer keeps for each one trained.
        world: processes.
    """

    def share(divided: bool, size: int) -> float:
        return size / (world if divided else 1)

    trained = weights.trained
    row = {
        "parameters": share(strategy.parameters, weights.parameters)
        + share(True, trained * strategy.copy),
        "gradients": share(strategy.gradients, trained),
        "optimizer": share(strategy.optimizer, states * trained),
    }
    working = float(strategy.buckets * BUCKET + 2 * weights.block * strategy.parameters)
    if not strategy.optimizer and world > 1:
        working += trained
    if not strategy.offload:
        return row | {"working": working, "host": 0.0}
    return dict.fromkeys(row, 0.0) | {"working": working, "host": sum(row.values())}


def show(
    config: Any, figures: dict[str, Any], rows: dict[str, dict[str, float]], memory: str
) -> None:
    """The plan for people: lines about the run, and a row of GiB for each strategy."""
    f, batch = figures, config.data.global_batch
    cost: Flops = f["flops"]
    lines = {
        "data": f"{f['samples']:,} samples",
        "batch": f"{batch} = {f['micro_batch']} x {f['world']} processes x {f['accumulation']} "
        "accumulated",
        "length": f"{f['steps']:,} steps, {f['steps'] / f['steps_per_epoch']:.4g} epochs of "
        f"{f['steps_per_epoch']:,}",
        "precision": f"{config.trainer.precision or '32-true'}",
        "parameters": f"{f['weights'].trained // 4:,} trained",
        "FLOPs": f"{cost.forward / 1e9:.4g} G forward, {cost.training / 1e9:.4g} G forward and "
        f"backward of a sample, {cost.training * batch / 1e12:.4g} T a step"
        + (f"; {cost.recomputed / 1e9:.4g} G of a sample recomputed" if cost.recomputed else ""),
        "speed": "unknown: give --device or --tflops",
    }
    if f["peak"] is not None:
        each, workers = f["cores"] / f["world"], config.data.num_workers
        read = f["megabytes_per_s"]
        lines["speed"] = (
            f"{f['img_per_s']:,.0f} img/s, {batch / f['img_per_s']:.3g} s a step, "
            f"{f['hours']:,.1f} hours, at MFU {f['mfu']:g} of {f['peak']:g} TFLOP/s"
        )
        lines["loading"] = (
            f"{f['img_per_s']:,.0f} img/s"
            + (f", {read:,.1f} MB/s" if read else "")
            + f": {f['cores']:,.1f} CPU cores at {f['per_core']:,.0f} img/s each, {each:.1f} a "
            f"process (data.num_workers is {workers})"
        )
    print("\n".join(f"{name:<13} {text}" for name, text in lines.items()))
    offloads = any(row["host"] for row in rows.values())
    headings = {name: name for name in COLUMNS} | {"fits": f"of {memory}"}
    headings |= {"host": "host, a node"} if offloads else {}
    print_columns("GiB a process", headings, rows, _cell)


def _cell(row: dict[str, Any], key: str) -> str:
    if key == "fits":
        return f"{'fits' if row[key] <= 1 else 'too much'}, {row[key]:.0%}"
    size = row[key] / 2**30
    return (f"{size:,.2f}" if size >= 0.1 else f"{size:.2g}") if size else "-"


def plan_command(argv: list[str]) -> int:
    """The verb `plan`."""
    quiet_lightning()
    planned(argv)
    return 0


def planned(argv: list[str]) -> dict[str, Any]:
    """What `plan` returns for a command line: options of `pretrain`, or with `--verb finetune` of
    `finetune`, and its own.

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
