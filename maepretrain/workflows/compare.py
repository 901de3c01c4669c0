"""The verb `compare`: several models on the same data, each trained for the same CPU seconds, then
judged alike: reconstruction, linear probe, k-NN, fine-tuning on few labels.

A run that has its figures is not made again: the command can be stopped at any time, called again,
and called with more configs later. Longer than other modules: the verb's parser, its budget, the
stages and the table belong to one loop.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.module import ShardData, shard_data
from maepretrain.data.normalise import Normalise
from maepretrain.data.settings import without
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.finetune import finetune, finetune_parser
from maepretrain.evaluate.frozen_features import PRETRAINED
from maepretrain.evaluate.options import TRAINING_ONLY
from maepretrain.evaluate.probe import probe, probe_parser
from maepretrain.evaluate.scores import spread
from maepretrain.files import replacing
from maepretrain.parsing.configs import config_words, find_config
from maepretrain.parsing.errors import UserError
from maepretrain.parsing.parser import allow_bare_flags, make_parser, parse
from maepretrain.plots.images import reconstruction_grid
from maepretrain.ranks import details_to, quiet_lightning, say
from maepretrain.runs.results import write_results
from maepretrain.runs.tables import print_columns
from maepretrain.training.experiment import run_experiment
from maepretrain.workflows.pretrain import pretrain, pretrain_parser

# Steps of the short runs by whose difference the cost of a step is known: the first two, and where
# they differ by less than CALIBRATED CPU seconds, the first and the last.
CALIBRATION = (10, 60, 1010)
CALIBRATED = 3.0
WARMUP = 0.1
PICTURES = 10
# Options that go to every pretraining (--data.train and the like), and to every probe.
OF_PRETRAINING = ("--data.", "--optim.", "--model.", "--trainer.")
OF_PROBE = ("--sweep.", "--neighbours.")
COMPARED = {
    "error": "reconstruction",
    "probe": "probe",
    "knn": "k-NN",
    "finetune": "fine-tuned",
    "parameters": "parameters",
    "images": "images seen",
    "cpu_seconds": "CPU s",
    "minutes": "min",
}


@dataclass(frozen=True)
class Budget:
    """Budget of a pretraining: CPU seconds, or a number of steps where it is set."""

    cpu_seconds: float
    steps: int | None = None

    @property
    def number(self) -> float:
        """Steps where they are set, else CPU seconds."""
        return self.cpu_seconds if self.steps is None else float(self.steps)

    def __str__(self) -> str:
        if self.steps is None:
            return f"{self.cpu_seconds:g} CPU seconds of pretraining each"
        return f"{self.steps} steps of pretraining each"


def compare(
    configs: list[str],
    out: Path,
    cpu_seconds: float = 120.0,
    steps: int | None = None,
    seeds: int = 3,
    seed: int = 0,
    finetuning: list[str] | None = None,
    options: list[str] | None = None,
    probe_options: list[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Train each config for the same CPU seconds, and print one table of the results.

    The number of steps is chosen beforehand, from the CPU time that a step takes here (decoding
    included), so that the learning rate's schedule ends with the budget; warm-up takes at most a
    tenth of it.

    Args:
        configs: of `pretrain`, files or names of shipped ones. Several that make one run, and
            options of it, are joined by `+`: data/digits+recipe/mae_digits+seed=1.
        out: folder of the runs, OUT/NAME/seed-N, of results.json and of the picture.
        cpu_seconds: budget of each pretraining.
        steps: of each pretraining, in the place of the budget.
        seeds: runs of each config.
        seed: the first of them.
        finetuning: configs of `finetune`, by which every encoder is fine-tuned on labels. Default
            none: the column stays empty.
        options: for every pretraining: `--data.train PATTERN` and the like.
        probe_options: for every probe: `--sweep.epochs 5` and the like.

    Returns:
        The figures of each config: mean, and `NAME_std` over the seeds.

    Raises:
        ValueError: a budget that is too small for one step, or another than that of the runs which
            the folder holds.
    """
    named = {name_of(config): words_of(config) for config in configs}
    if len(named) < len(configs):
        raise UserError("two configs of the same name: their runs would share a folder")
    if seeds < 1 or cpu_seconds <= 0 or (steps is not None and steps < 1):
        raise ValueError(
            f"seeds {seeds} and steps {steps} must be at least 1, cpu_seconds {cpu_seconds} above 0"
        )
    budget = Budget(cpu_seconds, steps)
    rows: dict[str, dict[str, Any]] = {}
    out.mkdir(parents=True, exist_ok=True)
    for name, words in named.items():
        figures = []
        for one in range(seed, seed + seeds):
            run = out / name / f"seed-{one}"
            pretraining = [*words, *(options or []), "--seed", str(one)]
            say(f"{name}, seed {one}: {run}")
            with details_to(out / "log.txt"):
                figures.append(
                    _judged_run(run, pretraining, budget, finetuning or [], probe_options or [])
                )
        rows[name] = spread([{"n": 1.0} | figure for figure in figures])
        write_results(out, "compare", {"rows": rows, "seeds": seeds} | vars(budget))
    first_runs = {name: out / name / f"seed-{seed}" for name in named}
    _draw(first_runs, out / "reconstructions.png")
    print_comparison(rows, budget)
    print(f"results in {out / 'results.json'}, pictures in {out / 'reconstructions.png'}")
    return rows


