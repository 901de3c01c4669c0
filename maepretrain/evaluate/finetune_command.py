"""The verb `finetune`: one run, or one for each of several seeds and their mean."""

from pathlib import Path
from typing import Any

from maepretrain.evaluate.finetune import finetune, finetune_parser
from maepretrain.evaluate.finetune_results import write_summary
from maepretrain.evaluate.options import add_verbose, details
from maepretrain.evaluate.result_lines import print_finetuned
from maepretrain.parsing.parser import allow_bare_flags, make_parser
from maepretrain.runs.results import read_results
from maepretrain.training.experiment import of_rank, run_experiment


def finetune_command(argv: list[str]) -> int:
    """Run `finetune`; 0 when it came to its end, 130 when it was stopped."""
    parser = _parser()
    allow_bare_flags(parser)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        raise ValueError(f"seeds {arguments.seeds} must be at least 1")
    with details(shown=arguments.verbose):
        if arguments.seeds == 1:
            code = run_experiment(finetune, _parser(), argv)
        else:
            code = _run_seeds(argv, arguments)
    if not code:
        print_finetuned(Path(arguments.run))
    return of_rank(code)


def _parser() -> Any:
    parser = finetune_parser(make_parser("finetune"))
    add_verbose(parser)
    return parser


def _run_seeds(argv: list[str], arguments: Any) -> int:
    """Fine-tune in RUN/seed-N for every seed; a resume goes on after the seeds that are done."""
    results = []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        run = Path(arguments.run) / f"seed-{seed}"
        path = run / "results.json"
        if not (arguments.resume and path.exists()):
            one = [*argv, "--seeds", "1", "--seed", str(seed), "--run", str(run)]
            code = run_experiment(finetune, _parser(), one)
            if code:
                return code
        if path.exists():
            results.append(read_results(path)["finetune"])
    if results:
        write_summary(Path(arguments.run), results)
    return 0
