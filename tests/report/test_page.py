"""The page of `report`: what it says of runs of every kind, that names cannot run on it, and how
Chromium shows it."""

import base64
import csv
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import aiohttp
import pytest
import torch
from PIL import Image
from support.runs import TINY

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.plots.curves import COLOURS, CURVE_POINTS, Line, curve_panel
from maepretrain.report.document import markdown
from maepretrain.report.evaluations import evaluations
from maepretrain.report.maps import features_of
from maepretrain.report.page import report
from maepretrain.report.records import read_metrics, read_run
from maepretrain.runs.results import write_results

Run = Callable[..., int]
CHROMIUM = shutil.which("chromium")
EVIL = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


class Page(HTMLParser):
    """Texts of cells, lines and headings, pictures, and ids and links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.in_cell = False
        self.html = path.read_text()
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        if tag == "img":
            self.images.append(found)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.words.append(" ")
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if "style" in self.tags[-1:]:
            return
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


def bare_run(folder: Path, **files: str) -> Path:
    """A run as an older maepretrain left it: without starts, results and pictures."""
    folder.mkdir(parents=True)
    files = {"config": "model:\n  class_path: a.b.Old\ndata:\n  train: a.tar\n"} | files
    (folder / "config.yaml").write_text(files.pop("config"))
    for name, text in files.items():
        path = folder / f"{name}.{'json' if name in ('status', 'results', 'starts') else 'csv'}"
        path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretraining that was stopped, went on and was probed, and a fine-tuning of it."""
    from maepretrain.cli.main import main

    patch = pytest.MonkeyPatch()
    patch.setattr("sys.argv", ["maepretrain", "pretrain", "--run", "my run"])
    folder = tmp_path_factory.mktemp("runs")
    data = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    pretrained, tuned = folder / "pretrained", folder / "tuned"
    argv = [
        "pretrain",
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        *data,
        "--run",
        pretrained,
        *TINY,
    ]
    argv += ["--trainer.check_val_every_n_epoch", 1, "--trainer.max_steps"]
    sweep = ["--sweep.min_steps", 9, "--sweep.choose_on_samples", 1, "--sweep.lrs", "[0.1]"]
    finetune = [*data, "--data.image_size", 16, "--data.global_batch", 24, "--run", tuned]
    finetune += ["--data.num_workers", 0, "--trainer.max_epochs", 2]
    for command in (
        [*argv, 6],
        [*argv, 12, "--resume"],
        ["probe", "--encoder", pretrained, "--seeds", 2, *sweep],
        [
            "finetune",
            "-c",
            "data/fashion_mnist",
            "-c",
            "eval/finetune_small",
            "--encoder",
            pretrained,
            *finetune,
        ],
    ):
        assert main([str(word) for word in command]) == 0
    patch.undo()
    return {"pretrained": pretrained, "tuned": tuned}


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs side by side."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report(list(runs.values()), path) == 0
    return path


def test_a_page_tells_what_the_folders_hold(page: Path, runs: dict[str, Path]) -> None:
    shown, run = Page(page), runs["pretrained"]
    rows = {row[0]: row[1:] for row in shown.rows}
    assert rows["State"] == ["done", "done"]
    assert rows["Step"][0] == "12/12" and rows["Epoch"][0] == "2.0"
    assert rows["Trained on"][0].startswith("150 samples in 4 shards")
    assert rows["optimizer"][0].startswith("adamw\n") and "tensors" in rows["optimizer"][1]
    assert rows["torch"] == [torch.__version__.partition("+")[0]] * 2
    assert rows["classifier"][1].startswith("10 classes, 150 labelled images")
    result = json.loads((run / "results.json").read_text())["probe"]["rows"]["pretrained"]
    told = rows[f"{run}: pretrained"]
    assert told[0] == f"{result['top1']:.4f} ± {result['top1_std']:.4f}"
    assert next(row for row in shown.rows if row[:2] == [str(run), "2"])[3] == "6"
    assert "maepretrain pretrain --run 'my run'" in shown.text
    assert f"maepretrain pretrain -c {run}/config.yaml --run {run}-again --resume false" in (
        shown.text
    )
    assert f"maepretrain probe --encoder {run} --seeds 2 --seed 0" in shown.text
    assert "No sample" in shown.text and "every loss was finite" in shown.text


