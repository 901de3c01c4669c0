"""Encoders for evaluation: of a run, of a file, of timm, at the image size of the data.

What `load_encoder` returns has `encode(images, pool="mean" | "cls" | "tokens")`. A ViT has also
`features(images, blocks)`, `layers()`, `depth`, `width` and `prefix`, as MaskedAutoencoder
documents them; `require_blocks` refuses an encoder that has not.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maepretrain.arguments import find_config
from maepretrain.checkpoints import (
    from_hugging_face,
    hugging_face_arguments,
    load_exactly,
    load_official,
    official_model,
    read_file,
    read_state,
    read_weights,
)
from maepretrain.data.module import ShardData
from maepretrain.distributed import say
from maepretrain.engines.fragments import is_checkpoint
from maepretrain.experiments import pretrain_parser
from maepretrain.models.mae import MaskedAutoencoder
from maepretrain.models.vit import check_blocks, vit_layers

Weights = dict[str, Tensor]


# Of a run's data these belong to its training; an evaluation shows every image once.
OF_TRAINING = ("seed", "global_batch", "lanes", "block", "tail", "crops_per_image", "max_faults")
OF_TRAINING += ("low_image_size", "low_epochs")


def load_encoder(spec: str, data: ShardData | None = None) -> nn.Module:
    """The pretrained encoder that `spec` names, for images as `data` gives them.

    Args:
        spec: a RUN folder of pretraining or fine-tuning (weights of its last.ckpt, averaged ones
            where it kept them); one of its checkpoints (of any engine); a consolidated file in the
            run's folder or one folder below; what `maepretrain export` wrote, as folder or file; an
            official MAE .pth; a Hugging Face ViTMAE folder; timm:NAME
            (timm's weights where they are on this machine, otherwise random, which is said) or
            timm:NAME?pretrained (timm's weights, downloaded if need be).
        data: tells channels and image size. Positions are interpolated to another size, and timm
            adapts the first layer of its models to other channels. None leaves the encoder's own
            size.

    Raises:
        ValueError: nothing of that name, weights of another model, channels or a size that the
            encoder does not take.
    """
    return _loaded(spec, data)[0]


def load_autoencoder(spec: str, data: ShardData | None = None) -> nn.Module:
    """The whole pretrained model that `spec` names, whose decoder belongs to its encoder.

    Raises:
        ValueError: as of `load_encoder`; an encoder alone, or one that was fine-tuned.
    """
    run = run_of(spec)
    if run is not None and "model" not in (config := _mapping(run / "config.yaml")):
        raise ValueError(
            f"{run} was fine-tuned to classify and has no decoder of its own: name the pretraining "
            f"run ({config.get('encoder')})"
        )
    model, decoder = _loaded(spec, data)
    if not decoder or not hasattr(model, "reconstruct"):
        raise ValueError(f"{spec} is an encoder alone: this needs a model with its decoder")
    return model


def _loaded(spec: str, data: ShardData | None) -> tuple[nn.Module, bool]:
    """The model, and whether more than its encoder was loaded."""
    found = _find(spec, data)
    if data is not None:
        _compare_normalisation(found, data, spec)
    model = found.make()
    whole = found.weights is not None and _load(model, found.weights(), spec)
    return _fit(model, found, data), whole


def fresh_encoder(spec: str, data: ShardData | None, seed: int) -> nn.Module:
    """The same architecture at random initial values; positions are those of a new model.

    Raises:
        ValueError: as of `load_encoder`.
    """
    found = _find(spec, data, random=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = found.make()
    size = getattr(model, "grid", None)
    model = _fit(model, found, data)
    if isinstance(model, MaskedAutoencoder) and model.grid != size:
        model.renew_positions()
    return model


def require_blocks(encoder: nn.Module, purpose: str) -> None:
    """Refuse an encoder without `features()` and `layers()`.

    Raises:
        ValueError: it has none.
    """
    if not hasattr(encoder, "features") or not hasattr(encoder, "layers"):
        raise ValueError(
            f"{purpose} needs a ViT; "
            f"{type(getattr(encoder, 'encoder', encoder)).__name__} has no blocks of tokens"
        )


@dataclass(frozen=True)
class _Images:
    """What an encoder asks of its data: the shape (c, h, w) of the images."""

    shape: tuple[int, ...]
    channels: int


@dataclass(frozen=True)
class _Found:
    """An encoder that is there but not made yet.

    Args:
        make: makes it at random initial values.
        shape: (c, h, w) of the images that `make`'s takes; None where it tells itself.
        weights: reads its weights; None where `make` has loaded them, or there are none.
        normalisation: mean and std of the data that it was trained on, where that is known.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None
    weights: Callable[[], Weights] | None = None
    normalisation: tuple[list[float], list[float]] | None = None


def _compare_normalisation(found: _Found, data: ShardData, spec: str) -> None:
    """Say where images would look other to the encoder than those that it was trained on."""
    given = list(data.mean), list(data.std)
    if found.normalisation is not None and found.normalisation != given:
        mean, std = found.normalisation
        say(
            f"WARNING       {spec} was trained on data of mean {mean} and std {std}; here they are "
            f"{given[0]} and {given[1]}"
        )


def _find(spec: str, data: ShardData | _Images | None, random: bool = False) -> _Found:
    if spec.startswith("timm:"):
        return _Found(lambda: _timm(spec.removeprefix("timm:"), data, random))
    path = _locate(spec)
    if path.is_file() or is_checkpoint(path):
        return _of_file(path)
    return _of_run(path, path / "checkpoints" / "last.ckpt")


def _locate(spec: str) -> Path:
    """A run folder, or a file of weights, which may be the only one in a folder.

    Raises:
        ValueError: nothing of the kind.
    """
    path = Path(spec)
    if path.is_file() or is_checkpoint(path) or (path / "config.yaml").is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"encoder {spec} is no run folder, no file, and no timm:NAME")
    files = [file for pattern in ("*.safetensors", "*.pth") for file in path.glob(pattern)]
    if len(files) != 1:
        raise ValueError(
            f"{path} is no run folder: it holds no config.yaml; nor is it an encoder's: it holds "
            f"{len(files)} files of weights"
        )
    return files[0]


def _of_file(path: Path) -> _Found:
    weights, arguments = read_file(path)
    arguments = arguments or hugging_face_arguments(path.parent / "config.json")
    if arguments is not None:
        return _Found(lambda: _masked_autoencoder(arguments, path), None, lambda: weights)
    run = run_of(str(path))
    if run is not None:
        return _of_run(run, path)
    try:
        return _Found(lambda: official_model(weights), None, lambda: weights)
    except ValueError as error:
        raise ValueError(f"encoder {path}: {error}") from error


def _of_run(run: Path, file: Path) -> _Found:
    """The model of a pretraining run, or the encoder of a fine-tuning run, whose architecture is
    that of the encoder it began with."""
    config = _mapping(run / "config.yaml")
    if "model" not in config and "encoder" not in config:
        raise ValueError(
            f"{run} is no pretraining run, nor a fine-tuning one: its config.yaml has neither "
            "model nor encoder"
        )
    if "model" in config:
        return _of_config(_read_config(run), lambda: read_weights(file))
    sizes = config["data"]
    side = sizes["image_size"]
    shape = (sizes["channels"], *([side, side] if isinstance(side, int) else side))
    data = _Images(shape, shape[0])
    try:
        origin = _find(str(config["encoder"]), data, random=True)
    except ValueError as error:
        raise ValueError(f"{run} was fine-tuned from {config['encoder']}: {error}") from error
    normalisation = list(sizes["mean"]), list(sizes["std"])
    return _Found(
        lambda: _fit(origin.make(), origin, data), shape, lambda: _tuned(file), normalisation
    )


def _tuned(file: Path) -> Weights:
    """The encoder in a checkpoint of fine-tuning: the average of its weights where there is one."""
    prefix = "ema.module.model."
    state, _ = read_state(file)
    averaged = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return averaged or read_weights(file)


def _masked_autoencoder(arguments: dict[str, Any], path: Path) -> MaskedAutoencoder:
    """From what a file says of itself: arguments of this class and of no other."""
    size = arguments.get("image_size", 224)
    # Other kinds of names make timm fetch things.
    if not timm.is_model(arguments.get("encoder", "vit_base_patch16_224")):
        raise ValueError(f"{path}: timm has no model {arguments['encoder']}")
    if isinstance(size, list):
        arguments = arguments | {"image_size": tuple(size)}
    try:
        return MaskedAutoencoder(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no MaskedAutoencoder: {error}") from error


def run_of(spec: str) -> Path | None:
    """The run folder that an encoder belongs to: itself, or of a file in it or one folder below."""
    path = Path(spec)
    inside = path.is_file() or is_checkpoint(path)
    folders = [path.parent, path.parent.parent] if inside else [path]
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def _read_config(run: Path) -> Namespace:
    """The configuration of a pretraining run, what follows from other parts of it filled in."""
    try:
        parser = pretrain_parser(ArgumentParser(exit_on_error=False))
        return parser.parse_path(str(run / "config.yaml"))
    except ArgumentError as error:
        raise ValueError(f"{run} is no pretraining run: {error}") from error


def _of_config(config: Namespace, weights: Callable[[], Weights]) -> _Found:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    section = parser.parse_object({"model": config.model})
    size = config.data.image_size
    sides = [size, size] if isinstance(size, int) else size
    return _Found(
        lambda: parser.instantiate(section).model,
        (config.data.channels, *sides),
        weights,
        (list(config.data.mean), list(config.data.std)),
    )


def _load(model: nn.Module, weights: Weights, spec: str) -> bool:
    """Copy the weights into the model; whether they were more than an encoder's."""
    try:
        if {"vit.embeddings.cls_token", "embeddings.cls_token"} & weights.keys():
            weights = from_hugging_face(weights)
        if isinstance(model, MaskedAutoencoder) and not any(
            k.startswith("encoder.") for k in weights
        ):
            return load_official(model, weights) == "encoder and decoder"
        load_exactly(model.state_dict(), weights)
        return True
    except ValueError as error:
        raise ValueError(f"encoder {spec}: {error}") from error


def _fit(model: nn.Module, found: _Found, data: ShardData | _Images | None) -> nn.Module:
    """The model for images of the data's size.

    Raises:
        ValueError: other channels, or a size that it cannot be made to take.
    """
    shape = found.shape
    if isinstance(model, MaskedAutoencoder):
        shape = (model.channels, *model.encoder.patch_embed.img_size)
    if data is None or shape is None or shape == data.shape:
        return model
    if shape[0] != data.channels:
        raise ValueError(
            f"the encoder takes images of {shape[0]} channels; data.channels is {data.channels}"
        )
    if not isinstance(model, MaskedAutoencoder) or len(data.shape) != 3:
        raise ValueError(
            f"the encoder takes inputs of size {list(shape[1:])}, not {list(data.shape[1:])}: "
            "set data.image_size"
        )
    height, width = data.shape[1:]
    model.resize((height, width))
    return model


class TimmEncoder(nn.Module):
    """A timm model as an encoder; without `features` where it is no plain VisionTransformer.

    Args:
        model: any timm model without a classifier.
    """

    # Runs on a divided memory too (ZeRO, FSDP2).
    shardable = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = model

    def encode(
        self, images: Float[Tensor, "b c h w"], pool: Literal["cls", "mean", "tokens"] = "mean"
    ) -> Tensor:
        """Features of images: (b, d), or all places, (b, n, d), with pool="tokens".

        Raises:
            ValueError: pool="cls" without a class token.
        """
        encoder = cast(Any, self.encoder)
        if pool == "cls" and getattr(encoder, "cls_token", None) is None:
            raise ValueError('this encoder has no class token: use pool "mean"')
        tokens = encoder.forward_features(images)
        if tokens.ndim == 4:  # the map of a network without tokens
            last = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
            tokens = tokens.flatten(1, 2) if last else tokens.flatten(2).mT
        if pool == "cls":
            return tokens[:, 0]
        places = tokens[:, getattr(encoder, "num_prefix_tokens", 0) :]
        if pool == "tokens":
            return places
        # ViTs that were trained on the mean have their norm after it.
        return getattr(encoder, "fc_norm", nn.Identity())(places.mean(1))

    @property
    def width(self) -> int:
        """Features of an image."""
        return cast(Any, self.encoder).num_features


class TimmViT(TimmEncoder):
    """A plain VisionTransformer of timm, with what MaskedAutoencoder offers of its encoder."""

    encoder: VisionTransformer

    def features(
        self, images: Float[Tensor, "b c h w"], blocks: Sequence[int]
    ) -> list[Float[Tensor, "b t d"]]:
        """What the given blocks put out, before the norm; all tokens, prefix tokens first.

        Raises:
            ValueError: a block that the encoder does not have.
        """
        check_blocks(blocks, self.depth)
        wanted = [block % self.depth for block in blocks]
        found = cast(Any, self.encoder).forward_intermediates(
            images,
            indices=sorted(set(wanted)),
            return_prefix_tokens=self.prefix > 0,
            output_fmt="NLC",
            intermediates_only=True,
        )
        whole = [torch.cat([x[1], x[0]], 1) if self.prefix else x for x in found]
        outputs = dict(zip(sorted(set(wanted)), whole, strict=True))
        return [outputs[number] for number in wanted]

    def layers(self) -> list[list[nn.Parameter]]:
        """Parameters from input to output: embedding and tokens, each block, norm."""
        return vit_layers(self.encoder)

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return len(self.encoder.blocks)

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.encoder.num_prefix_tokens


def _timm(name: str, data: ShardData | _Images | None, random: bool) -> nn.Module:
    name, _, query = name.partition("?")
    if query not in ("", "pretrained"):
        raise ValueError(f"timm:{name}?{query}: what may follow a name is ?pretrained")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name}")
    if data is not None and len(data.shape) != 3:
        raise ValueError(f"timm:{name} takes images, not signals of size {list(data.shape[1:])}")
    size = {} if data is None else {"img_size": data.shape[1:]}
    arguments: dict[str, Any] = {"num_classes": 0}
    arguments |= {} if data is None else {"in_chans": data.channels}
    if not random:
        arguments |= _timm_weights(name, download=query == "pretrained")
    try:
        try:
            model = timm.create_model(name, **size, **arguments)
        except TypeError:  # convolutional networks take any size
            model = timm.create_model(name, **arguments)
    except Exception as error:  # files, hubs and sizes fail in any way
        images = "" if data is None else f" for images {data.shape}"
        raise ValueError(f"timm cannot make {name}{images}: {error}") from error
    if type(model) is not VisionTransformer or model.pos_embed is None:
        return TimmEncoder(model)
    model.attn_pool = None  # pooling is ours: its parameters would never get a gradient
    return TimmViT(model)


def _timm_weights(name: str, download: bool) -> dict[str, Any]:
    """The arguments that give timm's own weights, or none where they are not on this machine."""
    if download:
        return {"pretrained": True}
    config = timm.get_pretrained_cfg(name)
    repository = config.hf_hub_id if config else None
    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, file) if repository else None
        if isinstance(cached, str):
            say(f"encoder       {name} with the weights of {repository}")
            return {"pretrained": True, "pretrained_cfg_overlay": {"file": cached}}
    say(
        f"encoder       {name} at RANDOM initial values: its weights are not on this machine; "
        f"timm:{name}?pretrained downloads them"
    )
    return {}


