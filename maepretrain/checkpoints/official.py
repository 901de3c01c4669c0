"""The layout of the official MAE checkpoints, in both directions.

The official repository (facebookresearch/mae) publishes `mae_pretrain_vit_*.pth` with the encoder
alone (150 tensors for ViT-B), `mae_pretrain_vit_*_full.pth` with the decoder (254) trained with
norm_pix, and `mae_visualize_*.pth` with a decoder of raw pixels, under cc-by-nc-4.0.
"""

import math
import re
from typing import Any, Literal, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maepretrain.checkpoints.weights import load_exactly
from maepretrain.models.mae.model import MaskedAutoencoder

# Width, blocks, patch side: ViT-B, L and H of section 4. Every official decoder has 16 heads.
OFFICIAL_ENCODERS = {
    (768, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}


def official_weights(model: MaskedAutoencoder, decoder: bool = True) -> dict[str, Tensor]:
    """The model's weights under the official names; they share the model's memory."""
    return {
        name.removeprefix("encoder."): tensor
        for name, tensor in model.state_dict().items()
        if decoder or name.startswith("encoder.")
    }


def load_official(
    model: MaskedAutoencoder, weights: dict[str, Tensor]
) -> Literal["encoder", "encoder and decoder"]:
    """Load weights in the official layout, all or nothing; the decoder stays if they have none.

    Returns:
        The parts that were loaded.

    Raises:
        ValueError: names or shapes that are not exactly the model's.
    """
    decoder = any(name.startswith("decoder_") for name in weights)
    load_exactly(official_weights(model, decoder), weights)
    return "encoder and decoder" if decoder else "encoder"


def official_model(weights: dict[str, Tensor], norm_pix: bool = True) -> MaskedAutoencoder:
    """The official model (ViT-B, L or H) that has the weights' shapes, with these weights.

    Args:
        weights: in the official layout, with or without a decoder.
        norm_pix: whether the decoder was trained for normalised pixels, which no shape shows.

    Raises:
        ValueError: weights of another model.
    """
    width, channels, patch, _ = _shape(weights, "patch_embed.proj.weight", 4)
    size = (width, _blocks(weights, "blocks."), patch)
    if size not in OFFICIAL_ENCODERS:
        raise ValueError(
            f"weights of width {size[0]}, depth {size[1]} and patch size {size[2]} are of no "
            f"official MAE: {', '.join(OFFICIAL_ENCODERS.values())}"
        )
    _, positions, _ = _shape(weights, "pos_embed", 3)
    decoder = {}
    if "decoder_embed.weight" in weights:
        decoder["decoder_width"] = _shape(weights, "decoder_embed.weight", 2)[0]
        decoder["decoder_depth"] = _blocks(weights, "decoder_blocks.")
    model = MaskedAutoencoder(
        OFFICIAL_ENCODERS[size],
        image_size=math.isqrt(positions - 1) * patch,
        channels=channels,
        decoder_heads=16,
        norm_pix=norm_pix,
        **decoder,
    )
    load_official(model, weights)
    return model


def _shape(weights: dict[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    if name not in weights or weights[name].ndim != axes:
        raise ValueError(f"weights are of no official MAE: no {name} with {axes} axes")
    return tuple(weights[name].shape)


def _blocks(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(prefix)})


def check_official(model: MaskedAutoencoder, theirs: str) -> None:
    """Refuse a model that the official code, and what follows it, cannot express.

    Raises:
        ValueError: a property that `theirs` does not have.
    """
    encoder = model.encoder
    h, w = encoder.patch_embed.img_size
    block = cast(Any, encoder.blocks[0])
    bias = block.attn.qkv.bias is not None
    wrong = {
        f"takes square images, not {h}x{w}": h != w,
        "has a class token, and this encoder none": encoder.cls_token is None,
        "has no register tokens": encoder.reg_token is not None,
        "has a position for the class token": encoder.no_embed_class,
        "has blocks with biases in q, k and v": not bias,
        "has plain blocks with GELU and LayerNorm of eps 1e-6": not _plain(encoder),
        "has a decoder of self-attention": model.decoder != "self",
        "has its mask tokens in the decoder": model.mask_tokens_in_encoder,
    }
    for rule, broken in wrong.items():
        if broken:
            raise ValueError(f"{theirs} {rule}")


def _plain(encoder: VisionTransformer) -> bool:
    """Return whether a ViT has the paper's blocks and nothing else."""
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    modules = [*(f"blocks.{layer}" for layer in layers), "patch_embed.proj", "norm"]
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    names = {re.sub(r"^blocks\.\d+\.", "blocks.", name) for name in encoder.state_dict()}
    blocks = cast(Any, encoder.blocks)
    return (
        names - {"cls_token", "reg_token", "pos_embed"} == expected
        and type(blocks[0].mlp.act) is nn.GELU
        and all(norm.eps == 1e-6 for b in blocks for norm in (b.norm1, b.norm2))
    )
