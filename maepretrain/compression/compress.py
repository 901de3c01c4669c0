"""`maepretrain compress`: a fine-tuned encoder and its classifier in a tenth of the bytes or less.

Deep compression (Han, Mao and Dally 2016, arXiv 1510.00149): the smallest weights are pruned and
the others retrained, what is left shares a few values by k-means which are trained on, and the
indices and the runs of zeros between them are Huffman-coded. Deviations: weights are pruned in
several rounds of one training, by one threshold for all blocks; biases, norms, tokens and positions
train on too and are kept as float16; codebook entry 0 is zero, for what is pruned.

The file is that of packing.py.

Axes: n weights of a layer, m of them stored, k codebook entries.
"""

import json
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import yaml
from jaxtyping import Float, Int64
from lightning.pytorch.callbacks import RichProgressBar
from safetensors.torch import save
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.checkpoints.packing import Shared, Weights, eight_bits, pack, sparse
from maepretrain.checkpoints.weights import (
    OWN_KEY,
    load_exactly,
    load_official,
    official_weights,
    read_state,
)
from maepretrain.data.augment import Augmentation
from maepretrain.data.module import ShardData
from maepretrain.evaluate.classifier import Classifier, Head
from maepretrain.evaluate.labels import choose_labels
from maepretrain.evaluate.options import data_of_encoder
from maepretrain.files import replacing
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.parsing import make_parser, parse
from maepretrain.ranks import quiet_lightning, say
from maepretrain.runs.results import print_columns, write_results
from maepretrain.training.callbacks.progress import progress
from maepretrain.training.callbacks.throughput import Throughput
from maepretrain.training.fit import set_threads
from maepretrain.training.optimizer import Optimization

# Of each stage: `bytes`, `ratio` to float32, `top1`.
Stages = dict[str, dict[str, int | float]]


def compress(
    encoder: str,
    data: ShardData,
    optim: Optimization,
    augment: Augmentation,
    out: Path | None = None,
    sparsity: float = 0.65,
    rounds: int = 5,
    attention_bits: int = 5,
    mlp_bits: int = 5,
    other_bits: int = 6,
    run_bits: int = 5,
    retrain_steps: int = 1000,
    share_steps: int = 500,
    lr: float = 1.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
) -> Stages:
    """Prune, share and code the weights of a fine-tuned encoder and its head into one file, which
    is an encoder; bytes and accuracy of each stage are printed and go to results.json of the run.

    Args:
        encoder: run folder of `maepretrain finetune`, whose data, optim, augment and label
            smoothing are used unless others are given.
        data: labelled shards; `val` only tells the accuracy.
        optim: optimizer of the retraining; its warm-up takes no more than a tenth of the steps.
        augment: of the training batches.
        out: the file to write, .safetensors; default RUN/compressed.safetensors.
        sparsity: share of the blocks' matrices that is pruned, the smallest values of all of them.
        rounds: prunings, with retraining after each; the first ones take more (a cubic).
        attention_bits: bits of an index into the codebook of each attention matrix; 1 to 8.
        mlp_bits: of each MLP matrix.
        other_bits: of the patch embedding and the head, which are not pruned.
        run_bits: the longest run of zeros is 2^run_bits - 1; a stored zero breaks longer ones.
        retrain_steps: training steps over all rounds of pruning.
        share_steps: training steps of the shared values.
        lr: share of optim.base_lr at which both begin; a cosine leads to 0.
        label_smoothing: share of the target spread over all classes.
        seed: of dropout, erasing and mixing.
        threads: compute threads on the CPU.
        overwrite: replace the file.

    Returns:
        `bytes`, `ratio` to float32 and `top1` of each stage.

    Raises:
        ValueError: no run of fine-tuning classes with a masked autoencoder, no held-out shards, an
            option outside its range, a file that is there, too few labels.
    """
    run, bits = Path(encoder), {"attention": attention_bits, "mlp": mlp_bits, "other": other_bits}
    out = out or run / "compressed.safetensors"
    config = _config(run)
    _check(out, overwrite, sparsity, rounds, retrain_steps, share_steps, lr)
    for name, value in (bits | {"run": run_bits}).items():
        if not 1 <= value <= 8:
            raise ValueError(f"{name}_bits {value} must be 1 to 8")
    set_threads(threads)
    model, head = _load_classifier(run, config, data)
    augment.apply(data)
    task = _Task(model, head, data, optim, augment, lr, label_smoothing, seed)
    layers, about = layers_of(model, head), {OWN_KEY: json.dumps(model.arguments)}
    matrices = [f"{name}.weight" for name in layers]

    before = task.weights()
    task.score("float32", save(before, about))
    content, weights = eight_bits(before, matrices, about)
    task.restore(weights)
    task.score("int8", content)

    task.restore(before)
    model.train_positions()
    blocks = [layer for name, layer in layers.items() if name.startswith(BLOCKS)]
    pruning = Pruning(blocks, sparsity, rounds, retrain_steps)
    task.train(retrain_steps, pruning)
    pruning.finish()
    task.score("pruned", sparse(task.weights(), matrices, about, run_bits))

    for name, layer in layers.items():
        share(layer, bits[_kind(name)])
    task.train(share_steps)
    shared = {f"{name}.weight": unshare(layer) for name, layer in layers.items()}
    rest = {k: v for k, v in task.weights().items() if k not in shared}
    with replacing(out) as file:
        file.write(pack(shared, rest, about, run_bits))
    # What is scored is what anyone gets from the file.
    task.restore(read_state(out)[0])
    top1 = task.score("shared", pack(shared, rest, about, run_bits, huffman_coded=False))
    task.score("Huffman", out.read_bytes(), top1)
    _report(run, out, task.stages, sparsity)
    return task.stages


