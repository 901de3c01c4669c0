"""Evaluation of frozen features, as the linear probe and k-NN share it: the rows of the table
(encoder and baselines), features in files, pictures, results.json."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from maepretrain.checkpoints.encoders import fresh_encoder, load_encoder
from maepretrain.checkpoints.run_config import run_of
from maepretrain.data.module import ShardData
from maepretrain.data.samples import ShardIndex
from maepretrain.evaluate.feature_files import FeatureFiles, feature_folder, write_features
from maepretrain.evaluate.feature_sets import (
    OUTPUT,
    BlockPool,
    FeatureSets,
    encoder_feature_sets,
    pca_features,
    pixel_features,
)
from maepretrain.evaluate.labelled_sets import LabelledSets
from maepretrain.evaluate.pictures import draw_confusion
from maepretrain.evaluate.processes import Processes
from maepretrain.evaluate.scores import spread
from maepretrain.plots.maps import embedding_map
from maepretrain.ranks import is_rank_zero
from maepretrain.runs.results import write_results

# Figures by name, of each row of the table.
ResultTable = dict[str, dict[str, Any]]
# The row of the encoder itself; the others are baselines.
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class CachedFeatures:
    """Features of one row of the table, in files.

    Args:
        bank: of the training samples that any seed chose.
        test: of the test samples.
        began: when the row began, by `time.perf_counter`.
        img_per_s: images encoded a second.
    """

    bank: FeatureFiles
    test: FeatureFiles
    began: float
    img_per_s: float


@dataclass(frozen=True)
class Outcome:
    """The result of one seed on the test set.

    Args:
        figures: scores, by name.
        predicted: the class of each test sample.
        confidence: its probability.
        feature_set: the features that were used.
        chosen: the settings that won on the training set.
    """

    figures: dict[str, float]
    predicted: Int64[Tensor, "n"]
    confidence: Float[Tensor, "n"]
    feature_set: str
    chosen: dict[str, Any]


class FrozenEvaluation:
    """One evaluation of a frozen encoder.

    Args:
        evaluator: its name; results and pictures are kept under it.
        encoder: a run folder, a file of weights, or timm:NAME.
        data: labelled shards; `val` is the test set.
        sets: of the same data.
        out: folder of the results; None takes the run folder.
        cache: folder for the features while this runs; None takes the folder of the results.
        batch: images of one forward pass.

    Raises:
        ValueError: an encoder that belongs to no run, and no `out`; a batch below 1.
    """

    def __init__(
        self,
        evaluator: str,
        encoder: str,
        data: ShardData,
        sets: LabelledSets,
        *,
        out: Path | None,
        cache: Path | None,
        batch: int,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch {batch} must be at least 1")
        self.evaluator = evaluator
        self.encoder = encoder
        self.data = data
        self.sets = sets
        self.folder = results_folder(encoder, out)
        self.cache = cache or self.folder
        self.batch = batch
        self.rows: ResultTable = {}

    def feature_sets(
        self,
        device: torch.device,
        *,
        baselines: bool,
        pools: tuple[BlockPool, ...] = (),
        blocks: list[int] | None = None,
    ) -> Iterator[tuple[str, FeatureSets]]:
        """Name and feature sets of the table's rows in order, each made when its turn comes."""
        data = self.data
        encoder = load_encoder(self.encoder, data)
        yield PRETRAINED, encoder_feature_sets(encoder, data, device, pools, blocks)
        if baselines:
            fresh = fresh_encoder(self.encoder, data, self.sets.seeds[0])
            yield "random encoder", encoder_feature_sets(fresh, data, device, pools, blocks)
            yield "raw pixels", pixel_features(data)
            pca = pca_features(data)
            yield f"PCA-{pca.widths[OUTPUT]}", pca

    @contextmanager
    def cached(
        self, row: str, features: FeatureSets, processes: Processes
    ) -> Iterator[CachedFeatures]:
        """Features of training and test samples, in files while the context lasts."""
        began = time.perf_counter()
        n = len(self.sets.train) + len(self.sets.test)
        size = 2 * n * sum(features.widths.values())  # fp16
        with feature_folder(self.cache, size, processes) as folder:

            def write(name: str, index: ShardIndex) -> FeatureFiles:
                return write_features(
                    features.encode,
                    features.widths,
                    self.data.evaluation(index, labelled=True),
                    folder / name,
                    processes,
                    self.batch,
                    self.data.num_workers,
                    task=f"{row}: features of the {name} set",
                )

            bank = write("train", self.sets.train)
            test = write("test", self.sets.test)
            yield CachedFeatures(bank, test, began, n / (time.perf_counter() - began))

    def add(self, row: str, outcomes: list[Outcome], features: CachedFeatures) -> None:
        """Add a row to the table: mean and spread over the seeds, and the chosen settings."""
        settings = dict(outcomes[0].chosen)
        del settings["accuracy_choosing"]
        self.rows[row] = spread([outcome.figures for outcome in outcomes]) | {
            "seeds": len(outcomes),
            "recipe": ", ".join(f"{name} {value}" for name, value in settings.items()),
            "minutes": (time.perf_counter() - features.began) / 60,
            "img_per_s": features.img_per_s,
            "chosen": [outcome.chosen for outcome in outcomes],
        }

    def draw(self, outcome: Outcome, test: FeatureFiles, *, tsne: bool) -> None:
        """Draw confusion matrix, most confused images and a map of the features."""
        if not is_rank_zero():
            return
        pictures = self.folder / "pictures"
        draw_confusion(
            pictures,
            self.evaluator,
            self.data,
            self.sets.test,
            truth=test.labels,
            predicted=outcome.predicted,
            confidence=outcome.confidence,
            classes=self.sets.classes,
        )
        features = test.rows(torch.arange(len(test)), outcome.feature_set)
        embedding_map(features, test.labels, pictures / f"{self.evaluator}-map-pca.png", "pca")
        if tsne:
            path = pictures / f"{self.evaluator}-map-tsne.png"
            embedding_map(features, test.labels, path, "tsne")

    def write(self, recipe: dict[str, Any]) -> ResultTable:
        """Write results.json on rank zero, and return the rows."""
        if is_rank_zero():
            result = {
                "encoder": self.encoder,
                "rows": self.rows,
                "recipe": recipe,
                "seeds": list(self.sets.seeds),
                "data": self.sets.described,
            }
            write_results(self.folder, self.evaluator, result)
        return self.rows


def results_folder(encoder: str, out: Path | None) -> Path:
    """The folder of an evaluation's results: `out`, or the run that the encoder belongs to.

    Raises:
        ValueError: there is neither.
    """
    folder = out or run_of(encoder)
    if folder is None:
        raise ValueError(f"encoder {encoder} belongs to no run folder: give --out for the results")
    return folder
