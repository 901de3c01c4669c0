"""The verb `probe`: linear classifiers on frozen features, many at once, and k-NN beside them.

Settings are chosen on the training set, and the test set is looked at once.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from maepretrain.data.module import ShardData
from maepretrain.evaluate.feature_sets import Pool
from maepretrain.evaluate.features import FeatureFiles, Processes
from maepretrain.evaluate.frozen_features import Frozen, LabelledSets, Outcome, Rows
from maepretrain.evaluate.heads import Head, LinearSweep, pooled, predictions
from maepretrain.evaluate.knn import vote_on_test
from maepretrain.evaluate.labels import folds_for_choosing
from maepretrain.evaluate.neighbours import NeighbourSweep
from maepretrain.evaluate.options import evaluation_parser
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.ranks import say
from maepretrain.runs.results import scores, spread


def probe(
    encoder: str,
    data: ShardData,
    sweep: LinearSweep,
    neighbours: NeighbourSweep,
    out: Path | None = None,
    blocks: list[int] | None = None,
    pools: tuple[Pool, ...] = ("mean", "cls", "last4"),
    baselines: bool = False,
    label_fraction: float = 1.0,
    labels_per_class: int | None = None,
    seeds: int = 1,
    seed: int = 0,
    tsne: bool = False,
    batch: int = 256,
    cache: Path | None = None,
) -> Rows:
    """Linear probe and k-NN of frozen features: heads for every view of the features and setting
    are trained at once, the best is chosen on held-out parts of the training set, trained again on
    all of it and tested once. Figures go to OUT/results.json, pictures to OUT/pictures.

    Args:
        encoder: a run folder, a file of weights, or timm:NAME.
        data: labelled shards; `val` is the test set. Default those of the run.
        sweep: how heads are trained and chosen.
        neighbours: what k-NN tries.
        out: folder of the results. Default the run folder.
        blocks: whose outputs are views, 0 the first, -1 the last. Default all.
        pools: of the blocks: mean of the patches, class token, and the mean of the last four
            blocks side by side. The encoder's own output is always a view.
        baselines: also the same encoder at random initial values, raw pixels and PCA.
        label_fraction: class-balanced share of the training labels to use.
        labels_per_class: as many training labels of every class.
        seeds: repetitions, each with its own labels, validation split and order of mini-batches.
        seed: the first of them.
        tsne: also draw a t-SNE map of at most 5,000 test features.
        batch: images of one forward pass.
        cache: folder for the features while this runs, on a disk that all processes see. Default
            the folder of the results.

    Returns:
        Figures of each row of the table.

    Raises:
        ValueError: no encoder, no labels, no test shards, no folder for the results, a
            batch larger than the set.
    """
    sets = LabelledSets(data, label_fraction, labels_per_class, seed, seeds, "a probe")
    frozen = Frozen("probe", encoder, data, sets, out, cache, batch)
    with Processes() as processes:
        for row, views in frozen.views(processes.device, baselines, pools, blocks):
            with frozen.features(views, processes) as f:
                outcomes, knn = [], []
                for choice, one in zip(sets.choices, sets.seeds, strict=True):
                    say(f"{row}, seed {one}")
                    probed = (f.bank, f.test, choice, sets.classes, one, processes)
                    outcomes.append(_probe_once(sweep, *probed))
                    knn.append(vote_on_test(neighbours, *probed))
                frozen.add(row, outcomes, f)
                frozen.rows[row] |= _knn_column(knn)
                if row == "pretrained":
                    frozen.draw(outcomes[0], f.test, tsne)
        recipe = {"sweep": vars(sweep), "neighbours": vars(neighbours)}
        return frozen.keep(recipe | {"pools": pools, "blocks": blocks})


def _knn_column(outcomes: list[Outcome]) -> dict[str, Any]:
    figures = spread([{"knn": o.figures["top1"], "n": o.figures["n"]} for o in outcomes])
    del figures["n"]
    return figures | {"knn_chosen": [outcome.chosen for outcome in outcomes]}


def _probe_once(
    sweep: LinearSweep,
    bank: FeatureFiles,
    test: FeatureFiles,
    choice: Int64[Tensor, "n"],
    classes: int,
    seed: int,
    processes: Processes,
) -> Outcome:
    """Choose the head on parts of the training set, train it on all of it, test it."""
    ranking = _compare(sweep, bank, choice, classes, seed, processes)
    best = ranking[0]
    final = sweep.fit(
        lambda i: bank.rows(choice[i], best.view),
        {best.view: bank.widths[best.view]},
        bank.labels[choice],
        classes,
        seed,
        ((best.lr, best.penalty),),
        processes.device,
    )
    answers = predictions(final, lambda i: test.rows(i, best.view), len(test))
    logits = torch.cat([y[best.view][:, 0].cpu() for _, y in answers])
    confidence, predicted = logits.softmax(1).max(1)
    chosen = {"view": best.view, "lr": best.lr, "penalty": best.penalty}
    chosen |= {"accuracy_choosing": best.accuracy}
    return Outcome(scores(logits, test.labels, classes), predicted, confidence, best.view, chosen)


def _compare(
    sweep: LinearSweep,
    bank: FeatureFiles,
    choice: Int64[Tensor, "n"],
    classes: int,
    seed: int,
    processes: Processes,
) -> list[Head]:
    """All heads, fitted on a part of the training set and ranked on the rest, the best first; on
    several such splits where the rest is small.

    The settings are shared out over the processes; no head knows of another, so the number
    of processes changes nothing.
    """
    folds = folds_for_choosing(bank.labels[choice], sweep.choose_on, seed, sweep.choose_on_samples)
    settings = sweep.settings[processes.rank :: processes.world_size]
    found: list[tuple[int, list[Head]]] = []
    for fit, hold in folds if settings else []:
        fitted, held = choice[fit], choice[hold]
        heads = sweep.fit(
            lambda i, fitted=fitted: bank.rows(fitted[i]),
            bank.widths,
            bank.labels[fitted],
            classes,
            seed,
            settings,
            processes.device,
        )
        ranking = sweep.rank(heads, lambda i, held=held: bank.rows(held[i]), bank.labels[held])
        found.append((len(held), ranking))
    parts = [part for part in processes.all(found) if part]
    # Fold by fold, the heads of all processes.
    ranking = pooled(
        [
            (each[0][0], [head for _, heads in each for head in heads])
            for each in zip(*parts, strict=True)
        ]
    )
    audit(sweep, ranking, len(bank.widths), len(choice), [len(hold) for _, hold in folds])
    return ranking


def audit(
    sweep: LinearSweep, ranking: list[Head], views: int, labelled: int, held: list[int]
) -> None:
    """Print what was applied, and whether the grid was wide enough.

    Args:
        sweep: how the heads were trained.
        ranking: all heads, the best first.
        views: of the features.
        labelled: samples of the training set.
        held: how many of them each fold held out to rank on.
    """
    best, fitted = ranking[0], labelled - held[0]
    batch, steps = sweep.length(fitted)
    lrs, penalties = (", ".join(f"{x:g}" for x in grid) for grid in (sweep.lrs, sweep.penalties))
    folds = f" in {len(held)} folds" if len(held) > 1 else ""
    say(
        f"  heads       {len(ranking)} = {views} views x {len(sweep.lrs)} lrs ({lrs}) x "
        f"{len(sweep.penalties)} penalties ({penalties})\n"
        f"  training    features standardised by {fitted:,} samples, Adam, batch {batch}, "
        f"{steps:,} steps\n              "
        f"({steps / math.ceil(fitted / batch):.4g} epochs), cosine to 0\n"
        f"  chosen      {best.view}, lr {best.lr:g}, penalty {best.penalty:g}: "
        f"{best.accuracy:.4f} on {sum(held):,} training samples held out{folds};\n"
        f"              trained again on all {labelled:,}"
    )
    for edge in sweep.edges(ranking):
        say(f"  WARNING     {edge}")


def probe_parser(parser: Any) -> Any:
    """`probe`: options from its signature, sections data, sweep and neighbours."""
    evaluation_parser(parser, probe, skip={"sweep", "neighbours"})
    parser.add_class_arguments(LinearSweep, "sweep")
    parser.add_class_arguments(NeighbourSweep, "neighbours")
    return parser


def probe_command(argv: list[str]) -> int:
    """The verb `probe`."""
    probe(**parse(probe_parser(make_parser("probe")), argv))
    return 0
