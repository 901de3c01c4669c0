"""Weights from files, and the layout of the official MAE checkpoints in both directions.

Files are read without running code from them: safetensors, or torch's restricted unpickler. The
official repository (facebookresearch/mae) publishes `mae_pretrain_vit_*.pth` with the encoder alone
(150 tensors for ViT-B), `mae_pretrain_vit_*_full.pth` with the decoder (254) trained with norm_pix,
and `mae_visualize_*.pth` with a decoder of raw pixels, under cc-by-nc-4.0.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maepretrain.checkpoints.packing import COMPRESSED_KEY, OWN_KEY, unpack
from maepretrain.checkpoints.sharded import Saved, choose, is_checkpoint
from maepretrain.files import replacing
from maepretrain.models.mae.model import MaskedAutoencoder

# Width, blocks, patch side: ViT-B, L and H of section 4. Every official decoder has 16 heads.
OFFICIAL_ENCODERS = {
    (768, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file: safetensors, an official .pth, a run's .ckpt (a folder where an engine
    divided it), or a plain state dict.

    A run's checkpoint gives its model's weights under the model's own names.

    Raises:
        ValueError: no such file, no weights in it, or one that would have to be unpickled.
    """
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a file, and what it says of itself: the arguments of their MaskedAutoencoder,
    which files of `maepretrain export` carry.

    Raises:
        ValueError: as of `read_weights`.
    """
    weights, arguments = read_state(path)
    # What else Lightning's module holds (normalisation, a classifier) is not the model's.
    bare = {name.removeprefix("_forward_module."): tensor for name, tensor in weights.items()}
    ours = {k.removeprefix("model."): v for k, v in bare.items() if k.startswith("model.")}
    return ours or weights, arguments


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """As `read_file`, with all that a run's checkpoint holds, under the names of its module.

    Raises:
        ValueError: as of `read_weights`.
    """
    if not path.is_file() and not is_checkpoint(path):
        raise ValueError(f"weights {path}: there is no such file")
    if is_checkpoint(path):
        return Saved(path).weights(), None
    loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    state = loaded if isinstance(loaded, dict) else {}
    arguments = state.pop(OWN_KEY, None)
    of_lightning, official = state.get("state_dict"), state.get("model")
    weights = next(found for found in (of_lightning, official, state) if isinstance(found, dict))
    if not weights or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"weights {path}: this file holds no state dict of tensors")
    return weights, arguments if isinstance(arguments, dict) else None


def consolidate(run: Path, ckpt_path: str = "auto", out: Path | None = None) -> int:
    """One fp32 safetensors file of a run's weights, whichever engine wrote its checkpoint.

    Args:
        run: the run folder.
        ckpt_path: last, best, a path, or auto, which is last or, where that cannot be read, the one
            of most steps.
        out: the file; default RUN/model.safetensors, which `--encoder` takes.

    Raises:
        ValueError: no checkpoint, or one that cannot be read.
    """
    path = choose(run / "checkpoints", ckpt_path)
    if path is None:
        raise ValueError(f"{run} holds no checkpoint")
    file = out or run / "model.safetensors"
    whole = {k: v.float() if v.is_floating_point() else v for k, v in read_state(path)[0].items()}
    with replacing(file) as opened:
        opened.write(save({name: tensor.contiguous() for name, tensor in whole.items()}))
    numbers = sum(tensor.numel() for tensor in whole.values())
    print(f"{file}: {len(whole)} tensors, {numbers:,} numbers, of {path}")
    return 0


def _load_safetensors(path: Path) -> Any:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        about, state = metadata.get(OWN_KEY), load_file(path)
        if COMPRESSED_KEY in metadata:
            state = unpack(state, metadata)
        return state | ({} if about is None else {OWN_KEY: json.loads(about)})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights {path}: no safetensors file ({error})") from error


def _load_torch(path: Path) -> Any:
    try:
        # Official training checkpoints hold their command line: attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes are read as instructions, and fail in any way
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it needs {wanted[1]}" if wanted else "it is no checkpoint or is damaged"
        raise ValueError(
            f"weights {path}: refused, since {reason}, and unpickling would run code from the "
            f"file; use safetensors or a file of tensors alone"
        ) from error


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
        What was loaded.

    Raises:
        ValueError: names or shapes that are not exactly the model's.
    """
    decoder = any(name.startswith("decoder_") for name in weights)
    load_exactly(official_weights(model, decoder), weights)
    return "encoder and decoder" if decoder else "encoder"


