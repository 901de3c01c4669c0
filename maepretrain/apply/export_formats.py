"""The formats of `maepretrain export`. A new format is a function that makes its files, one that
writes the Python lines which load them, and an entry of FORMATS.

    timm         model.safetensors (encoder), config.json: a folder for timm's local-dir: and hub
    hf           model.safetensors, config.json, preprocessor_config.json: a ViTMAEForPreTraining
    mae          mae.pth: {"model": weights} under the names of facebookresearch/mae
    safetensors  model.safetensors: our own names

Each file of weights also carries the arguments of its MaskedAutoencoder, so that `--encoder` takes
it back. Nothing of timm, transformers or the official code runs here; a model that they cannot
express is refused.
"""

import json
from collections.abc import Callable
from io import BytesIO
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from maepretrain.checkpoints.hugging_face import hugging_face_config, to_hugging_face
from maepretrain.checkpoints.official import check_official, official_weights
from maepretrain.checkpoints.weights import OWN_KEY
from maepretrain.models.mae.model import MaskedAutoencoder

Name = Literal["timm", "hf", "mae", "safetensors"]
# Content by file name.
Files = dict[str, bytes]


class Format(NamedTuple):
    """A layout of files that a library loads.

    `files` takes the model and the section `data` of its run, empty where that is not known.
    """

    library: str
    weights: str
    files: Callable[[MaskedAutoencoder, dict[str, Any]], Files]
    loading: Callable[[MaskedAutoencoder], str]


def timm(model: MaskedAutoencoder, data: dict[str, Any]) -> Files:
    arguments = timm_arguments(model)
    pretrained: dict[str, Any] = {
        "input_size": [model.channels, *arguments["img_size"]],
        "fixed_input_size": True,
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    pretrained |= {name: data[name] for name in ("mean", "std") if name in data}
    model_arguments = {k: v for k, v in arguments.items() if k not in ("in_chans", "num_classes")}
    config = {
        "architecture": timm_name(model).partition(".")[0],
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "avg",
        "model_args": model_arguments,
        "pretrained_cfg": pretrained,
    }
    weights = _safetensors(model, official_weights(model, decoder=False))
    return {"config.json": _json(config), "model.safetensors": weights}


def timm_loading(model: MaskedAutoencoder) -> str:
    """The lines that load the encoder with timm, from the folder or from the file alone."""
    options = ", ".join(f"{name}={value!r}" for name, value in timm_arguments(model).items())
    return (
        "import timm\n"
        'encoder = timm.create_model("local-dir:FOLDER", pretrained=True)\n'
        "features = encoder(images)  # the mean of the patches, (b, width)\n"
        "# the same from the file alone:\n"
        f'encoder = timm.create_model("{timm_name(model)}", '
        f'checkpoint_path="FOLDER/model.safetensors", {options})'
    )


def timm_arguments(model: MaskedAutoencoder) -> dict[str, Any]:
    """Arguments with which `timm.create_model(name, **arguments)` makes the encoder again; it pools
    the mean of the patches."""
    names = {
        "patch_size": "patch_size",
        "encoder_width": "embed_dim",
        "encoder_depth": "depth",
        "encoder_heads": "num_heads",
    }
    sizes = {
        theirs: model.arguments[ours]
        for ours, theirs in names.items()
        if model.arguments.get(ours) is not None
    }
    return {
        "img_size": list(model.encoder.patch_embed.img_size),
        "in_chans": model.channels,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
        **sizes,
    }


def timm_name(model: MaskedAutoencoder) -> str:
    """The name of the encoder's architecture in timm."""
    return str(model.arguments.get("encoder", "vit_base_patch16_224"))


def hugging_face(model: MaskedAutoencoder, data: dict[str, Any]) -> Files:
    config = hugging_face_config(model)
    weights = to_hugging_face(official_weights(model))
    files = {"config.json": _json(config), "model.safetensors": _safetensors(model, weights)}
    if "mean" in data:
        height, width = model.encoder.patch_embed.img_size
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": data["mean"],
            "image_std": data["std"],
        }
        files["preprocessor_config.json"] = _json(processor)
    return files


def hugging_face_loading(model: MaskedAutoencoder) -> str:
    """The lines that load encoder and decoder with transformers."""
    return (
        "from transformers import ViTMAEModel, ViTMAEForPreTraining\n"
        'encoder = ViTMAEModel.from_pretrained("FOLDER", mask_ratio=0.0)\n'
        "features = encoder(images).last_hidden_state[:, 1:].mean(1)  # patches come shuffled\n"
        'autoencoder = ViTMAEForPreTraining.from_pretrained("FOLDER")'
    )


def official(model: MaskedAutoencoder, data: dict[str, Any]) -> Files:
    check_official(model, "the official code")
    buffer = BytesIO()
    torch.save({"model": official_weights(model), OWN_KEY: model.arguments}, buffer)
    return {"mae.pth": buffer.getvalue()}


def official_loading(model: MaskedAutoencoder) -> str:
    """The lines that load encoder and decoder with the official code."""
    return (
        "import torch, models_mae  # of facebookresearch/mae\n"
        f"model = models_mae.MaskedAutoencoderViT({_official_arguments(model)})\n"
        'model.load_state_dict(torch.load("FOLDER/mae.pth", weights_only=True)["model"])'
    )


def _official_arguments(model: MaskedAutoencoder) -> str:
    block: Any = model.encoder.blocks[0]
    decoder: Any = model.decoder_blocks
    arguments = {
        "img_size": model.encoder.patch_embed.img_size[0],
        "patch_size": model.patch_size,
        "in_chans": model.channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": block.attn.num_heads,
        "decoder_embed_dim": model.decoder_embed.out_features,
        "decoder_depth": len(decoder),
        "decoder_num_heads": decoder[0].attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.width,
        "norm_pix_loss": model.norm_pix,
    }
    options = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"{options}, norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6)"


def safetensors(model: MaskedAutoencoder, data: dict[str, Any]) -> Files:
    return {"model.safetensors": _safetensors(model, model.state_dict())}


def safetensors_loading(model: MaskedAutoencoder) -> str:
    """The lines that load the encoder with this package."""
    return (
        "from maepretrain.checkpoints.encoders import load_encoder\n"
        'encoder = load_encoder("FOLDER")\n'
        "features = encoder.encode(images)  # (b, width)"
    )


FORMATS: dict[Name, Format] = {
    "timm": Format("timm", "model.safetensors", timm, timm_loading),
    "hf": Format("transformers", "model.safetensors", hugging_face, hugging_face_loading),
    "mae": Format("maepretrain", "mae.pth", official, official_loading),
    "safetensors": Format("maepretrain", "model.safetensors", safetensors, safetensors_loading),
}


def _safetensors(model: MaskedAutoencoder, weights: dict[str, Tensor]) -> bytes:
    metadata = {"format": "pt", OWN_KEY: json.dumps(model.arguments)}
    return save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata)


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