def _check(
    out: Path, overwrite: bool, sparsity: float, rounds: int, retrain: int, share: int, lr: float
) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there: take another --out, or --overwrite")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} must be in [0, 1)")
    if rounds < 1 or retrain < rounds or share < 0:
        raise ValueError(
            f"rounds {rounds}, retrain_steps {retrain} and share_steps {share}: each round of "
            "pruning needs a step or more"
        )
    if lr <= 0:
        raise ValueError(f"lr {lr} must be above 0")


BLOCKS = "model.blocks."


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    if "head" not in config or config["task"] != "classes":
        raise ValueError(f"compress takes the run folder of a finetune on classes, not {run}")
    return config


def _load_classifier(
    run: Path, config: dict[str, Any], data: ShardData
) -> tuple[MaskedAutoencoder, Head]:
    """Encoder and head as a run of fine-tuning ended with; `data` gets the labels it trained on."""
    if data.val_index is None:
        raise ValueError("compress tells the accuracy on held-out images: set data.val")
    labels = data.index.require_labels("compress")
    data.val_index.require_labels("compress")
    data.labelled = True
    fraction, few = config["label_fraction"], config["labels_per_class"]
    if fraction != 1 or few is not None:
        data.choose(choose_labels(labels, fraction, few, config["seed"]))
    model = load_encoder(str(run), data)
    if not isinstance(model, MaskedAutoencoder):
        raise ValueError(f"compress takes a MaskedAutoencoder; {run} is a {type(model).__name__}")
    state, _ = read_state(run / "checkpoints" / "last.ckpt")
    averaged = any(name.startswith("ema.module.head.") for name in state)
    weights = _part(state, "ema.module.head." if averaged else "head.")
    kind = config["head"], config["pool"], config["heads"]
    head = Head(model.width, len(weights["linear.weight"]), *kind)
    load_exactly(head.state_dict(), weights)
    return model, head


