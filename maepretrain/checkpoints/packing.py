"""Files of shared weights (Han, Mao and Dally 2016, arXiv 1510.00149), which `compress` writes and
`--encoder` reads, and the files that they are compared with.

The file is safetensors: `streams` (all layers' coded indices and runs), `lengths` (of the codes),
`codebooks`, `rest` (float16), and under the key "compressed" their table. Reading it gives the
weights that were scored bit by bit.

Axes: n weights of a layer, m of them stored, k codebook entries.
"""

import json
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from maepretrain.checkpoints import huffman

Weights = dict[str, Tensor]
# Keys of a file's metadata: the arguments of its MaskedAutoencoder as plain values, and the table
# of `pack`.
OWN_KEY = "maepretrain"
COMPRESSED_KEY = "compressed"


@dataclass(frozen=True)
class Shared:
    """A weight whose values come from a codebook, entry 0 of which is 0.0."""

    codebook: Float[np.ndarray, "k"]
    index: Int64[np.ndarray, "*shape"]


class Entries(NamedTuple):
    """The stored ones of n weights, most of which are 0: where they lie, and which they are."""

    runs: Int64[np.ndarray, "m"]
    which: Int64[np.ndarray, "m"]


def to_runs(kept: Int64[np.ndarray, "j"], run_bits: int) -> Entries:
    """Places of the weights that are kept, relative to each other (figure 2).

    Args:
        kept: places, ascending.
        run_bits: a run is shorter than 2^run_bits; a stored zero stands where it would not be.

    Returns:
        `runs`: zeros before each entry (the paper's difference less one), and `which` of the kept
        weights it is, -1 for a stored zero.
    """
    span = 1 << run_bits
    zeros = np.diff(kept, prepend=-1) - 1
    last = (zeros // span + 1).cumsum() - 1
    entries = int(last[-1]) + 1 if len(last) else 0
    runs = np.full(entries, span - 1)
    which = np.full(entries, -1)
    runs[last] = zeros % span
    which[last] = np.arange(len(kept))
    return Entries(runs, which)


def from_runs(runs: Int64[np.ndarray, "m"]) -> Int64[np.ndarray, "m"]:
    """The place of each entry."""
    return (runs + 1).cumsum() - 1


def pack(
    shared: dict[str, Shared],
    rest: Weights,
    about: dict[str, str],
    run_bits: int,
    *,
    huffman_coded: bool = True,
) -> bytes:
    """The file of shared weights.

    Args:
        shared: by name.
        rest: kept as float16.
        about: further metadata.
        run_bits: as of `to_runs`.
        huffman_coded: otherwise all symbols of a stream have codes of one length.

    Raises:
        ValueError: a number in `rest` that float16 cannot hold.
    """
    layers: list[Any] = []
    streams: list[bytes] = []
    codes: list[np.ndarray] = []
    for name, weight in shared.items():
        flat = weight.index.reshape(-1)
        kept = np.flatnonzero(flat)
        runs, which = to_runs(kept, run_bits)
        symbols = np.append(flat[kept], 0)[which]  # a stored zero is number -1
        sizes: list[int] = []
        for stream, kinds in ((symbols, len(weight.codebook)), (runs, 1 << run_bits)):
            code = _code(stream, kinds, huffman_coded=huffman_coded)
            coded = huffman.encode(stream, code)
            streams.append(coded)
            codes.append(code)
            sizes += [len(coded), len(code)]
        layers.append([name, list(weight.index.shape), len(runs), len(weight.codebook), sizes])
    tensors = {
        "streams": torch.from_numpy(np.frombuffer(bytearray(b"".join(streams)), np.uint8)),
        "lengths": torch.from_numpy(np.concatenate(codes).astype(np.uint8)),
        "codebooks": torch.from_numpy(np.concatenate([one.codebook for one in shared.values()])),
        "rest": _halves(rest),
    }
    named = [[name, list(tensor.shape)] for name, tensor in rest.items()]
    table = json.dumps({"layers": layers, "rest": named}, separators=(",", ":"))
    checksum = _checksum(tensors, about.get(OWN_KEY, ""), table)
    return save(tensors, about | {COMPRESSED_KEY: f"{checksum:08x}{table}"})


def _code(
    stream: Int64[np.ndarray, "m"], kinds: int, *, huffman_coded: bool
) -> Int64[np.ndarray, "j"]:
    """Lengths of the symbols' codes."""
    if huffman_coded:
        return huffman.code_lengths(np.bincount(stream, minlength=kinds))
    width = max(1, (kinds - 1).bit_length())
    return np.full(1 << width, width)


def _halves(rest: Weights) -> Float[Tensor, "n"]:
    halves = torch.cat([tensor.half().flatten() for tensor in rest.values()])
    if not halves.isfinite().all():
        raise ValueError("biases, norms or positions are beyond the 65,504 that float16 holds")
    return halves


def _checksum(tensors: Weights, *texts: str) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].numpy().tobytes(), checksum)
    return zlib.crc32("".join(texts).encode(), checksum)


