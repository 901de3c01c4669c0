"""Stacked autoencoders (Bengio, Lamblin, Popovici and Larochelle 2007; of denoising autoencoders:
Vincent, Larochelle, Lajoie, Bengio and Manzagol 2010).

Each layer is an autoencoder of its own, plain or of any other method of this family, whose inputs
are the codes of the layer below. Their encoders, one on the other, are then fine-tuned as one
network with a classifier (`maepretrain finetune`), or feed an SVM.

Deviation: the papers train layer after layer. Here that is one loss, the sum of the layers' own
losses on codes through which no gradient goes back: all layers train at the same time, each on
what those below it have learnt so far; with `samples_per_layer` one after the other.

Axes: b samples, c channels, *size sides, d numbers of the code of the last layer.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.coders import Activation, Coder, Dense
from maepretrain.models.autoencoders.likelihoods import Kind
from maepretrain.models.autoencoders.sparse import Sparse


class StackedReconstruction(NamedTuple):
    """Rows of a picture, in the (normalised) values of the input; all (b, c, *size)."""

    original: Float[Tensor, "b c *size"]
    first_layer: Float[Tensor, "b c *size"]
    reconstruction: Float[Tensor, "b c *size"]


class Stacked(nn.Module):
    """Minimises each layer's own loss on the codes of the layer below.

    Args:
        image_size: side of the square images, [height, width], or [length] of signals.
        channels: of the input.
        widths: codes of the layers.
        layer: the method of every layer, made of its coder alone: Autoencoder, Denoising,
            Contractive, ... with its arguments but the coder. Its noise is the same in all layers,
            none of which sees another's.
        activation: after each code.
        tied: each layer's decoder uses its encoder's weights, transposed.
        likelihood: of the input given the first code.
        code_likelihood: of a code given the next; bernoulli for codes of a sigmoid.
        samples_per_layer: so many samples train the first layer alone, the next as many the second
            alone and so on, the rest of the run the last; null trains all on all samples. A layer
            whose turn is over gets gradients of zero: with weight decay it would shrink, and Adam
            still follows its old ones for some steps.

    Raises:
        ValueError: no widths, samples_per_layer below 1, or given for layers of Sparse with penalty
            kl: at the end of a turn they would compare the mean activities of processes that train
            different layers.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 28,
        channels: int = 1,
        widths: Sequence[int] = (512, 256),
        layer: Callable[[Coder], nn.Module] = Autoencoder,
        activation: Activation = "sigmoid",
        tied: bool = False,
        likelihood: Kind = "gaussian",
        code_likelihood: Kind = "gaussian",
        samples_per_layer: int | None = None,
    ) -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths name one layer or more")
        if samples_per_layer is not None and samples_per_layer < 1:
            raise ValueError(f"samples_per_layer {samples_per_layer} must be at least 1")
        first = Dense(image_size, channels, widths[:1], activation, None, tied, likelihood)
        rest = [
            Dense([i], 1, [o], activation, None, tied, code_likelihood) for i, o in pairwise(widths)
        ]
        self.stack = nn.ModuleList(layer(coder) for coder in [first, *rest])
        self.samples_per_layer = samples_per_layer
        coupled = any(isinstance(one, Sparse) and one.penalty == "kl" for one in self.stack)
        if coupled and samples_per_layer is not None:
            raise ValueError(
                f"samples_per_layer {samples_per_layer} does not go with Sparse of penalty kl, "
                "whose loss is one of whole batches: leave it null"
            )

    def forward(self, batch: Batch) -> Batch:
        """The sum of the layers' losses.

        Args:
            batch: `input`, normalised (b, c, *size); `position`, int64 (b,).

        Returns:
            `loss`; `layer_1`, `layer_2`, ..., the loss of each layer, 0 while it is not trained.
        """
        x = batch["input"]
        losses = []
        for number, layer in enumerate(self.stack):
            mine = self._trains(number, batch["position"])
            losses.append(_share_of_loss(layer, x, batch["position"], mine))
            with torch.no_grad():
                x = cast(Any, layer).encode(x)[:, None]
        named = {f"layer_{k}": loss.detach() for k, loss in enumerate(losses, 1)}
        return {"loss": torch.stack(losses).sum(), **named}

    def _trains(self, number: int, position: Tensor) -> Bool[Tensor, "b"]:
        """Which samples train a layer; in evaluation all."""
        if self.samples_per_layer is None or not self.training:
            return torch.ones_like(position, dtype=torch.bool)
        turn = position // self.samples_per_layer
        return turn.clamp(max=len(self.stack) - 1) == number

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The code of the last layer."""
        return self._codes(images)[-1]

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes of the last layer, down through all layers."""
        down = code
        for layer in reversed(self.stack):
            down = cast(Any, layer).coder.mean(down.flatten(1))
        return down

    def _codes(self, images: Float[Tensor, "b c *size"]) -> list[Float[Tensor, "b _"]]:
        codes: list[Tensor] = []
        for layer in self.stack:
            x = codes[-1][:, None] if codes else images
            codes.append(cast(Any, layer).encode(x))
        return codes

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> StackedReconstruction:
        """Inputs decoded from the code of the first layer, and through all layers from the
        last."""
        codes = self._codes(images)
        first = cast(Any, self.stack[0]).coder.mean(codes[0])
        return StackedReconstruction(images, first, self.decode(codes[-1]))

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoders' parameters from input to output."""
        return [*(group for layer in self.stack for group in cast(Any, layer).layers()[:-1]), []]

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        layers = {
            f"layer {number}": cast(Any, layer).summary()["coder"]
            for number, layer in enumerate(self.stack, 1)
        }
        turns = self.samples_per_layer
        when = "all at once" if turns is None else f"one after the other, {turns:,} samples each"
        return {"layers": f"{len(self.stack)} {type(self.stack[0]).__name__}, {when}", **layers}


def _share_of_loss(layer: nn.Module, x: Tensor, position: Tensor, mine: Tensor) -> Tensor:
    """The loss of a layer on its samples, weighted by their share of the batch. Where it has none
    its parameters get gradients all the same, of zero: DDP waits for one of each."""
    if not mine.any():
        return torch.stack([0.0 * p.sum() for p in layer.parameters()]).sum()
    loss = layer({"input": x[mine], "position": position[mine]})["loss"]
    return loss * mine.float().mean()
