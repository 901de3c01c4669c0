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
from maepretrain.evaluate.feature_files import FeatureFiles
from maepretrain.evaluate.feature_sets import BlockPool
from maepretrain.evaluate.frozen_features import (
    PRETRAINED,
    FrozenEvaluation,
    Outcome,
    ResultTable,
    results_folder,
)
from maepretrain.evaluate.knn import vote_on_test
from maepretrain.evaluate.labelled_sets import LabelledSets
from maepretrain.evaluate.labels import folds_for_choosing
from maepretrain.evaluate.linear_heads import predictions
from maepretrain.evaluate.linear_sweep import LinearSweep, ScoredHead, mean_over_folds
from maepretrain.evaluate.neighbours import NeighbourSweep
from maepretrain.evaluate.options import add_verbose, details, evaluation_parser
from maepretrain.evaluate.processes import Processes
from maepretrain.evaluate.result_lines import print_frozen
from maepretrain.evaluate.scores import scores, spread
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.ranks import say, say_detail


def probe(
    encoder: str,
    data: ShardData,
    sweep: LinearSweep,
    neighbours: NeighbourSweep,
    out: Path | None = None,
    blocks: list[int] | None = None,
    pools: tuple[BlockPool, ...] = ("mean", "cls", "last4"),
    baselines: bool = False,
    label_fraction: float = 1.0,
    labels_per_class: int | None = None,
    seeds: int = 1,
    seed: int = 0,
    tsne: bool = False,
    batch: int = 256,
    cache: Path | None = None,
) -> ResultTable:
    """Linear probe and k-NN of frozen features. Heads for every feature set and setting are trained
    at once, the best is chosen on held-out shares of the training set, trained again on all of it
    and tested once. Figures go to OUT/results.json, pictures to OUT/pictures.

    Args:
        encoder: a run folder, a file of weights, or timm:NAME.
        data: labelled shards; `val` is the test set. Default those of the run.
        sweep: how heads are trained and chosen.
        neighbours: what k-NN tries.
        out: folder of the results. Default the run folder.
        blocks: whose outputs are feature sets, 0 the first, -1 the last. Default all.
        pools: of the blocks: mean of the patches, class token, and the mean of the last four
            blocks side by side. The encoder's own output is always a feature set.
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
    evaluation = FrozenEvaluation("probe", encoder, data, sets, out=out, cache=cache, batch=batch)
    with Processes() as processes:
        rows = evaluation.feature_sets(
            processes.device, baselines=baselines, pools=pools, blocks=blocks
        )
        for row, feature_sets in rows:
            with evaluation.cached(row, feature_sets, processes) as features:
                linear: list[Outcome] = []
                knn: list[Outcome] = []
                for choice, one in zip(sets.choices, sets.seeds, strict=True):
                    say_detail(f"{row}, seed {one}")
                    probed = (features.bank, features.test, choice, sets.classes, one, processes)
                    linear.append(_probe_once(sweep, *probed, row=row))
                    knn.append(vote_on_test(neighbours, *probed))
                evaluation.add(row, linear, features)
                evaluation.rows[row] |= _knn_columns(knn)
                if row == PRETRAINED:
                    evaluation.draw(linear[0], features.test, tsne=tsne)
        recipe = {"sweep": vars(sweep), "neighbours": vars(neighbours)}
        return evaluation.write(recipe | {"pools": pools, "blocks": blocks})


def _knn_columns(outcomes: list[Outcome]) -> dict[str, Any]:
    """Figures of k-NN in a row of the linear probe."""
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
    row: str,
) -> Outcome:
    """Choose the head on shares of the training set, train it on all of it, test it."""
    best = _rank(sweep, bank, choice, classes, seed, processes, row)[0]
    name = best.feature_set
    final = sweep.fit(
        lambda i: bank.rows(choice[i], name),
        {name: bank.widths[name]},
        bank.labels[choice],
        classes,
        seed,
        settings=((best.lr, best.penalty),),
        device=processes.device,
    )
    chunks = predictions(final, lambda i: test.rows(i, name), len(test))
    logits = torch.cat([chunk[name][:, 0].cpu() for _, chunk in chunks])
    confidence, predicted = logits.softmax(1).max(1)
    chosen = {
        "view": name,
        "lr": best.lr,
        "penalty": best.penalty,
        "accuracy_choosing": best.accuracy,
    }
    figures = scores(logits, test.labels, classes)
    return Outcome(figures, predicted, confidence, name, chosen)


def _rank(
    sweep: LinearSweep,
    bank: FeatureFiles,
    choice: Int64[Tensor, "n"],
    classes: int,
    seed: int,
    processes: Processes,
    row: str,
) -> list[ScoredHead]:
    """All heads, fitted on a part of the training set and ranked on the rest, the best first; on
    several such splits where the rest is small.

    The settings are shared out over the processes; no head knows of another, so the number
    of processes changes nothing.
    """
    folds = folds_for_choosing(bank.labels[choice], sweep.choose_on, seed, sweep.choose_on_samples)
    settings = sweep.settings[processes.rank :: processes.world_size]
    scored: list[tuple[int, list[ScoredHead]]] = []
    for number, (fit, hold) in enumerate(folds if settings else [], start=1):
        fitted = choice[fit]
        held_out = choice[hold]
        heads = sweep.fit(
            lambda i, fitted=fitted: bank.rows(fitted[i]),
            bank.widths,
            bank.labels[fitted],
            classes,
            seed,
            settings=settings,
            device=processes.device,
            task=f"{row}: linear heads, split {number} of {len(folds)}",
        )
        rows = lambda i, held_out=held_out: bank.rows(held_out[i])  # noqa: E731
        scored.append((len(held_out), sweep.rank(heads, rows, bank.labels[held_out])))
    ranking = mean_over_folds(_joined(processes.all(scored)))
    audit(
        sweep,
        ranking,
        feature_sets=len(bank.widths),
        labelled=len(choice),
        held_out=[len(hold) for _, hold in folds],
        row=row,
    )
    return ranking


def _joined(
    of_ranks: list[list[tuple[int, list[ScoredHead]]]],
) -> list[tuple[int, list[ScoredHead]]]:
    """Fold by fold, the heads of all processes; a process without settings has no folds."""
    joined = []
    for fold in zip(*[scored for scored in of_ranks if scored], strict=True):
        heads = [head for _, of_rank in fold for head in of_rank]
        joined.append((fold[0][0], heads))
    return joined


def audit(
    sweep: LinearSweep,
    ranking: list[ScoredHead],
    *,
    feature_sets: int,
    labelled: int,
    held_out: list[int],
    row: str,
) -> None:
    """Print the settings that were applied, and warn where the grid was too narrow.

    Args:
        sweep: how the heads were trained.
        ranking: all heads, the best first.
        feature_sets: how many there are.
        labelled: samples of the training set.
        held_out: samples that each fold held out to rank on.
        row: of the table, named in warnings.
    """
    best = ranking[0]
    fitted = labelled - held_out[0]
    batch, steps = sweep.length(fitted)
    epochs = steps / math.ceil(fitted / batch)
    lrs = ", ".join(f"{lr:g}" for lr in sweep.lrs)
    penalties = ", ".join(f"{penalty:g}" for penalty in sweep.penalties)
    folds = f" in {len(held_out)} folds" if len(held_out) > 1 else ""
    say_detail(
        f"  heads       {len(ranking)} = {feature_sets} feature sets x {len(sweep.lrs)} lrs "
        f"({lrs}) x {len(sweep.penalties)} penalties ({penalties})\n"
        f"  training    features standardised by {fitted:,} samples, Adam, batch {batch}, "
        f"{steps:,} steps\n"
        f"              ({epochs:.4g} epochs), cosine to 0\n"
        f"  chosen      {best.feature_set}, lr {best.lr:g}, penalty {best.penalty:g}: "
        f"{best.accuracy:.4f} on {sum(held_out):,} training samples held out{folds};\n"
        f"              trained again on all {labelled:,}"
    )
    for edge in sweep.edges(ranking):
        say(f"  WARNING     {edge} ({row})")


def probe_parser(parser: Any) -> Any:
    """`probe`: options from its signature, sections data, sweep and neighbours."""
    evaluation_parser(parser, probe, skip={"sweep", "neighbours"})
    parser.add_class_arguments(LinearSweep, "sweep")
    parser.add_class_arguments(NeighbourSweep, "neighbours")
    return parser


def probe_command(argv: list[str]) -> int:
    """The verb `probe`."""
    parser = probe_parser(make_parser("probe"))
    add_verbose(parser)
    arguments = parse(parser, argv)
    with details(shown=arguments.pop("verbose")):
        probe(**arguments)
    print_frozen(results_folder(arguments["encoder"], arguments["out"]), "probe")
    return 0
