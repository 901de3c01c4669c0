"""`maepretrain search`: the images of an index that are most like a query, by the features that
`maepretrain embed` wrote.

Real-valued features are compared by the angle between them; binary codes (Salakhutdinov and Hinton
2009) by how many bits differ.
"""

import json
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from maepretrain.apply.embed import Encode
from maepretrain.apply.embeddings import Embeddings, read
from maepretrain.apply.inputs import read_images
from maepretrain.apply.reconstruct import check_picture
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.module import ShardData, shard_data
from maepretrain.data.samples import ShardIndex
from maepretrain.data.settings import translated
from maepretrain.data.shards.index import open_shards
from maepretrain.evaluate.features import CHUNK
from maepretrain.evaluate.neighbours import nearest
from maepretrain.evaluate.pictures import to_unit_range
from maepretrain.models.autoencoders.semantic_hashing import hamming
from maepretrain.models.protocol import BinaryCodes, require
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.plots.images import titled_images
from maepretrain.ranks import say
from maepretrain.runs.tables import print_columns

Metric = Literal["cosine", "hamming"]
# Images of the index that are encoded again, and how far their features may be from those in it:
# fp16 and other devices stay well below, another encoder or other pixels do not.
COMPARED = 8
TOLERANCE = 0.02


class Neighbours(NamedTuple):
    """For each query its nearest images, the nearest first; row i of each is query i."""

    queries: list[str]
    numbers: Tensor
    distances: Tensor
    keys: list[list[str]]
    labels: list[list[int]]


@torch.no_grad()
def search(
    index: Path,
    query: list[str],
    k: int = 10,
    metric: Metric | None = None,
    encoder: str | None = None,
    out: Path | None = None,
) -> Neighbours:
    """Find the images of an index that are most like each query, print and draw them.

    Args:
        index: a .npz or .parquet of `maepretrain embed`.
        query: files, folders, or keys of images of the index.
        k: neighbours of each query.
        metric: "cosine", the angle between features (distance 1 - cosine); "hamming", how many bits
            of binary codes differ. Default hamming where the model has binary codes.
        encoder: default the one that made the index, where it lay then. Another place of the same
            encoder is fine; another encoder is refused.
        out: a .png of queries and neighbours.

    Raises:
        ValueError: a file that is no index, an encoder that did not make it, a query that is
            neither file nor key, k beyond the index, binary codes of a model that has none.
    """
    if out is not None:
        check_picture(out)
    bank = read_index(index)
    if not 1 <= k <= len(bank.keys):
        raise ValueError(f"k {k} must be 1 to {len(bank.keys)}, the images of {index}")
    made = json.loads(bank.made)
    data = data_of(bank)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_encoder(encoder or made["encoder"], data)
    metric = metric or ("hamming" if isinstance(model, BinaryCodes) else "cosine")
    if metric == "hamming":
        require(model, BinaryCodes, "has no binary codes: take --metric cosine")
    encode = Encode(model, data, made["pool"], device)
    _check_encoder(encode, bank, data, f"{index} was not made by {encoder or made['encoder']}")
    names, inputs = _read_queries(query, bank, data)
    features = encode(inputs)
    rows = torch.from_numpy(bank.features).float()
    if metric == "hamming":
        distances, numbers = nearest_bits(features, rows, k)
    else:
        cosine, numbers = nearest(features, rows.split(CHUNK), k)
        distances = (1 - cosine).clamp_min(0)  # a cosine of itself may round to above 1
    keys = [[bank.keys[i] for i in row] for row in numbers.tolist()]
    labels = [bank.labels[row].tolist() for row in numbers.numpy()]
    neighbours = Neighbours(names, numbers, distances, keys, labels)
    _print(neighbours, bank, metric)
    if out is not None:
        _draw(neighbours, inputs, bank, data, metric=metric, out=out)
    return neighbours


