"""Blocks of the masked autoencoder's decoder: of self-attention (He et al. 2021, arXiv 2111.06377),
or of cross-attention from masked patches to what the encoder saw (Fu et al. 2024, "Rethinking patch
dependence for masked autoencoders", arXiv 2401.14391).

Axes: b images, t tokens, n patches, m masked patches, d features, e features of the encoder.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int64
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F


class SelfBlock(Block):
    """timm's Block, which computes no more than is used of the decoder's first and last block.

    Args:
        d: features.
        heads: attention heads.
    """

    def __init__(self, d: int, heads: int) -> None:
        super().__init__(d, heads, qkv_bias=True, norm_layer=LayerNorm)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Tensor, "b t d"],
        hidden: Float[Tensor, "n d"] | None = None,
        masked: Int64[Tensor, "b m"] | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "b t2 d"]:
        """The block's output, equal to timm's but for rounding.

        Args:
            x: tokens.
            hidden: mask tokens, one for each place of the patch grid; before the first block all
                images have the same, so that norm, query, key and value are computed once a place.
            masked: the places of each image whose mask tokens follow the tokens of `x`.
            last: only so many last tokens are put out, and only their queries are computed.
        """
        attention, d = cast(Attention, self.attn), x.shape[-1]
        normed = self.norm1(x)
        if hidden is not None and masked is not None:
            fresh = F.embedding(masked, attention.qkv(self.norm1(hidden)))
            qkv = torch.cat([attention.qkv(normed), fresh], 1)
            x = torch.cat([x, F.embedding(masked, hidden).to(x.dtype)], 1)
            last = last or x.shape[1]
            q, kv = qkv[:, -last:, :d], qkv[:, :, d:]
        elif last is not None:
            weight, bias = attention.qkv.weight, attention.qkv.bias
            q = F.linear(normed[:, -last:], weight[:d], bias[:d])
            kv = F.linear(normed, weight[d:], bias[d:])
        else:
            return super().forward(x)
        k, v = kv.chunk(2, -1)
        x = x[:, -last:] + attention.proj(attend(q, k, v, attention.num_heads))
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Masked patches look at the encoder's tokens, and not at each other (figure 4 of the paper).

    Args:
        d: features.
        heads: attention heads.
        e: features of the encoder's tokens.
    """

    def __init__(self, d: int, heads: int, e: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(d), LayerNorm(d)
        self.q, self.kv, self.proj = nn.Linear(d, d), nn.Linear(e, 2 * d), nn.Linear(d, d)
        self.mlp = Mlp(d, 4 * d)

    def forward(
        self, x: Float[Tensor, "b m d"], memory: Float[Tensor, "b t e"]
    ) -> Float[Tensor, "b m d"]:
        """Queries of `x`; keys and values of `memory`."""
        q, (k, v) = self.q(self.norm1(x)), self.kv(memory).chunk(2, -1)
        x = x + self.proj(attend(q, k, v, self.heads))
        return x + self.mlp(self.norm2(x))


class FeatureMaps(nn.Module):
    """What each decoder block looks at: its own weighted sum of the encoder's blocks, normalised
    (section 3.3, "inter-block attention").

    Initial values: weights N(0, 1 / maps), LayerNorm 1 and 0.

    Args:
        maps: outputs of the encoder that are summed.
        blocks: decoder blocks.
        e: features of the encoder.
    """

    def __init__(self, maps: int, blocks: int, e: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, maps).normal_(std=1 / math.sqrt(maps)))
        self.norms = nn.ModuleList(LayerNorm(e) for _ in range(blocks))

    def forward(self, maps: Sequence[Float[Tensor, "b t e"]]) -> list[Float[Tensor, "b t e"]]:
        """One memory for each decoder block."""
        summed = torch.tensordot(self.weight, torch.stack(list(maps)), 1)  # (blocks, b, t, e)
        return [norm(memory) for norm, memory in zip(self.norms, summed, strict=True)]


def attend(
    q: Float[Tensor, "b t d"], k: Float[Tensor, "b t2 d"], v: Float[Tensor, "b t2 d"], heads: int
) -> Float[Tensor, "b t d"]:
    """Scaled dot-product attention, each head on its share of the features."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