@torch.no_grad()
def load_exactly(own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Copy weights into a model's own tensors, all of them or none.

    Raises:
        ValueError: names or shapes that are not exactly the model's.
    """
    both = own.keys() & weights.keys()
    shapes = {name: (tuple(weights[name].shape), tuple(own[name].shape)) for name in both}
    problems = {
        "missing": own.keys() - weights.keys(),
        "unknown": weights.keys() - own.keys(),
        "of another shape": {
            f"{name} {theirs} for {ours}"
            for name, (theirs, ours) in shapes.items()
            if theirs != ours
        },
    }
    found = [f"{len(names)} {kind}: {_few(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"weights do not fit the model ({'; '.join(found)})")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def official_model(weights: dict[str, Tensor], norm_pix: bool = True) -> MaskedAutoencoder:
    """The official model (ViT-B, L or H) that the weights' shapes tell, with these weights.

    Args:
        weights: in the official layout, with or without a decoder.
        norm_pix: what the decoder was trained for, which no shape tells.

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


# Names of the official layout and of Hugging Face's ViTMAE, in its files (transformers 4 and 5).
HUGGING_FACE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "blocks": "vit.encoder.layer",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_blocks": "decoder.decoder_layers",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
HUGGING_FACE_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = ("query", "key", "value")


def to_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the official layout under the names of Hugging Face's ViTMAEForPreTraining.

    Raises:
        ValueError: a weight that its model does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        whole = re.fullmatch(r"(\w+)\.(\d+)\.(.+)\.(weight|bias)", name)
        if whole and whole[3] == "attn.qkv" and whole[1] in HUGGING_FACE:
            block = f"{HUGGING_FACE[whole[1]]}.{whole[2]}.attention.attention"
            for part, third in zip(QKV, tensor.chunk(3), strict=True):
                renamed[f"{block}.{part}.{whole[4]}"] = third.clone()
        elif whole and whole[1] in HUGGING_FACE and whole[3] in HUGGING_FACE_BLOCK:
            block = f"{HUGGING_FACE[whole[1]]}.{whole[2]}"
            renamed[f"{block}.{HUGGING_FACE_BLOCK[whole[3]]}.{whole[4]}"] = tensor
        elif name in HUGGING_FACE:
            renamed[HUGGING_FACE[name]] = tensor
        elif (stem := re.sub(r"\.(weight|bias)$", "", name)) in HUGGING_FACE:
            renamed[HUGGING_FACE[stem] + name[len(stem) :]] = tensor
        else:
            raise ValueError(f"Hugging Face's ViTMAE has no {name}")
    return renamed


def from_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Hugging Face ViTMAE file in the official layout; unknown names stay."""
    if "embeddings.cls_token" in weights:  # a ViTMAEModel alone
        weights = {f"vit.{name}": tensor for name, tensor in weights.items()}
    # What transformers 5.23 makes of the decoder's blocks when it saves.
    garbled, right = "decoder.decoder_encoder.layer.", "decoder.decoder_layers."
    weights = {name.replace(garbled, right): tensor for name, tensor in weights.items()}
    back = {theirs: ours for ours, theirs in HUGGING_FACE.items()}
    inside = {theirs: ours for ours, theirs in HUGGING_FACE_BLOCK.items()}
    official: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor | None]] = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        whole = re.fullmatch(r"(vit\.encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)", stem)
        if whole is None:
            new = back.get(name) or (f"{back[stem]}.{kind}" if stem in back else name)
            official[new] = tensor
        elif whole[3].startswith("attention.attention."):
            fused = f"{back[whole[1]]}.{whole[2]}.attn.qkv.{kind}"
            part = QKV.index(whole[3].rpartition(".")[2])
            thirds.setdefault(fused, [None] * 3)[part] = tensor
        else:
            official[f"{back[whole[1]]}.{whole[2]}.{inside.get(whole[3], whole[3])}.{kind}"] = (
                tensor
            )
    for name, parts in thirds.items():
        official[name] = torch.cat([part for part in parts if part is not None])
    return official


def hugging_face_config(model: MaskedAutoencoder) -> dict[str, Any]:
    """config.json of a Hugging Face ViTMAE of the same architecture.

    Raises:
        ValueError: what its classes cannot express.
    """
    check_official(model, "Hugging Face's ViTMAE")
    encoder, decoder = model.encoder, cast(Any, model.decoder_blocks)
    block = cast(Any, encoder.blocks[0])
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": encoder.patch_embed.img_size[0],
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm.eps,  # theirs is 1e-12
        "decoder_hidden_size": model.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(decoder),
        "decoder_num_attention_heads": decoder[0].attn.num_heads,
        "decoder_intermediate_size": decoder[0].mlp.fc1.out_features,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.norm_pix,
    }


def check_official(model: MaskedAutoencoder, theirs: str) -> None:
    """Refuse a model that the official code, and what follows it, cannot express.

    Raises:
        ValueError: what `theirs` does not have.
    """
    encoder, (h, w) = model.encoder, model.encoder.patch_embed.img_size
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
    """Whether a ViT is no more than the paper's."""
    names = {re.sub(r"^blocks\.\d+\.", "blocks.", name) for name in encoder.state_dict()}
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    known = {f"blocks.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    known |= {
        f"{part}.{kind}" for part in ("patch_embed.proj", "norm") for kind in ("weight", "bias")
    }
    blocks = cast(Any, encoder.blocks)
    return (
        names - {"cls_token", "reg_token", "pos_embed"} == known
        and type(blocks[0].mlp.act) is nn.GELU
        and all(norm.eps == 1e-6 for b in blocks for norm in (b.norm1, b.norm2))
    )


def hugging_face_arguments(path: Path) -> dict[str, Any] | None:
    """The MaskedAutoencoder of a Hugging Face config.json, None where it is no ViTMAE's.

    Its LayerNorm eps is left: 1e-12 stands in files of weights that were trained with ours, 1e-6.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or config.get("model_type") != "vit_mae":
        return None
    config = HUGGING_FACE_DEFAULTS | config
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        raise ValueError(f"{path}: intermediate_size must be 4 x hidden_size")
    return {name: config[theirs] for name, theirs in HUGGING_FACE_ARGUMENTS.items()}


HUGGING_FACE_ARGUMENTS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
    "encoder_width": "hidden_size",
    "encoder_depth": "num_hidden_layers",
    "encoder_heads": "num_attention_heads",
    "decoder_width": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_heads": "decoder_num_attention_heads",
    "mask_ratio": "mask_ratio",
    "norm_pix": "norm_pix_loss",
}
# transformers writes no value that is its default.
HUGGING_FACE_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}
