"""`maepretrain embed`: the features of images with their keys, in a file for retrieval."""

import json
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maepretrain.apply.embeddings import Embeddings, check_path, write
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.batch import Batch
from maepretrain.data.module import ShardData
from maepretrain.data.normalise import Normalise
from maepretrain.data.samples import Samples
from maepretrain.data.transforms import CentreCrop
from maepretrain.evaluate.options import evaluation_parser
from maepretrain.evaluate.processes import Processes
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.plots.maps import embedding_map

Pool = Literal["mean", "cls", "tokens"]


class Encoded(NamedTuple):
    """Features and labels of a share of the samples: of the k of them that can be read; `readable`
    has an entry for all m."""

    features: Float[np.ndarray, "k *d"]
    labels: Int64[np.ndarray, "k"]
    readable: Bool[np.ndarray, "m"]


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
    that cannot be read is left out, and their number is printed.

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
    check_path(out)
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
        encoded = encode_all(encode, samples, share, batch, workers=data.num_workers, half=half)
        shares = processes.all(encoded)
        if processes.rank:
            return 0
    embeddings = _join(shares, samples, made=_how_made(encoder, pool, data))
    unreadable = len(samples) - len(embeddings.keys)
    if unreadable:
        print(f"{unreadable} unreadable samples are left out", file=sys.stderr)
    write(out, embeddings)
    features = embeddings.features
    print(f"features {features.shape} {features.dtype} of {len(features):,} images in {out}")
    if map is not None:
        _draw_map(features, embeddings.labels, map, map_method)
    return len(features)


def _join(shares: list[Encoded], samples: Samples, made: str) -> Embeddings:
    """The features of all processes, with the names of their samples."""
    some = [share for share in shares if len(share.readable)]
    readable = np.concatenate([share.readable for share in some])
    names = samples.names(np.flatnonzero(readable).tolist())
    return Embeddings(
        features=np.concatenate([share.features for share in some]),
        keys=[key for _, key in names],
        labels=np.concatenate([share.labels for share in some]),
        shards=[url for url, _ in names],
        made=made,
    )


class Encode:
    """Maps uint8 images to features on the CPU."""

    def __init__(self, model: nn.Module, data: ShardData, pool: Pool, device: torch.device) -> None:
        self.model = cast(Any, model.eval().to(device))
        self.pool = pool
        self.device = device
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
    encode: Encode, samples: Samples, share: range, batch: int, *, workers: int, half: bool
) -> Encoded:
    """Encode the samples of a share that can be read.

    Raises:
        ValueError: features that float16 cannot hold, where it is asked for.
    """
    loader: DataLoader[Batch] = DataLoader(
        samples,
        batch_sampler=[list(share[i : i + batch]) for i in range(0, len(share), batch)],
        num_workers=workers,
        collate_fn=cast(Any, _as_batch),
    )
    features: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    readable: list[np.ndarray] = []
    visible = sys.stderr.isatty() and share.start == 0
    for read in track(loader, "features", len(loader), disable=not visible):
        good = read["error"][:, 0] == 0
        encoded = encode(read["input"][good])
        features.append((_as_half(encoded) if half else encoded).numpy())
        labels.append(read["label"][good].numpy())
        readable.append(good.numpy())
    if not readable:  # more processes than samples
        nothing = np.zeros((0, 0), np.float32)
        return Encoded(nothing, np.zeros(0, np.int64), np.zeros(0, bool))
    return Encoded(np.concatenate(features), np.concatenate(labels), np.concatenate(readable))


def _as_half(features: Tensor) -> Tensor:
    if features.numel() and features.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError("features are beyond the 65,504 that float16 holds: leave out --half")
    return features.half()


def _as_batch(batch: Batch) -> Batch:
    return batch


def _how_made(encoder: str, pool: Pool, data: ShardData) -> str:
    """JSON of the encoder, the pool and the way in which images were shown."""
    spec = encoder if encoder.startswith("timm:") else str(Path(encoder).absolute())
    view: dict[str, Any] = {
        "image_size": list(data.shape[1:]),
        "channels": data.channels,
        "exif": data.exif,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    if isinstance(data.centre_crop, CentreCrop):
        view["crop"] = {"val_share": data.centre_crop.share}
    return json.dumps({"encoder": spec, "pool": pool, "data": view})


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
    unlabelled = int((labels < 0).sum())
    gray = f"; {unlabelled:,} images without label are gray" if unlabelled else ""
    print(f"map in {path}{gray}")


def embed_command(argv: list[str]) -> int:
    """The verb `embed`."""
    parser = evaluation_parser(make_parser("embed"), embed_images)
    embed_images(**parse(parser, argv))
    return 0
