"""Masked tokens against a plain computation of each text by itself, without padding, in the order
of the text; and through the command line."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.halves import assert_halves_average_to_the_whole
from support.recorder import Ranks
from torch import Tensor
from torch.nn import functional as F

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.decode import PADDING
from maepretrain.data.shards.sources import ImageFolder
from maepretrain.data.shards.write import write_shards
from maepretrain.models.masked_tokens import MaskedTokens
from maepretrain.parsing.configs import config_words

T = 24
SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "decoder_width": 12}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"mask_tokens_in_encoder": True, "decoder_depth": 0},
    {"mask_tokens_in_encoder": True, "decoder_depth": 1, "mask_ratio": 0.6},
]


def tiny(**options: Any) -> MaskedTokens:
    torch.manual_seed(0)
    return MaskedTokens(**({"image_size": [T], "mask_ratio": 0.3} | SIZES | options))


def texts(*lengths: int) -> Tensor:
    """Random bytes, (b, 1, T)."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.full((len(lengths), 1, T), PADDING)
    for row, length in zip(tokens, lengths, strict=True):
        row[0, :length] = torch.randint(0, 256, (length,), generator=random)
    return tokens


def plain(m: Any, text: Tensor, hidden: list[int]) -> tuple[Tensor, float]:
    """Loss and accuracy of the bytes of one text, whose hidden places are given."""
    shown = [i for i in range(len(text)) if i not in hidden]
    where, inner = m.positions, m.decoder_positions
    embedded = [m.embedding.weight[int(byte)] + where[i] for i, byte in enumerate(text)]
    if m.mask_tokens_in_encoder:
        for i in hidden:
            embedded[i] = m.mask_token[0, 0] + where[i]
        seen = list(range(len(text)))
    else:
        seen = shown
    x = torch.stack([m.cls_token[0, 0], *(embedded[i] for i in seen)])[None]
    for block in m.blocks:
        x = block(x)
    x = m.decoder_embed(m.norm(x))[0]
    slots = {i: x[1 + n] for n, i in enumerate(seen)}
    if not m.mask_tokens_in_encoder:
        slots |= {i: m.mask_token[0, 0] for i in hidden}
    y = torch.stack([x[0], *(slots[i] + inner[i] for i in range(len(text)))])[None]
    for block in m.decoder_blocks:
        y = block(y)
    logits = m.decoder_pred(m.decoder_norm(y[0, 1:]))[hidden]
    right = logits.argmax(1) == text[hidden]
    return F.cross_entropy(logits, text[hidden]), float(right.float().mean())


def hidden_places(model: MaskedTokens, batch: dict[str, Tensor]) -> list[list[int]]:
    tokens = batch["input"][:, 0]
    _, masked = model.split(tokens, batch["position"])
    lengths = (tokens != PADDING).sum(1).tolist()
    return [
        sorted(i for i in row if i < n) for row, n in zip(masked.tolist(), lengths, strict=True)
    ]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_is_that_of_each_text_by_itself(options: dict[str, Any]) -> None:
    """Texts that fill the window, end in it and have one byte."""
    model, lengths = tiny(**options), (T, 11, 1, 23)
    batch = {"input": texts(*lengths), "position": torch.tensor([3, 0, 70, 10**9])}
    found = model(batch)
    rows = zip(batch["input"][:, 0], lengths, hidden_places(model, batch), strict=True)
    each = [plain(model, tokens[:n], hidden) for tokens, n, hidden in rows]
    truth = torch.stack([loss for loss, _ in each]).mean()
    torch.testing.assert_close(found["loss"], truth, rtol=1e-5, atol=1e-6)
    assert float(found["accuracy"]) == pytest.approx(sum(a for _, a in each) / len(each))
    mine = torch.autograd.grad(found["loss"], list(model.parameters()))
    theirs = torch.autograd.grad(truth, list(model.parameters()))
    for (name, _), ours, other in zip(model.named_parameters(), mine, theirs, strict=True):
        assert (ours - other).norm() <= 1e-4 * other.norm() + 1e-6, name


