"""The masked autoencoder as others compute it, with our weights and our masks.

`Official` is the order of computation of facebookresearch/mae, written anew: embed all patches,
then mask; the decoder runs on all tokens in their places; all patches are predicted; the loss
averages over the masked ones. The others are the packages' own modules.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maepretrain.apply.export_formats import timm_arguments, timm_name
from maepretrain.checkpoints.hugging_face import hugging_face_config, to_hugging_face
from maepretrain.checkpoints.official import official_weights
from maepretrain.models.mae.model import MaskedAutoencoder

Loss = Callable[[Tensor, Tensor], Tensor]


class Side(NamedTuple):
    """One of those that are compared: what it trains, its loss of (images, noise), and whether its
    own training script runs AdamW fused on the CPU."""

    module: nn.Module
    loss: Loss
    fused: bool = False


class Official(nn.Module):
    """The official arrangement, with the official names.

    Args:
        model: whose sizes and weights it takes; a class token, no register tokens.
        decode_class_token: whether the decoder sees it; only stable-pretraining leaves it out.
    """

    def __init__(self, model: MaskedAutoencoder, decode_class_token: bool = True) -> None:
        super().__init__()
        # In the terms of Hugging Face, whose configuration names all of the sizes.
        sizes = hugging_face_config(model)
        width, decoder_width = sizes["hidden_size"], sizes["decoder_hidden_size"]
        image, patch, channels = (sizes[k] for k in ("image_size", "patch_size", "num_channels"))
        self.visible = model.masking.visible(model.grid)
        self.norm_pix = model.norm_pix
        self.decode_class_token = decode_class_token
        self.patch_embed = PatchEmbed(image, patch, channels, width)
        n = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos_embed", torch.empty(1, n + 1, width))
        self.blocks = _blocks(width, sizes["num_hidden_layers"], sizes["num_attention_heads"])
        self.norm = LayerNorm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.register_buffer("decoder_pos_embed", torch.empty(1, n + 1, decoder_width))
        self.decoder_blocks = _blocks(
            decoder_width,
            sizes["decoder_num_hidden_layers"],
            sizes["decoder_num_attention_heads"],
        )
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, patch**2 * channels)
        self.load_state_dict(official_weights(model))

    def forward(self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"]) -> Tensor:
        """Mean squared error of the masked patches."""
        positions = cast(Tensor, self.pos_embed)
        every = self.patch_embed(images) + positions[:, 1:]
        order = noise.argsort(1)
        places = order.argsort(1)  # of each patch in the shuffled order
        keep = order[:, : self.visible, None].expand(-1, -1, every.shape[2])
        first = (self.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        latent = self.norm(self.blocks(torch.cat([first, every.gather(1, keep)], 1)))
        prediction = self._decode(self.decoder_embed(latent), places)
        target = self._patches(images)
        if self.norm_pix:
            variance = target.var(-1, keepdim=True)
            target = (target - target.mean(-1, keepdim=True)) / (variance + 1e-6) ** 0.5
        each = ((prediction - target) ** 2).mean(-1)
        masked = (places >= self.visible).float()
        return (each * masked).sum() / masked.sum()

    def _decode(self, x: Tensor, places: Tensor) -> Tensor:
        b, n = places.shape
        hidden = self.mask_token.repeat(b, n - self.visible, 1)
        patches = torch.cat([x[:, 1:], hidden], 1)
        patches = patches.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        positions = cast(Tensor, self.decoder_pos_embed)
        if self.decode_class_token:
            x = torch.cat([x[:, :1], patches], 1) + positions
        else:
            x = patches + positions[:, 1:]
        x = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))
        return x[:, -n:]

    def _patches(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n v"]:
        """All pixels, patch by patch, channels last."""
        b, c, h, w = images.shape
        p = round((h * w / self.patch_embed.num_patches) ** 0.5)
        blocks = images.reshape(b, c, h // p, p, w // p, p)
        return torch.einsum("bcrpsq->brspqc", blocks).reshape(b, -1, p * p * c)


def _blocks(width: int, depth: int, heads: int) -> nn.Sequential:
    blocks = (Block(width, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))
    return nn.Sequential(*blocks)


def ours(model: MaskedAutoencoder) -> Side:
    """maepretrain's step."""
    return Side(model, lambda images, noise: model({"input": images}, noise)["loss"], True)


def official(model: MaskedAutoencoder) -> Side:
    """The official arrangement; its script makes AdamW without a flag."""
    module = Official(model)
    return Side(module, module)


def hugging_face(model: MaskedAutoencoder) -> Side:
    """ViTMAEForPreTraining of transformers, whose Trainer runs AdamW fused."""
    from transformers import ViTMAEForPreTraining

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hugging_face_config(model)))
        weights = to_hugging_face(official_weights(model))
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
        module: Any = ViTMAEForPreTraining.from_pretrained(folder).train()
    # Their constructor fixes the positions; transformers 5.24 forgets that when it loads weights.
    module.vit.embeddings.position_embeddings.requires_grad_(False)
    module.decoder.decoder_pos_embed.requires_grad_(False)
    return Side(module, lambda images, noise: module(images, noise=noise).loss, True)


