"""FLOPs against torch's counter on real forwards and backwards, by hand, and as published."""

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.coders import Dense
from maepretrain.models.autoencoders.denoising import Denoising
from maepretrain.models.flops import flops
from maepretrain.models.mae.model import MaskedAutoencoder

SMALL = {"encoder": "vit_tiny_patch16_224", "image_size": 64, "decoder_width": 96}
SMALL |= {"decoder_heads": 3, "decoder_depth": 2}
# With register tokens, and a LayerScale after each part of a block.
REGISTERS = {"encoder": "vit_small_patch14_reg4_dinov2", "patch_size": 16, "encoder_depth": 2}


def batch(n: int, channels: int, side: int) -> dict[str, torch.Tensor]:
    return {"input": torch.rand(n, channels, side, side), "position": torch.arange(n)}


def counted(model: nn.Module, images: dict[str, torch.Tensor]) -> tuple[float, float]:
    """FLOPs of a sample, forward and in all, of the real thing."""
    n = len(images["input"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(images)["loss"]
        forward = counter.get_total_flops() / n
        loss.backward()
        return forward, counter.get_total_flops() / n


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"mask_ratio": 0.5, "patch_size": 8},
        {"encoder": "vit_base_patch16_224", "encoder_depth": 3},
        REGISTERS,
        {"activation_checkpointing": True},
        REGISTERS | {"activation_checkpointing": True},
        {"decoder_depth": 1},
        {"decoder_depth": 3, "reconstruct": 0.3, "activation_checkpointing": True},
        {"decoder": "cross"},
        {"decoder": "cross", "reconstruct": 0.3, "activation_checkpointing": True},
        {"mask_tokens_in_encoder": True},
        {"masks_per_image": 3},
    ],
)
def test_a_masked_autoencoders_parts_are_what_the_counter_counts(changed: dict[str, Any]) -> None:
    model = MaskedAutoencoder(**SMALL | changed)
    images = batch(2, 3, 64)
    forward, training = counted(model, images)
    cost = flops(model, images)
    assert cost.forward == pytest.approx(forward, rel=1e-6)
    assert cost.training + cost.recomputed == pytest.approx(training, rel=1e-6)
    assert (cost.recomputed > 0) == bool(changed.get("activation_checkpointing"))


def test_smaller_images_cost_less() -> None:
    model = MaskedAutoencoder(**SMALL)
    images = batch(2, 3, 32)
    assert flops(model, images).training == pytest.approx(counted(model, images)[1], rel=1e-6)


def test_vit_base_costs_what_was_measured() -> None:
    """The official forward, 19.56 GFLOPs (patch embedding .231, prediction .154), less what is not
    computed here, by hand: patches that are masked, predictions of those that are visible; of the
    first decoder block what mask tokens give of q, k, v, but for once a batch; of the last one
    queries, projection, MLP and attention of the visible ones and the class token."""
    d, tokens, seen, masked, b = 512, 197, 50, 147, 8
    spared = 0.231 * 0.75 + 0.154 * 0.25
    spared += 2 * 3 * d * d * (masked - 196 / b) / 1e9
    spared += 2 * (10 * d * d * seen + 2 * seen * tokens * d) / 1e9
    with torch.device("meta"):
        cost = flops(MaskedAutoencoder(), batch(b, 3, 224))
    assert cost.forward / 1e9 == pytest.approx(19.56 - spared, rel=1e-3)
    assert cost.training / cost.forward == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_another_model_is_counted_and_left_as_it_is(likelihood: Any) -> None:
    """Linears by hand: forward a product each, backward two, the first one. A Bernoulli likelihood
    looks at its values, which fake tensors do not have."""
    coder = Dense(widths=[20, 5], image_size=8, channels=1, likelihood=likelihood)
    model = Denoising(coder) if likelihood == "bernoulli" else Autoencoder(coder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    products = [64 * 20, 20 * 5, 5 * 20, 20 * 64]
    cost = flops(model, batch(3, 1, 8))
    assert cost.forward == 2 * sum(products)
    assert cost.training == 2 * (3 * sum(products) - products[0])
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Attention(nn.Module):
    """A transformer block on the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(64, 4)

    def forward(self, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": self.block(images["input"][:, 0]).mean()}


def test_another_models_attention_is_counted_though_it_is_fused() -> None:
    """By hand: 12 d^2 of matrices for each of 64 tokens, and two products of tokens with tokens."""
    forward = 2 * 64 * (12 * 64**2) + 2 * (2 * 64 * 64 * 64)
    assert flops(Attention(), batch(2, 1, 64)).forward == forward
