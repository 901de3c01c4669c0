"""Iterative decoding (Ororbia, Mali, Wu, O'Connell, Dreese, Miller and Giles 2019, "Learned neural
iterative decoding for lossy image compression systems", arXiv 1803.05863): a recurrent network that
looks at a reconstruction and at the code, again and again, and puts right what it can. It needs no
bit more, and works behind any encoder and decoder.

As in the paper an image is patches, those that the code has one column of numbers for; a state is
kept for each, and all eight neighbours are its context (causal and non-causal); the loss is the
mean error of all steps.

Deviations: the first estimate is that of a decoder, not zero; a convolutional GRU for all patches
at once, in the place of patch after patch; each step adds to the estimate before it.

Axes: b images, c channels, h w sides, k channels of the code, i j sides of the code (h / p, w / p).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ConvGRU(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) whose products are convolutions, with torch.nn.GRU's
    gates: r, z = sigmoid, n = tanh(x + r h), h' = (1 - z) n + z h.

    Initial values: xavier-uniform weights, zero biases.

    Args:
        inputs: channels of the input.
        hidden: channels of the state.
        kernel: side of the convolution of the input, odd.
        stride: of that convolution; the state is smaller by it.
        state_kernel: side of the convolution of the state, odd.
    """

    def __init__(
        self, inputs: int, hidden: int, kernel: int = 3, stride: int = 1, state_kernel: int = 1
    ) -> None:
        super().__init__()
        self.of_input = nn.Conv2d(inputs, 3 * hidden, kernel, stride, kernel // 2)
        self.of_state = nn.Conv2d(hidden, 3 * hidden, state_kernel, 1, state_kernel // 2)
        initialise(self)

    def forward(
        self, x: Float[Tensor, "b c h w"], state: Float[Tensor, "b d i j"] | None
    ) -> Float[Tensor, "b d i j"]:
        """The next state; None stands for zeros."""
        from_input = self.of_input(x)
        if state is None:
            b, three, i, j = from_input.shape
            state = from_input.new_zeros(b, three // 3, i, j)
        reset, update, new = from_input.chunk(3, 1)
        reset_h, update_h, new_h = self.of_state(state).chunk(3, 1)
        z = (update + update_h).sigmoid()
        candidate = (new + (reset + reset_h).sigmoid() * new_h).tanh()
        return (1 - z) * candidate + z * state


class Refinement(nn.Module):
    """x_k = x_{k-1} + a correction read off the state of each patch, for a fixed number of steps.

    Initial values: those of ConvGRU; the last layer zero, so that all steps begin at x_0.

    Args:
        channels: of the images.
        code: channels of the code.
        patch: side of the patches: how many pixels a place of the code stands for.
        steps: of the refinement.
        width: channels of the state.

    Raises:
        ValueError: no steps or no width.
    """

    def __init__(
        self, channels: int, code: int, patch: int, steps: int = 3, width: int = 48
    ) -> None:
        super().__init__()
        if min(steps, width) < 1:
            raise ValueError(f"refinement of {steps} steps and width {width}: each must be over 0")
        self.steps, self.patch = steps, patch
        values = channels * patch**2
        self.read = nn.Conv2d(values + code, width, 1)
        self.cell = ConvGRU(width, width, state_kernel=3)
        self.write = nn.Conv2d(width, values, 1)
        initialise(self.read)
        nn.init.zeros_(self.write.weight)
        assert self.write.bias is not None
        nn.init.zeros_(self.write.bias)

    def forward(
        self, first: Float[Tensor, "b c h w"], code: Float[Tensor, "b k i j"]
    ) -> list[Float[Tensor, "b c h w"]]:
        """The estimates of all steps, the best one last."""
        estimates = []
        state = None
        x = first
        for _ in range(self.steps):
            patches = F.pixel_unshuffle(x, self.patch)  # (b, c p p, i, j)
            state = self.cell(self.read(torch.cat([patches, code], 1)).relu(), state)
            x = x + F.pixel_shuffle(self.write(state), self.patch)
            estimates.append(x)
        return estimates


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights (Glorot and Bengio 2010) and zero biases in all convolutions."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
