"""The benchmarks: every peer computes the loss that ours does, the file of results keeps what
others wrote, every benchmark answers --help."""

import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny

from benchmarks import __main__ as command
from benchmarks.gemm import products
from benchmarks.loop import Clock
from benchmarks.peers import PEERS, Official, Side, available, ours
from benchmarks.scaling import quarters
from benchmarks.step import EQUAL, Step, differences, measure, report, totals
from benchmarks.timing import interleaved, ratio, table
from maepretrain.models.flops import flops
from maepretrain.models.mae.model import MaskedAutoencoder

NAMES = [
    name for name in (*command.NAMES, *command.HOURS) if (command.HERE / f"{name}.py").exists()
]


def given(model: MaskedAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and noise."""
    return torch.randn(3, 3, 32, 32), torch.rand(3, model.grid[0] * model.grid[1])


@pytest.fixture(scope="module")
def peers() -> tuple[MaskedAutoencoder, dict[str, Side], dict[str, str]]:
    """A model and those of its peers that are installed; transformers is, for other tests."""
    model = tiny()
    found = model, *available(model)
    assert {"official arrangement", "Hugging Face"} <= set(found[1])
    assert set(found[1]) | set(found[2]) == set(PEERS)
    return found


@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_our_loss(peers: Any, name: str) -> None:
    """Other people's code, our weights and masks."""
    model, sides, missing = peers
    if name in missing:
        pytest.skip(missing[name])
    images, noise = given(model)
    assert differences(model, {name: sides[name]}, images, noise)[name] <= EQUAL
    assert ours(model).loss(images, noise).item() > 0.5


@pytest.mark.parametrize("norm_pix", [True, False])
def test_official_arrangement_has_our_gradients(norm_pix: bool) -> None:
    """Not only the loss: what is trained is the same."""
    model = tiny(norm_pix=norm_pix)
    other = Official(model)
    images, noise = given(model)
    model({"input": images}, noise)["loss"].backward()
    other(images, noise).backward()
    theirs = {name: p.grad for name, p in other.named_parameters()}
    mine = {name.removeprefix("encoder."): p.grad for name, p in model.named_parameters()}
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


def test_peers_train_the_same_numbers(peers: Any) -> None:
    """Fixed positions are no parameters; stable-pretraining's mask token has a projection more."""
    model, sides, _ = peers
    counts = {
        name: sum(p.numel() for p in side.module.parameters() if p.requires_grad)
        for name, side in sides.items()
    }
    expected = sum(p.numel() for p in model.parameters())
    more = 32 * 16 + 32  # its weight; and the token has the encoder's width
    assert counts.pop("stable-pretraining", expected + more) == expected + more
    assert set(counts.values()) == {expected}


def test_a_wrong_peer_is_found(peers: Any) -> None:
    """The class token in the decoder, or not, is a difference that the comparison sees."""
    model, _, _ = peers
    images, noise = given(model)
    other = Official(model, decode_class_token=False)
    found = differences(model, {"other": Side(other, other)}, images, noise)
    assert found["other"] > EQUAL


def test_step_tables(peers: Any) -> None:
    """Measured on a small model; the table's ratios are those of the seconds."""
    model, sides, _ = peers
    images, noise = given(model)
    compared = {"**maepretrain**": ours(model), **sides}
    steps = {name: Step(side, images, noise) for name, side in compared.items()}

    times, rate = measure(steps, lambda: 1e9, 2)
    assert rate == 1e9
    fused, shipped = (totals(times, steps, as_shipped) for as_shipped in (False, True))
    for i in range(2):
        official = times["compute"]["official arrangement"][i]
        assert (
            fused["official arrangement"][i] == official + times["fused"]["official arrangement"][i]
        )
        assert (
            shipped["official arrangement"][i]
            == official + times["loop"]["official arrangement"][i]
        )
        assert fused["Hugging Face"][i] == shipped["Hugging Face"][i]
    seconds = {"**maepretrain**": [0.9, 1.8], "official arrangement": [1.0, 2.0], "a": [1.1, 2.2]}
    steps = {name: next(iter(steps.values())) for name in seconds}
    text = report(seconds, steps, lean=1e9, rate=1e9, as_shipped=False)
    assert "| **maepretrain** | fused | 1,350 | 0.900 | 74 % |" in text
    assert "over the best peer (a) 0.818" in text and text.endswith("met.")
    assert report(seconds | {"a": [0.8, 1.6]}, steps, 1e9, 1e9, False).endswith("missed.")


def test_optimizer_flag_is_what_runs() -> None:
    """Fused and loop are the same update, and the fused kernel is really taken."""
    updated = []
    for fused in (True, False):
        model = tiny()
        step = Step(ours(model), *given(model))
        step.compute()
        with torch.profiler.profile() as profile:
            step.update(fused)
        kernels = {event.key for event in profile.key_averages()}
        assert ("aten::_fused_adamw_" in kernels) == fused
        updated.append(model.decoder_pred.weight.detach().clone())
    torch.testing.assert_close(*updated)


def test_products_are_the_flops_of_the_step() -> None:
    """All but the attention's own products, which are no linear layers: q k^T and its softmax by v
    are 4 t^2 d forward in each block, and twice that backward."""
    model, batch = tiny(encoder_width=32, decoder_depth=3), 3
    linear = sum(product.times * product.flops for product in products(model, batch))
    # The gradient of the pixels is timed, though no step needs it.
    embedding = next(p for p in products(model, batch) if p.layer == "patch embedding")
    linear -= embedding.flops // 3
    visible = model.masking.visible(model.grid)
    seen, every, masked = 1 + visible, 1 + 16, 16 - visible
    attention = 3 * 4 * (2 * seen**2 * 32 + (2 * every + masked) * every * 16)
    whole = flops(
        model, {"input": torch.empty(batch, 3, 32, 32), "position": torch.arange(batch)}
    ).training
    assert whole == pytest.approx(linear / batch + attention)


def test_interleaved_takes_turns() -> None:
    """Once to warm up, then each in each round, another one first."""
    called: list[str] = []
    functions: dict[str, Callable[[], object]] = {
        name: (lambda name=name: called.append(name)) for name in "abc"
    }
    times = interleaved(functions, 2)
    assert "".join(called) == "abc" + "abc" + "bca"
    assert [len(seconds) for seconds in times.values()] == [2, 2, 2]
    with pytest.raises(ValueError, match="rounds 0"):
        interleaved(functions, 0)


def test_ratio_is_the_median_of_ratios() -> None:
    assert ratio([1.0, 8.0, 3.0], [1.0, 2.0, 2.0]) == 1.5
    assert table(("a", "b"), [(1, 2)]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_clock_splits_a_step() -> None:
    """What is spent before forward and after backward is outside, and no more than the step."""
    import time

    def spend(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    model = tiny()
    images, noise = given(model)
    clock = Clock(model)
    for _ in range(6):
        spend(0.05)
        loss = model({"input": images}, noise)["loss"]
        spend(0.03)
        loss.backward()
        spend(0.02)
    step, outside, workers = clock.close()
    assert 0.1 <= outside < step
    assert workers == 0
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_quarters() -> None:
    assert quarters([9.0, 9.0, 1.0, 3.0, 9.0, 9.0, 4.0, 6.0]) == (2.0, 5.0)
    with pytest.raises(ValueError, match="3 samples"):
        quarters([1.0, 2.0, 3.0])
    assert statistics.mean(quarters([1.0] * 4)) == 1.0


def test_a_section_is_replaced_alone() -> None:
    """The rest of the file is the same, byte by byte; order is that of the benchmarks."""
    text = command.with_section("", "gemm", "| first |")
    text = command.with_section(
        text + "\n## Notes by hand\n\nkept\n", "engines", "### Part\n| kept |"
    )
    assert text.index("## gemm") < text.index("## engines")
    text = command.with_section(text, "step", "| new |")
    assert text.startswith(command.TITLE.rstrip()) and text.endswith("by hand\n\nkept\n")
    assert text.index("## step") < text.index("## gemm")
    again = command.with_section(text, "gemm", "| second |")
    assert again == text.replace("| first |", "| second |")
    assert command.with_section(again, "gemm", "| second |") == again


def test_results_are_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A real benchmark in a real process; a benchmark that fails leaves its section alone."""
    results = tmp_path / "RESULTS.md"
    results.write_text(command.with_section("", "order", "| kept |"))
    assert command.main(["gemm", "--rounds", "0"], results) == 1  # with one line that says why
    assert results.read_text() == command.with_section("", "order", "| kept |")
    said = capfd.readouterr().err
    assert "failed: gemm" in said and "--rounds: 0 must be at least 1" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("argv", [["stpe"], ["step", "gemm", "--rounds", "3"], ["--rounds", "3"]])
def test_wrong_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    assert end.value.code == 2
    assert argv[-2 if len(argv) > 1 else 0] in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in ("data", "loop", "scaling"):
        pytest.importorskip("skimage")
    if name == "data":
        pytest.importorskip("litdata")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert end.value.code == 0
    assert f"python -m benchmarks {name}" in capsys.readouterr().out
    assert command.purpose(name).endswith(".")
