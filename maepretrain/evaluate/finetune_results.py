"""Result of a fine-tuning run: results.json, pictures, and mean and spread over seeds."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from PIL import Image

from maepretrain.data.module import ShardData
from maepretrain.evaluate.classifier import Classifier
from maepretrain.evaluate.pictures import draw_confusion
from maepretrain.evaluate.scores import spread
from maepretrain.runs.results import write_results
from maepretrain.training.callbacks.pictures import log_picture

# Numbers of a result whose mean and spread over seeds are known.
FIGURES = ("top1", "top5", "mean_per_class", "mAP", "r2", "n", "minutes", "img_per_s")


@rank_zero_only
def write_result(
    run: Path,
    module: Classifier,
    data: ShardData,
    engine: L.Trainer,
    *,
    seconds: float,
    encoder: str,
    scratch: bool,
    seed: int,
) -> None:
    """Write results.json and draw the pictures of a classification.

    Args:
        run: the run folder.
        module: scored on the held-out samples.
        data: what it was trained on.
        engine: its loggers get the pictures.
        seconds: time of the whole run.
        encoder: as of `finetune`.
        scratch: as of `finetune`.
        seed: as of `finetune`.
    """
    result = module.scores | {
        "encoder": encoder,
        "scratch": scratch,
        "seed": seed,
        "labels": len(data.index),
        "recipe": _recipe(module),
        "minutes": seconds / 60,
        "img_per_s": module.steps * module.global_batch / max(seconds, 1e-9),
    }
    if module.targets is not None and module.targets.task == "regression":
        # A prediction in the targets' own units is mean + std * output.
        result |= {"target_mean": module.targets.mean, "target_std": module.targets.std}
    write_results(run, "finetune", result)
    if module.targets is None:
        _draw(run / "pictures", module, data, engine)


def _recipe(module: Classifier) -> str:
    trained = sum(p.requires_grad for p in module.model.parameters())
    epochs = module.steps / module.steps_per_epoch
    recipe = f"{module.head.kind} head, {trained} encoder tensors trained, {epochs:.4g} epochs"
    if module.ema is not None:
        recipe += f", averaged weights ({module.ema.decay})"
    return recipe


def _draw(folder: Path, module: Classifier, data: ShardData, engine: L.Trainer) -> None:
    assert data.val_index is not None
    logits = module.logits_of_all
    pictures = draw_confusion(
        folder,
        "finetune",
        data,
        data.val_index,
        truth=module.truth_of_all,
        predicted=logits.argmax(1),
        confidence=logits.softmax(1).amax(1),
        classes=logits.shape[1],
    )
    for path in pictures:
        log_picture(engine, path.stem, np.asarray(Image.open(path).convert("RGB")))


@rank_zero_only
def write_summary(folder: Path, results: list[dict[str, Any]]) -> None:
    """Write mean and spread over the seeds into results.json of the folder above the runs."""
    first = results[0]
    figures = [{name: one[name] for name in FIGURES if name in one} for one in results]
    result = spread(figures) | {
        "seeds": len(results),
        "recipe": first["recipe"],
        "labels": first["labels"],
        "encoder": first["encoder"],
    }
    write_results(folder, "finetune", result)