def words_of(config: str) -> list[str]:
    """Configs and options joined by `+` as words of the command line.

    Raises:
        UserError: a config that does not exist.
    """
    words = config_words(config)
    for option, value in pairwise(words):
        if option == "-c":
            find_config(value)
    return words


def name_of(config: str) -> str:
    """The folder of a config's runs: its parts without the data set and without folders."""
    if Path(config).is_file():
        return Path(config).stem
    parts = [part for part in config.split("+") if not part.startswith("data/")]
    return "+".join(part.replace("/", "_") if "=" in part else Path(part).stem for part in parts)


def _judged_run(
    run: Path, pretraining: list[str], budget: Budget, finetuning: list[str], probing: list[str]
) -> dict[str, float]:
    """Train and judge one run; each stage is skipped where its figures are in RUN/compare.json.

    Args:
        run: the run folder.
        pretraining: options of `pretrain`; the last one is the seed.
        budget: of the pretraining.
        finetuning: configs of `finetune`.
        probing: options of `probe`.

    Returns:
        The figures.
    """
    saved = run / "compare.json"
    figures: dict[str, float] = json.loads(saved.read_text()) if saved.exists() else {}
    if "cpu_seconds" not in figures:
        figures = _train(run, pretraining, budget) | {"budget": budget.number}
        _save(saved, figures)
    if figures["budget"] != budget.number:
        raise ValueError(
            f"{run} was trained for another budget, {figures['budget']:g} and not "
            f"{budget.number:g}: take another --out, or the same budget"
        )
    if "error" not in figures:
        figures |= _reconstruct(run)
        _save(saved, figures)
    if "probe" not in figures:
        row = _probe(run, probing)
        figures |= {"probe": row["top1"], "knn": row["knn"]}
        _save(saved, figures)
    if finetuning and "finetune" not in figures:
        figures["finetune"] = _finetune(run, finetuning, pretraining[-1])
        _save(saved, figures)
    return figures


def _save(path: Path, figures: dict[str, float]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(figures, indent=1).encode() + b"\n")


def _train(run: Path, pretraining: list[str], budget: Budget) -> dict[str, float]:
    """Pretrain within the budget, decoding in this process so that its CPU time is all there is."""
    options = [*pretraining, "--data.num_workers", "0", "--trainer.limit_val_batches", "0"]
    data, warmup_epochs = _parsed(options, run)
    steps = budget.steps or _steps_within(budget.cpu_seconds, options)
    warmup = min(warmup_epochs, WARMUP * steps / data.order.steps_per_epoch)
    length = ["--trainer.max_steps", str(steps), "--optim.warmup_epochs", str(warmup)]
    began = time.perf_counter()
    cpu_before = time.process_time()
    _pretrain([*options, *length, "--run", str(run), "--overwrite"])
    return {
        "cpu_seconds": time.process_time() - cpu_before,
        "minutes": (time.perf_counter() - began) / 60,
        "steps": float(steps),
        "images": float(steps * data.global_batch),
        "parameters": float(sum(p.numel() for p in load_encoder(str(run)).parameters())),
    }


def _parsed(options: list[str], run: Path) -> tuple[ShardData, float]:
    """The data of a pretraining, and its epochs of warm-up."""
    parser = pretrain_parser(make_parser("compare"))
    allow_bare_flags(parser)
    config = parser.parse_args([*options, "--run", str(run)])
    return shard_data(config.data.as_dict()), config.optim.warmup_epochs


def _pretrain(options: list[str]) -> None:
    parser = pretrain_parser(make_parser("pretrain"))
    if run_experiment(pretrain, parser, [*options, "--pictures", "0", "--live_probe", "0"]):
        raise KeyboardInterrupt  # it was stopped, and has said so


def _steps_within(cpu_seconds: float, options: list[str]) -> int:
    """Number of steps that the budget is enough for.

    The cost of a step is the difference of two short runs, which leaves start-up out.
    """
    few, some, many = CALIBRATION
    _cpu_seconds(options, few)  # the first one loads and compiles things
    start_up = _cpu_seconds(options, few)
    spent = _cpu_seconds(options, some) - start_up
    steps = some - few
    if spent < CALIBRATED:
        spent = _cpu_seconds(options, many) - start_up
        steps = many - few
    if not 0 < spent / steps <= cpu_seconds:
        raise ValueError(
            f"a step takes {spent / steps:.3g} CPU seconds: set cpu_seconds {cpu_seconds:g} higher"
        )
    return int(cpu_seconds * steps / spent)


