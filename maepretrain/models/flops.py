"""FLOPs of training: a multiplication and an addition are two, and matrix products alone count, as
papers and MFU have it.

The masked autoencoder by its own parts (He et al. 2021, arXiv 2111.06377, section 3): the encoder
sees visible tokens, the decoder all of them, and what is not computed is not counted. Any other
model by torch's FlopCounterMode.
"""

import copy
import re
import time
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maepretrain.data.batch import Batch
from maepretrain.models.mae.model import MaskedAutoencoder

# Dense peak TFLOP/s in 16 bits (V100 and T4 have float16 only) and in fp32 without TF32: the
# vendors' data sheets, from memory; of the SXM version where there are several.
DEVICES = {
    "t4": (65.0, 8.1),
    "v100": (125.0, 15.7),
    "rtx3090": (71.0, 35.6),
    "rtx4090": (165.0, 82.6),
    "a10": (125.0, 31.2),
    "a40": (150.0, 37.4),
    "l4": (121.0, 30.3),
    "l40s": (362.0, 91.6),
    "a100": (312.0, 19.5),
    "h100": (989.0, 67.0),
    "h200": (989.0, 67.0),
    "b200": (2250.0, 80.0),
}


class Flops(NamedTuple):
    """FLOPs of one sample: `forward`; `training`, forward and backward; `recomputed`, which
    activation checkpointing adds and MFU does not count (of other models than the masked
    autoencoder it is part of `training`)."""

    forward: float
    training: float
    recomputed: float = 0.0


def flops(model: nn.Module, batch: Batch) -> Flops:
    """What training costs a sample. The model stays as it is: parameters, gradients, buffers.

    Args:
        model: `model(batch) -> {"loss": ...}`; on the meta device too, unless its forward looks at
            values.
        batch: as the model takes it; of a masked autoencoder only the shape of `input` is used.
    """
    if isinstance(model, MaskedAutoencoder):
        return _of_masked_autoencoder(model, batch["input"])
    batch = as_taken(model, batch)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _counted(imitate(model), {k: torch.empty_like(v) for k, v in batch.items()})
    except DataDependentOutputException:  # its forward looks at values
        return _counted(copy.deepcopy(model), batch)


def as_taken(model: nn.Module, batch: Batch) -> Batch:
    """The batch, its `input` of the type that the model says it takes: `input_dtype`, of tokens."""
    taken = cast(torch.dtype, getattr(model, "input_dtype", batch["input"].dtype))
    return batch | {"input": batch["input"].to(taken)}


def _of_masked_autoencoder(model: MaskedAutoencoder, images: Tensor) -> Flops:
    p, width, prefix = model.patch_size, model.width, model.prefix
    rows, columns = images.shape[2] // p, images.shape[3] // p
    n = rows * columns
    visible, predicted = model.counts((rows, columns))
    inside = n if model.mask_tokens_in_encoder else visible
    embedding = 2 * visible * model.encoder.patch_embed.proj.weight.numel()
    costs = [_of_block(block, prefix + inside) for block in model.encoder.blocks]
    tokens = prefix + visible + predicted
    between = 0
    if model.decoder == "self":
        between = 2 * (prefix + inside) * model.decoder_embed.weight.numel()
        # What mask tokens become in the first block is computed once a place, for all masks.
        fresh = n / (len(images) * model.masks_per_image)
        for number, block in enumerate(model.decoder_blocks, 1):
            first = number == 1 and not model.mask_tokens_in_encoder
            computed = prefix + visible + fresh if first else float(tokens)
            queries = predicted if number == len(model.decoder_blocks) else tokens
            costs.append(_of_block(block, tokens, queries, computed, merged=first))
    else:
        seen = prefix + visible
        between = 2 * model.feature_maps.weight.numel() * seen * width
        costs += [_of_cross_block(block, predicted, seen) for block in model.decoder_blocks]
    prediction = 2 * predicted * model.decoder_pred.weight.numel()
    forward = embedding + sum(cost for cost, _ in costs) + between + prediction
    # A backward pass is two products for each one: by the weights, and by the input. Pixels need
    # no gradient.
    training = 3 * forward - embedding
    recomputed = sum(cost - last for cost, last in costs) if model.activation_checkpointing else 0
    masks = model.masks_per_image
    return Flops(*(float(masks * cost) for cost in (forward, training, recomputed)))


