"""The verb `knn`: weighted k-nearest neighbours of frozen features, k and temperature chosen on the
training set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from maepretrain.data.module import ShardData
from maepretrain.evaluate.feature_sets import OUTPUT
from maepretrain.evaluate.features import CHUNK, FeatureFiles, Processes
from maepretrain.evaluate.frozen_features import Frozen, LabelledSets, Outcome, Rows
from maepretrain.evaluate.neighbours import NeighbourSweep, nearest, vote
from maepretrain.evaluate.options import evaluation_parser
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.randomness import permutation
from maepretrain.ranks import say
from maepretrain.runs.results import scores


def knn(
    encoder: str,
    data: ShardData,
    neighbours: NeighbourSweep,
    out: Path | None = None,
    baselines: bool = False,
    label_fraction: float = 1.0,
    labels_per_class: int | None = None,
    seeds: int = 1,
    seed: int = 0,
    tsne: bool = False,
    batch: int = 256,
    cache: Path | None = None,
) -> Rows:
    """Weighted k-NN on the encoder's output: k and temperature are chosen on the training set, each
    sample classified by all others, and tested once. Figures go to OUT/results.json, pictures to
    OUT/pictures.

    Args:
        encoder: a run folder, a file of weights, or timm:NAME.
        data: labelled shards; `val` is the test set. Default those of the run.
        neighbours: which k and temperatures are tried.
        out: folder of the results. Default the run folder.
        baselines: also the same encoder at random initial values, raw pixels and PCA.
        label_fraction: class-balanced share of the training labels to use.
        labels_per_class: as many training labels of every class.
        seeds: repetitions, each with its own labels.
        seed: the first of them.
        tsne: also draw a t-SNE map of at most 5,000 test features.
        batch: images of one forward pass.
        cache: folder for the features while this runs, on a disk that all processes see. Default
            the folder of the results.

    Returns:
        Figures of each row of the table.

    Raises:
        ValueError: no encoder, no labels, no test shards, no folder for the results.
    """
    sets = LabelledSets(data, label_fraction, labels_per_class, seed, seeds, "k-NN")
    frozen = Frozen("knn", encoder, data, sets, out, cache, batch)
    with Processes() as processes:
        for row, views in frozen.views(processes.device, baselines):
            with frozen.features(views, processes) as f:
                outcomes = []
                for choice, one in zip(sets.choices, sets.seeds, strict=True):
                    say(f"{row}, seed {one}")
                    asked = (f.bank, f.test, choice, sets.classes, one, processes)
                    outcomes.append(vote_on_test(neighbours, *asked))
                frozen.add(row, outcomes, f)
                if row == "pretrained":
                    frozen.draw(outcomes[0], f.test, tsne)
        return frozen.keep({"neighbours": vars(neighbours)})


class _Bank:
    """The chosen samples' output features, chunk by chunk."""

    def __init__(self, files: FeatureFiles, choice: Int64[Tensor, "n"]) -> None:
        self.files, self.choice, self.labels = files, choice, files.labels[choice]

    def __iter__(self) -> Iterator[Tensor]:
        for numbers in self.choice.split(CHUNK):
            yield self.files.rows(numbers, OUTPUT)


def vote_on_test(
    sweep: NeighbourSweep,
    files: FeatureFiles,
    test: FeatureFiles,
    choice: Int64[Tensor, "n"],
    classes: int,
    seed: int,
    processes: Processes,
) -> Outcome:
    """Choose k and temperature by leaving one out, then let the training set vote on the test set;
    the queries are shared out over the processes.

    Args:
        sweep: which k and temperatures are tried.
        files: features of the training samples.
        test: features of the test samples.
        choice: the labelled ones among the training samples.
        classes: how many there are.
        seed: which training samples are asked.
        processes: who shares the work.
    """
    bank, mine = _Bank(files, choice), processes.share(len(test))
    k, temperature, accuracy = _choose(sweep, bank, classes, seed, processes)
    answers = []
    for numbers in torch.arange(mine.start, mine.stop).split(CHUNK):
        query = test.rows(numbers, OUTPUT).to(processes.device)
        cosine, found = (x.cpu() for x in nearest(query, bank, k))
        answers.append(vote(cosine, bank.labels[found], classes, k, temperature).max(1))
    parts = [answer for part in processes.all(answers) for answer in part]
    predicted = torch.cat([answer[1] for answer in parts])
    confidence = torch.cat([answer[0] for answer in parts])
    figures = scores(predicted, test.labels, classes)
    chosen = {"k": k, "temperature": temperature, "accuracy_choosing": accuracy}
    return Outcome(figures, predicted, confidence, OUTPUT, chosen)


def _choose(
    sweep: NeighbourSweep, bank: _Bank, classes: int, seed: int, processes: Processes
) -> tuple[int, float, float]:
    """(k, temperature, accuracy) that classify training samples best, each by all others."""
    ks = sweep.fitting(len(bank.labels))
    asked = permutation(seed, "knn", len(bank.labels))[: sweep.choose_on]
    mine = processes.share(len(asked))
    counts = torch.zeros(len(ks), len(sweep.temperatures), dtype=torch.int64)
    for own in asked[mine.start : mine.stop].split(CHUNK):
        query = bank.files.rows(bank.choice[own], OUTPUT).to(processes.device)
        cosine, found = (x.cpu() for x in nearest(query, bank, ks[-1], own.to(query.device)))
        counts += sweep.count(cosine, bank.labels[found], bank.labels[own], classes, ks)
    total = torch.stack(processes.all(counts)).sum(0)
    i, j = divmod(int(total.argmax()), len(sweep.temperatures))
    accuracy = float(total[i, j]) / len(asked)
    say(
        f"  k-NN        k {ks[i]} of {', '.join(map(str, ks))}; temperature "
        f"{sweep.temperatures[j]:g} of {', '.join(f'{t:g}' for t in sweep.temperatures)}: "
        f"{accuracy:.4f}\n              on {len(asked):,} training samples, each left out of the "
        "bank in turn"
    )
    if len(ks) > 1 and i == len(ks) - 1:
        say(f"  WARNING     k {ks[i]} is the largest that was tried: widen --neighbours.ks")
    return ks[i], sweep.temperatures[j], accuracy


def knn_parser(parser: Any) -> Any:
    """`knn`: options from its signature, sections data and neighbours."""
    evaluation_parser(parser, knn, skip={"neighbours"})
    parser.add_class_arguments(NeighbourSweep, "neighbours")
    return parser


def knn_command(argv: list[str]) -> int:
    """The verb `knn`."""
    knn(**parse(knn_parser(make_parser("knn")), argv))
    return 0
