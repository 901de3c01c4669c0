"""Features of a data set: one pass of an encoder over images in order, shared out over
processes."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch import distributed as dist

from maepretrain.data.module import Samples


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
    for i in range(rounds):
        # Past the end a rank encodes the last sample again, and it is cut off below.
        begin = (i * world_size + rank) * batch
        numbers = [min(k, n - 1) for k in range(begin, begin + batch)]
        if world_size == 1:
            numbers = numbers[: n - begin]
        encoded = encode(samples.__getitems__(numbers)["input"]).float()
        if world_size > 1:
            gathered = [torch.empty_like(encoded) for _ in range(world_size)]
            dist.all_gather(gathered, encoded.contiguous())
            encoded = torch.cat(gathered)
        features.append(encoded.cpu())
    return torch.cat(features)[:n], samples.index.labels()
