"""`maepretrain embed`: the features of images with their keys, in a file for retrieval.

A .npz holds `features` (n, d), `keys`, `labels` (-1: none) and `shards`; a .parquet has one row for
each image with `key`, `shard`, `label` and `feature`. Both are in the order of the shards. `made`,
JSON (of parquet in the table's metadata), says by which encoder and how images were shown to it:
`maepretrain search` shows it queries alike.
"""

import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.batch import Batch
from maepretrain.data.images import CentreCrop
from maepretrain.data.module import ShardData
from maepretrain.data.normalise import Normalise
from maepretrain.data.samples import Samples
from maepretrain.evaluate.features import Processes
from maepretrain.evaluate.options import evaluation_parser
from maepretrain.files import replacing
from maepretrain.parsing import make_parser, parse
from maepretrain.plots import embedding_map

Pool = Literal["mean", "cls", "tokens"]


class Embeddings(NamedTuple):
    """Features with what they are of; row i of each is the same image. And how they were made."""

    features: Float[np.ndarray, "n *d"]
    keys: list[str]
    labels: Int64[np.ndarray, "n"]
    shards: list[str]
    made: str


def embed_images(
    encoder: str,
    data: ShardData,
    out: Path,
    split: Literal["train", "val"] = "val",
    pool: Pool = "mean",
    half: bool = False,
    batch: int = 256,
    map: Path | None = None,
    map_method: Literal["pca", "tsne"] = "pca",
) -> int:
    """Write the features of all images of a split, with their keys, labels and shards.

    On several processes (torchrun, SLURM) each encodes its share and the first one writes. An image
    that cannot be read is left out, and how many were is said.

    Args:
        encoder: a run folder, a file of weights, or timm:NAME.
        data: shards; images as evaluation sees them, centre-cropped.
        out: file to write: .npz, or .parquet where pyarrow is installed. It replaces an older one.
        split: "train" or "val" shards.
        pool: "mean" of the patch tokens, "cls" token, or all patch "tokens", (n, patches, width).
        half: float16 instead of float32.
        batch: images in one forward pass.
        map: also draw the features as points of a plane, coloured by label, into this .png.
        map_method: "pca", the two directions of largest variance; "tsne", which keeps neighbours
            together (a minute or two for 5,000 images).

    Returns:
        How many images were written.

    Raises:
        ValueError: another kind of file, no such split, an encoder or pool that does not fit,
            features beyond float16.
    """
    _check_out(out)
    _check_map(map, pool)
    index = data.index if split == "train" else data.val_index
    if index is None or not len(index):
        raise ValueError(f"there are no samples to embed: data.{split} names no indexed shards")
    if batch < 1:
        raise ValueError(f"batch {batch} must be at least 1")
    samples = data.evaluation(index)
    with Processes() as processes:
        encode = Encode(load_encoder(encoder, data), data, pool, processes.device)
        share = processes.share(len(samples))
        features, labels, good = encode_all(encode, samples, share, batch, data.num_workers, half)
        parts = processes.all((features, labels, good))
        if processes.rank:
            return 0
    features, labels, good = (
        np.concatenate([part[i] for part in parts if len(part[2])]) for i in range(3)
    )
    names = [name for name, g in zip(samples.names([*range(len(samples))]), good, strict=True) if g]
    if len(names) < len(samples):
        print(f"{len(samples) - len(names)} unreadable samples are left out", file=sys.stderr)
    keys, shards = [key for _, key in names], [url for url, _ in names]
    write(out, Embeddings(features, keys, labels, shards, _how_made(encoder, pool, data)))
    print(f"features {features.shape} {features.dtype} of {len(names):,} images in {out}")
    if map is not None:
        _draw_map(features, labels, map, map_method)
    return len(names)


class Encode:
    """From uint8 images to features on the CPU."""

    def __init__(self, model: nn.Module, data: ShardData, pool: Pool, device: torch.device) -> None:
        self.model, self.pool, self.device = cast(Any, model.eval().to(device)), pool, device
        self.normalise = Normalise(data.mean, data.std).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        x = self.normalise(images.to(self.device))
        # A classic autoencoder has one feature vector and no pools.
        pooled = self.model.encode(x) if self.pool == "mean" else self._pooled(x)
        return pooled.float().cpu()

    def _pooled(self, x: Tensor) -> Tensor:
        try:
            return self.model.encode(x, pool=self.pool)
        except TypeError as error:
            raise ValueError(
                f"{type(self.model).__name__} has no tokens: take pool mean, not {self.pool}"
            ) from error


