"""Masked autoencoder (He et al. 2021, arXiv 2111.06377).

The encoder is a timm VisionTransformer that sees the visible patches only; a small decoder predicts
the pixels of the masked ones.

Deviations from the official code, none of which changes the loss: visible pixels are gathered
before they are projected; the decoder runs in shuffled order (attention does not care) with
positions gathered along; its final norm, its prediction and the target are computed for masked
patches only. Masks are a pure function of (seed, position of the sample in the run).

Axes: b images, c channels, h w pixels, n patches, k visible patches, m masked patches, d features,
p patch side.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import timm
import torch
from jaxtyping import Float, Int64
from timm.layers.norm import LayerNorm  # eps 1e-6, as in the official code
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maepretrain.randomness import uniform

Batch = dict[str, Tensor]
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
        mask_ratio: share of patches hidden; int(n * (1 - mask_ratio)) stay visible.
        mask: "random" patches, "block" hides rectangles, "grid" keeps one patch of each 2 x 2.
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
        mask_ratio: float = 0.75,
        mask: Literal["random", "block", "grid"] = "random",
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
        prefix = self.encoder.num_prefix_tokens
        self.hide(mask_ratio)
        width = self.encoder.embed_dim
        if decoder_width % decoder_heads:
            raise ValueError(
                f"decoder_width {decoder_width} is not divisible by {decoder_heads} heads"
            )
        # A buffer: timm's own is trained, the paper's positions are fixed.
        del self.encoder.pos_embed
        skip = 0 if self.encoder.no_embed_class else prefix
        self.encoder.register_buffer("pos_embed", sincos_positions(width, self.grid, skip))

        # Names from here on are those of the official checkpoints.
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.register_buffer(
            "decoder_pos_embed", sincos_positions(decoder_width, self.grid, prefix)
        )
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, self.patch_size**2 * channels)
        self._initialise()

    def hide(self, mask_ratio: float) -> None:
        """Hide this share of the patches from now on.

        Raises:
            ValueError: a share that leaves nothing to see or to predict.
        """
        n = self._patches
        self.mask_ratio, self.visible = mask_ratio, int(n * (1 - mask_ratio))
        if not 0 < self.visible < n:
            raise ValueError(
                f"mask_ratio {mask_ratio} leaves {self.visible} of {n} patches visible; at least "
                f"one must be visible and one masked"
            )
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
        images = batch["input"]
        if noise is None:
            noise = self.noise(batch["position"])
        keep, masked = self._split(noise)
        tokens = self._encode_visible(images, keep)
        decoded = self._decode(tokens, keep, masked)[:, -masked.shape[1] :]  # (b, m, d)
        prediction = self.decoder_pred(self.decoder_norm(decoded))
        target = gather_patches(images, masked, self.grid, "ppc").float()
        if self.norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / _patch_std(target)
        return {"loss": F.mse_loss(prediction.float(), target)}

    def noise(self, position: Int64[Tensor, "b"]) -> Float[Tensor, "b n"]:
        """Noise whose smallest entries stay visible, from (seed, position) alone."""
        rows, columns = self.grid
        n = rows * columns
        u = uniform(self.seed, "mask", position, n)
        if self.mask == "random":
            return u
        if self.mask == "grid":
            kept = torch.zeros(rows, columns, device=u.device)
            kept[::2, ::2] = -1.0
            return kept.flatten() + u
        return u + self._first_block(uniform(self.seed, "mask blocks", position, 4 * BLOCKS_TRIED))

    def _first_block(self, u: Float[Tensor, "b u"]) -> Float[Tensor, "b n"]:
        """For each patch the number of the first random rectangle that covers it, counted down: the
        first is masked first; 0 where none does.

        Rectangles as in BEiT (Bao et al. 2021, algorithm 1): aspect .3 to 1/.3, area from 1/12 of
        the patches to .4 of them.
        """
        rows, columns = self.grid
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

    def _split(
        self, noise: Float[Tensor, "b n"]
    ) -> tuple[Int64[Tensor, "b k"], Int64[Tensor, "b m"]]:
        """Visible and masked patch numbers; stable, since fp32 noise has ties."""
        ids = torch.argsort(noise, dim=1, stable=True)
        return ids[:, : self.visible], ids[:, self.visible :]

    def _encode_visible(
        self, images: Float[Tensor, "b c h w"], keep: Int64[Tensor, "b k"]
    ) -> Float[Tensor, "b t d"]:
        """Prefix tokens and visible patches through the encoder (section 3, "MAE encoder")."""
        encoder = self.encoder
        self._check_size(images)
        pixels = gather_patches(images, keep, self.grid, "cpp")
        projection = encoder.patch_embed.proj
        # A strided convolution over the whole image, applied to its visible quarter.
        tokens = F.linear(pixels, projection.weight.flatten(1), projection.bias)
        tokens = encoder.patch_embed.norm(tokens)
        positions = cast(Tensor, encoder.pos_embed)[0]
        skip = len(positions) - self._patches
        tokens = tokens + positions[skip + keep]
        tokens = torch.cat([*self._prefix(positions[:skip], len(images)), tokens], 1)
        tokens = self._run(encoder.blocks, encoder.norm_pre(tokens))
        return encoder.norm(tokens)

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
        tokens: Float[Tensor, "b t d"],
        keep: Int64[Tensor, "b k"],
        masked: Int64[Tensor, "b m"],
    ) -> Float[Tensor, "b t2 d2"]:
        """Prefix, visible and mask tokens, in this order, through the decoder's blocks (section 3,
        "MAE decoder")."""
        prefix = self.encoder.num_prefix_tokens
        positions = cast(Tensor, self.decoder_pos_embed)[0]
        visible = self.decoder_embed(tokens)
        hidden = self.mask_token + positions[prefix + masked]
        # decoder_pos_embed is zero at the prefix tokens.
        seen = visible[:, prefix:] + positions[prefix + keep]
        x = torch.cat([visible[:, :prefix], seen, hidden.to(seen.dtype)], 1)
        return self._run(self.decoder_blocks, x)

    def _run(self, blocks: Sequence[nn.Module] | nn.Module, x: Tensor) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in cast(Sequence[nn.Module], blocks):
            x = cast(Tensor, checkpoint(block, x, use_reentrant=False)) if recompute else block(x)
        return x

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
        tokens = self._run(self.encoder.blocks, self._embed(images))
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
            tokens = self._run([block], tokens)
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
        _check_divides(image_size, self.patch_size)
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
        self.visible = int(rows * columns * (1 - self.mask_ratio))
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
        if noise is None:
            noise = self.noise(torch.arange(b, device=images.device))
        keep, masked = self._split(noise)
        decoded = self._decode(self._encode_visible(images, keep), keep, masked)
        prediction = self.decoder_pred(
            self.decoder_norm(decoded[:, self.encoder.num_prefix_tokens :])
        )
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


def create_encoder(
    name: str, image_size: int | tuple[int, int], channels: int, **overrides: Any
) -> VisionTransformer:
    """A timm VisionTransformer without head or pooling, its norm after the last block kept.

    Raises:
        ValueError: an unknown name, another kind of model, or an image size that the patch size
            does not divide.
    """
    try:
        encoder = timm.create_model(
            name,
            img_size=image_size,
            in_chans=channels,
            num_classes=0,
            global_pool="",  # no attention pooling either: it would never get a gradient
            fc_norm=False,
            **overrides,
        )
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"timm cannot make encoder {name}: {error}") from error
    # A hybrid, whose patches are made by convolutions, is a VisionTransformer as well.
    if (
        type(encoder) is not VisionTransformer
        or type(encoder.patch_embed) is not PatchEmbed
        or encoder.pos_embed is None
    ):
        raise ValueError(f"encoder {name} is no plain timm VisionTransformer with positions")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    _check_divides(size, encoder.patch_embed.proj.kernel_size[0])
    return encoder


def _check_divides(image_size: tuple[int, int], p: int) -> None:
    h, w = image_size
    if h % p or w % p:
        raise ValueError(f"image size {h}x{w} must be divisible by patch size {p}")


def vit_layers(encoder: VisionTransformer) -> list[list[nn.Parameter]]:
    """The parameters of a ViT from input to output: embedding and tokens, each block, norm."""
    blocks = [list(block.parameters()) for block in encoder.blocks]
    last = [*encoder.norm.parameters(), *encoder.fc_norm.parameters()]
    later = {id(p) for group in [*blocks, last] for p in group}
    return [[p for p in encoder.parameters() if id(p) not in later], *blocks, last]


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Refuse numbers of blocks that an encoder does not have.

    Raises:
        ValueError: one outside -depth..depth - 1.
    """
    for block in blocks:
        if not -depth <= block < depth:
            raise ValueError(f"block {block} is none of the encoder's {depth} (0 is the first)")


