"""Files of features: `maepretrain embed` writes them, `maepretrain search` reads them.

A .npz holds `features` (n, d), `keys`, `labels` (-1: none) and `shards`; a .parquet has one row for
each image with `key`, `shard`, `label` and `feature`. Both are in the order of the shards. `made`,
JSON (of parquet in the table's metadata), names the encoder and how images were shown to it.
"""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float, Int64

from maepretrain.files import replacing


class Embeddings(NamedTuple):
    """Features of images; row i of each column is the same image. `made` is the JSON above."""

    features: Float[np.ndarray, "n *d"]
    keys: list[str]
    labels: Int64[np.ndarray, "n"]
    shards: list[str]
    made: str


def check_path(out: Path) -> None:
    """Refuse, before any work, a file that cannot be written.

    Raises:
        ValueError: another suffix, no pyarrow for a .parquet, no such folder.
    """
    if out.suffix not in (".npz", ".parquet"):
        raise ValueError(f"--out {out} must end in .npz or .parquet")
    if out.suffix == ".parquet":
        _require_pyarrow(out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")


def write(out: Path, embeddings: Embeddings) -> None:
    """Write a .npz or a .parquet, in the place of an older one."""
    with replacing(out) as file:
        if out.suffix == ".npz":
            _write_npz(file, embeddings)
        else:
            _write_parquet(file, embeddings)


def read(path: Path) -> Embeddings:
    """Read a file of `write`.

    Raises:
        ValueError: another file, or a .parquet where pyarrow is not installed.
        KeyError: a file without these columns.
        OSError: a file that is not there.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return _read_npz(path)


def _write_npz(file: IO[bytes], embeddings: Embeddings) -> None:
    columns = embeddings._asdict()
    columns["keys"] = np.array(embeddings.keys)
    columns["shards"] = np.array(embeddings.shards)
    np.savez(cast(Any, file), **columns)


def _read_npz(path: Path) -> Embeddings:
    with np.load(io.BytesIO(path.read_bytes())) as file:
        columns = {name: file[name] for name in Embeddings._fields}
    return Embeddings(
        features=columns["features"],
        keys=columns["keys"].tolist(),
        labels=columns["labels"],
        shards=columns["shards"].tolist(),
        made=str(columns["made"]),
    )


def _write_parquet(file: IO[bytes], embeddings: Embeddings) -> None:
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    # One axis a level: a list of features, or of tokens.
    features = pyarrow.array(embeddings.features.reshape(-1))
    for length in embeddings.features.shape[:0:-1]:
        features = pyarrow.FixedSizeListArray.from_arrays(features, length)
    columns = {
        "key": embeddings.keys,
        "shard": embeddings.shards,
        "label": embeddings.labels,
        "feature": features,
    }
    table = pyarrow.table(columns).replace_schema_metadata({"made": embeddings.made})
    parquet.write_table(table, file)


def _read_parquet(path: Path) -> Embeddings:
    _require_pyarrow(path)
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    table = parquet.read_table(pyarrow.BufferReader(path.read_bytes())).combine_chunks()
    column = table["feature"].combine_chunks()
    shape = [len(table)]
    while pyarrow.types.is_fixed_size_list(column.type):
        shape.append(column.type.list_size)
        column = column.flatten()
    return Embeddings(
        # Copies are writable, as torch wants them.
        features=column.to_numpy(zero_copy_only=False).reshape(shape).copy(),
        keys=table["key"].to_pylist(),
        labels=table["label"].to_numpy().copy(),
        shards=table["shard"].to_pylist(),
        made=table.schema.metadata[b"made"].decode(),
    )


def _require_pyarrow(path: Path) -> None:
    if find_spec("pyarrow") is None:
        raise ValueError(f"{path}: parquet needs `pip install pyarrow`; .npz needs nothing")
