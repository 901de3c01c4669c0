"""The linear probe against scikit-learn, against heads trained one by one, and through the command
line on one process and on two."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from support.blobs import blobs
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.evaluate.labels import choose_labels, folds_for_choosing
from maepretrain.evaluate.linear_heads import moments
from maepretrain.evaluate.linear_sweep import LinearSweep, ScoredHead, linear_probe, mean_over_folds
from maepretrain.evaluate.probe import audit
from maepretrain.evaluate.processes import Processes
from maepretrain.randomness import permutation
from maepretrain.workflows.quickstart import digits

Run = Callable[..., int]
SHORT = ["--sweep.min_steps", 60, "--sweep.epochs", 1]


def test_probe_agrees_with_scikit_learns_logistic_regression() -> None:
    """Both choose their one setting on the same split of the training half, over three halvings:
    898 test digits each, .5 points are 4.5 digits."""
    train, test = digits()
    x = torch.from_numpy(train.images).flatten(1).float() / 255
    x = torch.cat([x, torch.from_numpy(test.images).flatten(1).float() / 255])
    y = torch.cat([torch.from_numpy(train.labels), torch.from_numpy(test.labels)]).long()
    sweep, ours, theirs = LinearSweep(), [], []
    for seed in range(3):
        order = permutation(seed, "halves", len(y))
        bank, asked = order[:899], order[899:]
        fit, hold = (bank[i] for i in folds_for_choosing(y[bank], 0.2, seed, 1)[0])
        heads = sweep.fit(lambda i, fit=fit: x[fit[i]], {"pixels": 64}, y[fit], 10, seed)
        best = sweep.rank(heads, lambda i, hold=hold: x[hold[i]], y[hold])[0]
        setting = (best.lr, best.penalty)
        ours.append(linear_probe(x[bank], y[bank], x[asked], y[asked], setting))
        theirs.append(logistic_regression(x, y, bank, asked, fit, hold))
    assert abs(sum(ours) - sum(theirs)) / 3 < 0.005
    assert sum(ours) / 3 > 0.94


def logistic_regression(
    x: Tensor, y: Tensor, bank: Tensor, asked: Tensor, fit: Tensor, hold: Tensor
) -> float:
    def score(c: float, on: Tensor, of: Tensor) -> float:
        scaler = StandardScaler().fit(x[on])
        model = LogisticRegression(C=c, max_iter=2000).fit(scaler.transform(x[on]), y[on])
        return float(model.score(scaler.transform(x[of]), y[of]))

    best = max((0.003, 0.03, 0.3, 3.0), key=lambda c: score(c, fit, hold))
    return score(best, bank, asked)


def test_heads_trained_at_once_equal_heads_trained_alone() -> None:
    """Two views of one width, one of another, two learning rates, two penalties; alone:
    nn.Linear with torch's Adam and a cosine."""
    (x, y), widths = blobs(90, 1, width=24), {"a": 7, "b": 7, "c": 10}
    sweep = LinearSweep((1e-3, 1e-1), (0.0, 9.0), epochs=3, min_steps=1, batch=32)
    heads = sweep.fit(lambda i: x[i], widths, y, 5, seed=3)
    together = heads(x)
    begin = 0
    for view, width in widths.items():
        part = x[:, begin : begin + width]
        begin += width
        for i, setting in enumerate(sweep.settings):
            alone = trained_alone(part, y, *setting)
            assert torch.allclose(together[view][:, i], alone, atol=1e-4), (view, setting)


