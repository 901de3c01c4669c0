"""Deep compression: Huffman codes against textbook and entropy, runs against the paper's figure,
centroids against autograd, and the file against the weights that were scored."""

import heapq
import json
import struct
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from maepretrain.checkpoints import huffman
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.checkpoints.packing import Shared, eight_bits, from_runs, pack, sparse, to_runs
from maepretrain.checkpoints.weights import read_state
from maepretrain.compression.pruning import Pruning
from maepretrain.compression.sharing import centroid_gradient, share, unshare
from maepretrain.evaluate.classifier_head import ClassifierHead

Run = Callable[..., int]
SHORT = [
    *("--retrain_steps", 12, "--share_steps", 6, "--rounds", 3, "--sparsity", 0.5),
    *("--attention_bits", 4, "--mlp_bits", 3),
]


def test_textbook_code() -> None:
    """Cormen et al., Introduction to Algorithms, figure 16.3: a:45 b:13 c:12 d:16 e:9 f:5 thousand
    take 224,000 bits."""
    counts = np.array([45, 13, 12, 16, 9, 5])
    lengths = huffman.code_lengths(counts)
    assert lengths.tolist() == [1, 3, 3, 3, 4, 4]
    order, codes = huffman.canonical(lengths)
    written = {int(s): f"{c:0{lengths[s]}b}" for s, c in zip(order, codes, strict=True)}
    assert written == {0: "0", 1: "100", 2: "101", 3: "110", 4: "1110", 5: "1111"}
    assert huffman.encode(np.array([0, 1, 2, 5]), lengths) == bytes([0b01001011, 0b11100000])


def by_merging(counts: list[int]) -> int:
    """Bits that the best prefix code takes: the sum of all merged counts."""
    heap, bits = [c for c in counts if c], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        bits += both
        heapq.heappush(heap, both)
    return bits


def by_walking(stream: bytes, lengths: np.ndarray, count: int) -> list[int]:
    """Bit by bit through a table of words; canonical words counted from the rule alone."""
    words, word, last = {}, 0, 0
    for length, symbol in sorted((b, s) for s, b in enumerate(lengths.tolist()) if b):
        word <<= length - last
        words[f"{word:0{length}b}"], word, last = symbol, word + 1, length
    bits, read, found = "".join(f"{byte:08b}" for byte in stream), "", []
    for bit in bits:
        read += bit
        if read in words and len(found) < count:
            found.append(words[read])
            read = ""
    return found


