"""What the experiments of examples/capacity.py claim, held to their figures."""

import capacity
import pytest

pytestmark = pytest.mark.slow


def test_what_is_learnt_is_of_the_data_that_was_seen() -> None:
    errors = capacity.data_specific()
    seen = {(a, b): errors[f"trained on {a}, shown {b}"] for a, b in PAIRS}
    assert seen["digits", "patches"] > 3 * seen["patches", "patches"]
    assert seen["patches", "digits"] > 2 * seen["digits", "digits"]


PAIRS = [(a, b) for a in ("digits", "patches") for b in ("digits", "patches")]


def test_without_a_penalty_an_overcomplete_code_copies() -> None:
    found = capacity.copying()
    copied = found["overcomplete, digits"]
    assert copied < 0.05 * found["undercomplete, digits"]
    assert copied < 0.2 * found["overcomplete and sparse, digits"]
    # Noise is not of the digits' kind, and still copied: far better than by digits' features.
    assert found["overcomplete, noise"] < 0.6 * found["overcomplete and sparse, noise"]
    assert found["overcomplete, active"] > 0.3
    assert found["overcomplete and sparse, active"] < 0.5 * found["overcomplete, active"]


def test_one_number_memorises_a_small_set_if_the_coder_is_powerful() -> None:
    found = capacity.memorising()
    assert found["deep, the six"] < 0.1 * found["mean of the six, the six"]
    assert found["linear, the six"] > 0.3 * found["mean of the six, the six"]
    assert found["deep, others"] > 0.7 * found["mean image, others"]


def test_an_overcomplete_code_makes_xor_separable() -> None:
    accuracy = capacity.exclusive_or()
    assert accuracy["points"] < 0.8 and accuracy["code of 1"] < 0.8
    assert accuracy["code of 16"] > 0.98


def test_contraction_is_stronger_off_the_manifold_than_along_it() -> None:
    found = capacity.contraction()
    assert found["contractive, error"] < 0.02
    assert found["contractive, along / off"] > 5
    assert found["contractive, along / off"] > 2 * found["no penalty, along / off"]
