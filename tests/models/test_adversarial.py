"""Adversarial autoencoders: the textbook's two players, and codes that are distributed as the
prior."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.halves import assert_halves_average_to_the_whole
from torch import Tensor
from torch.nn import functional as F

from maepretrain.data.shards.sources import Arrays
from maepretrain.data.shards.write import write_shards
from maepretrain.evaluate.neighbours import knn_accuracy
from maepretrain.models.autoencoders.adversarial import Adversarial
from maepretrain.models.autoencoders.coders import Coder, Dense
from maepretrain.workflows.quickstart import digits

FRESH = torch.arange(10**6, 10**6 + 1000)  # positions that no training reaches


def make(width: int = 4, **more: Any) -> Adversarial:
    torch.manual_seed(0)
    coder = Dense(8, 1, [128, width], code_activation="none")
    return Adversarial(coder, discriminator=(64, 64), **more)


def labelled_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, test = digits()
    images = (torch.from_numpy(part.images).float()[:, None] / 255 for part in (train, test))
    labels = (torch.as_tensor(part.labels).long() for part in (train, test))
    (a, b), (c, d) = images, labels
    return a, c, b, d


def fit_game(model: Adversarial, steps: int, batch: int = 64) -> Adversarial:
    images, labels, _, _ = labelled_digits()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        chosen = torch.randint(len(images), (batch,), generator=generator)
        position = torch.arange(step * batch, (step + 1) * batch)
        inputs = {"input": images[chosen], "label": labels[chosen], "position": position}
        optimizer.zero_grad()
        model(inputs)["loss"].backward()
        optimizer.step()
    return model.eval()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| (Szekely and Rizzo 2013): 0 for equal distributions."""
    cross, own = torch.cdist(a, b).mean(), torch.cdist(a, a).mean() + torch.cdist(b, b).mean()
    return float(2 * cross - own)


