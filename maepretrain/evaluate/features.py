"""Features of a data set in memory: one pass of an encoder over its samples, in order."""

import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader

from maepretrain.data.batch import Batch
from maepretrain.data.errors import ErrorRow
from maepretrain.data.samples import Samples
from maepretrain.evaluate.progress import tracked

# Rows that are read or computed on at a time.
CHUNK = 4096


@torch.no_grad()
def embed(
    encode: Callable[[Tensor], Tensor],
    samples: Samples,
    batch: int = 256,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> tuple[Float[Tensor, "n d"], Int64[Tensor, "n"]]:
    """Features and labels of all samples, in order, on the CPU and on every rank.

    Args:
        encode: uint8 images (b, c, h, w) to features (b, d).
        samples: the samples to encode, as evaluation sees them.
        batch: images in one forward pass.
        rank: this process; it encodes every `world_size`-th batch.
        world_size: processes. All ranks run the same number of passes, since a sharded model needs
            all of them in a forward.
        workers: loader processes; 0 decodes in this one.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    batches = _batches_of_rank(len(samples), batch, rank, world_size)
    for read in read_batches(samples, batches, workers):
        encoded = encode(read["input"]).float()
        label = read["label"].to(encoded.device)
        if world_size > 1:
            encoded = _gather(encoded, world_size)
            label = _gather(label, world_size)
        features.append(encoded.cpu())
        labels.append(label.cpu())
    n = len(samples)
    return torch.cat(features)[:n], torch.cat(labels)[:n]


def _batches_of_rank(n: int, batch: int, rank: int, world_size: int) -> list[list[int]]:
    """Sample numbers of each batch of a rank.

    Several ranks need equal batches: past the end they encode the last sample again, and `embed`
    cuts it off.
    """
    rounds = -(-n // (batch * world_size))
    batches = []
    for i in range(rounds):
        begin = (i * world_size + rank) * batch
        end = min(begin + batch, n) if world_size == 1 else begin + batch
        batches.append([min(number, n - 1) for number in range(begin, end)])
    return batches


def _gather(x: Tensor, world_size: int) -> Tensor:
    gathered = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(gathered, x.contiguous())
    return torch.cat(gathered)


def read_batches(
    samples: Samples, batches: list[list[int]], workers: int, task: str = ""
) -> Iterator[Batch]:
    """The batches in order, decoded by loader processes.

    Unreadable samples are replaced; their number is printed at the end.

    Args:
        samples: the samples to read.
        batches: sample numbers of each batch.
        workers: loader processes; 0 decodes in this one.
        task: the name of the pass, for the progress bar; without one there is no bar.
    """
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=cast(Any, _as_read),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_set_up_worker,
        generator=torch.Generator().manual_seed(0),  # leaves the global generator alone
    )
    errors: list[ErrorRow] = []
    for batch in tracked(loader, len(batches), task):
        errors += samples.pop_errors(batch)
        yield batch
    if errors:
        print(f"{len(errors)} samples were replaced; the first is {errors[0]}", file=sys.stderr)


def _as_read(batch: Batch) -> Batch:
    """Samples come as whole batches already."""
    return batch


def _set_up_worker(_: int) -> None:
    """Ctrl-C reaches the whole process group: this process decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