def nearest_bits(
    query: Float[Tensor, "q d"], bank: Float[Tensor, "n d"], k: int
) -> tuple[Int64[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Distance in bits and number of the k samples of a bank with the fewest bits that differ; of
    equally many, which are common, the one with the nearest probabilities comes first.

    Args:
        query: probabilities of the bits.
        bank: the same of the samples.
        k: neighbours.
    """
    bits = hamming(query > 0.5, bank > 0.5)
    # Not by a matrix product: saturated probabilities are too near each other for its rounding.
    apart = torch.cdist(query, bank, compute_mode="donot_use_mm_for_euclid_dist")
    below_one = apart / (2 * query.shape[1] ** 0.5)
    numbers = (bits + below_one).topk(k, dim=1, largest=False).indices
    return bits.gather(1, numbers), numbers


def read_index(path: Path) -> Embeddings:
    """Read a file of `maepretrain embed`.

    Raises:
        ValueError: another file, features of tokens.
    """
    try:
        embeddings = read(path)
    except (ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"index {path} is no file of this version's `embed`") from error
    if embeddings.features.ndim != 2:
        raise ValueError(f"index {path} holds tokens: embed with pool mean or cls")
    return embeddings


def data_of(bank: Embeddings) -> ShardData:
    """Settings with which images were shown to the encoder of an index."""
    view = translated(json.loads(bank.made)["data"])
    view["mean"] = tuple(view["mean"])
    view["std"] = tuple(view["std"])
    return shard_data({"train": None} | view)


def _check_encoder(encode: Encode, bank: Embeddings, data: ShardData, problem: str) -> None:
    """Encode some images of the index again: the same encoder gives the same features, wherever
    its file lies now; one that was trained on, or other pixels, do not.

    Raises:
        ValueError: it gives others.
    """
    some = np.unique(np.linspace(0, len(bank.keys) - 1, COMPARED).astype(int)).tolist()
    again = encode(read_rows(some, bank, data))
    kept = torch.from_numpy(bank.features[some]).float()
    if again.shape != kept.shape:
        raise ValueError(f"{problem}: features are {kept.shape[1]} numbers, not {again.shape[1]}")
    apart = float((again - kept).norm() / kept.norm().clamp_min(1e-12))
    if not apart <= TOLERANCE:
        raise ValueError(
            f"{problem} as it is now: features of its images are {apart:.0%} apart; embed again"
        )


def read_rows(numbers: list[int], bank: Embeddings, data: ShardData) -> Tensor:
    """Images of the index, as they were encoded, from the shards that it names.

    Raises:
        ValueError: a shard that is not there, or has no such image any more.
    """
    read = []
    opened: dict[str, Any] = {}
    for number in numbers:
        url, key = bank.shards[number], bank.keys[number]
        if url not in opened:
            samples = data.evaluation(ShardIndex(open_shards([url], cache=data.cache)))
            keys = samples.index.columns(0).keys
            opened[url] = samples, {known: i for i, known in enumerate(keys)}
        samples, number_of_key = opened[url]
        if key not in number_of_key:
            raise ValueError(f"{url} has no image {key} any more: embed again")
        read.append(samples[number_of_key[key]]["input"])
    return torch.stack(read)


def _read_queries(query: list[str], bank: Embeddings, data: ShardData) -> tuple[list[str], Tensor]:
    names: list[str] = []
    inputs: list[Tensor] = []
    for name in query:
        if Path(name).exists():
            files = read_images([name], data)
            names += files.names
            inputs.append(files.values)
        elif name in bank.keys:
            names.append(name)
            inputs.append(read_rows([bank.keys.index(name)], bank, data))
        else:
            raise ValueError(f"query {name} is no file, no folder, and no key of the index")
    return names, torch.cat(inputs)


def _print(neighbours: Neighbours, bank: Embeddings, metric: Metric) -> None:
    columns = {"key": "key", "label": "label", "distance": f"{metric} distance", "shard": "shard"}
    for i, name in enumerate(neighbours.queries):
        rows = {}
        for rank, number in enumerate(neighbours.numbers[i].tolist()):
            label = neighbours.labels[i][rank]
            rows[str(rank + 1)] = {
                "key": neighbours.keys[i][rank],
                "label": "" if label < 0 else str(label),
                "distance": _distance(neighbours.distances[i, rank], metric),
                "shard": bank.shards[number].rpartition("/")[2],
            }
        print_columns(f"like {name}", columns, rows, lambda row, key: row[key])


def _distance(value: Float[Tensor, ""] | Tensor, metric: Metric) -> str:
    return f"{int(value)}" if metric == "hamming" else f"{float(value):.4f}"


def _draw(
    neighbours: Neighbours,
    inputs: Tensor,
    bank: Embeddings,
    data: ShardData,
    *,
    metric: Metric,
    out: Path,
) -> None:
    if inputs.ndim != 4:
        raise ValueError("signals are not drawn: leave out --out")
    images: list[Tensor] = []
    titles: list[str] = []
    for i, name in enumerate(neighbours.queries):
        images += [inputs[i], *read_rows(neighbours.numbers[i].tolist(), bank, data)]
        titles.append(f"query\n{name}")
        for rank, key in enumerate(neighbours.keys[i]):
            label = neighbours.labels[i][rank]
            name_of_image = f"class {label}" if label >= 0 else key
            distance = _distance(neighbours.distances[i, rank], metric)
            titles.append(f"{name_of_image}\n{distance}")
    columns = 1 + len(neighbours.keys[0])
    titled_images(list(to_unit_range(torch.stack(images))), titles, columns, out)
    say(f"picture       {out}")


def search_command(argv: list[str]) -> int:
    """The verb `search`."""
    parser = make_parser("search", config=False)
    help_text = "images: files, folders, or keys of the index"
    parser.add_argument("--query", nargs="+", type=str, required=True, help=help_text)
    parser.add_argument("-k", "--k", type=int, default=10, help="neighbours of each query")
    parser.add_function_arguments(search, skip={"query", "k"})
    search(**parse(parser, argv))
    return 0