def evaluation_parser(
    parser: ArgumentParser, function: Callable[..., Any], skip: Iterable[str] = ()
) -> ArgumentParser:
    """Options of an evaluation: those of `function`, which has an argument `encoder`, and the
    section `data`, whose values come from the run where the encoder is one."""
    parser.add_function_arguments(function, skip={"data", "config", *skip})
    parser.add_class_arguments(ShardData, "data")
    # An evaluation has no training batches, which could be larger than the set.
    parser.set_defaults({"data.global_batch": 1})
    return data_of_encoder(parser, OF_TRAINING)


def data_of_encoder(
    parser: ArgumentParser, skip: Sequence[str] = ("seed",), also: Sequence[str] = ()
) -> ArgumentParser:
    """Let the section `data` start from what the run of `--encoder` was trained on; configs and
    options that are given come after and win.

    Args:
        parser: has the section `data`.
        skip: keys that are not taken over (one that another argument sets would be refused).
        also: further sections and options that start from the run's.
    """
    plain = parser.parse_args

    def parse_args(argv: list[str], *args: Any, **kwargs: Any) -> Any:
        encoder = _named_encoder(argv)
        if encoder is not None and not encoder.startswith("timm:"):
            _locate(encoder)  # otherwise the data that it would bring are what is missing
        run = None if encoder is None else run_of(encoder)
        if run is not None:
            config = _mapping(run / "config.yaml")
            data = config.get("data") or {}
            known = {key: value for key, value in data.items() if key not in skip}
            starts = {"data": known} | {name: config[name] for name in also if name in config}
            given = [word for k, v in starts.items() for word in (f"--{k}", json.dumps(v))]
            argv = [*given, *argv]
        return plain(argv, *args, **kwargs)

    cast(Any, parser).parse_args = parse_args
    return parser


def _named_encoder(argv: list[str]) -> str | None:
    """The encoder that options or configs name, the last one winning."""
    named = None
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option == "--encoder":
            named = value
        elif option in ("-c", "--config"):
            named = _mapping(find_config(value)).get("encoder", named)
    return None if named is None else str(named)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return {}  # the parser will say it
    return content if isinstance(content, dict) else {}
