"""Masked autoencoder of token sequences: masked language models are denoising autoencoders.

With mask tokens in the encoder it is BERT's objective (Devlin et al. 2018, arXiv 1810.04805,
section 3.1); without, the encoder sees visible tokens only and a small decoder has the mask tokens,
as in the masked autoencoder (He et al. 2021, arXiv 2111.06377, section 3).

Deviations from BERT: every token that is predicted was masked (none is kept, none replaced by
another); positions are fixed; one sentence, no next-sentence loss. Masks are a pure function of
(seed, position of the sample in the run). No place after a text's end is attended to or predicted:
a short text gives what it would give by itself.

Axes: b texts, t tokens of a window, k visible and m masked slots, n some slots, d features.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.data.batch import Batch
from maepretrain.data.decode import PADDING
from maepretrain.models.mae.positions import sincos_positions
from maepretrain.randomness import uniform


class Prediction(NamedTuple):
    """`places` of the window that were masked; where one is after the text's end, its `logits` of
    the 256 bytes mean nothing."""

    places: Int64[Tensor, "b m"]
    logits: Float[Tensor, "b m 256"]


class MaskedTokens(nn.Module):
    """Predicts the masked bytes of a text.

    Initial values: N(0, 1) byte embeddings, which are as large as the sin-cos positions;
    xavier-uniform linears, zero biases, N(0, .02) class and mask tokens, LayerNorm 1 and 0.

    Args:
        image_size: [length] of a window, in tokens.
        width: features of the encoder.
        depth: blocks of the encoder.
        heads: attention heads of the encoder.
        decoder_width: features of the decoder.
        decoder_depth: blocks of the decoder; 0, with mask tokens in the encoder, leaves BERT's
            head: a linear layer, a norm and the prediction.
        decoder_heads: attention heads of the decoder.
        mask_ratio: share of a text's tokens that are hidden; at least one is.
        mask_tokens_in_encoder: the encoder sees mask tokens, as BERT's.
        seed: seed of the masks.

    Raises:
        ValueError: sizes that do not divide, a ratio that leaves nothing to see, masked places that
            no block sees.
    """

    # Of `input`; FLOPs are counted on a batch of this type.
    input_dtype = torch.int64

    def __init__(
        self,
        image_size: int | Sequence[int] = (128,),
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        decoder_width: int = 64,
        decoder_depth: int = 1,
        decoder_heads: int = 4,
        mask_ratio: float = 0.15,
        mask_tokens_in_encoder: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(image_size, int) or len(image_size) != 1:
            raise ValueError(f"image_size {image_size} must be [length]: tokens are a sequence")
        self.length = image_size[0]
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.mask_tokens_in_encoder = mask_tokens_in_encoder
        if not 0 < mask_ratio < 1 or self.length < 2:
            raise ValueError(
                f"mask_ratio {mask_ratio} must be in (0, 1) and the length {self.length} at least 2"
            )
        if depth < 1 or decoder_depth < (0 if mask_tokens_in_encoder else 1):
            raise ValueError(
                f"depth {depth} and decoder_depth {decoder_depth}: the encoder needs a block, and "
                "so does the decoder without mask_tokens_in_encoder"
            )
        for d, h in ((width, heads), (decoder_width, decoder_heads)):
            if d % 2 or d % h:
                raise ValueError(f"width {d} must be even and divisible by {h} heads")
        counts = [max(1, int(mask_ratio * n)) for n in range(self.length + 1)]
        self.masked = counts[-1]
        self.register_buffer("hidden", torch.tensor(counts), persistent=False)
        self.register_buffer("positions", _positions(width, self.length))
        self.register_buffer("decoder_positions", _positions(decoder_width, self.length))
        self.embedding = nn.Embedding(PADDING + 1, width, padding_idx=PADDING)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(
            torch.empty(1, 1, width if mask_tokens_in_encoder else decoder_width)
        )
        self.blocks = nn.ModuleList(_block(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_blocks = nn.ModuleList(
            _block(decoder_width, decoder_heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, PADDING)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def forward(self, batch: Batch) -> Batch:
        """Mean over texts of the mean cross-entropy of their masked tokens, in nats.

        Args:
            batch: `input`, int64 tokens (b, 1, t), PADDING after a text's end; `position` (b,).

        Returns:
            `loss`; `accuracy`, the mean share of masked tokens whose byte is the likeliest.
        """
        places, logits = self.predict(batch["input"], batch["position"])
        target = batch["input"][:, 0].gather(1, places)
        # A text weighs as any other: halves of a batch average to the whole, on several processes.
        n = (target != PADDING).sum(1).clamp(min=1)
        error = F.cross_entropy(
            logits.float().mT, target, ignore_index=PADDING, reduction="none"
        )  # (b, m)
        correct = logits.argmax(-1) == target  # PADDING is not among the logits
        return {"loss": (error.sum(1) / n).mean(), "accuracy": (correct.sum(1) / n).mean()}

    def predict(
        self, images: Shaped[Tensor, "b c *size"], position: Int64[Tensor, "b"]
    ) -> Prediction:
        """Predict the masked places of the samples of these positions in the run.

        Raises:
            ValueError: no tokens, or a window of another length.
        """
        tokens = self._tokens(images)
        visible, masked = self.split(tokens, position)
        places = torch.cat([visible, masked], 1)
        real = F.pad(tokens.gather(1, places) != PADDING, (1, 0), value=True)  # the class token
        x = self._embed(tokens, visible)
        if self.mask_tokens_in_encoder:
            x = torch.cat([x, self.mask_token + F.embedding(masked, self._buffer("positions"))], 1)
        x = self.decoder_embed(self._encode(x, real[:, : x.shape[1]]))
        if not self.mask_tokens_in_encoder:
            x = torch.cat([x, self.mask_token.expand(*masked.shape, -1).to(x.dtype)], 1)
        where = F.embedding(places, self._buffer("decoder_positions"))
        x = x + F.pad(where, (0, 0, 1, 0))
        for block in self.decoder_blocks:
            x = block(x, attn_mask=real[:, None, None])
        return Prediction(masked, self.decoder_pred(self.decoder_norm(x[:, -self.masked :])))

    def split(
        self, tokens: Int64[Tensor, "b t"], position: Int64[Tensor, "b"]
    ) -> tuple[Int64[Tensor, "b k"], Int64[Tensor, "b m"]]:
        """Places that stay visible and those that are masked, a share of each text's own length;
        places after its end fill up both."""
        real = tokens != PADDING
        length = real.sum(1, keepdim=True)
        noise = uniform(self.seed, "mask", position, self.length).masked_fill(~real, 2.0)
        shuffled = torch.argsort(
            noise, dim=1, stable=True
        )  # the text's places, then those after its end
        slot = torch.arange(self.length, device=tokens.device)
        # Hidden ones come first, then what is after the end, then the visible ones.
        group = torch.where(slot < length, 2, 1)
        group = torch.where(slot < self._buffer("hidden")[length], 0, group)
        order = shuffled.gather(1, torch.argsort(group, dim=1, stable=True))
        return order[:, self.masked :], order[:, : self.masked]

    def encode(self, images: Shaped[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """The mean of a text's encoded tokens, of which none is masked.

        Raises:
            ValueError: as of `predict`.
        """
        tokens = self._tokens(images)
        real = tokens != PADDING
        x = self._embed(tokens, torch.arange(self.length, device=tokens.device).expand_as(tokens))
        x = self._encode(x, F.pad(real, (1, 0), value=True))[:, 1:]
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output: embeddings, each block, norm."""
        first = [self.embedding.weight, self.cls_token]
        if self.mask_tokens_in_encoder:
            first.append(self.mask_token)
        blocks = [list(block.parameters()) for block in self.blocks]
        return [first, *blocks, list(self.norm.parameters())]

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        where = "encoder" if self.mask_tokens_in_encoder else "decoder"
        return {"masks": f"{self.masked} of {self.length} tokens; mask tokens in the {where}"}

    def _tokens(self, images: Shaped[Tensor, "b c *size"]) -> Int64[Tensor, "b t"]:
        if images.dtype != torch.int64 or images.shape[1:] != (1, self.length):
            raise ValueError(
                f"inputs are {images.dtype} {tuple(images.shape[1:])}, the model takes int64 "
                f"tokens (1, {self.length}), as .txt shards give them"
            )
        return images[:, 0]

    def _embed(
        self, tokens: Int64[Tensor, "b t"], places: Int64[Tensor, "b k"]
    ) -> Float[Tensor, "b n d"]:
        """The class token, and the tokens of these places."""
        x = self.embedding(tokens.gather(1, places))
        x = x + F.embedding(places, self._buffer("positions"))
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)

    def _encode(
        self, x: Float[Tensor, "b n d"], real: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        for block in self.blocks:
            x = block(x, attn_mask=real[:, None, None])
        return self.norm(x)

    def _buffer(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, name))


def _block(d: int, heads: int) -> Block:
    return Block(d, heads, qkv_bias=True, norm_layer=LayerNorm)


def _positions(d: int, length: int) -> Float[Tensor, "t d"]:
    """Sin-cos positions in one dimension: the columns' half of two-dimensional ones."""
    return sincos_positions(2 * d, (1, length), 0)[0, :, :d]
