"""FLOPs of training: a multiplication and an addition are two, and matrix products alone count, as
papers and MFU have it.

The masked autoencoder by its own parts (He et al. 2021, arXiv 2111.06377, section 3): the encoder
sees visible tokens, the decoder all of them. Any other model by torch's FlopCounterMode.
"""

import copy
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maepretrain.models.mae import MaskedAutoencoder

Batch = dict[str, Tensor]


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
        batch: as the model takes it; of a masked autoencoder it is not used.
    """
    if isinstance(model, MaskedAutoencoder):
        return _of_masked_autoencoder(model)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _counted(imitate(model), {k: torch.empty_like(v) for k, v in batch.items()})
    except DataDependentOutputException:  # its forward looks at values
        return _counted(copy.deepcopy(model), batch)


def _of_masked_autoencoder(model: MaskedAutoencoder) -> Flops:
    patches, seen = model.grid[0] * model.grid[1], model.prefix + model.visible
    embedding = 2 * model.visible * model.encoder.patch_embed.proj.weight.numel()
    encoder, encoder_last = _of_blocks(model.encoder.blocks, seen)
    between = 2 * seen * model.decoder_embed.weight.numel()
    decoder, decoder_last = _of_blocks(model.decoder_blocks, model.prefix + patches)
    prediction = 2 * (patches - model.visible) * model.decoder_pred.weight.numel()
    forward = embedding + encoder + between + decoder + prediction
    # A backward pass is two products for each one: by the weights, and by the input. Pixels need
    # no gradient.
    training = 3 * forward - embedding
    if not model.activation_checkpointing:
        return Flops(forward, training)
    return Flops(forward, training, encoder + decoder - encoder_last - decoder_last)


def _of_blocks(blocks: Iterable[nn.Module], tokens: int) -> tuple[int, int]:
    """Forward FLOPs of all of them: every token through every matrix, and the attention's two
    products of tokens with tokens (q k^T, and its softmax by v); and of these what comes last and
    is not recomputed, because the backward needs nothing that comes after it."""
    total = last = 0
    for block in blocks:
        matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
        width = cast(nn.Linear, block.get_submodule("attn.proj")).in_features
        total += 2 * tokens * matrices + 2 * (2 * tokens * tokens * width)
        if isinstance(block.get_submodule("ls2"), nn.Identity):  # a LayerScale needs its input
            last += 2 * tokens * cast(nn.Linear, block.get_submodule("mlp.fc2")).weight.numel()
    return total, last


def _counted(model: nn.Module, batch: Batch) -> Flops:
    n = len(batch["input"])
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
