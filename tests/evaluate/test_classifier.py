"""Heads, frozen layers, stochastic depth and averages against torch's own and sums by hand."""

import copy
import multiprocessing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from maepretrain.data.module import ShardData
from maepretrain.evaluate.classifier import Classifier
from maepretrain.evaluate.classifier_head import BatchNorm, ClassifierHead
from maepretrain.evaluate.drop_path import set_drop_path
from maepretrain.evaluate.trained_layers import choose_layers
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.training.optimizer import Optimization


def model(depth: int = 3, seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(
        "vit_tiny_patch16_224", 16, 4, 1, 32, depth, 2, decoder_width=16, decoder_heads=2
    )


@pytest.fixture
def data(shards: Path) -> ShardData:
    return ShardData(
        f"{shards}/train-*.tar",
        f"{shards}/test-*.tar",
        *(24, 16, 1),
        mean=(0.3,),
        std=(0.4,),
        num_workers=0,
    )


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def torchs(width: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(width, eps=1e-6, affine=False)


def batches(counts: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [5 + 3 * torch.randn(n, 7, generator=generator) for n in counts]


def test_batchnorm_equals_torchs() -> None:
    ours, theirs = BatchNorm(7), torchs(7)
    for x in batches([5, 9, 4]):
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours.running_mean, cast(Tensor, theirs.running_mean))
    assert torch.allclose(ours.running_var, cast(Tensor, theirs.running_var))
    for norm in (ours, theirs):
        norm.eval()
    assert torch.allclose(ours(batches([1])[0]), theirs(batches([1])[0]), atol=1e-5)
    with pytest.raises(ValueError, match="two samples or more"):
        ours.train()(batches([1])[0])


def normalise_on(rank: int, counts: list[list[int]], folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(counts[0]))
    norm = BatchNorm(7)
    outputs = []
    for step in counts:
        x = batches([sum(step)])[0].split(step)[rank]
        outputs.append(norm(x))
    torch.save([outputs, norm.running_mean, norm.running_var], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_batchnorm_on_two_processes_with_unequal_counts_equals_one(tmp_path: Path) -> None:
    counts = [[3, 8], [6, 0], [1, 1]]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=normalise_on, args=(r, counts, tmp_path)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    one = torchs(7)
    for step, count in enumerate(counts):
        whole = one(batches([sum(count)])[0])
        assert torch.allclose(torch.cat([f[0][step] for f in found]), whole, atol=1e-5)
    for _, mean, variance in found:
        assert torch.allclose(mean, cast(Tensor, one.running_mean), atol=1e-6)
        assert torch.allclose(variance, cast(Tensor, one.running_var), atol=1e-5)


def test_attentive_head_by_hand() -> None:
    """One learned query per head: softmax(q k / sqrt(d / h)) v, projected, then an MLP."""
    torch.manual_seed(0)
    encoder, head = model().eval(), ClassifierHead(32, 5, "attentive", heads=4)
    pool = cast(Any, head.norm)
    nn.init.normal_(head.linear.weight)
    tokens = head.features(encoder, images())
    assert torch.equal(tokens, encoder.encode(images(), pool="tokens"))
    query = pool.q(pool.latent)[0, 0]
    for b in range(4):
        keys, values = (pool.kv(tokens[b])[:, part * 32 : part * 32 + 32] for part in (0, 1))
        pooled = []
        for h in range(4):
            mine = slice(8 * h, 8 * h + 8)
            weight = (keys[:, mine] @ query[mine] / 8**0.5).exp()
            pooled.append((weight / weight.sum()) @ values[:, mine])
        x = pool.proj(torch.cat(pooled))
        x = x + pool.mlp(pool.norm(x))
        assert torch.allclose(head(tokens)[b], head.linear(x), atol=1e-5)


def test_fc_norm_takes_the_place_of_the_final_norm_as_in_the_official_code() -> None:
    """facebookresearch/mae's models_vit.py, global_pool: blocks, mean of the patches, fc_norm."""
    encoder, head = model().eval(), ClassifierHead(32, 5, "fc_norm")
    nn.init.normal_(head.linear.weight)
    vit = encoder.encoder
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images())))
    for block in vit.blocks:
        tokens = block(tokens)
    pooled = nn.functional.layer_norm(tokens[:, 1:].mean(1), (32,), eps=1e-6)
    assert torch.allclose(head(head.features(encoder, images())), head.linear(pooled), atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_linear_head_pools_after_the_norm(pool: Any) -> None:
    encoder = model().eval()
    tokens = encoder.encoder.forward_features(images())
    expected = tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]
    found = ClassifierHead(32, 5, "linear", pool).features(encoder, images())
    assert torch.allclose(found, expected, atol=1e-6)


