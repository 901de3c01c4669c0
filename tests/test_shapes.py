"""Types and shapes of every call of the package are checked while tests run."""

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from maepretrain.randomness import uniform

POSITION = torch.arange(3)


@pytest.mark.parametrize(
    ("seed", "position"), [("0", POSITION), (0, POSITION[:, None]), (0, POSITION.float())]
)
def test_a_call_with_another_type_or_shape_fails(seed: Any, position: torch.Tensor) -> None:
    with pytest.raises(TypeCheckError):
        uniform(seed, "crop", position, 4)
