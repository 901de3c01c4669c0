"""The verb `report`: one HTML page of one or several runs, side by side, from their folders alone.

Nothing on the page runs or is fetched: pictures lie in it, it has no script, and its
Content-Security-Policy allows none. A section says in one line what a folder lacks.
"""

import shlex
import time
from pathlib import Path

import jinja2

from maepretrain import __version__
from maepretrain.data.errors import printable
from maepretrain.files import replacing
from maepretrain.report.document import Section, counted
from maepretrain.report.overview import sentence
from maepretrain.report.records import Record, names_of, read_run, runs_below, utc
from maepretrain.report.sections import sections


def report(runs: list[Path], out: Path = Path("report.html"), map_images: int = 2000) -> int:
    """Write one HTML page of runs, for a browser without network. Pretraining or fine-tuning,
    running, stopped, failed or done.

    Args:
        runs: run folders; a folder of several seeds stands for its runs.
        out: the page; an older one is replaced.
        map_images: held-out images of a map of the features (PCA and t-SNE), which is computed
            where no evaluation left one and the shards lie on a disk here; 0 for none.

    Returns:
        0.

    Raises:
        ValueError: a folder that holds no run, a damaged file in it, a page that cannot be written.
    """
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out} must end in .html")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if map_images < 0:
        raise ValueError(f"map_images {map_images} must be at least 0")
    records = [read_run(path) for path in runs_below(runs)]
    page = render(records, sections(records, runs, map_images), out)
    with replacing(out) as file:
        file.write(page.encode())
    print(f"{out}  {len(page) / 1e6:.1f} MB, {counted(len(records), 'run')}")
    return 0


def render(records: list[Record], contents: list[Section], out: Path) -> str:
    """The page.

    Args:
        records: the runs.
        contents: its sections.
        out: where it will lie, for the command in its last line.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [record.name for record in records]
    command = shlex.join(["maepretrain", "report", *names, "--out", str(out)])
    sentences = [sentence(record) for record in records]
    return environment.get_template("page.html").render(
        title=", ".join(names_of(records)),
        leads=list(zip(names_of(records), sentences, strict=True)),
        sections=contents,
        written=utc(time.time()),
        version=__version__,
        command=printable(command),
    )
