"""FISTA against scikit-learn's coordinate descent, and a dictionary that is found again."""

from typing import Any

import pytest
import torch
from sklearn.decomposition import sparse_encode
from torch import Tensor
from torch.nn import functional as F

from maepretrain.models.autoencoders.predictive_sparse import PredictiveSparse, fista
from maepretrain.workflows.quickstart import digits


def problem(v: int, d: int, b: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(b, v).double(), F.normalize(torch.randn(v, d).double(), dim=0)


@pytest.mark.parametrize(("v", "d", "penalty"), [(20, 10, 0.1), (20, 30, 0.3), (8, 8, 1.0)])
def test_fista_is_the_lasso(v: int, d: int, penalty: float) -> None:
    x, dictionary = problem(v, d)
    ours = fista(x, dictionary, penalty, 2000)
    theirs = sparse_encode(
        x.numpy(), dictionary.T.numpy(), algorithm="lasso_cd", alpha=penalty, max_iter=100000
    )
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=2e-4, rtol=0)
    assert 0 < float((ours == 0).double().mean()) < 1


def test_fista_with_a_prediction_is_the_lasso_of_a_longer_vector() -> None:
    """proximity |z - p|^2 = |sqrt(proximity) p - sqrt(proximity) z|^2: d more rows."""
    x, dictionary = problem(12, 20)
    predicted = torch.randn(5, 20).double()
    root = 0.7**0.5
    longer = torch.cat([dictionary, root * torch.eye(20).double()])
    whole = torch.cat([x, root * predicted], 1)
    ours = fista(x, dictionary, 0.3, 2000, 0.7, predicted)
    theirs = sparse_encode(
        whole.numpy(), longer.T.numpy(), algorithm="lasso_cd", alpha=0.3, max_iter=100000
    )
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=2e-4, rtol=0)


def test_fista_is_faster_than_plain_shrinkage() -> None:
    """Beck and Teboulle, theorem 4.4: energy - least <= 2 L |z0 - z*|^2 / (k + 1)^2; from the same
    start plain shrinkage (ISTA) is above that."""
    x, dictionary = problem(20, 40, 1)

    def energy(z: Tensor) -> float:
        return float(0.5 * (x - z @ dictionary.T).square().sum() + 0.05 * z.abs().sum())

    best = fista(x, dictionary, 0.05, 5000)
    curvature = float(torch.linalg.matrix_norm(dictionary, 2) ** 2)
    for k in (5, 20, 80):
        bound = 2 * curvature * float(best.square().sum()) / (k + 1) ** 2
        assert energy(fista(x, dictionary, 0.05, k)) - energy(best) <= bound
    z = torch.zeros_like(best)
    for _ in range(80):
        z = F.softshrink(z - (z @ dictionary.T - x) @ dictionary / curvature, 0.05 / curvature)
    gap, plain = energy(fista(x, dictionary, 0.05, 80)) - energy(best), energy(z) - energy(best)
    assert gap < 0.5 * plain


def test_code_of_a_sample_does_not_depend_on_the_batch() -> None:
    x, dictionary = problem(20, 30)
    torch.testing.assert_close(
        fista(x, dictionary, 0.1, 50)[2:3], fista(x[2:3], dictionary, 0.1, 50)
    )


@pytest.fixture(scope="module")
def learnt() -> tuple[PredictiveSparse, Tensor, list[dict[str, Tensor]]]:
    """A model trained on sparse sums of columns of a known dictionary."""
    torch.manual_seed(1)
    true = F.normalize(torch.randn(16, 20), dim=0)
    model = PredictiveSparse([16], 1, 20, penalty=0.1, proximity=0.1, steps=20)
    adam, seen = torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(500):
        on = torch.rand(128, 20).argsort(1) < 2
        z = on * torch.randn(128, 20).sign() * (1 + torch.rand(128, 20))
        adam.zero_grad()
        seen.append(model({"input": (z @ true.T)[:, None]}))
        seen[-1]["loss"].backward()
        adam.step()
    return model, true, seen


def test_finds_the_dictionary_up_to_sign_and_order(learnt: Any) -> None:
    model, true, _ = learnt
    found = (model.dictionary.detach().T @ true).abs()
    assert float(found.amax(0).min()) > 0.95
    assert len(set(found.argmax(0).tolist())) == 20
    torch.manual_seed(2)
    random = F.normalize(torch.randn(16, 20), dim=0).T @ true
    assert float(random.abs().amax(0).min()) < 0.8


def test_prediction_approaches_the_inferred_code(learnt: Any) -> None:
    _, _, seen = learnt
    assert seen[-1]["prediction"] < 0.6 * seen[0]["prediction"]
    assert seen[-1]["error"] < 0.2 * seen[0]["error"]
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]


def test_columns_have_length_one_whatever_the_optimizer_does(learnt: Any) -> None:
    model, _, _ = learnt
    torch.testing.assert_close(model.dictionary.norm(dim=0), torch.ones(20))
    assert float((model.columns.detach().norm(dim=0) - 1).abs().max()) > 0.01


def test_loss_is_the_energy_at_the_inferred_code() -> None:
    torch.manual_seed(0)
    model = PredictiveSparse(8, 1, 40, penalty=0.2, proximity=0.5, steps=300)
    images = torch.from_numpy(digits()[0].images[:3]).float()[:, None] / 255
    z, predicted, x = model.infer(images), model.encode(images), images.flatten(1)
    energies = [
        0.5 * (x[i] - model.dictionary @ z[i]).square().sum()
        + 0.2 * z[i].abs().sum()
        + 0.25 * (z[i] - predicted[i]).square().sum()
        for i in range(3)
    ]
    losses = model({"input": images})
    torch.testing.assert_close(losses["loss"], torch.stack(energies).mean())
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_inferred_code_is_that_of_least_energy() -> None:
    """The gradient of the smooth part is -penalty x sign where the code is not 0, and no larger
    elsewhere."""
    torch.manual_seed(0)
    model = PredictiveSparse(8, 1, 40, penalty=0.2, proximity=0.5, steps=300)
    images = torch.from_numpy(digits()[0].images[:3]).float()[:, None] / 255
    with torch.no_grad():
        z, predicted, d = model.infer(images), model.encode(images), model.dictionary
        slope = (z @ d.T - images.flatten(1)) @ d + 0.5 * (z - predicted)
    torch.testing.assert_close(slope[z != 0], -0.2 * z[z != 0].sign(), atol=1e-3, rtol=0)
    assert float(slope.abs().max()) < 0.2 + 1e-3
    assert 0.05 < float((z == 0).float().mean()) < 0.95


def test_contract() -> None:
    model, images = PredictiveSparse(8, 2, 40), torch.randn(3, 2, 8, 8)
    assert model.encode(images).shape == (3, 40)
    drawn = model.reconstruct(images)
    assert drawn._fields == ("original", "inferred", "reconstruction")
    for code, row in ((model.infer(images), drawn[1]), (model.encode(images), drawn[2])):
        torch.testing.assert_close(row.flatten(1), code @ model.dictionary.T)
    assert all(row.shape == images.shape for row in drawn)
    assert [len(group) for group in model.layers()] == [3, 0]
    assert "40 columns" in model.summary()["dictionary"]
    with pytest.raises(ValueError, match=r"inputs are \(2, 9, 8\)"):
        model.encode(torch.zeros(1, 2, 9, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width 0"),
        ({"steps": 0}, "steps 0"),
        ({"penalty": -1.0}, "penalty -1.0"),
        ({"proximity": 0.0}, "proximity 0.0"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PredictiveSparse(8, **arguments)