@pytest.mark.parametrize("classes", [0, 3])
def test_gradients_are_the_two_players(classes: int) -> None:
    """Goodfellow et al. 2014, algorithm 1, with the encoder's heuristic loss: each player alone, by
    plain back-propagation through D written with logarithms of probabilities."""
    model = make(6, classes=classes, weight=0.3)
    x, _, _, _ = labelled_digits()
    x, label, position = x[:16], torch.arange(16) % 3, torch.arange(16)
    model({"input": x, "label": label, "position": position})["loss"].backward()
    mine = {name: p.grad for name, p in model.named_parameters()}

    code = model.coder.encode(x)[:, : model.width]
    read = torch.cat([code, F.one_hot(label, 3).float()], 1) if classes else code
    d_code, d_drawn = (model.discriminator(c).sigmoid() for c in (code, model.draw(position)))
    discriminator = -(d_drawn.log() + (1 - d_code).log()).mean()
    autoencoder = model.coder.error(read, x) - 0.3 * d_code.log().mean()
    players = {"discriminator": discriminator, "coder": autoencoder}
    for player, loss in players.items():
        own = {n: p for n, p in model.named_parameters() if n.startswith(player)}
        expected = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
        for name, gradient in zip(own, expected, strict=True):
            torch.testing.assert_close(mine[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_codes_become_the_prior() -> None:
    """Held-out codes, by the energy distance, which for draws of the prior itself is .01."""
    test = labelled_digits()[2]
    distances = []
    for weight in (0.0, 0.03):
        model = fit_game(make(weight=weight), 500)
        with torch.no_grad():
            distances.append(energy_distance(model.encode(test), model.draw(FRESH)))
    plain, matched = distances
    assert matched < 0.06
    assert matched < 0.2 * plain


@pytest.mark.slow
def test_conditional_codes_keep_the_style_and_decode_by_class() -> None:
    images, labels, test, truth = labelled_digits()
    told, plain = fit_game(make(14, classes=10), 500), fit_game(make(4), 500)
    with torch.no_grad():
        known = [
            knn_accuracy(model.encode(test), truth, model.encode(images), labels, k=20)
            for model in (told, plain)
        ]
        # Drawn styles decode to the class that was asked for, as k-NN among real digits says.
        asked = torch.arange(200) % 10
        drawn = told.sample(200)
        right = knn_accuracy(drawn.flatten(1), asked, images.flatten(1), labels, k=5)
        found = float((told.classify(test) == truth).float().mean())
        shown = told.reconstruct(test[:9])
    assert known[0] < known[1] - 0.1
    assert right > 0.6
    assert found > 0.7
    assert shown._fields == ("original", "reconstruction", "next_class")
    mse = (shown.reconstruction - shown.original).square().mean()
    assert mse < (cast(Any, shown).next_class - shown.original).square().mean()


def test_draws_follow_the_prior_and_the_position_alone() -> None:
    gaussian = make().draw(FRESH)
    uniform = make(prior="uniform").draw(FRESH)
    assert torch.equal(make().draw(FRESH[5:9]), gaussian[5:9])
    assert not torch.equal(make(seed=1).draw(FRESH), gaussian)
    assert abs(float(gaussian.mean())) < 0.05 and abs(float(gaussian.std()) - 1) < 0.05
    assert abs(float(uniform.mean())) < 0.03 and abs(float(uniform.std()) - 3**-0.5) < 0.02
    assert float(uniform.abs().max()) <= 1


@pytest.mark.parametrize("classes", [0, 3])
def test_halves_average_to_the_whole(classes: int) -> None:
    batch = {
        "input": labelled_digits()[0][:8],
        "position": torch.arange(8),
        "label": torch.arange(8) % 3,
    }
    assert_halves_average_to_the_whole(make(6, classes=classes), batch)


SMALL = [
    *("--data.image_size", "8", "--data.global_batch", "50", "--data.num_workers", "0"),
    *("--trainer.accelerator", "cpu", "--trainer.max_steps", "3"),
]


def test_labels_reach_the_model(tmp_path: Path, shards: Path, run_cli: Callable[..., int]) -> None:
    data = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    config = [
        "pretrain",
        "-c",
        "data/fashion_mnist",
        "-c",
        "recipe/adversarial",
        "--model.classes",
        "10",
        "--model.coder.widths",
        "[512,256,18]",
        *data,
        *SMALL,
    ]
    assert run_cli(*config, "--run", tmp_path / "run") == 0
    assert list((tmp_path / "run/pictures").glob("step-*.png"))


def test_shards_without_labels_are_refused(
    tmp_path: Path, run_cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    unlabelled = Arrays(digits()[0].images[:60], np.full(60, -1))
    write_shards(unlabelled, tmp_path, "train", 60)
    config = [
        "pretrain",
        "-c",
        "data/fashion_mnist",
        "-c",
        "recipe/adversarial",
        "--model.classes",
        "10",
        "--model.coder.widths",
        "[512,256,18]",
        *SMALL,
        "--run",
        tmp_path / "run",
    ]
    assert run_cli(*config, "--data.train", f"{tmp_path}/train-*.tar", "--data.val", "null") == 2
    assert "Adversarial needs a label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("coder", "more", "message"),
    [
        (Dense(8, 1, [4]), {}, "ReLU"),
        (Dense(8, 1, [4], code_activation="tanh"), {}, "Tanh"),
        (Dense(8, 1, [4], code_activation="none"), {"classes": 4}, "no room"),
        (Dense(8, 1, [4], code_activation="none"), {"weight": -1.0}, r"weight -1\.0"),
        (Dense(8, 1, [4], code_activation="none"), {"discriminator": ()}, "widths"),
    ],
)
def test_refuses(coder: Coder, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adversarial(coder, **more)


@pytest.mark.parametrize("label", [None, torch.tensor([0, 3]), torch.tensor([-1, 0])])
def test_refuses_labels_out_of_range(label: Tensor | None) -> None:
    batch = {"input": torch.zeros(2, 1, 8, 8), "position": torch.arange(2)}
    with pytest.raises(ValueError, match=r"0\.\.2"):
        make(6, classes=3)(batch if label is None else batch | {"label": label})