@pytest.mark.parametrize("kinds", [2, 3, 17, 256])
@pytest.mark.parametrize("skew", [0, 1, 6])
def test_huffman_is_optimal_within_a_bit_of_the_entropy_and_round_trips(
    kinds: int, skew: int
) -> None:
    random = np.random.default_rng(kinds)
    share = np.exp(-skew * np.arange(kinds) / kinds * 3)
    symbols = random.choice(kinds, 3000, p=share / share.sum())
    counts = np.bincount(symbols, minlength=kinds)
    lengths = huffman.code_lengths(counts)
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    mean = (counts * lengths).sum() / counts.sum()
    assert entropy <= mean + 1e-12
    assert mean < entropy + 1
    assert (counts * lengths).sum() == by_merging(counts.tolist())
    stream = huffman.encode(symbols, lengths)
    assert len(stream) == -(-by_merging(counts.tolist()) // 8)
    assert by_walking(stream, lengths, 3000) == symbols.tolist()
    for piece in (64, 1 << 20):  # codes that lie across two pieces
        assert np.array_equal(huffman.decode(stream, lengths, 3000, piece), symbols)


def test_degenerate_streams() -> None:
    nothing = np.zeros(0, np.int64)
    assert huffman.encode(nothing, huffman.code_lengths(np.zeros(4, np.int64))) == b""
    assert huffman.decode(b"", np.zeros(4, np.int64), 0).tolist() == []
    lengths = huffman.code_lengths(np.array([0, 7]))
    assert huffman.encode(np.ones(7, np.int64), lengths) == b""  # entropy 0, and 0 bits
    assert huffman.decode(b"", lengths, 7).tolist() == [1] * 7
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(sum(fibonacci[-2:]))
    deep = huffman.code_lengths(np.array(fibonacci))
    assert deep.max() == 39  # the deepest code that so many symbols can have
    every = np.arange(40)
    assert np.array_equal(huffman.decode(huffman.encode(every, deep), deep, 40), every)


@pytest.mark.parametrize(
    ("stream", "lengths", "count"),
    [
        (b"\x00", [1, 1], 9),  # too short
        (b"\x00\x00", [1, 1], 8),  # too long
        (b"\x00", [1, 1, 1], 2),  # no prefix code
        (b"\x00", [2, 2], 2),  # not complete
        (b"", [0, 0], 2),  # no code at all
    ],
)
def test_streams_that_are_none_are_refused(stream: bytes, lengths: list[int], count: int) -> None:
    with pytest.raises(ValueError):
        huffman.decode(stream, np.array(lengths), count)


def test_a_symbol_without_a_code_is_refused() -> None:
    with pytest.raises(ValueError, match="no code"):
        huffman.encode(np.array([2]), np.array([1, 1, 0]))


def test_runs_are_those_of_figure_2() -> None:
    """Weights 3.4, .9 and 1.7 at 1, 4 and 15, differences of 3 bits: a zero is stored at 12. Zeros
    before each entry are the paper's differences 3, 8, 3 less one."""
    entries = to_runs(np.array([1, 4, 15]), 3)
    assert entries.runs.tolist() == [1, 2, 7, 2]
    assert entries.which.tolist() == [0, 1, -1, 2]
    assert from_runs(entries.runs).tolist() == [1, 4, 12, 15]


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_runs_lead_back_to_the_places(bits: int) -> None:
    random = np.random.default_rng(bits)
    for density in (0.0, 0.002, 0.1, 1.0):
        kept = np.flatnonzero(random.random(4000) < density)
        entries = to_runs(kept, bits)
        assert not len(entries.runs) or entries.runs.max() < 2**bits
        assert np.array_equal(from_runs(entries.runs)[entries.which >= 0], kept)
        # No more stored zeros than there are gaps for.
        gaps = [b - a - 1 for a, b in pairwise([-1, *kept.tolist()])]
        assert (entries.which < 0).sum() == sum(gap // 2**bits for gap in gaps)


def test_the_gradient_of_centroids_is_autograds() -> None:
    random = torch.Generator().manual_seed(0)
    index = torch.randint(0, 7, (12, 20), generator=random)
    upstream = torch.randn(12, 20, generator=random)
    codebook = torch.randn(7, generator=random, requires_grad=True)
    codebook[index].backward(upstream)
    gradient = codebook.grad
    assert gradient is not None
    torch.testing.assert_close(centroid_gradient(upstream, index, 7), gradient)
    # And through a layer that shares its weights: entry 0 is no parameter.
    layer = nn.Linear(20, 12)
    with torch.no_grad():
        layer.weight[torch.rand(12, 20, generator=random) < 0.5] = 0
    zeros = layer.weight == 0
    share(layer, 3)
    x = torch.randn(5, 20, generator=random)
    layer(x).square().sum().backward()
    sharing = cast(Any, layer).parametrizations.weight
    free = torch.cat([torch.zeros(1), sharing.original.detach()]).requires_grad_()
    (x @ free[sharing[0].index].T + layer.bias.detach()).square().sum().backward()
    expected = free.grad
    assert expected is not None
    assert len(sharing.original) == 7
    torch.testing.assert_close(sharing.original.grad, expected[1:])
    before = layer.weight.detach().clone()
    shared = unshare(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight == 0, zeros)
    assert np.array_equal(shared.codebook[shared.index], layer.weight.detach().numpy())


def test_centroids_are_the_means_of_their_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(30, 30)
    before = layer.weight.detach().clone()
    share(layer, 4)
    shared = unshare(layer)
    for entry in range(1, 16):
        own = before[torch.from_numpy(shared.index == entry)]
        assert abs(float(own.mean()) - shared.codebook[entry]) < 1e-5
    # Every weight has the nearest centroid.
    distance = (before.numpy()[..., None] - shared.codebook[1:]) ** 2
    nearest = (before.numpy() - shared.codebook[shared.index]) ** 2
    assert np.allclose(distance.min(-1), nearest, atol=1e-7)


def test_pruning_takes_the_smallest_of_all_matrices_in_rounds() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(20, 30), nn.Linear(30, 10)]
    before = torch.cat([cast(Any, layer).weight.detach().flatten().clone() for layer in layers])
    pruning = Pruning(layers, 0.8, 4, 100)
    shares = []
    for r in (1, 2, 3, 4):
        if r > 1:
            pruning.prune(r)
        masks = torch.cat([cast(Any, layer).weight_mask.flatten() for layer in layers])
        shares.append(1 - float(masks.mean()))
    assert shares == pytest.approx([0.8 * (1 - f**3) for f in (0.75, 0.5, 0.25, 0)], abs=1e-3)
    assert pruning.round_at_step == {25: 2, 50: 3, 75: 4}
    pruning.finish()
    after = torch.cat([cast(Any, layer).weight.detach().flatten() for layer in layers])
    assert int((after == 0).sum()) == 720
    kept = after != 0
    assert torch.equal(after[kept], before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()
    assert all(isinstance(cast(Any, layer).weight, nn.Parameter) for layer in layers)


def shared_of(shape: tuple[int, ...], entries: int, density: float, seed: int = 0) -> Shared:
    random = np.random.default_rng(seed)
    codebook = np.append(0, random.normal(size=entries - 1)).astype(np.float32)
    index = random.integers(1, max(2, entries), shape) * (random.random(shape) < density)
    return Shared(codebook, index if entries > 1 else index * 0)


@pytest.mark.parametrize("coded", [True, False])
def test_a_file_gives_back_every_bit(tmp_path: Path, coded: bool) -> None:
    shared = {
        "model.a.weight": shared_of((40, 50), 32, 0.1),
        "model.dense.weight": shared_of((8, 3, 4, 4), 64, 1),
        "model.rare.weight": shared_of((90, 90), 4, 0.001),
        "model.gone.weight": shared_of((5, 5), 1, 0),
        "model.last.weight": shared_of((3, 7), 256, 0.5),
    }
    rest = {"model.norm.bias": torch.randn(11), "head.linear.bias": torch.randn(2, 3)}
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack(shared, rest, {}, 3, huffman_coded=coded))
    found, _ = read_state(path)
    assert found.keys() == shared.keys() | rest.keys()
    for name, one in shared.items():
        assert np.array_equal(found[name].numpy(), one.codebook[one.index])
    for name, tensor in rest.items():
        assert torch.equal(found[name], tensor.half().float())


def test_the_stages_before_hold_what_they_say() -> None:
    weights = {"a": torch.randn(30, 40), "bias": torch.randn(30)}
    weights["a"][torch.rand(30, 40) < 0.9] = 0
    content, read = eight_bits(weights, ["a"], {})
    assert 1200 + 60 + 4 < len(content) < 1600
    assert (read["a"] - weights["a"]).abs().max() <= weights["a"].abs().max() / 127 / 2 + 1e-6
    assert len(read["a"].unique()) <= 255
    entries = to_runs(weights["a"].flatten().nonzero().flatten().numpy(), 3)
    exact = 4 * len(entries.runs) + -(-3 * len(entries.runs) // 8) + 4 * 30
    content = sparse(weights, ["a"], {}, 3)
    header = struct.unpack("<Q", content[:8])[0]
    assert len(content) - 8 - header == exact


@pytest.fixture(scope="module")
def tuned(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny encoder, fine-tuned until it tells digits apart."""
    from support.runs import TINY

    from maepretrain.cli.main import main

    folder = tmp_path_factory.mktemp("compress")
    data = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    first = [
        "pretrain",
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        *data,
        "--run",
        str(folder / "run"),
        *TINY,
    ]
    then = [
        *(
            "finetune",
            "-c",
            "data/fashion_mnist",
            "-c",
            "eval/finetune_small",
            "--encoder",
            str(folder / "run"),
        ),
        *(
            *data,
            "--run",
            str(folder / "tuned"),
            "--data.image_size",
            "16",
            "--data.crop.scale",
            "null",
        ),
        *("--data.crop.flip", "0", "--data.num_workers", "0", "--data.global_batch", "24"),
        *("--optim.base_lr", "0.1", "--trainer.max_epochs", "8"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["maepretrain"])
        assert main([*first, "--trainer.max_epochs", "2"]) == 0
        assert main(then) == 0
    return folder / "tuned"


@pytest.fixture(scope="module")
def compressed(tuned: Path) -> Path:
    from maepretrain.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["maepretrain"])
        assert main(["compress", "--encoder", str(tuned), *map(str, SHORT)]) == 0
    return tuned / "compressed.safetensors"


def logits(weights: dict[str, torch.Tensor], model: Any, images: torch.Tensor) -> torch.Tensor:
    head = ClassifierHead(model.width, 10)
    head.load_state_dict({k[5:]: v for k, v in weights.items() if k.startswith("head.")})
    with torch.no_grad():
        return head(head.features(model, images))


def test_the_file_is_small_sparse_and_what_was_scored(
    tuned: Path, compressed: Path, shards: Path
) -> None:
    stages = json.loads((tuned / "results.json").read_text())["compress"]["stages"]
    assert list(stages) == ["float32", "int8", "pruned", "shared", "Huffman"]
    assert stages["Huffman"]["bytes"] == compressed.stat().st_size
    sizes = [stages[name]["bytes"] for name in ("float32", "pruned", "shared", "Huffman")]
    assert sizes == sorted(sizes, reverse=True)
    assert stages["float32"]["ratio"] == 1
    weights, _ = read_state(compressed)
    numbers = sum(tensor.numel() for tensor in weights.values())
    # float32 is the weights and a header.
    assert 4 * numbers < stages["float32"]["bytes"] < 4 * numbers + 8000
    blocks = {k: v for k, v in weights.items() if "blocks" in k and v.ndim == 2}
    zeros = sum(int((v == 0).sum()) for v in blocks.values())
    assert zeros / sum(v.numel() for v in blocks.values()) == pytest.approx(0.5, abs=1e-3)
    for name, tensor in blocks.items():
        assert len(tensor.unique()) <= (16 if ".attn." in name else 8)
    before = json.loads((tuned / "results.json").read_text())["finetune"]
    assert stages["float32"]["top1"] == before["top1"]

    # Encoder and head out of the file score what the table says, through other code.
    from maepretrain.data.samples import Samples, ShardIndex
    from maepretrain.data.shards.index import open_shards
    from maepretrain.data.transforms import CentreCrop

    index = ShardIndex(open_shards(f"{shards}/test-*.tar"))
    read = Samples(index, 1, CentreCrop(16, 16, 1.0)).__getitems__([*range(50)])
    images = (read["input"].float() / 255 - 0.286) / 0.353
    model = cast(Any, load_encoder(str(compressed))).eval()
    right = logits(weights, model, images).argmax(1) == read["label"]
    assert float(right.double().mean()) == pytest.approx(stages["Huffman"]["top1"], abs=1e-6)


def test_the_file_is_an_encoder(
    tuned: Path, compressed: Path, tmp_path: Path, run_cli: Run
) -> None:
    weights, _ = read_state(compressed)
    state = cast(Any, load_encoder(str(compressed))).state_dict()
    official = {k[6:]: v for k, v in weights.items() if k.startswith("model.")}
    assert all(torch.equal(state[f"encoder.{name}"], v) for name, v in official.items())
    assert run_cli("knn", "--encoder", compressed) == 0
    assert run_cli("embed", "--encoder", compressed, "--out", tmp_path / "f.npz") == 0
    assert np.load(tmp_path / "f.npz")["features"].shape == (50, 32)
    # A second time, other options: refused unless asked for.
    assert run_cli("compress", "--encoder", tuned, *SHORT) == 2


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def test_damage_is_one_line(
    compressed: Path, tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    content = compressed.read_bytes()
    body = 8 + struct.unpack("<Q", content[:8])[0]
    broken = tmp_path / "broken.safetensors"
    size = len(content)
    cases = [content[: size // 2], content[:5], b"", content + b"more"]
    cases += [flipped(content, at) for at in range(body, size, (size - body) // 20)]
    cases += [content[:body].replace(b'"layers\\"', b'"Layers\\"') + content[body:]]
    for case in cases:
        assert case != content
        broken.write_bytes(case)
        with pytest.raises(ValueError, match=r"broken\.safetensors") as caught:
            load_encoder(str(broken))
        assert "\n" not in str(caught.value)
    assert run_cli("knn", "--encoder", broken) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert set(load_file(compressed)) == {"streams", "lengths", "codebooks", "rest"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--sparsity", 1], "sparsity 1.0 must be in"),
        (["--mlp_bits", 9], "mlp_bits 9 must be 1 to 8"),
        (["--run_bits", 0], "run_bits 0 must be 1 to 8"),
        (["--rounds", 7, "--retrain_steps", 5], "each round"),
        (["--out", "weights.pth"], "must end in .safetensors"),
        (["--out", "nowhere/f.safetensors"], "there is no folder nowhere"),
        (["--data.val", "null"], "set data.val"),
        (["--sparseness", 0.5], "sparseness"),
        (["--lr", 0], "lr 0.0 must be above 0"),
    ],
)
def test_mistakes_are_one_line(
    tuned: Path, run_cli: Run, capsys: pytest.CaptureFixture[str], options: list[Any], why: str
) -> None:
    out = [] if "--out" in options else ["--out", tuned / "other.safetensors"]
    assert run_cli("compress", "--encoder", tuned, *out, *options) == 2
    error = capsys.readouterr().err.strip()
    assert why in error
    assert "\n" not in error
    assert not (tuned / "other.safetensors").exists()


def test_what_is_no_fine_tuned_run_is_refused(
    tuned: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for encoder, why in {
        tuned.parent / "run": "run folder of a finetune",
        tuned / "results.json": "run folder of a finetune",
        tuned.parent / "nothing": "is no run folder",
    }.items():
        assert run_cli("compress", "--encoder", encoder) == 2
        error = capsys.readouterr().err.strip()
        assert why in error
        assert "\n" not in error
