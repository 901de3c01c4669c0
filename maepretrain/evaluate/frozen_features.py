"""What evaluations of frozen features share: the labelled sets of every seed, the rows of the
table, features in files, and what is kept of the figures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from maepretrain.checkpoints.encoders import fresh_encoder, load_encoder
from maepretrain.checkpoints.run_config import run_of
from maepretrain.data.module import ShardData
from maepretrain.data.shards.index import class_names, summary
from maepretrain.evaluate.feature_sets import (
    OUTPUT,
    Pool,
    Views,
    encoder_views,
    pca_views,
    pixel_views,
)
from maepretrain.evaluate.features import FeatureFiles, Processes, feature_folder, write_features
from maepretrain.evaluate.labels import choose_labels, count_classes
from maepretrain.plots import confusion_matrix, embedding_map, most_confused
from maepretrain.ranks import is_rank_zero, say
from maepretrain.runs.results import print_table, spread, write_results

# Test images that are drawn as confused most.
CONFUSED = 24
Rows = dict[str, dict[str, Any]]


class LabelledSets:
    """The labelled training samples of every seed, and the test samples.

    Samples with a wrong label are left out: what would be read in their place is counted already.

    Args:
        data: labelled shards; `val` is the test set.
        fraction: class-balanced share of the training labels.
        per_class: as many training labels of every class.
        seed: the first seed.
        seeds: how many; each has its own choice of labels.
        purpose: what needs them, for messages.

    Raises:
        ValueError: no test shards, no labels, labels of the test set that training does not know,
            no seeds.
    """

    def __init__(
        self,
        data: ShardData,
        fraction: float,
        per_class: int | None,
        seed: int,
        seeds: int,
        purpose: str = "a probe",
    ) -> None:
        if seeds < 1:
            raise ValueError(f"seeds {seeds} must be at least 1")
        if data.val_index is None:
            raise ValueError("there are no held-out shards to test on: set --data.val")
        labels = data.index.require_labels(purpose)
        truth = data.val_index.require_labels(purpose)
        if not len(tested := (truth >= 0).nonzero().flatten()):
            raise ValueError("no test sample has a label >= 0")
        self.classes, self.seeds = count_classes(labels, truth), range(seed, seed + seeds)
        chosen = [choose_labels(labels, fraction, per_class, one) for one in self.seeds]
        # What several seeds chose is encoded once.
        union = torch.cat(chosen).unique()
        self.choices = [torch.searchsorted(union, one) for one in chosen]
        self.train, self.test = data.index.choose(union), data.val_index.choose(tested)
        wrong = int((labels < 0).sum()), len(truth) - len(tested)
        if any(wrong):
            say(f"left out      {wrong[0]} training and {wrong[1]} test samples of wrong label")
        self.described = {
            "train": summary(data.index.shards),
            "labelled": len(chosen[0]),
            "label_fraction": fraction,
            "labels_per_class": per_class,
            "test": summary(data.val_index.shards),
            "tested": len(tested),
        }


@dataclass(frozen=True)
class Features:
    """Cached features of a row of the table.

    Args:
        bank: of the training samples that any seed chose.
        test: of the test samples.
        began: when the row began.
        speed: images encoded a second.
    """

    bank: FeatureFiles
    test: FeatureFiles
    began: float
    speed: float


@dataclass(frozen=True)
class Outcome:
    """What one seed gave on the test set.

    Args:
        figures: scores, by name.
        predicted: the class of each test sample.
        confidence: the probability given to it.
        view: the features that were used.
        chosen: the settings that won on the training set.
    """

    figures: dict[str, float]
    predicted: Int64[Tensor, "n"]
    confidence: Float[Tensor, "n"]
    view: str
    chosen: dict[str, Any]


class Frozen:
    """One evaluation of a frozen encoder.

    Args:
        name: of the evaluator; results and pictures are kept under it.
        encoder: a run folder, a file of weights, or timm:NAME.
        data: labelled shards; `val` is the test set.
        sets: of the same data.
        out: folder of the results; None takes the run folder.
        cache: folder for the features while this runs; None takes the folder of the results.
        batch: images of one forward pass.

    Raises:
        ValueError: an encoder that belongs to no run, and no `out`.
    """

    def __init__(
        self,
        name: str,
        encoder: str,
        data: ShardData,
        sets: LabelledSets,
        out: Path | None,
        cache: Path | None,
        batch: int,
    ) -> None:
        folder = out or run_of(encoder)
        if folder is None:
            raise ValueError(
                f"encoder {encoder} belongs to no run folder: give --out for the results"
            )
        if batch < 1:
            raise ValueError(f"batch {batch} must be at least 1")
        self.name, self.encoder, self.data, self.sets = name, encoder, data, sets
        self.folder, self.cache, self.batch = folder, cache or folder, batch
        self.rows: Rows = {}

    def views(
        self,
        device: torch.device,
        baselines: bool,
        pools: tuple[Pool, ...] = (),
        blocks: list[int] | None = None,
    ) -> Iterator[tuple[str, Views]]:
        """Names and views in the order of the table's rows, each made when its turn comes."""
        encoder, data = load_encoder(self.encoder, self.data), self.data
        yield "pretrained", encoder_views(encoder, data, device, pools, blocks)
        if baselines:
            fresh = fresh_encoder(self.encoder, data, self.sets.seeds[0])
            yield "random encoder", encoder_views(fresh, data, device, pools, blocks)
            yield "raw pixels", pixel_views(data)
            views = pca_views(data)
            yield f"PCA-{views.widths[OUTPUT]}", views

    @contextmanager
    def features(self, views: Views, processes: Processes) -> Iterator[Features]:
        """Features of training and test samples, in files while the context lasts."""
        began, data = time.perf_counter(), self.data
        indexes = {"train": self.sets.train, "test": self.sets.test}
        n = sum(len(index) for index in indexes.values())
        with feature_folder(self.cache, 2 * n * sum(views.widths.values()), processes) as folder:
            bank, test = (
                write_features(
                    views.encode,
                    views.widths,
                    data.evaluation(index, labelled=True),
                    folder / name,
                    processes,
                    self.batch,
                    data.num_workers,
                )
                for name, index in indexes.items()
            )
            yield Features(bank, test, began, n / (time.perf_counter() - began))

    def add(self, row: str, outcomes: list[Outcome], features: Features) -> None:
        """A row of the table: mean and spread over the seeds, and what was chosen."""
        first = outcomes[0].chosen
        recipe = [f"{k} {value}" for k, value in first.items() if k != "accuracy_choosing"]
        self.rows[row] = spread([outcome.figures for outcome in outcomes]) | {
            "seeds": len(outcomes),
            "recipe": ", ".join(recipe),
            "minutes": (time.perf_counter() - features.began) / 60,
            "img_per_s": features.speed,
            "chosen": [outcome.chosen for outcome in outcomes],
        }

    def draw(self, outcome: Outcome, test: FeatureFiles, tsne: bool) -> None:
        """Confusion matrix, most confused images and a map of the features."""
        if not is_rank_zero():
            return
        pictures, truth = self.folder / "pictures" / self.name, test.labels
        names = class_names(self.sets.test.shards)
        confusion_matrix(
            truth,
            outcome.predicted,
            self.sets.classes,
            pictures.with_name(f"{self.name}-confusion.png"),
            names,
        )
        wrong = (outcome.predicted != truth).nonzero().flatten()
        wrong = wrong[outcome.confidence[wrong].argsort(descending=True)][:CONFUSED]
        if len(wrong) and len(self.data.shape) == 3:
            samples = self.data.evaluation(self.sets.test, labelled=True)
            images = list(shown(samples.__getitems__(wrong.tolist())["input"]))
            most_confused(
                images,
                truth[wrong].tolist(),
                outcome.predicted[wrong].tolist(),
                outcome.confidence[wrong].tolist(),
                pictures.with_name(f"{self.name}-most-confused.png"),
                names,
            )
        methods: tuple[Literal["pca", "tsne"], ...] = ("pca", "tsne") if tsne else ("pca",)
        features = test.rows(torch.arange(len(test)), outcome.view)
        for method in methods:
            path = pictures.with_name(f"{self.name}-map-{method}.png")
            embedding_map(features, truth, path, method)

    def keep(self, recipe: dict[str, Any]) -> Rows:
        """results.json and the printed table; returns the rows."""
        if is_rank_zero():
            result = {"encoder": self.encoder, "rows": self.rows, "recipe": recipe}
            result |= {"seeds": list(self.sets.seeds), "data": self.sets.described}
            path = write_results(self.folder, self.name, result)
            described = self.sets.described
            print(f"{described['tested']:,} test images, {described['labelled']:,} labelled")
            print_table(self.rows)
            print(f"results in {path}")
        return self.rows


def shown(images: Tensor) -> Float[Tensor, "b c h w"]:
    """Pixels in 0..1."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
