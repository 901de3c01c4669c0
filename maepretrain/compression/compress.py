"""`maepretrain compress`: a fine-tuned encoder and its classifier in a tenth of the bytes or less.

Deep compression (Han, Mao and Dally 2016, arXiv 1510.00149): the smallest weights are pruned and
the others retrained, what is left shares a few values by k-means which are trained on, and the
indices and the runs of zeros between them are Huffman-coded. Deviations: weights are pruned in
several rounds of one training, by one threshold for all blocks; biases, norms, tokens and positions
train on too and are kept as float16; codebook entry 0 is zero, for what is pruned.

The file is that of checkpoints/packing.py.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from maepretrain.checkpoints.packing import Shared, eight_bits, pack, sparse
from maepretrain.checkpoints.weights import OWN_KEY, read_state
from maepretrain.compression.pruning import Pruning
from maepretrain.compression.retraining import Retraining, load_classifier, read_finetune_config
from maepretrain.compression.sharing import share, unshare
from maepretrain.data.finetune_augmentation import Augmentation
from maepretrain.data.module import ShardData, add_data
from maepretrain.evaluate.options import data_of_encoder
from maepretrain.files import replacing
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.ranks import quiet_lightning, say
from maepretrain.runs.results import write_results
from maepretrain.runs.tables import print_columns
from maepretrain.training.optimizer import Optimization
from maepretrain.training.trainer_arguments import set_threads

# Of each stage: `bytes`, `ratio` to float32, `top1`.
Stages = dict[str, dict[str, int | float]]

BLOCKS = "model.blocks."


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
        data: labelled shards; `val` serves only to measure the accuracy.
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
    run = Path(encoder)
    out = out or run / "compressed.safetensors"
    config = read_finetune_config(run)
    _check_out(out, overwrite=overwrite)
    _check_training(sparsity, rounds, retrain_steps, share_steps, lr)
    bits = {"attention": attention_bits, "mlp": mlp_bits, "other": other_bits}
    _check_bits(bits | {"run": run_bits})
    set_threads(threads)
    model, head = load_classifier(run, config, data)
    augment.apply(data)
    training = Retraining(model, head, data, optim, augment, lr, label_smoothing, seed)
    layers = training.layers()
    matrices = [f"{name}.weight" for name in layers]
    about = {OWN_KEY: json.dumps(model.arguments)}
    stages: Stages = {}

    original = training.weights()
    _note(stages, "float32", save(original, about), training.accuracy())
    int8_file, int8_weights = eight_bits(original, matrices, about)
    training.restore(int8_weights)
    _note(stages, "int8", int8_file, training.accuracy())

    training.restore(original)
    model.train_positions()
    _prune(training, layers, sparsity=sparsity, rounds=rounds, steps=retrain_steps)
    pruned_file = sparse(training.weights(), matrices, about, run_bits)
    _note(stages, "pruned", pruned_file, training.accuracy())

    shared = _share(training, layers, bits, share_steps)
    rest = {k: v for k, v in training.weights().items() if k not in shared}
    with replacing(out) as file:
        file.write(pack(shared, rest, about, run_bits))
    # What is scored is what anyone gets from the file.
    training.restore(read_state(out)[0])
    top1 = training.accuracy()
    equal_lengths = pack(shared, rest, about, run_bits, huffman_coded=False)
    _note(stages, "shared", equal_lengths, top1)
    _note(stages, "Huffman", out.read_bytes(), top1)
    _report(run, out, stages, sparsity)
    return stages


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there: take another --out, or --overwrite")


def _check_training(sparsity: float, rounds: int, retrain: int, share: int, lr: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} must be in [0, 1)")
    if rounds < 1 or retrain < rounds or share < 0:
        raise ValueError(
            f"rounds {rounds}, retrain_steps {retrain} and share_steps {share}: each round of "
            "pruning needs a step or more"
        )
    if lr <= 0:
        raise ValueError(f"lr {lr} must be above 0")


def _check_bits(bits: dict[str, int]) -> None:
    for name, value in bits.items():
        if not 1 <= value <= 8:
            raise ValueError(f"{name}_bits {value} must be 1 to 8")


def _kind(name: str) -> str:
    """The group that a layer's bits are chosen for."""
    if not name.startswith(BLOCKS):
        return "other"
    return "attention" if ".attn." in name else "mlp"


def _prune(
    training: Retraining,
    layers: dict[str, nn.Module],
    *,
    sparsity: float,
    rounds: int,
    steps: int,
) -> None:
    """Prune the blocks' matrices while they train."""
    blocks = [layer for name, layer in layers.items() if name.startswith(BLOCKS)]
    pruning = Pruning(blocks, sparsity, rounds, steps)
    training.train(steps, pruning)
    pruning.finish()


def _share(
    training: Retraining, layers: dict[str, nn.Module], bits: dict[str, int], steps: int
) -> dict[str, Shared]:
    """Give each matrix a codebook, and train its values."""
    for name, layer in layers.items():
        share(layer, bits[_kind(name)])
    training.train(steps)
    return {f"{name}.weight": unshare(layer) for name, layer in layers.items()}


def _note(stages: Stages, stage: str, content: bytes, top1: float) -> None:
    """Add the size of a stage's file and its accuracy to the table, and print them."""
    size = len(content)
    first = stages["float32"]["bytes"] if stages else size
    stages[stage] = {"bytes": size, "ratio": first / size, "top1": top1}
    say(f"{stage:<13} {size:,} bytes, accuracy {top1:.4f}")


def _report(run: Path, out: Path, stages: Stages, sparsity: float) -> None:
    result = {"stages": stages, "sparsity": sparsity, "file": str(out)}
    path = write_results(run, "compress", result)
    formats = {"bytes": "{:,}", "ratio": "{:.1f}", "top1": "{:.4f}"}
    headings = {"bytes": "bytes", "ratio": "x smaller", "top1": "accuracy"}

    def cell(row: dict[str, Any], key: str) -> str:
        return formats[key].format(row[key])

    print_columns("stage", headings, stages, cell)
    say(f"{out}, an encoder; figures in {path}")


def compress_command(argv: list[str]) -> int:
    """The verb `compress`."""
    quiet_lightning()
    parser = make_parser("compress")
    parser.add_function_arguments(compress, skip={"data", "optim", "augment"})
    add_data(parser)
    parser.add_class_arguments(Optimization, "optim")
    parser.add_class_arguments(Augmentation, "augment")
    parser.link_arguments("seed", "data.order.seed")
    also = ("optim", "augment", "label_smoothing", "seed", "threads")
    compress(**parse(data_of_encoder(parser, also=also), argv))
    return 0
