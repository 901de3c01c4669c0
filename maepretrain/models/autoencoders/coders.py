"""Pairs of an encoder and a decoder, of which the autoencoders are made: dense layers, or
convolutions over images and signals.

A coder knows nothing of losses but the distribution that its decoder parameterises. Sizes are
arguments; a method takes any coder.

Axes: b samples, c channels, *size sides, d numbers of the code, v = c x sides, q parameters of a
value.

Initial values: xavier-uniform weights (Glorot and Bengio 2010), zero biases.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.models.autoencoders.likelihoods import Kind, Likelihood

Activation = Literal["none", "sigmoid", "tanh", "relu", "gelu", "softplus"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


class Coder(nn.Module):
    """The interface of coders. An abstract type: configs name Dense or Convolutional.

    Args:
        image_size: side of the square images, [height, width], or [length] of signals.
        channels: of the input.
        likelihood: of the values given the code.
        levels: bins of a categorical likelihood.

    Attributes:
        shape: (c, *size) of an input.
        width: d, numbers of the code.
        hidden_width: numbers of what the encoder's last layer reads.
        code_activation: what the encoder ends in.
    """

    width: int
    hidden_width: int
    code_activation: nn.Module

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        likelihood: Kind,
        levels: int,
    ) -> None:
        super().__init__()
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.shape: tuple[int, ...] = (channels, *sides)
        self.likelihood = Likelihood(likelihood, levels)

    @property
    def values(self) -> int:
        """v: numbers of an input."""
        return math.prod(self.shape)

    def hidden(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b e"]:
        """The input of the encoder's last layer."""
        raise NotImplementedError

    def code(self, hidden: Float[Tensor, "b e"]) -> Float[Tensor, "b d"]:
        """The encoder's last layer."""
        raise NotImplementedError

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b v q"]:
        """Parameters of the distribution of every value."""
        raise NotImplementedError

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output, as `finetune` groups them: each layer, and
        an empty last group in the place of a norm."""
        raise NotImplementedError

    def encode(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The code of normalised inputs.

        Raises:
            ValueError: inputs of another size.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"inputs are {tuple(x.shape[1:])}, the model takes {self.shape}")
        return self.code(self.hidden(x))

    def error(self, code: Float[Tensor, "b d"], x: Float[Tensor, "b c *size"]) -> Float[Tensor, ""]:
        """The mean error of a value of the inputs, decoded from their codes: for a Gaussian decoder
        the mean squared error, otherwise nats."""
        return self.likelihood.error(self.decode(code), x.flatten(1)).mean()

    def nll(self, code: Float[Tensor, "b d"], x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b"]:
        """-log p(x | code) in nats."""
        return self.likelihood.nll(self.decode(code), x.flatten(1))

    def mean(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected input."""
        return self.likelihood.mean(self.decode(code)).unflatten(1, self.shape)

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        encoder = sum(p.numel() for layer in self.layers() for p in layer)
        everything = sum(p.numel() for p in self.parameters())
        return {
            "coder": f"{type(self).__name__}, {self.values:,} values to {self.width:,} and back, "
            f"{self.likelihood.kind}",
            "parameters": f"encoder {encoder:,}, decoder {everything - encoder:,}",
        }


class Dense(Coder):
    """Dense layers; the decoder mirrors the encoder.

    Args:
        image_size: side of the square images, [height, width], or [length] of signals.
        channels: of the input.
        widths: outputs of the encoder's layers, the code last. A code wider than the input is
            overcomplete.
        activation: after each layer but the code and the output.
        code_activation: after the code; null takes `activation`.
        tied: the decoder uses the encoder's weights, transposed.
        likelihood: gaussian (values of any range), bernoulli or categorical (values in 0..1).
        levels: bins of a categorical likelihood.

    Raises:
        ValueError: no widths, a width below 1, or tied weights for a categorical decoder.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 28,
        channels: int = 1,
        widths: Sequence[int] = (64,),
        activation: Activation = "relu",
        code_activation: Activation | None = None,
        tied: bool = False,
        likelihood: Kind = "gaussian",
        levels: int = 16,
    ) -> None:
        super().__init__(image_size, channels, likelihood, levels)
        if not widths or min(widths) < 1:
            raise ValueError(f"widths {list(widths)} must be one layer or more, each at least 1")
        if tied and likelihood == "categorical":
            raise ValueError("tied weights give one number for each value: take another likelihood")
        sizes = [self.values, *widths]
        self.width = sizes[-1]
        self.hidden_width = sizes[-2]
        self.tied = tied
        self.encoder = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]()
        self.code_activation = ACTIVATIONS[code_activation or activation]()
        back = [*reversed(sizes[1:]), self.values * self.likelihood.parameters_per_value]
        if tied:
            self.biases = nn.ParameterList(torch.zeros(o) for o in back[1:])
        else:
            self.decoder = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(back))
        _initialise(self)

    def hidden(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b e"]:
        y = x.flatten(1)
        for layer in self.encoder[:-1]:
            y = self.activation(layer(y))
        return y

    def code(self, hidden: Float[Tensor, "b e"]) -> Float[Tensor, "b d"]:
        return self.code_activation(self.encoder[-1](hidden))

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b v q"]:
        y = code
        for number in range(len(self.encoder)):
            y = self._back(number, y if number == 0 else self.activation(y))
        return y.unflatten(1, (self.values, self.likelihood.parameters_per_value))

    def _back(self, number: int, y: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        """The decoder's layer of that number, the one after the code being 0."""
        if self.tied:
            layer = self.encoder[len(self.encoder) - 1 - number]
            assert isinstance(layer, nn.Linear)
            return F.linear(y, layer.weight.T, self.biases[number])
        return self.decoder[number](y)

    def layers(self) -> list[list[nn.Parameter]]:
        return [*(list(layer.parameters()) for layer in self.encoder), []]


