"""The verb `knn`: weighted k-nearest neighbours of frozen features, k and temperature chosen on the
training set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from maepretrain.data.module import ShardData
from maepretrain.evaluate.feature_files import FeatureFiles
from maepretrain.evaluate.feature_sets import OUTPUT
from maepretrain.evaluate.features import CHUNK
from maepretrain.evaluate.frozen_features import (
    PRETRAINED,
    FrozenEvaluation,
    Outcome,
    ResultTable,
    results_folder,
)
from maepretrain.evaluate.labelled_sets import LabelledSets
from maepretrain.evaluate.neighbours import NeighbourSweep, nearest, vote
from maepretrain.evaluate.options import add_verbose, details, evaluation_parser
from maepretrain.evaluate.processes import Processes
from maepretrain.evaluate.result_lines import print_frozen
from maepretrain.evaluate.scores import scores
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.randomness import permutation
from maepretrain.ranks import say, say_detail


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
) -> ResultTable:
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
    evaluation = FrozenEvaluation("knn", encoder, data, sets, out=out, cache=cache, batch=batch)
    with Processes() as processes:
        rows = evaluation.feature_sets(processes.device, baselines=baselines)
        for row, feature_sets in rows:
            with evaluation.cached(row, feature_sets, processes) as features:
                outcomes = []
                for choice, one in zip(sets.choices, sets.seeds, strict=True):
                    say_detail(f"{row}, seed {one}")
                    outcomes.append(
                        vote_on_test(
                            neighbours,
                            features.bank,
                            features.test,
                            choice,
                            sets.classes,
                            one,
                            processes,
                        )
                    )
                evaluation.add(row, outcomes, features)
                if row == PRETRAINED:
                    evaluation.draw(outcomes[0], features.test, tsne=tsne)
        return evaluation.write({"neighbours": vars(neighbours)})


class _Bank:
    """Output features of the labelled samples, chunk by chunk."""

    def __init__(self, files: FeatureFiles, choice: Int64[Tensor, "n"]) -> None:
        self.files = files
        self.choice = choice
        self.labels = files.labels[choice]

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
        seed: which training samples are queries of the choice.
        processes: who shares the work.
    """
    bank = _Bank(files, choice)
    k, temperature, accuracy = _choose(sweep, bank, classes, seed, processes)
    share = processes.share(len(test))
    votes = []
    for numbers in torch.arange(share.start, share.stop).split(CHUNK):
        query = test.rows(numbers, OUTPUT).to(processes.device)
        cosine, labels = _neighbours(query, bank, k)
        votes.append(vote(cosine, labels, classes, k, temperature).max(1))
    votes = [chunk for of_rank in processes.all(votes) for chunk in of_rank]
    confidence = torch.cat([chunk[0] for chunk in votes])
    predicted = torch.cat([chunk[1] for chunk in votes])
    figures = scores(predicted, test.labels, classes)
    chosen = {"k": k, "temperature": temperature, "accuracy_choosing": accuracy}
    return Outcome(figures, predicted, confidence, OUTPUT, chosen)


def _neighbours(
    query: Float[Tensor, "q d"], bank: _Bank, k: int, own: Int64[Tensor, "q"] | None = None
) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Cosine and label of the k nearest samples of the bank, on the CPU."""
    cosine, numbers = nearest(query, bank, k, own)
    return cosine.cpu(), bank.labels[numbers.cpu()]


def _choose(
    sweep: NeighbourSweep, bank: _Bank, classes: int, seed: int, processes: Processes
) -> tuple[int, float, float]:
    """(k, temperature, accuracy) that classify training samples best, each by all others."""
    ks = sweep.fitting(len(bank.labels))
    queries = permutation(seed, "knn", len(bank.labels))[: sweep.choose_on]
    share = processes.share(len(queries))
    correct = torch.zeros(len(ks), len(sweep.temperatures), dtype=torch.int64)
    for own in queries[share.start : share.stop].split(CHUNK):
        query = bank.files.rows(bank.choice[own], OUTPUT).to(processes.device)
        cosine, labels = _neighbours(query, bank, ks[-1], own.to(query.device))
        correct += sweep.count_correct(cosine, labels, bank.labels[own], classes, ks)
    total = torch.stack(processes.all(correct)).sum(0)
    i, j = divmod(int(total.argmax()), len(sweep.temperatures))
    k = ks[i]
    temperature = sweep.temperatures[j]
    accuracy = float(total[i, j]) / len(queries)
    tried_ks = ", ".join(str(k) for k in ks)
    tried_temperatures = ", ".join(f"{t:g}" for t in sweep.temperatures)
    say_detail(
        f"  k-NN        k {k} of {tried_ks}; temperature {temperature:g} of "
        f"{tried_temperatures}: {accuracy:.4f}\n"
        f"              on {len(queries):,} training samples, each left out of the bank in turn"
    )
    if len(ks) > 1 and k == ks[-1]:
        say(f"  WARNING     k {k} is the largest that was tried: widen --neighbours.ks")
    return k, temperature, accuracy


def knn_parser(parser: Any) -> Any:
    """`knn`: options from its signature, sections data and neighbours."""
    evaluation_parser(parser, knn, skip={"neighbours"})
    parser.add_class_arguments(NeighbourSweep, "neighbours")
    return parser


def knn_command(argv: list[str]) -> int:
    """The verb `knn`."""
    parser = knn_parser(make_parser("knn"))
    add_verbose(parser)
    arguments = parse(parser, argv)
    with details(shown=arguments.pop("verbose")):
        knn(**arguments)
    print_frozen(results_folder(arguments["encoder"], arguments["out"]), "knn")
    return 0