def layers_of(model: MaskedAutoencoder, head: Head) -> dict[str, nn.Module]:
    """The linear maps of encoder and head, whose matrices are shared, by names in the file."""
    parts = {"model": model.encoder, "head": head}
    return {
        f"{part}.{name}": module
        for part, whole in parts.items()
        for name, module in cast(nn.Module, whole).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _kind(name: str) -> str:
    if not name.startswith(BLOCKS):
        return "other"
    return "attention" if ".attn." in name else "mlp"


def _part(weights: Weights, prefix: str) -> Weights:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


@dataclass
class _Task:
    """What is trained and scored, and how; the arguments are those of `compress`."""

    model: MaskedAutoencoder
    head: Head
    data: ShardData
    optim: Optimization
    augment: Augmentation
    lr: float
    label_smoothing: float
    seed: int
    stages: Stages = field(default_factory=dict)

    def weights(self) -> Weights:
        """All of encoder and head, without a decoder, by their names in the file."""
        encoder = official_weights(self.model, decoder=False)
        return {
            f"{part}.{name}": tensor.detach().cpu().float().contiguous().clone()
            for part, weights in {"model": encoder, "head": self.head.state_dict()}.items()
            for name, tensor in weights.items()
        }

    def restore(self, weights: Weights) -> None:
        """Set what `weights` gave."""
        load_official(self.model, _part(weights, "model."))
        load_exactly(self.head.state_dict(), _part(weights, "head."))

    def train(self, steps: int, *callbacks: L.Callback) -> None:
        """Steps at a share of the learning rate, with a short warm-up."""
        if not steps:
            return
        optim = copy(self.optim)
        optim.base_lr *= self.lr
        most = 0.1 * steps / self.data.order.steps_per_epoch
        optim.warmup_epochs = min(optim.warmup_epochs, most)
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

    def score(self, stage: str, content: bytes, top1: float | None = None) -> float:
        """Note the size of a stage's file and the accuracy on all held-out images."""
        if top1 is None:
            module = Classifier(self.model, self.head, self.optim, self.data, 1)
            _trainer(self.data, 1).validate(module, self.data, verbose=False)
            top1 = module.scores["top1"]
        size = len(content)
        first = self.stages["float32"]["bytes"] if self.stages else size
        self.stages[stage] = {"bytes": size, "ratio": first / size, "top1": top1}
        say(f"{stage:<13} {size:,} bytes, accuracy {top1:.4f}")
        return top1


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


class Pruning(L.Callback):
    """Prunes a model's smallest weights in rounds of its training, all of them by one threshold.

    After round r of R a share of s (1 - (1 - r / R)^3) is pruned (Zhu and Gupta 2017, arXiv
    1710.01878, equation 1): what goes first is missed least, and the last rounds have time to heal.

    Args:
        modules: whose `weight` is pruned, a first time at once.
        sparsity: s, of all their weights together.
        rounds: R, at equal distances from the first step on.
        steps: of the training.
    """

    def __init__(self, modules: list[nn.Module], sparsity: float, rounds: int, steps: int) -> None:
        self.modules, self.sparsity, self.rounds = modules, sparsity, rounds
        self._starts = {steps * r // rounds: r + 1 for r in range(1, rounds)}
        self._pruned = 0
        # Before there is an optimizer: it makes other parameters of the weights.
        self.prune(1)

    def prune(self, r: int) -> None:
        """Round r, 1..R."""
        total = sum(cast(Tensor, m.weight).numel() for m in self.modules)
        wanted = round(total * self.sparsity * (1 - (1 - r / self.rounds) ** 3))
        # `weight` is what the last forward left, a step older.
        now = {(m, "weight"): getattr(m, "weight_orig", m.weight) for m in self.modules}
        more, self._pruned = wanted - self._pruned, wanted
        prune.global_unstructured(
            list(now), prune.L1Unstructured, importance_scores=now, amount=more
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self._starts:
            self.prune(self._starts[trainer.global_step])

    def finish(self) -> None:
        """Weights are plain parameters again, those that were pruned zero."""
        for module in self.modules:
            prune.remove(module, "weight")


class _Lookup(torch.autograd.Function):
    """codebook[index], whose gradient is equation 3."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.entries = len(codebook)
        return codebook[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return centroid_gradient(gradients[0], ctx.saved_tensors[0], ctx.entries), None


def centroid_gradient(
    gradient: Float[Tensor, "*shape"], index: Int64[Tensor, "*shape"], entries: int
) -> Float[Tensor, "k"]:
    """The gradient of each codebook entry: the sum over the weights that share it (equation 3)."""
    zeros = gradient.new_zeros(entries)
    return zeros.index_add_(0, index.flatten(), gradient.flatten())


class Sharing(nn.Module):
    """The parametrization of a weight by the centroids that its values share."""

    index: Tensor

    def __init__(self, index: Int64[Tensor, "*shape"], centroids: Float[Tensor, "c"]) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self._centroids = centroids

    def forward(self, centroids: Float[Tensor, "c"]) -> Float[Tensor, "*shape"]:
        return cast(Tensor, _Lookup.apply(F.pad(centroids, (1, 0)), self.index))

    def right_inverse(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "c"]:
        """What is trained in the place of the weight."""
        return self._centroids.clone()


def share(layer: nn.Module, bits: int) -> None:
    """Cluster the weights of a layer that are not 0 by k-means, and train the centroids instead.

    Centroids begin at equal distances between the smallest and the largest weight, which keeps the
    few large ones (section 3.2). With the entry for 0 there are 2^bits at most.
    """
    weight = cast(Tensor, layer.weight).detach().cpu()
    kept = weight != 0
    values = weight[kept].numpy()
    index = torch.zeros(weight.shape, dtype=torch.int64)
    count = min(2**bits - 1, len(np.unique(values)))
    centroids = np.zeros(0, np.float32)
    if count:
        linear = np.linspace(values.min(), values.max(), count, dtype=np.float32)[:, None]
        found = KMeans(count, init=cast(Any, linear), n_init=cast(Any, 1), tol=0)
        index[kept] = torch.from_numpy(found.fit_predict(values[:, None]).astype(np.int64) + 1)
        centroids = found.cluster_centers_[:, 0].astype(np.float32)
    parametrize.register_parametrization(
        layer, "weight", Sharing(index, torch.from_numpy(centroids))
    )


def unshare(layer: nn.Module) -> Shared:
    """What a layer's weight has become; it is a plain parameter again."""
    sharing = cast(Any, layer).parametrizations.weight
    codebook = F.pad(sharing.original.detach().cpu(), (1, 0)).numpy()
    index = sharing[0].index.cpu().numpy()
    parametrize.remove_parametrizations(layer, "weight")
    return Shared(codebook, index)


def _report(run: Path, out: Path, stages: Stages, sparsity: float) -> None:
    path = write_results(
        run, "compress", {"stages": stages, "sparsity": sparsity, "file": str(out)}
    )
    formats = {"bytes": "{:,}", "ratio": "{:.1f}", "top1": "{:.4f}"}
    headings = {"bytes": "bytes", "ratio": "x smaller", "top1": "accuracy"}
    print_columns("stage", headings, stages, lambda row, key: formats[key].format(row[key]))
    say(f"{out}, an encoder; figures in {path}")


def compress_command(argv: list[str]) -> int:
    """The verb `compress`."""
    quiet_lightning()
    parser = make_parser("compress")
    parser.add_function_arguments(compress, skip={"data", "optim", "augment"})
    parser.add_class_arguments(ShardData, "data")
    parser.add_class_arguments(Optimization, "optim")
    parser.add_class_arguments(Augmentation, "augment")
    parser.link_arguments("seed", "data.seed")
    also = ("optim", "augment", "label_smoothing", "seed", "threads")
    compress(**parse(data_of_encoder(parser, also=also), argv))
    return 0
