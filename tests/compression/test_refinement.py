"""The iterative decoder: its unit against torch.nn.GRUCell, its steps against loops."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.compression.refinement import ConvGRU, Refinement


def test_unit_equals_torchs_cell() -> None:
    """1 x 1 images: convolutions are products, of 3 x 3 kernels only the middle counts."""
    torch.manual_seed(0)
    ours, theirs = ConvGRU(5, 7, 3, state_kernel=3), nn.GRUCell(5, 7)
    with torch.no_grad():
        for conv, weight, bias in (
            (ours.of_input, theirs.weight_ih, theirs.bias_ih),
            (ours.of_state, theirs.weight_hh, theirs.bias_hh),
        ):
            assert conv.bias is not None
            weight.copy_(conv.weight[:, :, 1, 1])
            conv.bias.copy_(bias)
    x, h = torch.randn(4, 5), torch.randn(4, 7)
    found = ours(x[:, :, None, None], h[:, :, None, None])
    torch.testing.assert_close(found[:, :, 0, 0], theirs(x, h))
    torch.testing.assert_close(ours(x[:, :, None, None], None)[:, :, 0, 0], theirs(x))


def test_a_stride_makes_the_state_smaller() -> None:
    cell = ConvGRU(3, 4, 3, 2)
    state = cell(torch.randn(2, 3, 10, 6), None)
    assert state.shape == (2, 4, 5, 3)
    assert cell(torch.randn(2, 3, 10, 6), state).shape == state.shape


def perturbed(steps: int = 3) -> Refinement:
    torch.manual_seed(0)
    refinement = Refinement(2, 3, 4, steps, 5)
    with torch.no_grad():
        for parameter in refinement.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return refinement


def by_loops(r: Refinement, x: Tensor, code: Tensor) -> Tensor:
    """Patch after patch, by GRUCell on the 3 x 3 states around each."""
    p, width = r.patch, r.read.out_channels
    _, _, i, j = code.shape
    state = torch.zeros(width, i, j)
    x = x.clone()
    for _ in range(r.steps):
        seen = torch.zeros(width, i + 2, j + 2)
        for a in range(i):
            for b in range(j):
                patch = x[0, :, a * p : a * p + p, b * p : b * p + p].flatten()
                column = torch.cat([patch, code[0, :, a, b]])
                seen[:, a + 1, b + 1] = F.linear(
                    column, r.read.weight[:, :, 0, 0], r.read.bias
                ).relu()
        before = F.pad(state, (1, 1, 1, 1))
        state = torch.zeros_like(state)
        for a in range(i):
            for b in range(j):
                around = [t[:, a : a + 3, b : b + 3].flatten() for t in (seen, before)]
                gates = [
                    F.linear(t, c.weight.flatten(1), c.bias)
                    for t, c in zip(around, (r.cell.of_input, r.cell.of_state), strict=True)
                ]
                (ri, zi, ni), (rh, zh, nh) = (g.chunk(3) for g in gates)
                z = (zi + zh).sigmoid()
                new = (ni + (ri + rh).sigmoid() * nh).tanh()
                state[:, a, b] = (1 - z) * new + z * before[:, a + 1, b + 1]
                change = F.linear(state[:, a, b], r.write.weight[:, :, 0, 0], r.write.bias)
                x[0, :, a * p : a * p + p, b * p : b * p + p] += change.view(-1, p, p)
    return x


def test_steps_equal_loops_over_patches() -> None:
    refinement = perturbed()
    x, code = torch.randn(1, 2, 12, 8), torch.randn(1, 3, 3, 2)
    with torch.no_grad():
        estimates = refinement(x, code)
        assert len(estimates) == 3
        torch.testing.assert_close(
            estimates[-1], by_loops(refinement, x, code), atol=1e-5, rtol=1e-4
        )


def test_begins_at_the_decoders_estimate() -> None:
    torch.manual_seed(0)
    x, code = torch.randn(2, 3, 16, 8), torch.randn(2, 4, 2, 1)
    assert all(torch.equal(step, x) for step in Refinement(3, 4, 8)(x, code))


def test_learns_what_the_code_says() -> None:
    """An estimate of zeros; the truth stands in the code of each patch and its right neighbour."""
    torch.manual_seed(0)
    refinement = Refinement(1, 2, 2, 2, 16)
    optimizer = torch.optim.Adam(refinement.parameters(), 1e-2)
    errors = []
    for _ in range(150):
        code = torch.rand(16, 2, 4, 4)
        right = F.pad(code[:, 1:], (0, 1))[..., 1:]
        truth = F.interpolate(code[:, :1] + right, scale_factor=2)
        steps = refinement(torch.zeros_like(truth), code)
        loss = torch.stack([(step - truth).square().mean() for step in steps]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert sum(errors[-20:]) / 20 < 0.05 * errors[0]


def test_refuses() -> None:
    with pytest.raises(ValueError, match="0 steps"):
        Refinement(3, 4, 8, 0)
