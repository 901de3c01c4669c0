"""Masked autoencoder (He et al. 2021, arXiv 2111.06377).

The encoder is a timm VisionTransformer that sees the visible patches only; a small decoder predicts
the pixels of the masked ones.

Deviations from the official code, none of which changes the loss: visible pixels are gathered
before they are projected; the decoder runs in shuffled order (attention does not care) with
positions gathered along; what its first block makes of mask tokens is computed once a place; its
last block, final norm, prediction and the target are computed for masked patches only. Masks are a
pure function of (seed, position of the sample in the run).

Axes: b images, c channels, h w pixels, n patches, k visible patches, m masked patches, d features,
p patch side.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int64
from timm.layers.norm import LayerNorm  # eps 1e-6, as in the official code
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maepretrain.data.batch import Batch
from maepretrain.models.mae.decoders import CrossBlock, FeatureMaps, SelfBlock
from maepretrain.models.vit import (
    check_blocks,
    check_divides,
    create_encoder,
    gather_patches,
    sincos_positions,
    unpatchify,
    vit_layers,
)
from maepretrain.randomness import uniform

BLOCKS_TRIED = 32


class Reconstruction(NamedTuple):
    """What a picture shows, in the (normalised) pixel values of the input; all (b, c, h, w)."""

    original: Float[Tensor, "b c h w"]
    masked: Float[Tensor, "b c h w"]
    reconstruction: Float[Tensor, "b c h w"]
    pasted: Float[Tensor, "b c h w"]


class MaskedAutoencoder(nn.Module):
    """Masked autoencoder on a timm ViT.

    Initial values as in the official code: xavier-uniform linears and patch projection, zero
    biases, N(0, .02) class, register and mask tokens, LayerNorm 1 and 0 with eps 1e-6, fixed 2-D
    sin-cos positions.

    Args:
        encoder: name of a timm VisionTransformer with absolute positions.
        image_size: side of the square input, or [height, width].
        patch_size: side of a patch; null takes the encoder's.
        channels: input channels.
        encoder_width: features of the encoder; null takes its own, as for depth and heads.
        encoder_depth: blocks of the encoder.
        encoder_heads: attention heads of the encoder.
        decoder_width: features of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        decoder: "self" attends among all tokens, as the paper; "cross" from masked patches to the
            encoder's tokens (CrossMAE), whose blocks each decoder block weighs for itself.
        mask_ratio: share of patches hidden; int(n * (1 - mask_ratio)) stay visible.
        mask: "random" patches, "block" hides rectangles, "grid" keeps one patch of each 2 x 2.
        reconstruct: share of the masked patches that are predicted, a random choice.
        masks_per_image: masks of each image in a step; the loss is their mean.
        mask_tokens_in_encoder: the encoder sees mask tokens too, as BERT's does (the paper's table
            1c); it shows what leaving them out saves.
        norm_pix: predict each patch normalised by its own mean and variance.
        activation_checkpointing: recompute blocks in the backward pass to save memory.
        seed: seed of the masks.

    Raises:
        ValueError: sizes that do not divide, a mask that leaves nothing to see or to predict, an
            encoder that is no such ViT.
    """

    # Runs on a divided memory too (ZeRO, FSDP2).
    shardable = True

    def __init__(
        self,
        encoder: str = "vit_base_patch16_224",
        image_size: int | tuple[int, int] = 224,
        patch_size: int | None = None,
        channels: int = 3,
        encoder_width: int | None = None,
        encoder_depth: int | None = None,
        encoder_heads: int | None = None,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder: Literal["self", "cross"] = "self",
        mask_ratio: float = 0.75,
        mask: Literal["random", "block", "grid"] = "random",
        reconstruct: float = 1.0,
        masks_per_image: int = 1,
        mask_tokens_in_encoder: bool = False,
        norm_pix: bool = True,
        activation_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        # What makes the same model again: an exported file tells it beside its weights.
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.arguments: dict[str, Any] = arguments
        overrides = {
            "patch_size": patch_size,
            "embed_dim": encoder_width,
            "depth": encoder_depth,
            "num_heads": encoder_heads,
        }
        self.encoder = create_encoder(
            encoder, image_size, channels, **{k: v for k, v in overrides.items() if v is not None}
        )
        self.grid: tuple[int, int] = self.encoder.patch_embed.grid_size
        self.patch_size: int = self.encoder.patch_embed.patch_size[0]
        self.channels, self.seed, self.mask, self.norm_pix = channels, seed, mask, norm_pix
        self.activation_checkpointing = activation_checkpointing
        self.reconstructed, self.masks_per_image = reconstruct, masks_per_image
        self.decoder, self.mask_tokens_in_encoder = decoder, mask_tokens_in_encoder
        _check_options(reconstruct, masks_per_image, mask, decoder, mask_tokens_in_encoder)
        self.hide(mask_ratio)
        width = self.encoder.embed_dim
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth {decoder_depth} must be at least 1")
        if decoder_width % decoder_heads:
            raise ValueError(
                f"decoder_width {decoder_width} is not divisible by {decoder_heads} heads"
            )
        # A buffer: timm's own is trained, the paper's positions are fixed.
        del self.encoder.pos_embed
        prefix = self.encoder.num_prefix_tokens
        skip = 0 if self.encoder.no_embed_class else prefix
        self.encoder.register_buffer("pos_embed", sincos_positions(width, self.grid, skip))

        # Names from here on are those of the official checkpoints.
        masked_width = width if mask_tokens_in_encoder else decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, masked_width))
        self.register_buffer(
            "decoder_pos_embed", sincos_positions(decoder_width, self.grid, prefix)
        )
        if decoder == "self":
            self.decoder_embed = nn.Linear(width, decoder_width)
            blocks = (SelfBlock(decoder_width, decoder_heads) for _ in range(decoder_depth))
        else:
            self.feature_maps = FeatureMaps(len(self.encoder.blocks), decoder_depth, width)
            blocks = (CrossBlock(decoder_width, decoder_heads, width) for _ in range(decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, self.patch_size**2 * channels)
        self._initialise()

    def hide(self, mask_ratio: float) -> None:
        """Hide this share of the patches from now on.

        Raises:
            ValueError: a share that leaves nothing to see or to predict.
        """
        self.mask_ratio = mask_ratio
        self.visible, _ = self.counts(self.grid)
        if self.mask == "grid" and (mask_ratio != 0.75 or self.grid[0] % 2 or self.grid[1] % 2):
            raise ValueError(
                f"mask grid keeps one patch of 2 x 2: it needs mask_ratio 0.75 (not {mask_ratio}) "
                f"and an even patch grid (not {self.grid[0]}x{self.grid[1]})"
            )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.encoder.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        if projection.bias is not None:  # ViTs with a norm before their blocks have none
            nn.init.zeros_(projection.bias)
        for token in (self.encoder.cls_token, self.encoder.reg_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def forward(self, batch: Batch, noise: Float[Tensor, "b n"] | None = None) -> Batch:
        """Mean squared error of the masked patches (section 3, "Reconstruction target").

        Args:
            batch: `input`, normalised images (b, c, h, w); `position`, int64 (b,), where `noise` is
                not given.
            noise: the patches with the smallest noise stay visible.

        Returns:
            `loss`, a scalar.
        """
        images, grid = batch["input"], self._grid(batch["input"])
        if noise is None:
            noise = self.noise(batch["position"], grid)
        if self.masks_per_image > 1:
            images = images.repeat_interleave(self.masks_per_image, 0)
        keep, masked = self._split(noise, grid)
        masked = masked[:, : max(1, round(self.reconstructed * masked.shape[1]))]
        decoded = self._decode(self._encode_visible(images, keep, masked), keep, masked, grid)
        prediction = self.decoder_pred(self.decoder_norm(decoded))
        target = gather_patches(images, masked, grid, "ppc").float()
        if self.norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / _patch_std(target)
        return {"loss": F.mse_loss(prediction.float(), target)}

    def noise(
        self, position: Int64[Tensor, "b"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b2 n"]:
        """Noise whose smallest entries stay visible, from (seed, position) alone; one row for each
        mask of each image.

        Args:
            position: of the samples in the run.
            grid: patches of the images; default those that the model was made for.
        """
        grid = grid or self.grid
        rows = [self._noise(position, grid, number) for number in range(self.masks_per_image)]
        return torch.stack(rows, 1).flatten(0, 1)

    def _noise(
        self, position: Int64[Tensor, "b"], grid: tuple[int, int], number: int
    ) -> Float[Tensor, "b n"]:
        rows, columns = grid
        n, which = rows * columns, f" {number}" if number else ""
        u = uniform(self.seed, "mask" + which, position, n)
        if self.mask == "random":
            return u
        if self.mask == "grid":
            kept = torch.zeros(rows, columns, device=u.device)
            kept[::2, ::2] = -1.0
            return kept.flatten() + u
        chosen = uniform(self.seed, "mask blocks" + which, position, 4 * BLOCKS_TRIED)
        return u + self._first_block(chosen, grid)

    def _first_block(self, u: Float[Tensor, "b u"], grid: tuple[int, int]) -> Float[Tensor, "b n"]:
        """For each patch the number of the first random rectangle that covers it, counted down: the
        first is masked first; 0 where none does.

        Rectangles as in BEiT (Bao et al. 2021, algorithm 1): aspect .3 to 1/.3, area from 1/12 of
        the patches to .4 of them.
        """
        rows, columns = grid
        n = rows * columns
        share, aspect, top, left = u.view(len(u), BLOCKS_TRIED, 4).unbind(-1)  # (b, blocks)
        area = n * (1 / 12 + (0.4 - 1 / 12) * share)
        aspect = (0.3 ** (1 - 2 * aspect)).sqrt()
        height = (area.sqrt() * aspect).round().clamp(1, rows)
        width = (area.sqrt() / aspect).round().clamp(1, columns)
        top = (top * (rows - height + 1)).floor()[..., None]
        left = (left * (columns - width + 1)).floor()[..., None]
        row, column = torch.arange(rows, device=u.device), torch.arange(columns, device=u.device)
        in_rows = (row >= top) & (row < top + height[..., None])  # (b, blocks, rows)
        in_columns = (column >= left) & (column < left + width[..., None])
        covered = (in_rows[..., None] & in_columns[..., None, :]).flatten(2)  # (b, blocks, n)
        countdown = torch.arange(BLOCKS_TRIED, 0, -1, device=u.device)[:, None]
        return (covered * countdown).amax(1).float()

    def counts(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Patches of a grid that stay visible, and those that are predicted.

        Raises:
            ValueError: a mask that leaves nothing to see or to predict.
        """
        n = grid[0] * grid[1]
        visible = int(n * (1 - self.mask_ratio))
        if not 0 < visible < n:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} leaves {visible} of {n} patches visible; at least "
                f"one must be visible and one masked"
            )
        return visible, max(1, round(self.reconstructed * (n - visible)))

    def _grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Patches of images of the size that the model was made for, or of a smaller one."""
        (c, h, w), p = images.shape[1:], self.patch_size
        height, width = self.encoder.patch_embed.img_size
        if c != self.channels or h > height or w > width or h % p or w % p:
            self._check_size(images)
        return h // p, w // p

    def check_smaller(self, h: int, w: int) -> None:
        """Refuse smaller images on which the loss cannot be computed.

        Raises:
            ValueError: sides that the patch size does not divide, or too few patches for the mask.
        """
        check_divides((h, w), self.patch_size)
        rows, columns = h // self.patch_size, w // self.patch_size
        self.counts((rows, columns))
        if self.mask == "grid" and (rows % 2 or columns % 2):
            raise ValueError(f"mask grid needs an even patch grid, not {rows}x{columns}")

    def _split(
        self, noise: Float[Tensor, "b n"], grid: tuple[int, int]
    ) -> tuple[Int64[Tensor, "b k"], Int64[Tensor, "b m"]]:
        """Visible and masked patch numbers; stable, since fp32 noise has ties."""
        ids = torch.argsort(noise, dim=1, stable=True)
        visible, _ = self.counts(grid)
        return ids[:, :visible], ids[:, visible:]

    def _encode_visible(
        self,
        images: Float[Tensor, "b c h w"],
        keep: Int64[Tensor, "b k"],
        masked: Int64[Tensor, "b m"],
    ) -> list[Float[Tensor, "b t d"]]:
        """Prefix tokens and visible patches after each of the encoder's blocks; the last one after
        the encoder's norm (section 3, "MAE encoder")."""
        encoder, grid = self.encoder, self._grid(images)
        pixels = gather_patches(images, keep, grid, "cpp")
        projection = encoder.patch_embed.proj
        # A strided convolution over the whole image, applied to its visible quarter.
        tokens = F.linear(pixels, projection.weight.flatten(1), projection.bias)
        tokens = encoder.patch_embed.norm(tokens)
        positions = self._positions(cast(Tensor, encoder.pos_embed)[0], grid)
        skip = len(positions) - grid[0] * grid[1]
        tokens = tokens + positions[skip + keep]
        if self.mask_tokens_in_encoder:
            tokens = torch.cat([tokens, self.mask_token + positions[skip + masked]], 1)
        tokens = torch.cat([*self._prefix(positions[:skip], len(images)), tokens], 1)
        outputs = [encoder.norm_pre(tokens)]
        for block in encoder.blocks:
            outputs.append(self._run(block, outputs[-1]))
        return [*outputs[1:-1], encoder.norm(outputs[-1])]

    def _positions(
        self, positions: Float[Tensor, "s d"], grid: tuple[int, int]
    ) -> Float[Tensor, "s2 d"]:
        """Positions of prefix tokens, if they have any, and of a grid's patches."""
        if grid == self.grid:
            return positions
        prefix = len(positions) - self.grid[0] * self.grid[1]
        return sincos_positions(positions.shape[1], grid, prefix)[0].to(positions)

    @property
    def _patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def _prefix(self, positions: Float[Tensor, "s d"], b: int) -> list[Tensor]:
        """Class and register tokens with their positions, (b, s, d)."""
        both = (self.encoder.cls_token, self.encoder.reg_token)
        tokens: list[Tensor] = [token for token in both if token is not None]
        if not tokens:
            return []
        prefix = torch.cat(tokens, 1)
        return [(prefix + positions if len(positions) else prefix).expand(b, -1, -1)]

    def _decode(
        self,
        encoded: list[Float[Tensor, "b t d"]],
        keep: Int64[Tensor, "b k"],
        masked: Int64[Tensor, "b m"],
        grid: tuple[int, int],
        outputs: int | None = None,
    ) -> Float[Tensor, "b m2 d2"]:
        """Decoded masked patches (section 3, "MAE decoder"); with `outputs`, so many of the last
        tokens in the order prefix, visible, masked."""
        prefix, last = self.encoder.num_prefix_tokens, outputs or masked.shape[1]
        # Zero at the prefix tokens.
        positions = self._positions(cast(Tensor, self.decoder_pos_embed)[0], grid)
        if self.decoder == "cross":
            ids = torch.cat([keep, masked], 1)[:, -last:]
            x = self.mask_token + positions[prefix + ids]
            memories = self.feature_maps(encoded)
            for block, memory in zip(self.decoder_blocks, memories, strict=True):
                x = self._run(block, x, memory)
            return x
        x, ids = self.decoder_embed(encoded[-1]), torch.cat([keep, masked], 1)
        ids = ids[:, : x.shape[1] - prefix]
        x = torch.cat([x[:, :prefix], x[:, prefix:] + positions[prefix + ids]], 1)
        fresh: tuple[Any, ...] = (None, None)
        if not self.mask_tokens_in_encoder:
            fresh = (self.mask_token[0] + positions[prefix:], masked)
        for number, block in enumerate(self.decoder_blocks, 1):
            x = self._run(block, x, *fresh, last if number == len(self.decoder_blocks) else None)
            fresh = (None, None)
        return x

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, *arguments, use_reentrant=False))
        return block(*arguments)

    def _check_size(self, images: Float[Tensor, "b c h w"]) -> None:
        made_for = (self.channels, *self.encoder.patch_embed.img_size)
        if images.shape[1:] != made_for:
            raise ValueError(f"images are {tuple(images.shape[1:])}, the model takes {made_for}")

    def encode(
        self, images: Float[Tensor, "b c h w"], pool: Literal["cls", "mean", "tokens"] = "mean"
    ) -> Tensor:
        """Features of whole images after the encoder's norm: (b, d), or (b, n, d) patch tokens with
        pool="tokens".

        Raises:
            ValueError: images of another size, or pool="cls" without a class token.
        """
        if pool == "cls" and self.encoder.cls_token is None:
            raise ValueError('this encoder has no class token: use pool "mean"')
        tokens = self._embed(images)
        for block in self.encoder.blocks:
            tokens = self._run(block, tokens)
        tokens = self.encoder.norm(tokens)
        if pool == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.prefix :]
        return patches.mean(1) if pool == "mean" else patches

    def features(
        self, images: Float[Tensor, "b c h w"], blocks: Sequence[int]
    ) -> list[Float[Tensor, "b t d"]]:
        """What the given blocks put out for whole images, before the encoder's norm.

        Args:
            images: normalised.
            blocks: 0 is the first, -1 the last.

        Returns:
            For each of `blocks` all tokens: `prefix` tokens, the class token first, then patches.

        Raises:
            ValueError: images of another size, or a block that the encoder does not have.
        """
        check_blocks(blocks, self.depth)
        wanted = [block % self.depth for block in blocks]
        tokens, outputs = self._embed(images), {}
        for number, block in enumerate(self.encoder.blocks[: max(wanted, default=-1) + 1]):
            tokens = self._run(block, tokens)
            if number in wanted:
                outputs[number] = tokens
        return [outputs[number] for number in wanted]

    def _embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """What the first block is given: prefix tokens and all patches, with positions."""
        self._check_size(images)
        encoder = self.encoder
        tokens = encoder.patch_drop(encoder._pos_embed(encoder.patch_embed(images)))
        return encoder.norm_pre(tokens)

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return len(self.encoder.blocks)

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.encoder.embed_dim

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token, if there is one, and registers."""
        return self.encoder.num_prefix_tokens

    @torch.no_grad()
    def resize(self, image_size: tuple[int, int]) -> None:
        """Take images of another size: positions are interpolated to the new patch grid (bicubic),
        those of prefix tokens stay.

        Interpolated, not made anew: what the blocks learnt to read is where a patch lies between
        the edges of the image. The official code does the same for fine-tuning.

        Raises:
            ValueError: a size that the patch size does not divide.
        """
        check_divides(image_size, self.patch_size)
        old, rows, columns = self.grid, *(side // self.patch_size for side in image_size)
        self.encoder.patch_embed.set_input_size(image_size)
        self.grid = (rows, columns)
        for module, name in ((self.encoder, "pos_embed"), (self, "decoder_pos_embed")):
            positions = cast(Tensor, getattr(module, name))
            skip = positions.shape[1] - old[0] * old[1]
            # The tensor keeps its kind: a fixed buffer, or a Parameter that is trained.
            positions.data = resample_abs_pos_embed(
                positions.data,
                [rows, columns],
                [*old],
                skip,
                antialias=False,  # as the official code; in enlarging it makes a difference too
            )
        self.visible, _ = self.counts(self.grid)
        self.arguments["image_size"] = image_size

    def renew_positions(self) -> None:
        """Sin-cos positions as a model of this size starts with."""
        for module, name in ((self.encoder, "pos_embed"), (self, "decoder_pos_embed")):
            positions = cast(Tensor, getattr(module, name))
            skip = positions.shape[1] - self._patches
            positions.data = sincos_positions(positions.shape[2], self.grid, skip)

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"] | None = None
    ) -> Reconstruction:
        """Original, masked, predicted, and predicted with the visible patches pasted in; norm_pix
        is undone per patch."""
        b = len(images)
        self._check_size(images)
        if noise is None:
            noise = self.noise(torch.arange(b, device=images.device))[:: self.masks_per_image]
        keep, masked = self._split(noise, self.grid)
        encoded = self._encode_visible(images, keep, masked)
        decoded = self._decode(encoded, keep, masked, self.grid, self._patches)
        prediction = self.decoder_pred(self.decoder_norm(decoded))
        ids = torch.cat([keep, masked], 1)
        prediction = prediction.gather(
            1, ids.argsort(1)[..., None].expand(-1, -1, prediction.shape[-1])
        )
        every = torch.arange(self._patches, device=images.device).expand(b, -1)
        patches = gather_patches(images, every, self.grid, "ppc")
        if self.norm_pix:
            prediction = prediction * _patch_std(patches) + patches.mean(-1, keepdim=True)
        hidden = torch.ones(b, self._patches, 1, device=images.device).scatter(
            1, keep[..., None], 0.0
        )
        shown = [patches * (1 - hidden), prediction, patches * (1 - hidden) + prediction * hidden]
        return Reconstruction(images, *(unpatchify(x, self.grid, self.channels) for x in shown))

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters from input to output: embedding and tokens, each block, norm."""
        return vit_layers(self.encoder)

    def train_positions(self) -> None:
        """Make the fixed positions a Parameter again, as the official code does for fine-tuning."""
        positions = cast(Tensor, self.encoder.pos_embed)
        del self.encoder.pos_embed
        self.encoder.pos_embed = nn.Parameter(positions.clone())

    def summary(self) -> dict[str, str]:
        """What a run prints of this model before its first step."""
        encoder = sum(p.numel() for p in self.encoder.parameters())
        decoder = sum(p.numel() for p in self.parameters()) - encoder
        return {
            "mask": f"{self.mask}, ratio {self.mask_ratio}: "
            f"{self.visible} of {self._patches} patches visible",
            "parameters": f"encoder {encoder:,}, decoder {decoder:,}",
        }


def _patch_std(patches: Float[Tensor, "b k v"]) -> Float[Tensor, "b k 1"]:
    return (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def _check_options(
    reconstruct: float, masks_per_image: int, mask: str, decoder: str, mask_tokens_in_encoder: bool
) -> None:
    if masks_per_image < 1 or not 0 < reconstruct <= 1:
        raise ValueError(
            f"masks_per_image {masks_per_image} must be at least 1, reconstruct {reconstruct} in "
            "(0, 1]"
        )
    if reconstruct < 1 and mask != "random":
        # The order of the others says where their rectangle or square is.
        raise ValueError(f"reconstruct {reconstruct} needs mask random, not {mask}")
    if mask_tokens_in_encoder and (decoder != "self" or reconstruct < 1):
        raise ValueError("mask_tokens_in_encoder needs decoder self and reconstruct 1")