def test_accuracy_counts_what_is_right() -> None:
    """Texts of one byte, and a model that predicts only it."""
    model = tiny()
    with torch.no_grad():
        model.decoder_pred.bias[7] = 1e4
    tokens = texts(T, 9)
    tokens[0, 0, :], tokens[1, 0, :9] = 7, 8
    batch = {"input": tokens, "position": torch.arange(2)}
    assert float(model(batch)["accuracy"]) == 0.5


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.9])
def test_a_mask_is_a_share_of_the_text_and_nothing_after_its_end(ratio: float) -> None:
    model, lengths = tiny(mask_ratio=ratio), [*range(1, T + 1)]
    batch = {"input": texts(*lengths), "position": torch.arange(T)}
    tokens = batch["input"][:, 0]
    visible, masked = model.split(tokens, batch["position"])
    together = torch.cat([visible, masked], 1).sort(1).values
    assert torch.equal(together, torch.arange(T).expand(T, -1))
    for n, hidden in zip(lengths, hidden_places(model, batch), strict=True):
        assert len(hidden) == max(1, int(ratio * n))


def test_masks_are_uniform_and_functions_of_seed_and_position() -> None:
    model, n, length = tiny(), 4000, 20
    tokens = texts(*[length] * 8).repeat(n // 8, 1, 1)
    batch = {"input": tokens, "position": torch.arange(n)}
    places = hidden_places(model, batch)
    counts = torch.bincount(torch.tensor([i for row in places for i in row]), minlength=length)
    expected = n * 6 / length  # int(.3 x 20) of 20
    assert len(counts) == length
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8  # .999 quantile of 19 dof
    other = {"input": tokens.flip(0), "position": torch.arange(n).flip(0)}
    assert hidden_places(model, other) == places[::-1]
    assert hidden_places(tiny(seed=1), batch) != places
    assert len({tuple(p) for p in places[:100]}) > 90


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_hidden_does_not_reach_the_prediction(options: dict[str, Any]) -> None:
    """Other bytes in masked places change no logits; another visible byte does."""
    model, tokens, position = tiny(**options), texts(T, 13), torch.arange(2)
    places, logits = model.predict(tokens, position)
    _, masked = model.split(tokens[:, 0], position)
    assert torch.equal(places, masked)
    is_text = tokens[:, 0].gather(1, masked) != PADDING
    changed = tokens.clone()
    changed[:, 0] = changed[:, 0].scatter(1, masked, torch.where(is_text, 5, PADDING))
    assert torch.equal(model.predict(changed, position).logits[is_text], logits[is_text])
    visible, _ = model.split(tokens[:, 0], position)
    changed = tokens.clone()
    changed[0, 0, visible[0, 0]] = (changed[0, 0, visible[0, 0]] + 1) % 256
    assert not torch.allclose(model.predict(changed, position).logits[0], logits[0])


@pytest.mark.parametrize("options", OPTIONS)
def test_processes_may_share_a_batch(options: dict[str, Any]) -> None:
    """Every parameter has a gradient, and texts of any length weigh alike."""
    batch = {"input": texts(T, 5, 1, 17), "position": torch.arange(4)}
    assert_halves_average_to_the_whole(tiny(**options), batch)


def test_a_code_is_the_mean_of_the_text_alone() -> None:
    model, m = tiny(), cast(Any, tiny())
    tokens = texts(T, 10)
    for row, n, code in zip(tokens[:, 0], (T, 10), model.encode(tokens), strict=True):
        x = torch.cat([m.cls_token[0], m.embedding(row[:n]) + m.positions[:n]])[None]
        for block in m.blocks:
            x = block(x)
        torch.testing.assert_close(code, m.norm(x)[0, 1:].mean(0), rtol=1e-5, atol=1e-5)


def test_positions_are_sines_and_cosines() -> None:
    """Vaswani et al. 2017, section 3.5, sines first."""
    d, found = 16, cast(Tensor, tiny().positions)
    for place in (0, 1, T - 1):
        angles = [place / 10000 ** (2 * i / d) for i in range(d // 2)]
        truth = torch.tensor(angles, dtype=torch.float64)
        torch.testing.assert_close(found[place], torch.cat([truth.sin(), truth.cos()]).float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 28}, r"image_size 28 must be \[length\]"),
        ({"image_size": [8, 8]}, "must be .length."),
        ({"mask_ratio": 1.0}, r"mask_ratio 1.0 must be in \(0, 1\)"),
        ({"image_size": [1]}, "length 1 at least 2"),
        ({"width": 18, "heads": 4}, "width 18 must be even and divisible by 4"),
        ({"decoder_depth": 0}, "so does the decoder without mask_tokens_in_encoder"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_inputs_that_are_no_tokens_are_refused() -> None:
    for images in (torch.rand(2, 1, T), texts(T)[..., 1:], texts(T).expand(1, 3, T)):
        with pytest.raises(ValueError, match=r"the model takes int64 tokens \(1, 24\)"):
            tiny().encode(images)


# Through the command line.


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of this file: 60 to train on, 20 held out, of any length."""
    folder = tmp_path_factory.mktemp("text")
    lines = [line for line in Path(__file__).read_bytes().splitlines() if line][:80]
    for split, part in (("train", lines[:60]), ("test", lines[60:])):
        for number, line in enumerate(part):
            path = folder / split / f"{'even' if number % 2 else 'odd'}" / f"{number:03d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(line)
        write_shards(ImageFolder(folder / split), folder / "shards", split, 25)
    return folder / "shards"


def options_of(config: str, shards: Path, run: Path, steps: int) -> list[str]:
    return [
        *("pretrain", *config_words(config), "--run", str(run), "--trainer.max_steps", str(steps)),
        *("--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"),
        *("--data.global_batch", "20", "--trainer.accelerator", "cpu"),
        *("--trainer.log_every_n_steps", "1", "--optim.warmup_epochs", "0"),
        *("--model.width", "16", "--model.depth", "1", "--model.decoder_width", "16"),
    ]


def logged(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def weights(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    "config",
    [
        "data/text+recipe/masked_bytes",
        "data/text+recipe/masked_bytes+model.depth=2+model.decoder_depth=1+model.mask_tokens_in_encoder=false",
    ],
)
def test_a_run_learns_and_a_resume_equals_never_stopping(
    config: str, shards: Path, tmp_path: Path, run_cli: Callable[..., int]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_cli(*options_of(config, shards, whole, 12)) == 0
    # The same 12 steps, of which nothing but a checkpoint of the fifth is left.
    keep = ["--checkpoint_every_steps", "1000000", "--keep_every_steps", "5"]
    assert run_cli(*options_of(config, shards, cut, 12), *keep) == 0
    (kept,) = (cut / "checkpoints").glob("*5.ckpt")
    for later in ("checkpoints/last.ckpt", "metrics.csv"):
        (cut / later).unlink()
    resumed = ["--resume", "--ckpt_path", str(kept)]
    assert run_cli(*options_of(config, shards, cut, 12), *keep, *resumed) == 0
    for name, weight in weights(whole).items():
        assert torch.equal(weights(cut)[name], weight), name
    losses = logged(whole, "loss")
    assert logged(cut, "loss") == losses[5:]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert 0 <= logged(whole, "val_accuracy")[-1] <= 1
    assert not list(whole.glob("pictures/*"))

    model = cast(Any, load_encoder(str(whole)).eval())
    tokens = torch.full((3, 1, 64), 65)
    assert model.encode(tokens).shape == (3, 16)


@pytest.mark.slow
def test_two_processes_equal_one(shards: Path, tmp_path: Path, run_cli: Callable[..., int]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    sgd = ["--optim.optimizer", "sgd", "--optim.base_lr", "1e-1"]
    assert (
        run_cli(
            *options_of(
                "data/text+recipe/masked_bytes+model.depth=2+model.decoder_depth=1+model.mask_tokens_in_encoder=false",
                shards,
                one,
                4,
            ),
            *sgd,
        )
        == 0
    )
    ranks = Ranks(
        tmp_path / "log",
        [
            *options_of(
                "data/text+recipe/masked_bytes+model.depth=2+model.decoder_depth=1+model.mask_tokens_in_encoder=false",
                shards,
                two,
                4,
            ),
            *sgd,
        ],
        2,
    )
    assert ranks.wait() == [0, 0], ranks.output()
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, atol=2e-6, rtol=1e-5)


def test_images_are_refused_in_one_line(
    shards: Path, tmp_path: Path, run_cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    square = ["--data.image_size", "8"]
    assert (
        run_cli(
            *options_of(
                "data/text+recipe/masked_bytes+model.depth=2+model.decoder_depth=1+model.mask_tokens_in_encoder=false",
                shards,
                tmp_path / "run",
                2,
            ),
            *square,
        )
        == 2
    )
    assert "image_size 8 must be [length]" in capsys.readouterr().err


def test_text_goes_through_knn_and_plan(
    shards: Path, tmp_path: Path, run_cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_cli(*options_of("data/text+recipe/masked_bytes", shards, run, 2)) == 0
    assert run_cli("knn", "--encoder", str(run)) == 0
    capsys.readouterr()
    planned = [
        "plan",
        "-c",
        "data/text",
        "-c",
        "recipe/masked_bytes",
        "--model.depth",
        "2",
        "--model.decoder_depth",
        "1",
        "--model.mask_tokens_in_encoder",
        "false",
        "--data.train",
        f"{shards}/train-*.tar",
    ]
    assert run_cli(*planned, "--devices", "1", "--memory", "1GB") == 0
    assert "FLOPs" in capsys.readouterr().out