def test_a_page_needs_nothing_else(page: Path) -> None:
    shown = Page(page)
    assert {"script", "iframe", "object", "embed"}.isdisjoint(shown.tags)
    assert all(image["src"].startswith("data:image/") for image in shown.images)
    assert all(len(image["alt"].split()) > 4 for image in shown.images)
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", shown.html)
    assert "url(" not in shown.html and "default-src 'none'" in shown.html
    assert {link.removeprefix("#") for link in shown.links} <= set(shown.ids)
    assert len(shown.ids) == len(set(shown.ids))


def test_pictures_are_those_of_the_folder_and_maps_are_computed(
    page: Path, runs: dict[str, Path]
) -> None:
    images = {image["alt"]: image["src"] for image in Page(page).images}
    name = str(runs["pretrained"])

    def data(start: str) -> bytes:
        found = next(uri for alt, uri in images.items() if alt.startswith(start))
        return base64.b64decode(found.partition("base64,")[2])

    grid = runs["pretrained"] / "pictures/step-00000006.png"
    assert data(f"Reconstructions of held-out images by {name} after step 6") == grid.read_bytes()
    drawn = runs["pretrained"] / "pictures/probe-confusion.png"
    assert data(f"Linear probe of {name}: confusion") == drawn.read_bytes()
    drawn = runs["tuned"] / "pictures/finetune-confusion.png"
    assert data(f"Fine-tuning of {runs['tuned']}: confusion") == drawn.read_bytes()
    maps = [alt for alt in images if alt.startswith("Map of")]
    # PCA of the probe; t-SNE of it, and both of the fine-tuned encoder, are the report's.
    assert len(maps) == 4 and sum("50 held-out images" in alt for alt in maps) == 3
    for alt in maps:
        picture = Image.open(BytesIO(base64.b64decode(images[alt].partition("base64,")[2])))
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def test_features_of_a_map_are_the_encoders(runs: dict[str, Path], shards: Path) -> None:
    from maepretrain.evaluate.options import evaluation_parser
    from maepretrain.parsing.parser import make_parser, parse

    run = str(runs["pretrained"])
    parser = evaluation_parser(make_parser("report", config=False), features_of)
    arguments = parse(parser, ["--encoder", run, "--images", "20"])
    features, labels = features_of(**arguments)
    data, model = arguments["data"], load_encoder(run)
    numbers = list(range(0, 50, 3))
    read = data.evaluation(data.val_index, labelled=True).__getitems__(numbers)
    pixels = (read["input"].float() / 255 - 0.305) / 0.376
    with torch.no_grad():
        truth: Any = model.eval().encode(pixels)  # type: ignore[operator]
    assert torch.equal(labels, read["label"])
    torch.testing.assert_close(features, truth, rtol=0, atol=1e-5)


