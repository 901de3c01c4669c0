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

from maepretrain.models.vit import run_block


class SelfBlock(Block):
    """timm's Block, which computes only what is used of the decoder's first and last block.

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
            hidden: a mask token for each patch of the grid. Before the first block all images have
                the same ones, so that their norm, query, key and value are computed once.
            masked: the patches of each image whose mask tokens follow the tokens of `x`.
            last: so many last tokens are put out, and only their queries are computed.
        """
        attention = cast(Attention, self.attn)
        d = x.shape[-1]
        normed = self.norm1(x)
        if hidden is not None and masked is not None:
            fresh = F.embedding(masked, attention.qkv(self.norm1(hidden)))
            qkv = torch.cat([attention.qkv(normed), fresh], 1)
            x = torch.cat([x, F.embedding(masked, hidden).to(x.dtype)], 1)
            last = last or x.shape[1]
            q = qkv[:, -last:, :d]
            kv = qkv[:, :, d:]
        elif last is not None:
            weight = attention.qkv.weight
            bias = attention.qkv.bias
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
        self.norm1 = LayerNorm(d)
        self.norm2 = LayerNorm(d)
        self.q = nn.Linear(d, d)
        self.kv = nn.Linear(e, 2 * d)
        self.proj = nn.Linear(d, d)
        self.mlp = Mlp(d, 4 * d)

    def forward(
        self, x: Float[Tensor, "b m d"], memory: Float[Tensor, "b t e"]
    ) -> Float[Tensor, "b m d"]:
        """Queries of `x`; keys and values of `memory`."""
        q = self.q(self.norm1(x))
        k, v = self.kv(memory).chunk(2, -1)
        x = x + self.proj(attend(q, k, v, self.heads))
        return x + self.mlp(self.norm2(x))


class SelfDecoder(nn.ModuleList):
    """Blocks of self-attention among all tokens (He et al. 2021, section 3, "MAE decoder").

    Args:
        d: features.
        depth: blocks.
        heads: attention heads.
    """

    def __init__(self, d: int, depth: int, heads: int) -> None:
        _check(d, depth, heads)
        super().__init__(SelfBlock(d, heads) for _ in range(depth))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        hidden: Float[Tensor, "n d"] | None,
        masked: Int64[Tensor, "b m"],
        outputs: int,
        recompute: bool = False,
    ) -> Float[Tensor, "b outputs d"]:
        """So many last tokens, decoded.

        Args:
            x: tokens of the encoder, with positions.
            hidden: a mask token with the position of each patch; None where `x` has them already.
            masked: the patches of each image whose mask tokens follow the tokens of `x`.
            outputs: how many tokens.
            recompute: compute blocks again in the backward pass.
        """
        for number, block in enumerate(self, 1):
            last = outputs if number == len(self) else None
            x = run_block(block, x, hidden, masked, last, recompute=recompute)
            hidden = None
        return x


class CrossDecoder(nn.ModuleList):
    """Blocks of cross-attention from mask tokens to the encoder's tokens.

    Args:
        d: features.
        depth: blocks.
        heads: attention heads.
        e: features of the encoder's tokens.
    """

    def __init__(self, d: int, depth: int, heads: int, e: int) -> None:
        _check(d, depth, heads)
        super().__init__(CrossBlock(d, heads, e) for _ in range(depth))

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        memories: Sequence[Float[Tensor, "b t e"]],
        recompute: bool = False,
    ) -> Float[Tensor, "b m d"]:
        """Mask tokens with positions, decoded; each block reads a memory of its own."""
        for block, memory in zip(self, memories, strict=True):
            x = run_block(block, x, memory, recompute=recompute)
        return x


class FeatureMaps(nn.Module):
    """The memory of each decoder block: its own weighted sum of the outputs of the encoder's
    blocks, normalised (section 3.3, "inter-block attention").

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


def _check(d: int, depth: int, heads: int) -> None:
    if depth < 1:
        raise ValueError(f"decoder_depth {depth} must be at least 1")
    if d % heads:
        raise ValueError(f"decoder_width {d} is not divisible by {heads} heads")


def attend(
    q: Float[Tensor, "b t d"], k: Float[Tensor, "b t2 d"], v: Float[Tensor, "b t2 d"], heads: int
) -> Float[Tensor, "b t d"]:
    """Scaled dot-product attention, each head on its share of the features."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