def _cpu_seconds(options: list[str], steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        _pretrain([*options, "--trainer.max_steps", str(steps), "--run", f"{folder}/run"])
        return time.process_time() - began


def _evaluation_data(run: Path) -> ShardData:
    """The run's data as an evaluation reads them: every sample once."""
    parser = pretrain_parser(make_parser("compare"))
    config = parser.parse_path(str(run / "config.yaml"))
    known = without(config.data.as_dict(), TRAINING_ONLY)
    return shard_data(known | {"global_batch": 1})


@torch.no_grad()
def _reconstruct(run: Path) -> dict[str, float]:
    """Mean squared error of the reconstructions of held-out inputs, in pixel values of 0..1."""
    data = _evaluation_data(run)
    if data.val_index is None:
        raise ValueError("there are no held-out shards to reconstruct: set --data.val")
    model, normalise = load_encoder(str(run)).eval(), Normalise(data.mean, data.std)

    def errors(images: Tensor) -> Float[Tensor, "b 1"]:
        pictures = cast(Any, model).reconstruct(normalise(images))
        reconstruction = normalise.undo(pictures.reconstruction.float())
        gap = reconstruction - normalise.undo(pictures.original.float())
        return gap.square().flatten(1).mean(1, keepdim=True)

    error, _ = embed(errors, data.evaluation(data.val_index))
    return {"error": float(error.double().mean())}


def _probe(run: Path, options: list[str]) -> dict[str, Any]:
    """Figures of the linear probe and of k-NN."""
    parser = probe_parser(make_parser("probe"))
    return probe(**parse(parser, ["--encoder", str(run), *options]))[PRETRAINED]


def _finetune(run: Path, configs: list[str], seed: str) -> float:
    """Accuracy after fine-tuning; the inputs are normalised as the encoder knows them."""
    folder = run / "finetune"
    data = _evaluation_data(run)
    options = []
    for config in configs:
        options += ["-c", config]
    options += [f"--data.mean={list(data.mean)}", f"--data.std={list(data.std)}"]
    options += ["--data.num_workers=0"]
    options += ["--encoder", str(run), "--run", str(folder), "--seed", seed, "--overwrite"]
    if run_experiment(finetune, finetune_parser(make_parser("finetune")), options):
        raise KeyboardInterrupt
    return json.loads((folder / "results.json").read_text())["finetune"]["top1"]


@torch.no_grad()
def _draw(runs: dict[str, Path], path: Path) -> None:
    """The same held-out inputs as each model reconstructs them, a row each."""
    rows: dict[str, Tensor] = {}
    for name, run in runs.items():
        data = _evaluation_data(run)
        assert data.val_index is not None
        model, normalise = load_encoder(str(run)).eval(), Normalise(data.mean, data.std)
        numbers = list(range(min(PICTURES, len(data.val_index))))
        images = data.evaluation(data.val_index).__getitems__(numbers)["input"]
        pictures = cast(Any, model).reconstruct(normalise(images))
        rows.setdefault("original", normalise.undo(pictures.original.float()))
        rows[name] = normalise.undo(pictures.reconstruction.float())
    if len({row.shape for row in rows.values()}) == 1:  # configs may differ in their image size
        reconstruction_grid(list(rows.values()), list(rows), path)


def print_comparison(rows: dict[str, dict[str, Any]], budget: Budget) -> None:
    """Print the table for people.

    Args:
        rows: figures of each config, as `compare` returns them.
        budget: of each pretraining.
    """
    print(f"{budget}; mean ± spread over seeds")
    print_columns("config", COMPARED, rows, _cell)


def _cell(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    if key in ("parameters", "images", "cpu_seconds"):
        return f"{row[key]:,.0f}"
    if key == "minutes":
        return f"{row[key]:.1f}"
    digits = 5 if key == "error" else 4
    mean = f"{row[key]:.{digits}f}"
    std = row.get(f"{key}_std")
    return mean if std is None else f"{mean} ± {std:.{digits}f}"


def compare_command(argv: list[str]) -> int:
    """The verb `compare`; `--data.…`, `--optim.…`, `--model.…` and `--trainer.…` go to every
    pretraining, `--sweep.…` and `--neighbours.…` to every probe."""
    own, pretraining, probing = _split_options(argv)
    parser = make_parser("compare", config=False)
    parser.add_argument("-c", "--configs", nargs="+", type=str, required=True, help="of `pretrain`")
    parser.add_function_arguments(compare, skip={"configs", "options", "probe_options"})
    quiet_lightning()
    arguments = parser.parse_args(own).as_dict()
    compare(**arguments, options=pretraining, probe_options=probing)
    return 0


def _split_options(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Words for `compare` itself, for each pretraining, for each probe; values follow options."""
    own: list[str] = []
    pretraining: list[str] = []
    probing: list[str] = []
    target = own
    for word in argv:
        if word.startswith(OF_PRETRAINING):
            target = pretraining
        elif word.startswith(OF_PROBE):
            target = probing
        elif word.startswith("-"):
            target = own
        target.append(word)
    return own, pretraining, probing