@torch.no_grad()
def encode_all(
    encode: Encode, samples: Samples, share: range, batch: int, workers: int, half: bool
) -> tuple[Float[np.ndarray, "k *d"], Int64[np.ndarray, "k"], Bool[np.ndarray, "m"]]:
    """Features and labels of the samples of a share that can be read, and which of them can.

    Raises:
        ValueError: features that float16 cannot hold, where it is asked for.
    """
    loader: DataLoader[Batch] = DataLoader(
        samples,
        batch_sampler=[list(share[i : i + batch]) for i in range(0, len(share), batch)],
        num_workers=workers,
        collate_fn=cast(Any, _as_batch),
    )
    features, labels, good = [], [], []
    shown = sys.stderr.isatty() and share.start == 0
    for read in track(loader, "features", len(loader), disable=not shown):
        fine = read["error"][:, 0] == 0
        encoded = encode(read["input"][fine])
        if half and encoded.numel() and encoded.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError("features are beyond the 65,504 that float16 holds: leave out --half")
        features.append((encoded.half() if half else encoded).numpy())
        labels.append(read["label"][fine].numpy())
        good.append(fine.numpy())
    empty = (np.zeros((0, 0), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    found = zip((features, labels, good), empty, strict=True)
    rows, classes, which = (np.concatenate(parts) if parts else none for parts, none in found)
    return rows, classes, which


def _as_batch(batch: Batch) -> Batch:
    return batch


def _how_made(encoder: str, pool: Pool, data: ShardData) -> str:
    spec = encoder if encoder.startswith("timm:") else str(Path(encoder).absolute())
    shown: dict[str, Any] = {"image_size": list(data.shape[1:])}
    shown |= {"channels": data.channels, "exif": data.exif}
    shown |= {"mean": list(data.mean), "std": list(data.std)}
    if isinstance(data.centre_crop, CentreCrop):
        shown["val_share"] = data.centre_crop.share
    return json.dumps({"encoder": spec, "pool": pool, "data": shown})


def _check_map(path: Path | None, pool: Pool) -> None:
    if path is not None and path.suffix != ".png":
        raise ValueError(f"--map {path} must end in .png")
    if path is not None and pool == "tokens":
        raise ValueError("a map has one point for each image: take pool mean or cls, not tokens")


def _draw_map(
    features: Float[np.ndarray, "n d"],
    labels: Int64[np.ndarray, "n"],
    path: Path,
    method: Literal["pca", "tsne"],
) -> None:
    if len(features) < 3:
        raise ValueError(f"a map needs 3 images or more, not {len(features)}")
    embedding_map(torch.from_numpy(features), torch.from_numpy(labels), path, method)
    without = int((labels < 0).sum())
    print(f"map in {path}" + (f"; {without:,} images without label are gray" if without else ""))


def _check_out(out: Path) -> None:
    if out.suffix not in (".npz", ".parquet"):
        raise ValueError(f"--out {out} must end in .npz or .parquet")
    if out.suffix == ".parquet":
        _require_pyarrow(out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")


def _require_pyarrow(path: Path) -> None:
    if find_spec("pyarrow") is None:
        raise ValueError(f"{path}: parquet needs `pip install pyarrow`; .npz needs nothing")


def write(out: Path, rows: Embeddings) -> None:
    """Write a .npz or a .parquet."""
    with replacing(out) as file:
        if out.suffix == ".npz":
            named = rows._replace(keys=np.array(rows.keys), shards=np.array(rows.shards))  # pyright: ignore
            np.savez(cast(Any, file), **named._asdict())
        else:
            _write_parquet(file, rows)


def _write_parquet(file: IO[bytes], rows: Embeddings) -> None:
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    # One axis a level: a list of features, or of tokens.
    column = pyarrow.array(rows.features.reshape(-1))
    for length in rows.features.shape[:0:-1]:
        column = pyarrow.FixedSizeListArray.from_arrays(column, length)
    columns = {"key": rows.keys, "shard": rows.shards, "label": rows.labels, "feature": column}
    table = pyarrow.table(columns).replace_schema_metadata({"made": rows.made})
    parquet.write_table(table, file)


def read(path: Path) -> Embeddings:
    """What `write` wrote.

    Raises:
        ValueError: another file, or a .parquet where pyarrow is not installed.
        KeyError: a file without these columns.
        OSError: a file that is not there.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path)
    with np.load(io.BytesIO(path.read_bytes())) as file:
        found = {name: file[name] for name in Embeddings._fields}
    columns = {name: found[name].tolist() for name in ("keys", "shards")}
    return Embeddings(found["features"], labels=found["labels"], made=str(found["made"]), **columns)


def _read_parquet(path: Path) -> Embeddings:
    _require_pyarrow(path)
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    table = parquet.read_table(pyarrow.BufferReader(path.read_bytes())).combine_chunks()
    shape, column = [len(table)], table["feature"].combine_chunks()
    while pyarrow.types.is_fixed_size_list(column.type):
        shape.append(column.type.list_size)
        column = column.flatten()
    features = column.to_numpy(zero_copy_only=False).reshape(shape).copy()  # writable, for torch
    keys, shards = (table[name].to_pylist() for name in ("key", "shard"))
    made = table.schema.metadata[b"made"].decode()
    return Embeddings(features, keys, table["label"].to_numpy().copy(), shards, made)


def embed_command(argv: list[str]) -> int:
    """The verb `embed`."""
    parser = evaluation_parser(make_parser("embed"), embed_images)
    embed_images(**parse(parser, argv))
    return 0
