"""The fine-tuned classifier that `compress` takes apart: its weights by name, further training of
them, and their accuracy."""

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import yaml
from lightning.pytorch.callbacks import RichProgressBar
from torch import nn

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.checkpoints.official import load_official, official_weights
from maepretrain.checkpoints.packing import Weights
from maepretrain.checkpoints.weights import load_exactly, read_state
from maepretrain.data.finetune_augmentation import Augmentation
from maepretrain.data.module import ShardData
from maepretrain.evaluate.classifier import Classifier
from maepretrain.evaluate.classifier_head import ClassifierHead
from maepretrain.evaluate.labels import choose_labels
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.models.protocol import declared
from maepretrain.training.callbacks.progress import progress
from maepretrain.training.callbacks.throughput import Throughput
from maepretrain.training.optimizer import Optimization


@dataclass
class Retraining:
    """A classifier with all that trains and measures it.

    Args:
        model: the encoder.
        head: the classifier on its features.
        data: labelled shards.
        optim: optimizer of the run that made the classifier.
        augment: of the training batches.
        lr: share of optim.base_lr at which a training begins; a cosine leads to 0.
        label_smoothing: share of the target spread over all classes.
        seed: of dropout, erasing and mixing.
    """

    model: MaskedAutoencoder
    head: ClassifierHead
    data: ShardData
    optim: Optimization
    augment: Augmentation
    lr: float
    label_smoothing: float
    seed: int

    def layers(self) -> dict[str, nn.Module]:
        """The linear maps of encoder and head, whose matrices are compressed, by names in the
        file."""
        layers: dict[str, nn.Module] = {}
        modules: dict[str, nn.Module] = {"model": self.model.encoder, "head": self.head}
        for prefix, whole in modules.items():
            for name, module in whole.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    layers[f"{prefix}.{name}"] = module
        return layers

    def weights(self) -> Weights:
        """All weights of encoder and head, without a decoder, by their names in the file."""
        weights: Weights = {}
        states: dict[str, Weights] = {
            "model": official_weights(self.model, decoder=False),
            "head": self.head.state_dict(),
        }
        for prefix, state in states.items():
            for name, tensor in state.items():
                copied = tensor.detach().cpu().float().contiguous().clone()
                weights[f"{prefix}.{name}"] = copied
        return weights

    def restore(self, weights: Weights) -> None:
        """Set all weights to what `weights` returned."""
        load_official(self.model, _below(weights, "model."))
        load_exactly(self.head.state_dict(), _below(weights, "head."))

    def train(self, steps: int, *callbacks: L.Callback) -> None:
        """Train so many steps, after a warm-up of a tenth of them at most."""
        if not steps:
            return
        optim = copy(self.optim)
        optim.base_lr *= self.lr
        longest = 0.1 * steps / self.data.order.steps_per_epoch
        optim.warmup_epochs = min(optim.warmup_epochs, longest)
        module = Classifier(
            self.model,
            self.head,
            optim,
            self.data,
            steps,
            self.augment,
            label_smoothing=self.label_smoothing,
            seed=self.seed,
        )
        _trainer(self.data, steps, *callbacks, limit_val_batches=0).fit(module, self.data)

    def accuracy(self) -> float:
        """Accuracy on all held-out images."""
        module = Classifier(self.model, self.head, self.optim, self.data, 1)
        _trainer(self.data, 1).validate(module, self.data, verbose=False)
        return module.scores["top1"]


def _trainer(data: ShardData, steps: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    data.plan(steps, 1, 1)
    throughput = Throughput(data.global_batch)
    bar = progress(throughput)
    return L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        devices=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=isinstance(bar, RichProgressBar),
        callbacks=[*callbacks, bar, throughput],
        **options,
    )


def read_finetune_config(run: Path) -> dict[str, Any]:
    """The configuration of a run of fine-tuning classes.

    Raises:
        ValueError: another folder.
    """
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    if "head" not in config or config["task"] != "classes":
        raise ValueError(f"compress takes the run folder of a finetune on classes, not {run}")
    return config


def load_classifier(
    run: Path, config: dict[str, Any], data: ShardData
) -> tuple[MaskedAutoencoder, ClassifierHead]:
    """Encoder and head as a run of fine-tuning ended with; `data` is set to the labels that it was
    trained on.

    Args:
        run: the folder.
        config: its configuration.
        data: labelled shards.

    Raises:
        ValueError: no held-out shards, no labels, another encoder than a masked autoencoder.
    """
    if data.val_index is None:
        raise ValueError("compress measures the accuracy on held-out images: set data.val")
    labels = data.index.require_labels("compress")
    data.val_index.require_labels("compress")
    data.labelled = True
    fraction, few = config["label_fraction"], config["labels_per_class"]
    if fraction != 1 or few is not None:
        data.choose(choose_labels(labels, fraction, few, config["seed"]))
    model = load_encoder(str(run), data)
    if declared(model, "layout") != "mae":
        raise ValueError(f"compress takes a MaskedAutoencoder; {run} is a {type(model).__name__}")
    model = cast(MaskedAutoencoder, model)
    return model, _load_head(run, config, model.width)


def _load_head(run: Path, config: dict[str, Any], width: int) -> ClassifierHead:
    state, _ = read_state(run / "checkpoints" / "last.ckpt")
    averaged = any(name.startswith("ema.module.head.") for name in state)
    weights = _below(state, "ema.module.head." if averaged else "head.")
    classes = len(weights["linear.weight"])
    head = ClassifierHead(width, classes, config["head"], config["pool"], config["heads"])
    load_exactly(head.state_dict(), weights)
    return head


def _below(weights: Weights, prefix: str) -> Weights:
    """The weights whose names begin so, without that beginning."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
