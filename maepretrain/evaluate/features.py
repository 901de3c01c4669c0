"""Features of a data set: one pass of an encoder over images in order, shared out over
processes."""

import sys
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch import distributed as dist

from maepretrain.data.faults import Fault
from maepretrain.data.samples import Samples


@torch.no_grad()
def embed(
    encode: Callable[[Tensor], Tensor],
    samples: Samples,
    batch: int = 256,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Float[Tensor, "n d"], Int64[Tensor, "n"]]:
    """Features and labels of all samples, in order, on the CPU and on every rank.

    Args:
        encode: uint8 images (b, c, h, w) to features (b, d).
        samples: what to encode, as evaluation sees it.
        batch: images in one forward pass.
        rank: this process; it encodes every `world_size`-th batch.
        world_size: processes. All ranks run the same number of passes, since sharded engines need
            all of them in a forward.
    """
    n, rounds = len(samples), -(-len(samples) // (batch * world_size))
    features: list[Tensor] = []
    labels: list[Tensor] = []
    faults: list[Fault] = []
    for i in range(rounds):
        # Past the end a rank encodes the last sample again, and it is cut off below.
        begin = (i * world_size + rank) * batch
        numbers = [min(k, n - 1) for k in range(begin, begin + batch)]
        if world_size == 1:
            numbers = numbers[: n - begin]
        read = samples.__getitems__(numbers)
        faults += samples.faults(read)
        encoded = encode(read["input"]).float()
        label = read["label"].to(encoded.device)
        if world_size > 1:
            encoded, label = _gather(encoded, world_size), _gather(label, world_size)
        features.append(encoded.cpu())
        labels.append(label.cpu())
    if faults:
        print(f"{len(faults)} samples were replaced; the first is {faults[0]}", file=sys.stderr)
    return torch.cat(features)[:n], torch.cat(labels)[:n]


def _gather(x: Tensor, world_size: int) -> Tensor:
    gathered = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(gathered, x.contiguous())
    return torch.cat(gathered)