class Convolutional(Coder):
    """Convolutions that halve the sides, over images or signals; the decoder enlarges to the
    nearest neighbour and convolves (Odena, Dumoulin and Olah 2016), which leaves no checkerboard.

    Args:
        image_size: side of the square images, [height, width], or [length] of signals.
        channels: of the input.
        stages: channels of the encoder's convolutions, each of which halves the sides, rounding up.
        code: numbers of the code, by a dense layer; null takes the last stage's map as it is.
        kernel: side of the convolutions, odd.
        activation: after each layer but the code and the output.
        code_activation: after the code; null takes `activation`.
        likelihood: gaussian (values of any range), bernoulli or categorical (values in 0..1).
        levels: bins of a categorical likelihood.

    Raises:
        ValueError: no stages, a width below 1, an even kernel, inputs that are neither images nor
            signals.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 28,
        channels: int = 1,
        stages: Sequence[int] = (16, 32),
        code: int | None = None,
        kernel: int = 3,
        activation: Activation = "relu",
        code_activation: Activation | None = None,
        likelihood: Kind = "gaussian",
        levels: int = 16,
    ) -> None:
        super().__init__(image_size, channels, likelihood, levels)
        if not stages or min(*stages, 1 if code is None else code) < 1:
            raise ValueError(f"stages {list(stages)} and code {code} must be at least 1")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} must be odd")
        if len(self.shape) not in (2, 3):
            raise ValueError(f"convolutions go over images and signals, not {self.shape}")
        signals = len(self.shape) == 2
        convolution = nn.Conv1d if signals else nn.Conv2d
        sizes = [channels, *stages]
        # The sides before each stage and after the last.
        self.sides = [self.shape[1:]]
        for _ in stages:
            self.sides.append(tuple(-(-side // 2) for side in self.sides[-1]))
        self.encoder = nn.ModuleList(
            convolution(i, o, kernel, stride=2, padding=kernel // 2) for i, o in pairwise(sizes)
        )
        outputs = channels * self.likelihood.parameters_per_value
        back = [*reversed(sizes[1:]), outputs]
        self.decoder = nn.ModuleList(
            convolution(i, o, kernel, padding=kernel // 2) for i, o in pairwise(back)
        )
        self.map = (stages[-1], *self.sides[-1])
        flat = math.prod(self.map)
        self.to_code = None if code is None else nn.Linear(flat, code)
        self.from_code = None if code is None else nn.Linear(code, flat)
        before = math.prod((sizes[-2], *self.sides[-2]))
        self.width, self.hidden_width = (flat, before) if code is None else (code, flat)
        self.activation = ACTIVATIONS[activation]()
        self.code_activation = ACTIVATIONS[code_activation or activation]()
        _initialise(self)

    def hidden(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b e"]:
        stages = self.encoder if self.to_code is not None else self.encoder[:-1]
        for stage in stages:
            x = self.activation(stage(x))
        return x.flatten(1)

    def code(self, hidden: Float[Tensor, "b e"]) -> Float[Tensor, "b d"]:
        if self.to_code is not None:
            return self.code_activation(self.to_code(hidden))
        last = self.encoder[-1]
        assert isinstance(last, nn.Conv1d | nn.Conv2d)
        before = hidden.unflatten(1, (last.in_channels, *self.sides[-2]))
        return self.code_activation(last(before)).flatten(1)

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b v q"]:
        y = code if self.from_code is None else self.activation(self.from_code(code))
        y = y.unflatten(1, self.map)
        for number, stage in enumerate(self.decoder):
            y = y if number == 0 else self.activation(y)
            y = stage(F.interpolate(y, size=list(self.sides[-2 - number]), mode="nearest"))
        parameters = y.unflatten(1, (self.shape[0], self.likelihood.parameters_per_value))
        return parameters.movedim(2, -1).flatten(1, -2)  # (b, c, *size, q) to (b, v, q)

    def layers(self) -> list[list[nn.Parameter]]:
        stages = [list(stage.parameters()) for stage in self.encoder]
        code = [] if self.to_code is None else [list(self.to_code.parameters())]
        return [*stages, *code, []]


def _initialise(coder: nn.Module) -> None:
    for module in coder.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