def trained_alone(x: Tensor, y: Tensor, lr: float, penalty: float) -> Tensor:
    x = (x - x.mean(0)) / x.std(0, unbiased=False)
    head = nn.Linear(x.shape[1], 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": penalty / len(y)}, {"params": [head.bias]}]
    optimizer = torch.optim.Adam(groups, lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for epoch in range(3):
        for numbers in permutation(3, "probe", len(y), epoch).split(32):
            optimizer.zero_grad()
            F.cross_entropy(head(x[numbers]), y[numbers]).backward()
            optimizer.step()
            cosine.step()
    return head(x)


@pytest.mark.parametrize("penalty", [1.0, 10.0])
def test_few_labels_give_scikit_learns_solution(penalty: float) -> None:
    """Five labels a class, 32 standardised principal components, most of them noise: probabilities
    of unseen digits as of LogisticRegression(C = 1 / penalty), whatever the learning rate."""
    train, test = digits()
    x, u = (torch.from_numpy(part.images).flatten(1).float() for part in (train, test))
    pca = PCA(32, random_state=0).fit(x.numpy())
    x, u = (torch.from_numpy(pca.transform(part.numpy())).float() for part in (x, u))
    y = torch.from_numpy(train.labels).long()
    few = choose_labels(y, per_class=5)
    scaler = StandardScaler().fit(x[few])
    theirs = LogisticRegression(C=1 / penalty, max_iter=2000).fit(scaler.transform(x[few]), y[few])
    sweep = LinearSweep((0.03, 0.3), (penalty,))
    ours = sweep.fit(lambda i: x[few[i]], {"x": 32}, y[few], 10)(u)["x"].softmax(2)
    expected = torch.from_numpy(theirs.predict_proba(scaler.transform(u))).float()
    for i in range(2):
        assert torch.allclose(ours[:, i], expected, atol=0.02)
        assert float((ours[:, i].argmax(1) == expected.argmax(1)).float().mean()) > 0.99


def test_folds_are_pooled_by_their_samples() -> None:
    first = [ScoredHead("a", 0.1, 1.0, 0.5, 2.0), ScoredHead("b", 0.1, 1.0, 1.0, 1.0)]
    second = [ScoredHead("b", 0.1, 1.0, 0.0, 9.0), ScoredHead("a", 0.1, 1.0, 0.9, 0.4)]
    a, b = mean_over_folds([(30, first), (10, second)])
    assert (a.feature_set, a.accuracy, a.loss) == ("a", pytest.approx(0.6), pytest.approx(1.6))
    assert (b.feature_set, b.accuracy, b.loss) == ("b", pytest.approx(0.75), pytest.approx(3.0))


def test_heads_are_ranked_by_loss() -> None:
    (x, y), (u, v) = blobs(200, 1), blobs(100, 2)
    sweep = LinearSweep((1e-5, 1e-2, 3e-2), (0.1,), epochs=1, min_steps=30)
    found = sweep.rank(sweep.fit(lambda i: x[i], {"x": 16}, y, 5), lambda i: u[i], v)
    heads = sweep.fit(lambda i: x[i], {"x": 16}, y, 5)
    logits = heads(u)["x"]
    for head in found:
        mine = logits[:, sweep.lrs.index(head.lr)]
        assert head.accuracy == pytest.approx(float((mine.argmax(1) == v).double().mean()))
        assert head.loss == pytest.approx(float(F.cross_entropy(mine, v)), rel=1e-5)
    assert found == sorted(found, key=lambda head: head.loss)
    assert found[-1].lr == 1e-5


def test_moments_are_exact_and_a_constant_feature_is_no_noise() -> None:
    x = torch.randn(10_000, 3, dtype=torch.float64) * torch.tensor([1.0, 50.0, 0.0]) + 300
    mean, std = moments(lambda i: x[i].float(), len(x))
    assert torch.allclose(mean, x.float().double().mean(0).float(), rtol=1e-6)
    assert torch.allclose(std[:2], x[:, :2].std(0, unbiased=False).float(), rtol=1e-4)
    assert float(std[2]) == pytest.approx(float(std.max()) / 1000, rel=1e-4)


def test_shuffled_labels_give_chance_and_labels_themselves_are_learnt() -> None:
    (x, y), order = blobs(400, 1), permutation(0, "shuffle", 400)
    assert linear_probe(x[:300], y[order][:300], x[300:], y[order][300:]) < 0.35
    assert linear_probe(F.one_hot(y).float(), y, F.one_hot(y).float(), y) == 1.0


def test_the_scale_of_the_features_does_not_matter() -> None:
    (x, y), (u, v) = blobs(200, 1), blobs(100, 2)
    assert linear_probe(x * 1000 + 7, y, u * 1000 + 7, v) == linear_probe(x, y, u, v)


def test_what_a_sweep_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="batch 64 is larger than the 50 samples to fit on"):
        LinearSweep(batch=64).length(50)
    for arguments in ({"lrs": ()}, {"lrs": (0.0,)}, {"epochs": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="a sweep needs learning rates above 0"):
            LinearSweep(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"penalties \[-1\.0\] must be 0 or more"):
        LinearSweep(penalties=(-1.0,))
    with pytest.raises(ValueError, match="choose_on_samples 0 must be at least 1"):
        LinearSweep(choose_on_samples=0)
    assert LinearSweep(epochs=10, min_steps=1).length(600) == (256, 30)
    assert LinearSweep(epochs=10, min_steps=99).length(50) == (50, 99)
    assert LinearSweep(epochs=10).length(54_000) == (1024, 530)


def results(folder: Path, evaluator: str = "probe") -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())[evaluator]


def test_probe_table(
    tmp_path: Path, tiny_run: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path]
    out += ["--sweep.min_steps", 100, "--sweep.epochs", 1]
    assert run_cli("probe", "--encoder", tiny_run, "--baselines", "--tsne", "--verbose", *out) == 0
    printed, found = capsys.readouterr().out, results(tmp_path)
    rows = found["rows"]
    assert list(rows) == ["pretrained", "random encoder", "raw pixels", "PCA-64"]
    assert rows["raw pixels"]["top1"] > 0.8
    assert all(0 <= row["knn"] <= 1 and row["n"] == 50 for row in rows.values())
    # Two blocks: output, mean and class token of each, the last blocks side by side.
    assert (
        "heads       90 = 6 feature sets x 3 lrs (0.03, 0.1, 0.3) x "
        "5 penalties (0.01, 0.1, 1, 10, 100)" in printed
    )
    # Ten folds of at least one of each class are not 500 of 150: all are held out once.
    assert re.search(
        r"on 1\d\d training samples held out in \d+ folds;\s+trained.* all 150", printed
    )
    assert "50 test images, 150 labelled" in printed
    assert found["data"]["labelled"] == 150
    names = ("confusion", "most-confused", "map-pca", "map-tsne")
    for name in names:
        assert Image.open(tmp_path / "pictures" / f"probe-{name}.png").width > 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "results.json"]