def gather_patches(
    images: Float[Tensor, "b c h w"],
    ids: Int64[Tensor, "b k"],
    grid: tuple[int, int],
    order: Literal["cpp", "ppc"],
) -> Float[Tensor, "b k v"]:
    """The pixels of chosen patches: (c, p, p) as the patch projection reads them, or (p, p, c) as
    the target is ordered."""
    b, c, h, w = images.shape
    rows, columns = grid
    blocks = images.reshape(b, c, rows, h // rows, columns, w // columns)
    blocks = blocks.permute((0, 2, 4, 1, 3, 5) if order == "cpp" else (0, 2, 4, 3, 5, 1))
    which = torch.arange(b, device=ids.device)[:, None]
    return blocks[which, ids // columns, ids % columns].flatten(2)


def unpatchify(
    patches: Float[Tensor, "b n v"], grid: tuple[int, int], channels: int
) -> Float[Tensor, "b c h w"]:
    """Images from all patches in (p, p, c) order."""
    b, _, v = patches.shape
    rows, columns = grid
    p = round((v // channels) ** 0.5)
    blocks = patches.reshape(b, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return blocks.reshape(b, channels, rows * p, columns * p)


def sincos_positions(width: int, grid: tuple[int, int], prefix: int) -> Float[Tensor, "1 n d"]:
    """Fixed 2-D sin-cos positions, zero for prefix tokens; the first half of the features encodes
    the column.

    Raises:
        ValueError: a width that is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {width}")
    rows, columns = grid
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = []
    for coordinate in (column, row):  # the official code puts w before h
        angle = coordinate.flatten()[:, None] * frequency
        halves += [angle.sin(), angle.cos()]
    positions = torch.cat(halves, 1).float()
    return torch.cat([torch.zeros(prefix, width), positions])[None]


def _patch_std(patches: Float[Tensor, "b k v"]) -> Float[Tensor, "b k 1"]:
    return (patches.var(-1, keepdim=True) + 1e-6).sqrt()
