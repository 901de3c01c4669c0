"""Masked autoencoder (He et al. 2021, arXiv 2111.06377).

The encoder is a timm VisionTransformer that sees the visible patches only; a small decoder predicts
the pixels of the masked ones.

Deviations from the official code, none of which changes the loss: visible pixels are gathered
before they are projected; the decoder runs in shuffled order (attention does not care) with
positions gathered along; its first block projects mask tokens once a batch; its last block, final
norm, prediction and the target are computed for masked patches only. Masks are a pure function of
(seed, position of the sample in the run).

Axes: b images, n patches, k visible and m masked ones, v values of a patch, t tokens, d features.
"""

from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int64
from timm.layers.norm import LayerNorm  # eps 1e-6, as in the official code
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.data.batch import Batch
from maepretrain.models import vit
from maepretrain.models.mae import patches, positions
from maepretrain.models.mae.decoders import CrossDecoder, FeatureMaps, SelfDecoder
from maepretrain.models.mae.initial_values import initialise, keeps_arguments
from maepretrain.models.mae.masking import Kind, Masking
from maepretrain.models.plain_vit import PlainViT


class MaskedAutoencoder(PlainViT):
    """Masked autoencoder on a timm ViT.

    Initial values as the official code's: xavier-uniform linears and patch projection, zero biases,
    N(0, .02) tokens, LayerNorm 1 and 0 with eps 1e-6, fixed 2-D sin-cos positions.

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

    layout = "mae"
    arguments: dict[str, Any]

    @keeps_arguments
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
        mask: Kind = "random",
        reconstruct: float = 1.0,
        masks_per_image: int = 1,
        mask_tokens_in_encoder: bool = False,
        norm_pix: bool = True,
        activation_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = vit.create_encoder(
            encoder,
            image_size,
            channels,
            patch_size=patch_size,
            embed_dim=encoder_width,
            depth=encoder_depth,
            num_heads=encoder_heads,
        )
        self.norm_pix = norm_pix
        self.activation_checkpointing = activation_checkpointing
        self.seed = seed
        self.masking = Masking(mask, mask_ratio, reconstruct, masks_per_image)
        self.masking.check(self.grid)
        self.decoder = decoder
        self.mask_tokens_in_encoder = mask_tokens_in_encoder
        if mask_tokens_in_encoder and (decoder != "self" or reconstruct < 1):
            raise ValueError("mask_tokens_in_encoder needs decoder self and reconstruct 1")
        positions.fix(self.encoder, self.grid)

        # Names from here on are those of the official checkpoints.
        masked_width = self.width if mask_tokens_in_encoder else decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, masked_width))
        decoder_pos_embed = positions.sincos_positions(decoder_width, self.grid, self.prefix)
        self.register_buffer("decoder_pos_embed", decoder_pos_embed)
        sizes = (decoder_width, decoder_depth, decoder_heads)
        if decoder == "self":
            self.decoder_embed = nn.Linear(self.width, decoder_width)
            self.decoder_blocks = SelfDecoder(*sizes)
        else:
            self.feature_maps = FeatureMaps(self.depth, decoder_depth, self.width)
            self.decoder_blocks = CrossDecoder(*sizes, self.width)
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, self.patch_size**2 * channels)
        tokens = [self.encoder.cls_token, self.encoder.reg_token, self.mask_token]
        initialise(self, self.encoder.patch_embed.proj, tokens)

    def forward(self, batch: Batch, noise: Float[Tensor, "b n"] | None = None) -> Batch:
        """`loss`: mean squared error of the masked patches (section 3, "Reconstruction target").

        Args:
            batch: `input`, normalised images (b, c, h, w); `position`, for the default of `noise`.
            noise: the patches with the smallest noise stay visible.
        """
        images = batch["input"]
        grid = patches.grid_of(images, self.image_shape, self.patch_size)
        if noise is None:
            noise = self.masking.noise(self.seed, batch["position"], grid)
        if self.masking.per_image > 1:
            images = images.repeat_interleave(self.masking.per_image, 0)
        keep, masked = self.masking.split(noise, grid)
        masked = masked[:, : self.masking.predictions(grid)]
        encoded = self._encode_visible(images, keep, masked)
        prediction = self._decode(encoded, keep, masked, grid, outputs=masked.shape[1])
        target = patches.gather_patches(images, masked, grid, "ppc").float()
        target = patches.normalised(target) if self.norm_pix else target
        return {"loss": F.mse_loss(prediction.float(), target)}

    def noise(self, position: Int64[Tensor, "b"]) -> Float[Tensor, "b2 n"]:
        """Noise whose smallest entries stay visible, a row for each mask of each image."""
        return self.masking.noise(self.seed, position, self.grid)

    def _encode_visible(
        self,
        images: Float[Tensor, "b c h w"],
        keep: Int64[Tensor, "b k"],
        masked: Int64[Tensor, "b m"],
    ) -> list[Float[Tensor, "b t d"]]:
        """Prefix tokens and visible patches after each block, the last one after the norm too
        (section 3, "MAE encoder")."""
        encoder = self.encoder
        grid = patches.grid_of(images, self.image_shape, self.patch_size)
        pixels = patches.gather_patches(images, keep, grid, "cpp")
        tokens = vit.project_patches(encoder, pixels)
        where = positions.at_grid(cast(Tensor, encoder.pos_embed), self.grid, grid)
        skip = len(where) - grid[0] * grid[1]
        tokens = tokens + where[skip + keep]
        if self.mask_tokens_in_encoder:
            tokens = torch.cat([tokens, self.mask_token + where[skip + masked]], 1)
        tokens = vit.prepend_prefix(encoder, tokens, where[:skip])
        outputs = [encoder.norm_pre(tokens)]
        for block in encoder.blocks:
            recompute = self.activation_checkpointing
            outputs.append(vit.run_block(block, outputs[-1], recompute=recompute))
        return [*outputs[1:-1], encoder.norm(outputs[-1])]

    def _decode(
        self,
        encoded: list[Float[Tensor, "b t d"]],
        keep: Int64[Tensor, "b k"],
        masked: Int64[Tensor, "b m"],
        grid: tuple[int, int],
        outputs: int,
    ) -> Float[Tensor, "b outputs v"]:
        """Pixels of the last `outputs` patches, the masked ones last (section 3, "MAE decoder")."""
        where = positions.at_grid(cast(Tensor, self.decoder_pos_embed), self.grid, grid)
        where = where[self.prefix :]  # zero at the prefix tokens
        ids = torch.cat([keep, masked], 1)
        recompute = self.activation_checkpointing
        if isinstance(self.decoder_blocks, CrossDecoder):
            x = self.mask_token + where[ids[:, -outputs:]]
            x = self.decoder_blocks(x, self.feature_maps(encoded), recompute)
        else:
            x = self.decoder_embed(encoded[-1])
            seen = where[ids[:, : x.shape[1] - self.prefix]]
            x = torch.cat([x[:, : self.prefix], x[:, self.prefix :] + seen], 1)
            hidden = None if self.mask_tokens_in_encoder else self.mask_token[0] + where
            x = self.decoder_blocks(x, hidden, masked, outputs, recompute)
        return self.decoder_pred(self.decoder_norm(x))

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"] | None = None
    ) -> patches.MaskedReconstruction:
        """Original, masked, predicted, and predicted with the visible patches pasted in; norm_pix
        is undone per patch. By default with the first mask of positions 0, 1, ..."""
        self.check_size(images)
        if noise is None:
            position = torch.arange(len(images), device=images.device)
            noise = self.noise(position)[:: self.masking.per_image]
        keep, masked = self.masking.split(noise, self.grid)
        encoded = self._encode_visible(images, keep, masked)
        prediction = self._decode(encoded, keep, masked, self.grid, outputs=noise.shape[1])
        return patches.pictures(images, prediction, keep, masked, self.grid, self.norm_pix)

    def hide(self, mask_ratio: float) -> None:
        """Hide this share of the patches from now on; a share that cannot be is refused."""
        self.masking.ratio = mask_ratio
        self.masking.check(self.grid)

    def check_smaller(self, h: int, w: int) -> None:
        """Raise ValueError where the loss of smaller images cannot be computed."""
        vit.check_divides((h, w), self.patch_size)
        self.masking.check((h // self.patch_size, w // self.patch_size))

    def resize(self, image_size: tuple[int, int]) -> None:
        """Take images of another size; positions are interpolated to the new patches."""
        positions.resize(self.encoder, self._position_tables(), image_size)
        self.masking.check(self.grid)
        self.arguments["image_size"] = image_size

    def renew_positions(self) -> None:
        """Sin-cos positions as a model of this size starts with."""
        positions.renew(self._position_tables(), self.grid)

    def _position_tables(self) -> list[Tensor]:
        return [cast(Tensor, self.encoder.pos_embed), cast(Tensor, self.decoder_pos_embed)]

    def train_positions(self) -> None:
        """Make the fixed positions a Parameter again, as the official code does for fine-tuning."""
        positions.train(self.encoder)

    def summary(self) -> dict[str, str]:
        """Lines that a run prints before its first step."""
        encoder = sum(p.numel() for p in self.encoder.parameters())
        decoder = sum(p.numel() for p in self.parameters()) - encoder
        parameters = f"encoder {encoder:,}, decoder {decoder:,}"
        return {"mask": self.masking.describe(self.grid), "parameters": parameters}