def test_the_result_is_three_lines_and_warnings(
    tmp_path: Path, tiny_run: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("probe", "--encoder", tiny_run, "--out", tmp_path, *SHORT) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("  WARNING")]
    row = results(tmp_path)["rows"]["pretrained"]
    assert [line.split("  ")[0] for line in lines] == ["linear probe", "chosen", "results"]
    assert f"top-1 {row['top1']:.4f}, k-NN {row['knn']:.4f} on 50 test images" in lines[0]
    assert f"features {row['chosen'][0]['view']}, lr" in lines[1]
    assert str(tmp_path / "results.json") in lines[2]


def test_few_labels_and_seeds(
    tmp_path: Path, tiny_run: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--encoder",
        tiny_run,
        "--out",
        tmp_path,
        *SHORT,
        "--blocks",
        "[-1]",
        "--pools",
        "[mean]",
    ]
    assert run_cli("probe", *options, "--labels-per-class", 3, "--seeds", 3, "--seed", 5) == 0
    assert "50 test images, 30 labelled" in capsys.readouterr().out
    found = results(tmp_path)
    row = found["rows"]["pretrained"]
    assert found["seeds"] == [5, 6, 7]
    assert (row["seeds"], len(row["chosen"])) == (3, 3)
    assert 0 < row["top1_std"] < 0.3
    assert {choice["view"] for choice in row["chosen"]} <= {"output", "block 1 mean"}
    assert run_cli("probe", *options, "--label_fraction", 0.2) == 0
    train, _ = digits()
    counts = torch.from_numpy(train.labels[:150]).bincount().tolist()
    labelled = sum(max(1, round(0.2 * n)) for n in counts)
    assert f"50 test images, {labelled} labelled" in capsys.readouterr().out


def heads_of(losses: list[float], accuracies: list[float]) -> list[ScoredHead]:
    """At learning rates .001, .01 and .1, ranked."""
    heads = zip((0.001, 0.01, 0.1), accuracies, losses, strict=True)
    return sorted((ScoredHead("output", lr, 1.0, a, x) for lr, a, x in heads), key=lambda h: h.loss)


