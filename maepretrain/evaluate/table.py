"""How good is an encoder: linear probe and k-NN of its features beside random features, raw pixels
and PCA."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from torch import Tensor

from maepretrain.data.module import ShardData
from maepretrain.data.samples import ShardIndex
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.finetune import choose_fraction
from maepretrain.evaluate.knn import knn_accuracy
from maepretrain.evaluate.probe import linear_probe
from maepretrain.experiments import fresh_model, read_model, read_run_data
from maepretrain.training import Normalise

Encode = Callable[[Tensor], Tensor]


def probe(
    encoder: Path,
    train: list[str] | None = None,
    test: list[str] | None = None,
    baselines: bool = False,
    label_fraction: float = 1.0,
    k: int = 20,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Linear probe and k-NN accuracy of frozen features on held-out images; prints a table and
    keeps it in RUN/probe.json.

    Args:
        encoder: run folder of a pretraining.
        train: labelled shards to fit on; default the run's own training shards.
        test: labelled shards to test on; default the run's held-out shards.
        baselines: also the same encoder at random initial values, raw pixels and PCA.
        label_fraction: class-balanced share of the training labels to use.
        k: neighbours that vote in k-NN.
        seed: seed of the chosen labels.

    Returns:
        {name: {"probe": accuracy, "knn": accuracy}}.

    Raises:
        ValueError: no run, no held-out shards, no labels.
    """
    data = read_run_data(encoder, train, test)
    if data.val_index is None:
        raise ValueError("there are no held-out shards to test on: give --test")
    bank_index = data.index
    labels = bank_index.require_labels("a probe")
    data.val_index.require_labels("a probe")
    if label_fraction != 1:
        bank_index = bank_index.choose(choose_fraction(labels, label_fraction, seed))
    results = {}
    for name, encode in _encoders(encoder, data, baselines).items():
        bank, labels = _features(encode, data, bank_index)
        query, truth = _features(encode, data, data.val_index)
        results[name] = _score(bank, labels, query, truth, k)
        if name == "raw pixels":
            pca = PCA(min(64, len(bank) - 1, bank.shape[1]), random_state=0).fit(bank.numpy())
            bank, query = (
                torch.from_numpy(pca.transform(x.numpy())).float() for x in (bank, query)
            )
            results[f"PCA-{bank.shape[1]}"] = _score(bank, labels, query, truth, k)
    print_table(results, k, len(bank_index), len(data.val_index))
    (encoder / "probe.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def _score(bank: Tensor, labels: Tensor, query: Tensor, truth: Tensor, k: int) -> dict[str, float]:
    return {
        "probe": linear_probe(bank, labels, query, truth),
        "knn": knn_accuracy(query, truth, bank, labels, k),
    }


def _encoders(run: Path, data: ShardData, baselines: bool) -> dict[str, Encode]:
    """Functions from uint8 images to features, in the order of the table's rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    normalise = Normalise(data.mean, data.std).to(device)

    def encode_with(model: Any) -> Encode:
        model = model.eval().to(device)
        return lambda images: model.encode(normalise(images.to(device)))

    encoders = {"pretrained": encode_with(read_model(run))}
    if baselines:
        encoders["random encoder"] = encode_with(fresh_model(run))
        encoders["raw pixels"] = pixels
    return encoders


def pixels(images: Tensor) -> Float[Tensor, "b d"]:
    """Pixels in 0..1 as features."""
    return images.flatten(1).float() / 255


def _features(encode: Encode, data: ShardData, index: ShardIndex) -> tuple[Tensor, Tensor]:
    return embed(encode, data.evaluation(index, labelled=True))


def print_table(results: dict[str, dict[str, float]], k: int, train: int, test: int) -> None:
    """The table for people."""
    print(f"accuracy on {test:,} held-out images, {train:,} labelled")
    table = Table()
    table.add_column("features")
    for column in ("linear probe", f"k-NN ({k})"):
        table.add_column(column, justify="right")
    for name, row in results.items():
        table.add_row(name, f"{row['probe']:.3f}", f"{row['knn']:.3f}")
    Console().print(table)