def _of_block(
    block: nn.Module,
    tokens: int,
    queries: int | None = None,
    computed: float | None = None,
    merged: bool = False,
) -> tuple[float, float]:
    """Forward FLOPs: every token through every matrix, and the attention's two products of tokens
    with tokens (q k^T, and its softmax by v); and of these what comes last and is not recomputed,
    because the backward needs nothing that comes after it.

    Args:
        block: a timm Block.
        tokens: of the sequence.
        queries: tokens that are put out; default all.
        computed: tokens whose queries, keys and values are computed; default all.
        merged: queries are computed with the keys and values, though they are not used.
    """
    queries = tokens if queries is None else queries
    computed = float(tokens if computed is None else computed)
    width = cast(nn.Linear, block.get_submodule("attn.proj")).in_features
    qkv = cast(nn.Linear, block.get_submodule("attn.qkv")).weight.numel()
    rest = sum(p.numel() for p in block.parameters() if p.ndim == 2) - qkv
    asked = computed if merged else min(queries, computed)
    total = 2.0 * (qkv / 3 * (asked + 2 * computed) + queries * rest)
    total += 2 * (2 * queries * tokens * width)
    return total, _not_recomputed(block, queries)


def _of_cross_block(block: nn.Module, queries: int, seen: int) -> tuple[float, float]:
    kv = cast(nn.Linear, block.get_submodule("kv"))
    rest = sum(p.numel() for p in block.parameters() if p.ndim == 2) - kv.weight.numel()
    products = 2 * (2 * queries * seen * kv.out_features / 2)
    return 2.0 * (seen * kv.weight.numel() + queries * rest) + products, _not_recomputed(
        block, queries
    )


def _not_recomputed(block: nn.Module, queries: int) -> float:
    if not isinstance(getattr(block, "ls2", nn.Identity()), nn.Identity):
        return 0.0  # a LayerScale needs its input
    return 2.0 * queries * cast(nn.Linear, block.get_submodule("mlp.fc2")).weight.numel()


def _counted(model: nn.Module, batch: Batch) -> Flops:
    n = len(batch["input"])
    model.eval()  # a copy: nothing random is drawn, and no statistics kept
    # Fused attention is not counted on the CPU; its products are the same.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(batch)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
        return Flops(forward / n, counter.get_total_flops() / n)


def imitate(model: nn.Module) -> nn.Module:
    """A copy of fake CPU tensors, which have shapes and types but neither memory nor values; inside
    a FakeTensorMode."""

    def fake(tensor: Tensor) -> Tensor:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        trained = tensor.requires_grad
        return nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty

    # What deepcopy has met already it does not copy.
    return copy.deepcopy(model, {id(t): fake(t) for t in (*model.parameters(), *model.buffers())})


def peak_of(device: str | None, dtype: torch.dtype | None) -> float | None:
    """Peak TFLOP/s of a GPU of DEVICES in a type; None where none is named.

    Raises:
        ValueError: an unknown one.
    """
    if device is None:
        return None
    if device.lower() not in DEVICES:
        raise ValueError(f"device {device} is none of {', '.join(DEVICES)}: give --tflops")
    return DEVICES[device.lower()][dtype is None]


def peak_here(device: torch.device, dtype: torch.dtype | None) -> tuple[float, str]:
    """Peak TFLOP/s of a device of this machine, and where it is from: the data sheet of a GPU of
    DEVICES, else the fastest of some matrix products (a fifth of a second).

    Args:
        device: what computes.
        dtype: what autocast casts to; None for fp32.
    """
    if device.type == "cuda":
        words = re.split(r"[^a-z0-9]+", torch.cuda.get_device_name(device).lower())
        joined = {*words, "".join(words[-2:])}
        for name in DEVICES:
            if name in joined:
                return peak_of(name, dtype) or 0.0, f"{name}'s data sheet"
    n = 8192 if device.type == "cuda" else 512
    x = torch.randn(n, n, device=device, dtype=dtype or torch.float32)
    seconds = []
    for _ in range(8):
        _wait(device)
        began = time.perf_counter()
        torch.mm(x, x)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds) / 1e12, f"measured, {n} x {n} matrices"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
