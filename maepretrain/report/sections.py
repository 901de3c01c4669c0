"""The sections of a page about runs, in its order. A new section is a function of the runs that
returns elements (document.py), and one line here."""

from collections.abc import Sequence
from pathlib import Path

from maepretrain.report.curves import curves
from maepretrain.report.document import Section
from maepretrain.report.evaluations import evaluations
from maepretrain.report.history import errors, starts
from maepretrain.report.maps import maps
from maepretrain.report.overview import summary
from maepretrain.report.pictures import confusions, reconstructions
from maepretrain.report.records import Record
from maepretrain.report.settings import applied, configurations, environment, reproduce


def sections(
    records: list[Record], folders: Sequence[Path] = (), map_images: int = 0
) -> list[Section]:
    """All sections of a page.

    Args:
        records: the runs, shown side by side.
        folders: that may hold mean results over several runs.
        map_images: held-out images of a map of the features; 0 computes none.
    """
    return [
        Section("summary", "What was trained on what", [summary(records)]),
        Section("curves", "Curves", curves(records)),
        Section("reconstructions", "Reconstructions over training", reconstructions(records)),
        Section("evaluations", "Evaluations", evaluations(records, folders)),
        Section("confusion", "Confusions", confusions(records)),
        Section("map", "Maps of the features", maps(records, map_images)),
        Section("starts", "Starts, restarts and preemptions", starts(records)),
        Section("errors", "Errors in the data", errors(records)),
        Section("applied", "What was really applied", applied(records)),
        Section("config", "Configuration", configurations(records)),
        Section("environment", "Environment and versions", environment(records)),
        Section("reproduce", "Commands to reproduce", reproduce(records)),
    ]
