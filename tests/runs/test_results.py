"""Figures against scikit-learn's, results.json under two writers, and the pictures."""

import json
import statistics
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
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from sklearn.metrics import confusion_matrix as counts_of

from maepretrain.data.shards.index import class_names, open_shards
from maepretrain.data.shards.sources import find_source
from maepretrain.data.shards.write import write_shards
from maepretrain.plots.confusion import confusion_matrix, most_confused
from maepretrain.plots.maps import embedding_map
from maepretrain.runs.results import print_table, scores, spread, write_results


def answers(n: int = 200, classes: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), truth] += 1.0
    return logits, truth


def test_scores_equal_scikit_learns() -> None:
    logits, truth = answers()
    found = scores(logits, truth, 8)
    for k in (1, 5):
        assert found[f"top{k}"] == pytest.approx(top_k_accuracy_score(truth, logits, k=k))
    balanced = balanced_accuracy_score(truth, logits.argmax(1))
    assert found["mean_per_class"] == pytest.approx(balanced)
    assert found["n"] == 200
    first = scores(logits.argmax(1), truth, 8)
    assert first["top1"] == found["top1"]
    assert "top5" not in first


def test_classes_that_the_truth_lacks_do_not_count() -> None:
    found = scores(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 5)
    assert found == {"top1": pytest.approx(2 / 3), "mean_per_class": 0.75, "n": 3}


@pytest.mark.parametrize("truth", [[], [0, 5], [-1, 0]])
def test_truths_out_of_range_are_refused(truth: list[int]) -> None:
    labels = torch.tensor(truth, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"truths in 0\.\.4"):
        scores(labels, labels, 5)


def test_the_spread_is_the_sample_standard_deviation() -> None:
    tops = [0.5, 0.7, 0.9]
    found = spread([{"top1": top, "n": 10} for top in tops])
    assert found["top1"] == pytest.approx(statistics.mean(tops))
    assert found["top1_std"] == pytest.approx(statistics.stdev(tops))
    assert found["n"] == 10
    assert spread([{"top1": 0.5, "n": 10}]) == {"top1": 0.5, "n": 10}


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


def test_the_table_shows_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"top1": 0.91234, "top1_std": 0.005, "n": 10000, "seeds": 3, "recipe": "lr 0.1"}
    print_table({"pretrained": row, "raw pixels": {"top1": 0.5, "knn": 0.25, "n": 10000}})
    out = capsys.readouterr().out
    for cell in ("0.9123 ± 0.0050", "0.5000", "0.2500", "10,000", "pretrained: lr 0.1"):
        assert cell in out
    assert "top-5" not in out


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