def unpack(tensors: Weights, about: dict[str, str]) -> Weights:
    """The weights in a file of `pack`, float32.

    Args:
        tensors: of the file.
        about: its metadata.

    Raises:
        ValueError: damage.
    """
    checksum = about[COMPRESSED_KEY][:8]
    table = about[COMPRESSED_KEY][8:]
    try:
        if int(checksum, 16) != _checksum(tensors, about.get(OWN_KEY, ""), table):
            raise ValueError("its checksum is another one")
        described = json.loads(table)
        return _shared_weights(tensors, described["layers"]) | _rest(tensors, described["rest"])
    except (KeyError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"this compressed file is damaged: {error}") from error


def _shared_weights(tensors: Weights, layers: list[Any]) -> Weights:
    sizes = np.array([sizes for *_, sizes in layers]).reshape(-1, 2)
    streams = iter(_split(tensors["streams"].numpy(), sizes[:, 0]))
    codes = iter(_split(tensors["lengths"].numpy(), sizes[:, 1]))
    codebooks = _split(tensors["codebooks"].numpy(), [entries for *_, entries, _ in layers])
    weights: Weights = {}
    for (name, shape, count, *_), codebook in zip(layers, codebooks, strict=True):
        symbols = huffman.decode(next(streams).tobytes(), next(codes), count)
        runs = huffman.decode(next(streams).tobytes(), next(codes), count)
        flat = np.zeros(int(np.prod(shape)), np.float32)
        flat[from_runs(runs)] = codebook[symbols]
        weights[name] = torch.from_numpy(flat.reshape(shape))
    return weights


def _split(whole: np.ndarray, sizes: Any) -> list[np.ndarray]:
    return np.split(whole, np.cumsum(sizes)[:-1])


def _rest(tensors: Weights, named: list[Any]) -> Weights:
    parts = tensors["rest"].float().split([int(np.prod(shape)) for _, shape in named])
    return {name: part.view(shape) for (name, shape), part in zip(named, parts, strict=True)}


def eight_bits(
    weights: Weights, matrices: list[str], about: dict[str, str]
) -> tuple[bytes, Weights]:
    """Plain int8: each matrix by one scale, the largest absolute value at 127; the rest is float16.

    Returns:
        The file, and the weights that it stands for.
    """
    scales = {name: weights[name].abs().amax().clamp_min(1e-30) / 127 for name in matrices}
    codes = {name: (weights[name] / scales[name]).round().to(torch.int8) for name in matrices}
    halves = {name: tensor.half() for name, tensor in weights.items() if name not in codes}
    values = {name: codes[name] * scales[name] for name in matrices}
    stacked = {"scales": torch.stack([scales[name] for name in matrices])}
    return (
        save(codes | halves | stacked, about),
        values | {name: half.float() for name, half in halves.items()},
    )


def sparse(weights: Weights, matrices: list[str], about: dict[str, str], run_bits: int) -> bytes:
    """The file of pruned matrices: what is not 0 in float32, and runs of `run_bits` bits each."""
    width = np.full(1 << run_bits, run_bits)
    tensors = {name: tensor for name, tensor in weights.items() if name not in matrices}
    for name in matrices:
        flat = weights[name].flatten()
        kept = flat.nonzero().flatten()
        runs, which = to_runs(kept.numpy(), run_bits)
        tensors[f"{name}.values"] = F.pad(flat[kept], (0, 1))[torch.from_numpy(which)]
        packed = np.frombuffer(huffman.encode(runs, width), np.uint8)
        tensors[f"{name}.runs"] = torch.from_numpy(packed.copy())
    return save(tensors, about)