def test_initial_values_of_the_probe() -> None:
    torch.manual_seed(0)
    assert float(
        ClassifierHead(768, 1000, "batchnorm").linear.weight.detach().std()
    ) == pytest.approx(0.01, rel=0.01)
    assert float(ClassifierHead(768, 1000).linear.weight.detach().std()) == pytest.approx(
        2e-5, rel=0.01
    )
    assert not ClassifierHead(768, 10, "batchnorm").linear.bias.any()


@pytest.mark.parametrize(
    ("head", "blocks", "first", "last"),
    # layers: 0 embedding, 1 to 3 blocks, 4 norm
    [
        *(("linear", 0, 5, 4), ("linear", 1, 3, 4), ("linear", 2, 2, 4), ("linear", 3, 1, 4)),
        *(("linear", -1, 0, 4), ("fc_norm", -1, 0, 3), ("fc_norm", 1, 3, 3)),
    ],
)
def test_trained_layers(head: Any, blocks: int, first: int, last: int) -> None:
    encoder = model()
    choose_layers(encoder, ClassifierHead(32, 5, head), blocks)
    inside = {id(p) for layer in encoder.layers() for p in layer}
    for number, layer in enumerate(encoder.layers()):
        assert {p.requires_grad for p in layer} == {first <= number <= last}
    assert not any(p.requires_grad for p in encoder.parameters() if id(p) not in inside)


def test_an_encoder_without_layers_can_only_be_frozen() -> None:
    assert choose_layers(nn.Linear(2, 2), ClassifierHead(2, 5), 0) == []
    with pytest.raises(ValueError, match="Linear has no layers"):
        choose_layers(nn.Linear(2, 2), ClassifierHead(2, 5), -1)


def test_drop_path_rises_linearly_in_the_encoder_only() -> None:
    encoder = model(depth=3)
    assert set_drop_path(encoder, encoder.layers(), 0.3) == pytest.approx([0.0, 0.15, 0.3])
    blocks = cast(Any, encoder.encoder.blocks)
    for block, rate in zip(blocks, (0.0, 0.15, 0.3), strict=True):
        for path in (block.drop_path1, block.drop_path2):
            assert path.drop_prob == pytest.approx(rate)
    assert all(isinstance(b.drop_path1, nn.Identity) for b in cast(Any, encoder.decoder_blocks))
    # A path that is kept counts 1 / (1 - rate): the mean stays.
    torch.manual_seed(0)
    path = blocks[2].drop_path1.train()
    assert float(path(torch.ones(20_000, 1)).mean()) == pytest.approx(1, abs=0.02)
    assert path(torch.ones(50, 1)).unique().tolist() == pytest.approx([0, 1 / 0.7])


def test_drop_path_without_blocks_is_refused() -> None:
    layers = [[p] for p in nn.Linear(2, 2).parameters()] * 2
    with pytest.raises(ValueError, match=r"drop_path 0.1: Linear has 0 trained blocks"):
        set_drop_path(nn.Linear(2, 2), layers, 0.1)


def test_modes_and_the_average_by_hand(data: ShardData) -> None:
    encoder = model().eval()  # as loaders give it
    module = Classifier(
        encoder, ClassifierHead(32, 10), Optimization(), data, 10, drop_path=0.5, ema=0.75
    )
    assert encoder.training  # else drop path does nothing
    assert module.ema is not None
    assert not any(m.training for m in module.ema.modules())
    assert not any(p.requires_grad for p in module.ema.parameters())
    first = copy.deepcopy(module.head.linear.weight.detach())
    average = first.clone()
    for step in range(1, 5):
        with torch.no_grad():
            module.head.linear.weight.add_(step)
        module.ema.update(module._network, step)
        now = module.head.linear.weight.detach()
        # The first step is taken as it is.
        average = now.clone() if step == 1 else 0.75 * average + 0.25 * now
    averaged = cast(Any, module.ema.module)["head"].linear
    assert torch.allclose(averaged.weight, average)
    module.eval()
    features = encoder.encode(images())
    assert torch.allclose(module.logits(images()), averaged(features), atol=1e-4)


def test_a_frozen_encoder_stays_in_evaluation_mode_and_gets_no_graph(data: ShardData) -> None:
    module = Classifier(
        model(),
        ClassifierHead(32, 10, "batchnorm"),
        Optimization("lars"),
        data,
        10,
        trained_blocks=0,
    ).train()
    assert not module.model.training
    assert module.head.training
    loss = module.logits(images()).sum()
    loss.backward()
    assert all(p.grad is None for p in module.model.parameters())
    assert all(p.grad is not None for p in module.head.parameters())
