"""Settings of runs: their configuration, what they applied, the versions that computed, and the
commands that make them again."""

import shlex

from maepretrain.data.errors import printable
from maepretrain.report.document import Code, Element, Table, Text, printable_lines
from maepretrain.report.evaluations import result_rows
from maepretrain.report.records import Record, names_of
from maepretrain.runs.configuration import flat


def applied(records: list[Record]) -> list[Element]:
    """Lines that each run printed before its first step."""
    known = [record for record in records if record.applied]
    elements: list[Element] = []
    if known:
        rows = []
        for name in dict.fromkeys(name for record in known for name in record.applied):
            cells = [printable_lines(record.applied.get(name, "")) for record in known]
            rows.append([name, *cells])
        elements.append(Table(["", *names_of(known)], rows))
    for record in records:
        if not record.applied:
            line = f"{record.name} left no record of what it applied: an older maepretrain."
            elements.append(Text(printable(line)))
    return elements


def differences(records: list[Record]) -> list[Element]:
    """The values in which the configurations differ."""
    configs = [flat(record.config) for record in records]
    rows = []
    for key in sorted({key for config in configs for key in config}):
        values = [str(config.get(key, "")) for config in configs]
        if len(set(values)) > 1 and key != "run":
            rows.append([printable(key), *map(printable, values)])
    if not rows:
        return [Text("The configurations are equal but for the run folder.")]
    return [Table(["differs in", *names_of(records)], rows)]


def configuration(record: Record) -> Code:
    """The resolved configuration."""
    text = (record.path / "config.yaml").read_text().strip()
    title = printable(f"{record.name}/config.yaml")
    return Code(title, printable_lines(text), long=True, language="yaml")


def configurations(records: list[Record]) -> list[Element]:
    """All configurations, after the values in which they differ."""
    elements: list[Element] = differences(records) if len(records) > 1 else []
    return [*elements, *(configuration(record) for record in records)]


def environment(records: list[Record]) -> list[Element]:
    """Versions of the packages, the system and the device."""
    known = [record for record in records if record.versions]
    elements: list[Element] = []
    if known:
        rows = []
        for name in dict.fromkeys(name for record in known for name in record.versions):
            cells = [printable(str(record.versions.get(name, ""))) for record in known]
            rows.append([printable(name), *cells])
        elements.append(Table(["", *names_of(known)], rows))
    lines = [
        f"{record.name}: earlier starts had other versions."
        for record in known
        if _had_other_versions(record)
    ]
    lines += [
        f"{record.name} left no record of its environment: an older maepretrain."
        for record in records
        if not record.versions
    ]
    return [*elements, *(Text(printable(line)) for line in lines)]


def _had_other_versions(record: Record) -> bool:
    return any(start.get("versions") != record.versions for start in record.starts)


def reproduce(records: list[Record]) -> list[Element]:
    """The commands that make the runs and their figures again."""
    elements: list[Element] = []
    for record in records:
        lines = [*_as_started(record), *_train_again(record)]
        evaluated = [_evaluate_again(record, evaluator) for evaluator in ("probe", "knn")]
        if any(evaluated):
            lines += ["", "# its figures", *filter(None, evaluated)]
        text = printable_lines("\n".join(lines))
        elements.append(Code(printable(record.name), text, language="shell"))
    return elements


def _as_started(record: Record) -> list[str]:
    if not record.starts or "command" not in record.starts[0]:
        return []
    start = record.starts[0]
    folder = shlex.join(["cd", str(start.get("folder", "."))])
    return ["# as it was started", folder, str(start["command"]), ""]


def _train_again(record: Record) -> list[str]:
    words = ["maepretrain", record.verb, "-c", str(record.path / "config.yaml")]
    words += ["--run", f"{record.path}-again"]
    for flag in ("resume", "overwrite"):
        if record.config.get(flag):
            words += [f"--{flag}", "false"]
    return ["# the same from its resolved configuration, in a new folder", shlex.join(words)]


def _evaluate_again(record: Record, evaluator: str) -> str:
    """The command of an evaluation with the options in its result; empty where there is none."""
    result = record.results.get(evaluator)
    if not isinstance(result, dict):
        return ""
    words = ["maepretrain", evaluator, "--encoder", str(record.path)]
    if len(result_rows(result)) > 1:
        words.append("--baselines")
    data = result.get("data") or {}
    for name in ("label_fraction", "labels_per_class"):
        if data.get(name) not in (None, 1.0):
            words += [f"--{name}", str(data[name])]
    seeds = result.get("seeds")
    if isinstance(seeds, list) and seeds and seeds != [0]:
        words += ["--seeds", str(len(seeds)), "--seed", str(seeds[0])]
    return shlex.join(words)
