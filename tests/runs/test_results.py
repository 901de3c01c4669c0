"""Figures against scikit-learn's, results.json under two writers, and the pictures."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix as counts_of

from maepretrain.data.shards.index import class_names, open_shards
from maepretrain.data.shards.sources import find_source
from maepretrain.data.shards.write import write_shards
from maepretrain.plots.confusion import confusion_matrix, most_confused
from maepretrain.plots.maps import embedding_map
from maepretrain.runs.results import write_results


def answers(n: int = 200, classes: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), truth] += 1.0
    return logits, truth


def test_evaluators_leave_each_others_results_alone(tmp_path: Path) -> None:
    names = [f"evaluator {i}" for i in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_results(tmp_path / "new", name, {"of": name}), names))
    path = write_results(tmp_path / "new", "evaluator 0", {"of": "again"})
    results = json.loads(path.read_text())
    assert sorted(results) == sorted(names)
    assert results["evaluator 0"]["of"] == "again"
    assert results["evaluator 7"]["of"] == "evaluator 7"
    assert results["evaluator 7"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["no json", "[1, 2]"])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        write_results(tmp_path, "probe", {})
    assert path.read_text() == content


@pytest.mark.parametrize("classes", [8, 40])
def test_confusion_matrix_counts_as_scikit_learns(tmp_path: Path, classes: int) -> None:
    logits, truth = answers()
    path = tmp_path / "pictures" / "confusion.png"
    counts = confusion_matrix(truth, logits.argmax(1), classes, path)
    theirs = counts_of(truth, logits.argmax(1), labels=range(classes))
    assert counts.tolist() == theirs.tolist()
    assert Image.open(path).width > 400


def texts(draw: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that Matplotlib was made to write in a picture."""
    written: list[str] = []
    honest = Text.draw

    def note(self: Text, *arguments: Any, **more: Any) -> None:
        written.append(self.get_text())
        honest(self, *arguments, **more)

    monkeypatch.setattr(Text, "draw", note)
    draw()
    return written


def test_classes_are_called_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cat", "dog", "a very long-named class"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    write_shards(find_source(str(tmp_path / "images"), None, "train"), tmp_path / "shards", "train")
    names = class_names(open_shards(f"{tmp_path}/shards/train-*.tar"))
    assert names == ["a very long-named class", "cat", "dog"]
    some, path = torch.tensor([0, 1, 2]), tmp_path / "a.png"
    called = {"a very long-n…", "cat", "dog"}
    assert called <= set(texts(lambda: confusion_matrix(some, some, 3, path, names), monkeypatch))
    image = [torch.zeros(3, 8, 8)]
    written = texts(lambda: most_confused(image, [1], [2], [0.5], path, names), monkeypatch)
    assert "cat\ntaken for dog\n50%" in written
    # A set of which two names are known is numbered.
    written = texts(lambda: confusion_matrix(some, some, 3, path, names[:2]), monkeypatch)
    assert {"0", "1", "2"} <= set(written) and "cat" not in written


def test_shards_of_others_have_no_names(tmp_path: Path, shards: Path) -> None:
    assert class_names(open_shards(f"{shards}/test-*.tar")) == [str(i) for i in range(10)]
    for content in (None, b"{", b"[]", b'{"classes": 3}'):
        copy = tmp_path / "a-000000.tar"
        copy.write_bytes((shards / "test-000000.tar").read_bytes())
        if content is not None:
            (tmp_path / "a.json").write_bytes(content)
        assert class_names(open_shards(str(copy))) == []


@pytest.mark.parametrize(("number", "channels"), [(1, 1), (11, 3), (24, 4)])
def test_confused_images_are_drawn(tmp_path: Path, number: int, channels: int) -> None:
    images = list(torch.rand(number, channels, 8, 8))
    some = list(range(number))
    most_confused(images, some, some[::-1], [0.9] * number, tmp_path / "confused.png")
    picture = Image.open(tmp_path / "confused.png")
    assert picture.height > 150
    assert len(picture.convert("L").getcolors() or []) > 30


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_map_of_features_keeps_classes_together(tmp_path: Path, method: str) -> None:
    labels = torch.arange(3).repeat_interleave(40)
    features = (
        torch.randn(120, 10, generator=torch.Generator().manual_seed(0)) + 9 * labels[:, None]
    )
    points = embedding_map(features, labels, tmp_path / "map.png", method).numpy()  # type: ignore
    if method == "pca":
        theirs = PCA(2).fit_transform(features.double().numpy())
        assert np.allclose(np.abs(points), np.abs(theirs), atol=1e-3)
    centres = np.stack([points[labels == c].mean(0) for c in range(3)])
    distance = ((points[:, None] - centres) ** 2).sum(2)
    assert (distance.argmin(1) == labels.numpy()).mean() > 0.95
    assert len(Image.open(tmp_path / "map.png").convert("RGB").getcolors(1 << 20) or []) > 3
