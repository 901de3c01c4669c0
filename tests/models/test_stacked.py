"""Each layer of a stack against the same layer trained alone."""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import pytest
import torch
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.coders import Coder, Dense
from maepretrain.models.autoencoders.contractive import Contractive
from maepretrain.models.autoencoders.denoising import Denoising
from maepretrain.models.autoencoders.sparse import Sparse
from maepretrain.models.autoencoders.stacked import Stacked
from maepretrain.workflows.quickstart import digits


@cache
def pixels(n: int) -> Tensor:
    return torch.from_numpy(digits()[0].images[:n]).float()[:, None] / 255


def batch(step: int, size: int = 20) -> dict[str, Tensor]:
    position = torch.arange(step * size, (step + 1) * size)
    return {"input": pixels(200)[position % 200], "position": position}


def train(model: nn.Module, steps: int, momentum: float = 0.9) -> nn.Module:
    sgd = torch.optim.SGD(model.parameters(), 0.5, momentum=momentum)
    for step in range(steps):
        sgd.zero_grad()
        model(batch(step))["loss"].backward()
        sgd.step()
    return model


def noisy(coder: Coder) -> nn.Module:
    return Denoising(coder, "masking", 0.3, seed=4)


METHODS: list[Callable[[Coder], nn.Module]] = [Autoencoder, noisy, Contractive]


@pytest.mark.parametrize("layer", METHODS)
@pytest.mark.parametrize("tied", [False, True])
def test_first_layer_is_bit_equal_to_one_trained_alone(layer: Any, tied: bool) -> None:
    torch.manual_seed(0)
    stack = Stacked(8, 1, [24, 12, 6], layer, tied=tied)
    alone = layer(Dense(8, 1, [24], "sigmoid", tied=tied))
    alone.load_state_dict(stack.stack[0].state_dict())
    before = {name: x.clone() for name, x in stack.state_dict().items()}
    train(stack, 15)
    train(alone, 15)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, stack.stack[0].state_dict()[name]), name
    # The others trained too.
    assert all(not torch.equal(x, before[name]) for name, x in stack.state_dict().items())


def test_second_layer_is_one_trained_alone_on_the_codes_of_the_first() -> None:
    """One after the other: the first layer does not change any more."""
    torch.manual_seed(0)
    stack = Stacked(8, 1, [24, 12], samples_per_layer=100)
    alone = Autoencoder(Dense([24], 1, [12], "sigmoid"))
    alone.load_state_dict(stack.stack[1].state_dict())
    train(stack, 12, momentum=0.0)
    sgd, first = torch.optim.SGD(alone.parameters(), 0.5), stack.stack[0]
    for step in range(5, 12):
        with torch.no_grad():
            codes = first.encode(batch(step)["input"])[:, None]  # type: ignore
        sgd.zero_grad()
        alone({"input": codes})["loss"].backward()
        sgd.step()
    for name, value in alone.state_dict().items():
        assert torch.equal(value, stack.stack[1].state_dict()[name]), name


def test_layers_take_turns() -> None:
    torch.manual_seed(0)
    model = Stacked(8, 1, [24, 12, 6], samples_per_layer=40)
    for start, trained in ((0, 0), (20, 0), (40, 1), (80, 2), (120, 2), (10_000, 2)):
        model.zero_grad()
        losses = model({"input": pixels(20), "position": torch.arange(start, start + 20)})
        losses["loss"].backward()
        for number, layer in enumerate(model.stack):
            gradients = [p.grad for p in layer.parameters()]
            assert all(g is not None for g in gradients)  # what DDP waits for
            moved = sum(float(g.abs().sum()) for g in gradients if g is not None)
            assert (moved > 0) == (number == trained)
            assert (float(losses[f"layer_{number + 1}"]) > 0) == (number == trained)
    model.eval()
    losses = model({"input": pixels(20), "position": torch.arange(20)})
    assert all(float(loss) > 0 for loss in losses.values())


def test_a_batch_between_two_turns_is_the_mean_of_its_parts() -> None:
    torch.manual_seed(0)
    model = Stacked(8, 1, [24, 12], noisy, samples_per_layer=40)
    whole = {"input": pixels(20), "position": torch.arange(30, 50)}
    parts = [{name: x[part] for name, x in whole.items()} for part in (slice(10), slice(10, 20))]
    mean = torch.stack([model(part)["loss"] for part in parts]).mean()
    torch.testing.assert_close(model(whole)["loss"], mean)


def test_loss_is_the_sum_of_the_layers_and_falls() -> None:
    torch.manual_seed(0)
    model = Stacked(8, 1, [48, 24], likelihood="bernoulli", code_likelihood="bernoulli")
    first = model(batch(0))
    named = [value for name, value in first.items() if name != "loss"]
    assert list(first) == ["loss", "layer_1", "layer_2"]
    torch.testing.assert_close(first["loss"], torch.stack(named).sum())
    train(model, 60)
    last = model(batch(0))
    assert all(last[name] < first[name] for name in first)


def test_codes_feed_a_support_vector_machine() -> None:
    torch.manual_seed(0)
    model = Stacked(8, 1, [100, 60], noisy, "relu", likelihood="bernoulli")
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        adam.zero_grad()
        model(batch(step, 64))["loss"].backward()
        adam.step()
    (train_set, test_set), scores = digits(), []
    with torch.no_grad():
        codes = [
            model.encode(torch.from_numpy(part.images).float()[:, None] / 255).numpy()
            for part in (train_set, test_set)
        ]
    machine = LinearSVC(random_state=0).fit(codes[0][:300], train_set.labels[:300])
    scores.append(machine.score(codes[1], test_set.labels))
    assert scores[0] > 0.88


def test_contract() -> None:
    model, images = Stacked(8, 1, [24, 12, 6]), pixels(3)
    assert model.encode(images).shape == (3, 6)
    drawn = model.reconstruct(images)
    assert drawn._fields == ("original", "first_layer", "reconstruction")
    codes, coders = model._codes(images), [cast(Any, layer).coder for layer in model.stack]
    torch.testing.assert_close(drawn.first_layer, coders[0].mean(codes[0]))
    down = coders[1].mean(coders[2].mean(codes[2])[:, 0])[:, 0]
    torch.testing.assert_close(drawn.reconstruction, coders[0].mean(down))
    assert all(row.shape == images.shape for row in drawn)
    assert [len(group) for group in model.layers()] == [2, 2, 2, 0]
    # The encoder is a chain of its layers, through which a classifier's gradient goes back.
    model.encode(images).sum().backward()
    assert all(p.grad is not None for group in model.layers() for p in group)
    assert model.summary()["layers"] == "3 Autoencoder, all at once"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"widths": []}, "widths"), ({"samples_per_layer": 0}, "samples_per_layer 0")],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stacked(8, 1, **arguments)


def few_active(coder: Coder) -> nn.Module:
    return Sparse(coder, "kl", weight=0.1)


def test_layers_of_one_mean_activity_train_at_once_only() -> None:
    """Their loss is one of the whole batch: half a batch in one layer's turn has another."""
    torch.manual_seed(0)
    stack = Stacked(8, 1, [24, 12], few_active)
    alone = few_active(Dense(8, 1, [24], "sigmoid"))
    alone.load_state_dict(stack.stack[0].state_dict())
    assert torch.equal(stack(batch(0))["layer_1"], alone(batch(0))["loss"])
    with pytest.raises(ValueError, match="samples_per_layer 40 does not go with Sparse"):
        Stacked(8, 1, [24, 12], few_active, samples_per_layer=40)
