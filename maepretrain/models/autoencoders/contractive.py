"""Contractive autoencoder (Rifai, Vincent, Muller, Glorot and Bengio 2011, "Contractive
auto-encoders: explicit invariance during feature extraction", equations 2 and 3): the code is made
to change little with the input, by the squared Frobenius norm of the encoder's Jacobian.

The paper has the closed form of one sigmoid layer. Here also: one tanh, ReLU or linear layer; the
exact norm of any encoder by automatic differentiation; Hutchinson's estimate (1989) of it, for
||J||^2 is the mean of |J^T v|^2 over random signs v.

Deviation: errors are means over the values of an input, not sums, so that a weight is smaller by
the number of values.

Axes: b samples, c channels, *size sides, d numbers of the code, r rows J^T is multiplied with.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from maepretrain.data.batch import Batch
from maepretrain.models.autoencoders.autoencoder import Reconstruction
from maepretrain.models.autoencoders.coders import Coder, Dense
from maepretrain.randomness import uniform

Jacobian = Literal["closed", "exact", "hutchinson"]


class Contractive(nn.Module):
    """An autoencoder with a penalty on the norm of the encoder's Jacobian.

    NOTE a small code and large weights of the decoder evade the penalty: tie the weights, as the
    paper does.

    Args:
        coder: Dense or Convolutional.
        weight: of the penalty.
        jacobian: "closed": the formula of one dense layer; "exact": of any encoder, d backward
            passes in one; "hutchinson": an estimate without bias, `probes` backward passes.
        probes: vectors of signs that Hutchinson's estimate takes the mean over.
        seed: seed of the signs.

    Raises:
        ValueError: a negative weight, no probes, "closed" for another encoder than one dense layer
            with sigmoid, tanh, relu or no activation.
    """

    def __init__(
        self,
        coder: Coder,
        weight: float = 1e-3,
        jacobian: Jacobian = "exact",
        probes: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight {weight} must not be negative")
        if probes < 1:
            raise ValueError(f"probes {probes} must be at least 1")
        self.coder = coder
        self.weight = weight
        self.jacobian = jacobian
        self.probes = probes
        self.seed = seed
        if jacobian == "closed":
            self._one_layer()

    def forward(self, batch: Batch) -> Batch:
        """The loss: error + weight x ||J||^2 (equation 3).

        Args:
            batch: `input`, normalised (b, c, *size); `position` (b,).

        Returns:
            `loss`; `error`, that of the decoder; `contraction`, the mean of ||J||^2.
        """
        x = batch["input"]
        code, norms = self._code_and_norms(x, batch["position"])
        error = self.coder.error(code, x)
        contraction = norms.mean()
        return {
            "loss": error + self.weight * contraction,
            "error": error,
            "contraction": contraction,
        }

    def norms(
        self, images: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b"]:
        """||J||^2 of the encoder at each image, the sum of the squares of all d h_j / d x_i
        (equation 2); of Hutchinson's estimate the signs are those of `position`."""
        if position is None:
            position = torch.arange(len(images), device=images.device)
        return self._code_and_norms(images, position)[1]

    def _code_and_norms(
        self, x: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b"]]:
        if self.jacobian == "closed":
            code = self.coder.encode(x)
            # dh_j/dx_i = s'_j W_ji: each unit's slope squared, times the squares of its weights.
            rows = self._one_layer().weight.square().sum(1)
            return code, self._slopes(code).square() @ rows
        trained = torch.is_grad_enabled()
        # Lightning validates in inference mode, in which no gradient can be taken.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            code = self.coder.encode(x)
            vectors = self._signs(code, position) if self.jacobian == "hutchinson" else _unit(code)
            (products,) = torch.autograd.grad(
                code, x, vectors, create_graph=trained, is_grads_batched=True
            )
        squares = products.flatten(2).square().sum(2)  # (r, b)
        return code, squares.mean(0) if self.jacobian == "hutchinson" else squares.sum(0)

    def _one_layer(self) -> nn.Linear:
        """The encoder's only layer.

        Raises:
            ValueError: it has others, or another activation than those with a slope that the code
                tells.
        """
        known = isinstance(self.coder.code_activation, nn.Sigmoid | nn.Tanh | nn.ReLU | nn.Identity)
        if not (known and isinstance(self.coder, Dense) and len(self.coder.encoder) == 1):
            raise ValueError(
                'jacobian "closed" is of one dense layer with sigmoid, tanh, relu or none: '
                'set jacobian to "exact" or "hutchinson"'
            )
        layer = self.coder.encoder[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def _slopes(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """The derivative of the code's activation, by the code."""
        activation = self.coder.code_activation
        if isinstance(activation, nn.Sigmoid):
            return code * (1 - code)
        if isinstance(activation, nn.Tanh):
            return 1 - code.square()
        return (
            (code > 0).to(code.dtype)
            if isinstance(activation, nn.ReLU)
            else code.new_ones(code.shape)
        )

    def _signs(
        self, code: Float[Tensor, "b d"], position: Int64[Tensor, "b"]
    ) -> Float[Tensor, "r b d"]:
        """Vectors of -1 and 1 for each sample."""
        b, d = code.shape
        u = uniform(self.seed, "hutchinson", position, self.probes * d)
        signs = torch.where(u < 0.5, -1.0, 1.0).to(code.dtype)
        return signs.view(b, self.probes, d).movedim(1, 0)

    def encode(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The code."""
        return self.coder.encode(images)

    def decode(self, code: Float[Tensor, "b d"]) -> Float[Tensor, "b c *size"]:
        """The expected images of codes."""
        return self.coder.mean(code)

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c *size"]) -> Reconstruction:
        """The original, and the input decoded from its code."""
        return Reconstruction(images, self.coder.mean(self.coder.encode(images)))

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output."""
        return self.coder.layers()

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        probes = f", {self.probes} probes" if self.jacobian == "hutchinson" else ""
        how = f"weight {self.weight:g}, {self.jacobian} norm of the Jacobian{probes}"
        return {"contraction": how} | self.coder.summary()


def _unit(code: Float[Tensor, "b d"]) -> Float[Tensor, "d b d"]:
    """The unit vectors, the same for each sample."""
    b, d = code.shape
    unit = torch.eye(d, dtype=code.dtype, device=code.device)
    return unit[:, None].expand(d, b, d)