@pytest.mark.parametrize(
    ("losses", "accuracies", "told"),
    [
        ([0.9, 1.0, 1.1], [0.7, 0.6, 0.5], "lr 0.001"),
        ([1.1, 1.0, 0.9], [0.5, 0.6, 0.7], "lr 0.1"),
        ([1.0, 0.9, 1.0], [0.7, 0.6, 0.7], None),
        ([0.99, 1.0, 1.1], [0.7, 0.6, 0.5], None),  # hardly better
        ([0.9, 1.0, 1.1], [0.6, 0.6, 0.5], None),  # no more of them right
    ],
)
def test_the_grids_edge_is_told_where_it_matters(
    losses: list[float],
    accuracies: list[float],
    told: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = LinearSweep((0.1, 0.001, 0.01), (1.0,), min_steps=60)
    ranking = heads_of(losses, accuracies)
    audit(sweep, ranking, feature_sets=1, labelled=110, held_out=[10, 10], row="raw pixels")
    printed = capsys.readouterr().out
    assert ("WARNING" in printed) is (told is not None)
    assert told is None or f"WARNING     {told} lies on the edge" in printed
    assert "batch 100, 60 steps\n              (60 epochs)" in printed
    assert "on 20 training samples held out in 2 folds;\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep.batch", 500], "batch 500 is larger than the 136 samples to fit on"),
        (["--blocks", "[2]"], "block 2 is none of the encoder's 2"),
        (["--seeds", 0], "seeds 0 must be at least 1"),
        (["--labels_per_class", 100], "labelled samples, 100 are needed"),
        (["--labels_per_class", 1], "no class has two labelled samples"),
        (["--data.val", "null"], "no held-out shards to test on"),
        (["--batch", 0], "batch 0 must be at least 1"),
    ],
)
def test_what_cannot_be_probed_is_one_line(
    tmp_path: Path,
    tiny_run: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
    message: str,
) -> None:
    assert run_cli("probe", "--encoder", tiny_run, "--out", tmp_path, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "results.json").exists()


def test_an_encoder_without_a_run_needs_a_folder(
    shards: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.train", f"{shards}/train-*.tar", "--data.image_size", 16, "--data.channels", 1]
    data += ["--data.val", f"{shards}/test-*.tar", "--data.mean", "[0.3]", "--data.std", "[0.4]"]
    data += ["--data.global_batch", 24]
    assert run_cli("probe", "--encoder", "timm:vit_tiny_patch16_224", *data) == 2
    assert "belongs to no run folder: give --out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["probe", "knn"])
def test_two_processes_give_what_one_gives(
    tmp_path: Path, tiny_run: Path, run_cli: Run, verb: str
) -> None:
    """An odd number of settings, 3, and shares of images that are not equal."""
    from support.recorder import READS, RECORDS, _context, _free_port, _run_rank

    options = ["--encoder", str(tiny_run), "--baselines", "--labels_per_class", "7", "--seeds", "2"]
    options += (
        [
            "--sweep.min_steps",
            "60",
            "--sweep.lrs",
            "[0.003,0.01,0.1]",
            "--sweep.penalties",
            "[0.3]",
        ]
        if verb == "probe"
        else []
    )
    assert run_cli(verb, *options, "--out", tmp_path / "one") == 0
    environment = {
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"},
        **{"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1"},
        **{"MASTER_PORT": str(_free_port()), RECORDS: str(tmp_path), "HOLD": ""},
        READS: str(tmp_path / "reads"),
    }
    words = [verb, *options, "--out", str(tmp_path / "two")]
    ranks = [
        _context().Process(target=_run_rank, args=(words, environment, rank)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    printed = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert [process.exitcode for process in ranks] == [0, 0], printed
    assert "test images" in printed[0]
    assert "test images" not in printed[1]
    one, two = (results(tmp_path / name, verb)["rows"] for name in ("one", "two"))
    figures = ("top1", "top5", "mean_per_class", "knn", "n", "chosen")
    for row in one:
        assert {k: one[row].get(k) for k in figures} == {k: two[row].get(k) for k in figures}


@pytest.mark.parametrize("n", [0, 1, 7, 50])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_ranks_share_everything_once(n: int, world_size: int) -> None:
    processes, shares = Processes(), []
    processes.world_size = world_size
    for rank in range(world_size):
        processes.rank = rank
        shares += list(processes.share(n))
    assert shares == list(range(n))