def test_curves_are_those_of_the_metrics(runs: dict[str, Path]) -> None:
    with (runs["pretrained"] / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = read_metrics(runs["pretrained"] / "metrics.csv")
    assert found["loss"] == [(int(r["step"]) + 1, float(r["loss"])) for r in rows if r["loss"]]
    assert [step for step, _ in found["val_loss"]] == [6, 12]
    assert len(found["grad_norm"]) == 12


def test_tensorboard_shows_the_same_scalars_and_pictures(runs: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for run, pictures in (
        ("pretrained", {"reconstruction": {6: "step-00000006", 12: "step-00000012"}}),
        ("tuned", {"finetune-confusion": {12: "finetune-confusion"}}),
    ):
        events = EventAccumulator(str(runs[run]), size_guidance={"scalars": 0, "images": 0})
        events.Reload()
        metrics = read_metrics(runs[run] / "metrics.csv")
        assert set(metrics) <= set(events.Tags()["scalars"]) and "grad_norm" in metrics
        for name, values in metrics.items():
            shown = {event.step + 1: event.value for event in events.Scalars(name)}
            assert shown == pytest.approx(dict(values), rel=1e-5), name
        for name, files in pictures.items():
            images = events.Images(name)
            assert [event.step + 1 for event in images] == [*files]
            for event, file in zip(images, files.values(), strict=True):
                drawn = Image.open(runs[run] / "pictures" / f"{file}.png").convert("RGB")
                live = Image.open(BytesIO(event.encoded_image_string))
                assert live.tobytes() == drawn.tobytes()


def points(svg: bytes, colour: str) -> list[tuple[float, float]]:
    """Where a curve of this colour goes, from SVG's own path."""
    tree = ElementTree.fromstring(svg)
    path = next(
        p for p in tree.iter("{http://www.w3.org/2000/svg}path") if colour in p.get("style", "")
    )
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]


def test_a_panel_draws_its_values_to_scale() -> None:
    steps = [1, 11, 21, 31]
    drawn = points(
        curve_panel(
            [Line(steps, [1.0, 3.0, float("nan"), 2.0], COLOURS[0])], [(11, "gray")], log=True
        ),
        COLOURS[0],
    )
    (x1, y1), (x2, y2), (x4, y4) = drawn
    assert (x4 - x1) / (x2 - x1) == pytest.approx(3, rel=1e-4)
    assert (y4 - y1) / (y2 - y1) == pytest.approx(0.5, rel=1e-4)
    wide = curve_panel([Line(steps, [1.0, 10.0, 100.0, 1000.0], COLOURS[0])], [], log=True)
    ys = [y for _, y in points(wide, COLOURS[0])]
    assert ys[1] - ys[0] == pytest.approx(ys[3] - ys[2], rel=1e-4)  # logarithmic
    many = [*range(10 * CURVE_POINTS)]
    long = curve_panel([Line(many, [float(s) for s in many], COLOURS[1])], [], log=False)
    assert len(points(long, COLOURS[1])) <= CURVE_POINTS
    assert b"currentColor" in long and b"prefers-color-scheme" in long


@pytest.mark.parametrize("state", ["running", "preempted", "stopped", "failed", "done"])
def test_every_state_and_an_old_folder(tmp_path: Path, state: str) -> None:
    status = json.dumps({"state": state, "starts": 3, "steps": 20, "steps_per_epoch": 5})
    run = bare_run(tmp_path / "run", status=status, metrics="loss,step\n0.5,4\n0.2,9\n0.3")
    assert report([run], tmp_path / "report.html") == 0
    shown = Page(tmp_path / "report.html")
    assert ["State", state] in shown.rows and ["Step", "10/20"] in shown.rows
    for line in (
        f"{run}: {state}, started 3 times; its folder has no list of starts.",
        f"{run}: no map by PCA and t-SNE, there are no held-out shards.",
        "No reconstructions yet",
        "No evaluation yet",
        "left no record of its environment",
    ):
        assert line in shown.text, line
    assert [image["alt"] for image in shown.images] == [
        f"Loss by step: {run}, training: 0.5 at step 5, 0.2 at step 10, between 0.2 and 0.5."
    ]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run")
    (run / "pictures").mkdir()
    (run / "pictures/step-00000001.png").write_bytes(b"\x89PNG half")
    assert report([run], tmp_path / "report.html") == 0
    shown = Page(tmp_path / "report.html")
    assert "No step has been logged yet." in shown.text and shown.images == []
    assert ["State", "not begun"] in shown.rows


def evil_run(folder: Path) -> Path:
    """Markup in every place that a user or a shard names."""
    error = ["unreadable input", f"{EVIL}.tar", f"{EVIL}\udcff", "7", EVIL]
    run = bare_run(
        folder / "<img src=x onerror=alert(1)>",
        config=f"model:\n  class_path: a.{EVIL}\ndata:\n  train: \"{EVIL}\"\nseed: '{EVIL[:30]}'\n",
        metrics=f"step,loss,{EVIL}\n0,1,2\n1,1,3\n",
    )
    with (run / "errors.csv").open("w", errors="surrogateescape", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["kind", "shard", "key", "position", "replaced_by"])
        rows.writerows([error] * 30)
    (run / "nonfinite.csv").write_text(f"step,rank,position,key,shard\n3,0,5,{EVIL},b.tar\n")
    start = {"at": 1.0, "step": 0, "after": None, "applied": {EVIL: EVIL}, "versions": {EVIL: EVIL}}
    start |= {"command": f"maepretrain pretrain {EVIL}", "host": EVIL}
    (run / "starts.json").write_text(json.dumps([start]))
    write_results(run, EVIL, {"rows": {EVIL: {"top1": 0.5, EVIL: 1.5, "recipe": EVIL}}})
    return run


def test_names_stay_text(tmp_path: Path) -> None:
    run = evil_run(tmp_path)
    assert report([run, bare_run(tmp_path / "plain")], tmp_path / "report.html") == 0
    shown = Page(tmp_path / "report.html")
    assert "script" not in shown.tags and all("onerror" not in image for image in shown.images)
    assert all(image["src"].startswith("data:") for image in shown.images)
    assert shown.text.count(EVIL) > 20
    assert "30 errors: 30 unreadable input; the first 20 are shown." in shown.text
    assert "1 samples in 1 steps gave no finite loss" in shown.text
    assert "\\udcff" in shown.text


def test_the_same_parts_in_markdown(runs: dict[str, Path], tmp_path: Path) -> None:
    text = markdown(evaluations([read_run(runs["pretrained"])]))
    assert "| Linear probe | top-1 |" in text and " ± " in text
    evil = markdown(evaluations([read_run(evil_run(tmp_path))]))
    assert "<script" not in re.sub(r"(?s)```.*?```", "", evil) and "&lt;script" in evil


def test_seeds_of_one_folder_are_its_runs(tmp_path: Path) -> None:
    for seed in range(2):
        run = bare_run(tmp_path / f"few/seed-{seed}", config=f"encoder: a\nseed: {seed}\n")
        write_results(run, "finetune", {"top1": 0.5 + seed / 4, "labels": 1500, "scratch": True})
    write_results(tmp_path / "few", "finetune", {"top1": 0.625, "top1_std": 0.1768, "seeds": 2})
    assert report([tmp_path / "few"], tmp_path / "report.html", map_images=0) == 0
    rows = Page(tmp_path / "report.html").rows
    assert [f"{tmp_path}/few/seed-1: from scratch", "0.7500", "", "1,500"] in rows
    assert [f"{tmp_path}/few: fine-tuned", "0.6250 ± 0.1768", "2", ""] in rows
    assert ["seed", "0", "1"] in rows  # in what the configurations differ


def test_a_map_that_cannot_be_computed_says_why(runs: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(runs["tuned"], moved)
    config = (moved / "config.yaml").read_text()
    for pattern, why in (
        ("/nowhere/a.tar", "/nowhere/a.tar"),
        ("https://example.org/a.tar", "its shards are not on a disk here"),
    ):
        changed = re.sub(r"(?m)^  val: .*$", f"  val: {pattern}", config)
        (moved / "config.yaml").write_text(changed)
        assert report([moved], tmp_path / "report.html") == 0
        text = Page(tmp_path / "report.html").text
        assert "no map by PCA and t-SNE, " in text and why in text.partition("no map by")[2]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nowhere"], "nowhere holds no run: it has no config.yaml"),
        (["RUN", "--out", "report.pdf"], "--out report.pdf must end in .html"),
        (["RUN", "--out", "nowhere/report.html"], "there is no folder nowhere"),
        (["RUN", "--map-images", "-1"], "map_images -1 must be at least 0"),
        (["BROKEN"], "config.yaml is no configuration"),
        (["RUN", "--dark"], "--dark"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], line: str, tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    bare_run(Path("RUN"))
    bare_run(Path("BROKEN"), config="{")
    assert run_cli("report", *argv) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not list(tmp_path.glob("**/report.*"))


def test_a_page_that_is_there_is_replaced_as_a_whole(tmp_path: Path, run_cli: Run) -> None:
    out, run = tmp_path / "report.html", bare_run(tmp_path / "run")
    out.write_text("old")
    assert run_cli("report", run, "--out", out, "--map-images", 0) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port at which a headless Chromium listens."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page was not tried in a browser")
    home = tmp_path_factory.mktemp("chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={home}", "--remote-debugging-port=0", "about:blank"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen([CHROMIUM, *options], stdout=log, stderr=log)
    told = home / "DevToolsActivePort"
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text().strip()):
        assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
        time.sleep(0.1)
    yield int(told.read_text().split()[0])
    process.terminate()
    process.wait(30)


async def visit(port: int, page: Path, expression: str) -> tuple[Any, list[str], list[str]]:
    """A page in the browser by its DevTools protocol.

    Returns:
        The value of an expression on the loaded page, what came to the console, and addresses that
        were asked for.
    """
    console: list[str] = []
    asked: list[str] = []
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            address = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
        async with session.ws_connect(address, max_msg_size=0) as socket:
            number = 0

            async def call(method: str, until: str = "", **params: Any) -> Any:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": params})
                result = None
                while True:
                    said = await socket.receive_json(timeout=60)
                    kind, about = said.get("method", ""), said.get("params", {})
                    if kind in ("Log.entryAdded", "Runtime.consoleAPICalled"):
                        console.append(json.dumps(about))
                    if kind in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
                        console.append(json.dumps(about))
                    if kind == "Network.requestWillBeSent":
                        asked.append(about["request"]["url"])
                    if said.get("id") == number:
                        result = said.get("result")
                    if (result is not None and not until) or (until and kind == until):
                        return result

            for domain in ("Page", "Log", "Runtime", "Network"):
                await call(f"{domain}.enable")
            await call("Page.navigate", until="Page.loadEventFired", url=page.resolve().as_uri())
            found = await call("Runtime.evaluate", expression=expression, returnByValue=True)
            await call("Page.close")
    return found["result"]["value"], console, asked


def in_browser(port: int, page: Path, expression: str) -> tuple[Any, list[str], list[str]]:
    import asyncio

    return asyncio.run(visit(port, page, expression))


def test_chromium_shows_every_picture_without_a_word(browser: int, page: Path) -> None:
    sizes, console, asked = in_browser(
        browser, page, "[...document.images].map(i => [i.naturalWidth, i.width, i.alt])"
    )
    assert len(sizes) == len(Page(page).images) > 12
    assert all(natural > 0 and width > 100 for natural, width, _ in sizes), sizes
    assert console == []
    assert [url for url in asked if not url.startswith("data:")] == [page.resolve().as_uri()]


def test_chromium_runs_nothing_that_a_name_says(browser: int, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert report([evil_run(tmp_path)], out) == 0
    title, console, asked = in_browser(browser, out, "document.title")
    assert title.endswith("<img src=x onerror=alert(1)>")
    assert console == [] and len([url for url in asked if url.startswith("file:")]) == 1
    # The page's policy holds even where a name would be markup: the last wall is tried as well.
    out.write_text(out.read_text().replace("<main>", f"<main>{EVIL}"))
    title, console, _ = in_browser(browser, out, "document.title")
    assert title != "owned" and any("Content Security Policy" in line for line in console)


def test_a_phone_scrolls_no_page_sideways(browser: int, page: Path) -> None:
    widths, _, _ = in_browser(
        browser,
        page,
        "document.documentElement.style.width = '380px', document.body.style.width = '380px',"
        "[document.body.scrollWidth, document.body.clientWidth]",
    )
    assert widths[0] <= widths[1] + 1