def lightly(model: MaskedAutoencoder) -> Side:
    """lightly's MAE example, of its own modules."""
    modules, utils = map(import_module, ("lightly.models.modules", "lightly.models.utils"))
    sizes = hugging_face_config(model)
    # It would draw the weights anew.
    skip = {"weight_initialization": "skip", "pos_embed_initialization": "skip"}
    backbone = modules.MaskedVisionTransformerTIMM(_timm(model), **skip)
    backbone.mask_token.requires_grad_(False)  # not used by this method
    n, p = backbone.sequence_length - 1, model.patch_size
    visible = model.masking.visible(model.grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they rename this class
        decoder = modules.MAEDecoderTIMM(
            num_patches=n,
            patch_size=p,
            in_chans=model.channels,
            embed_dim=model.width,
            decoder_embed_dim=sizes["decoder_hidden_size"],
            decoder_depth=sizes["decoder_num_hidden_layers"],
            decoder_num_heads=sizes["decoder_num_attention_heads"],
        )
    weights = official_weights(model)
    decoder.load_state_dict({k: v for k, v in weights.items() if k in decoder.state_dict()})

    def loss(images: Tensor, noise: Tensor) -> Tensor:
        order = noise.argsort(1) + 1
        first = torch.zeros(len(images), 1, dtype=order.dtype)
        keep = torch.cat([first, order[:, :visible]], 1)
        masked = order[:, visible:]
        encoded = decoder.embed(backbone.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (len(images), n + 1))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        prediction = decoder.predict(utils.get_at_index(decoder.decode(tokens), masked))
        # The class token has no patch.
        target = utils.get_at_index(utils.patchify(images, p), masked - 1)
        if model.norm_pix:
            target = utils.normalize_mean_var(target)
        return nn.functional.mse_loss(prediction, target)

    return Side(nn.ModuleList([backbone, decoder]), loss)


def stable_pretraining(model: MaskedAutoencoder) -> Side:
    """stable-pretraining's MAE. Its decoder leaves the class token out, so that its loss is that of
    `Official(model, decode_class_token=False)`; its eps of LayerNorm, 1e-5, is set to ours."""
    import_module("loguru").logger.disable("stable_pretraining")
    sizes = hugging_face_config(model)
    masking = _GivenMask(model.masking.visible(model.grid))
    module = import_module("stable_pretraining.methods").MAE(
        _timm(model),
        decoder_embed_dim=sizes["decoder_hidden_size"],
        decoder_depth=sizes["decoder_num_hidden_layers"],
        decoder_num_heads=sizes["decoder_num_attention_heads"],
        norm_pix_loss=model.norm_pix,
        masking=masking,
    )
    decoder = module.decoder.transformer
    for norm in (m for m in decoder.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = 1e-6
    decoder.load_state_dict(_of_stable_pretraining(model, decoder))
    module.train()

    def loss(images: Tensor, noise: Tensor) -> Tensor:
        masking.noise = noise
        return module(images).loss

    return Side(module, loss)


def _of_stable_pretraining(model: MaskedAutoencoder, decoder: nn.Module) -> dict[str, Tensor]:
    """Our decoder under their names. Their mask token has the encoder's width and a projection of
    its own, whose bias is ours; they predict pixels channel by channel."""
    ours = official_weights(model)
    c, p = model.channels, model.patch_size
    theirs = {
        "query_proj.weight": torch.zeros_like(ours["decoder_embed.weight"]),
        "query_proj.bias": ours["mask_token"].flatten(),
        "pos_embed": ours["decoder_pos_embed"][:, 1:],
    }
    for kind in ("weight", "bias"):
        theirs[f"context_proj.{kind}"] = ours[f"decoder_embed.{kind}"]
        theirs[f"final_norm.{kind}"] = ours[f"decoder_norm.{kind}"]
        prediction = ours[f"decoder_pred.{kind}"].unflatten(0, (p * p, c))
        theirs[f"output_proj.{kind}"] = prediction.transpose(0, 1).flatten(0, 1)
    blocks = {k.removeprefix("decoder_"): v for k, v in ours.items() if "decoder_blocks." in k}
    return theirs | blocks


class _GivenMask(nn.Module):
    """A masking of stable-pretraining that does not draw the noise."""

    def __init__(self, visible: int) -> None:
        super().__init__()
        self.visible = visible
        self.noise = torch.empty(0)

    def forward(self, x: Tensor, grid_h: int, grid_w: int) -> Any:
        order = self.noise.argsort(1)
        places, keep = order.argsort(1), order[:, : self.visible]
        visible = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        output = import_module("stable_pretraining.backbone.patch_masking").MaskingOutput
        return output(visible, (places >= self.visible).float(), places, keep)


def _timm(model: MaskedAutoencoder) -> Any:
    """The encoder as timm makes it, with our weights."""
    encoder: Any = timm.create_model(timm_name(model), **timm_arguments(model))
    encoder.load_state_dict(official_weights(model, decoder=False))
    encoder.pos_embed.requires_grad_(False)
    return encoder


PEERS: dict[str, Callable[[MaskedAutoencoder], Side]] = {
    "official arrangement": official,
    "Hugging Face": hugging_face,
    "lightly": lightly,
    "stable-pretraining": stable_pretraining,
}
# Where the package of a peer is not the name that it is imported by.
PACKAGES = {"Hugging Face": "transformers"}


def available(model: MaskedAutoencoder) -> tuple[dict[str, Side], dict[str, str]]:
    """All peers that are installed here, each with its own copy of the weights, and why the others
    are not."""
    sides, missing = {}, {}
    for name, make in PEERS.items():
        try:
            sides[name] = make(copy.deepcopy(model))
        except ImportError as error:
            missing[name] = f"{error} (the extra `peers` has it)"
    return sides, missing
