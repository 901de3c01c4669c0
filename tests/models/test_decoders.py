"""The masked autoencoder's options against one plain computation of each, sample by sample, in the
order of the image, with attention written out."""

import math
from typing import Any, cast

import pytest
import torch
from support.models import pictures, some_noise, tiny, visible
from torch import Tensor
from torch.nn import functional as F

from maepretrain.models.mae.model import MaskedAutoencoder

OPTIONS: list[dict[str, Any]] = [
    {},
    {"decoder_depth": 1},
    {"decoder_depth": 3, "encoder": "vit_medium_patch16_reg4_gap_256"},
    {"reconstruct": 0.4},
    {"reconstruct": 0.01},
    {"mask_tokens_in_encoder": True},
    {"decoder": "cross"},
    {"decoder": "cross", "reconstruct": 0.4, "decoder_depth": 3},
    {"decoder": "cross", "encoder": "vit_base_patch16_siglip_224", "norm_pix": False},
]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(tokens, d): softmax(q k^T / sqrt(d / heads)) v, head by head."""
    parts = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        parts.append(((a @ b.T) / math.sqrt(a.shape[1])).softmax(1) @ c)
    return torch.cat(parts, 1)


def plain_loss(model: MaskedAutoencoder, image: Tensor, shown: Tensor, asked: Tensor) -> Tensor:
    """Loss of one image: its patches that are `shown` and those that are predicted, by number."""
    m, p = cast(Any, model), model.patch_size
    vit, prefix = m.encoder, model.prefix
    embedded = vit._pos_embed(vit.patch_embed(image[None]))[0]
    positions = vit.pos_embed[0]
    if m.mask_tokens_in_encoder:
        hidden = [i for i in range(len(embedded) - prefix) if i not in shown]
        for i in hidden:
            embedded[prefix + i] = m.mask_token[0, 0] + positions[len(positions) - 16 + i]
        tokens = embedded
    else:
        tokens = embedded[[*range(prefix), *(prefix + i for i in shown.tolist())]]
    tokens, maps = vit.norm_pre(tokens)[None], []
    for block in vit.blocks:
        tokens = block(tokens)
        maps.append(tokens[0])
    maps[-1] = tokens = vit.norm(tokens)[0]
    where = m.decoder_pos_embed[0, prefix:]
    if m.decoder == "cross":
        x = m.mask_token[0] + where[asked]
        for i, block in enumerate(m.decoder_blocks):
            w = m.feature_maps.weight[i]
            summed = torch.stack([w[j] * one for j, one in enumerate(maps)]).sum(0)
            k, v = block.kv(m.feature_maps.norms[i](summed)).chunk(2, 1)
            x = x + block.proj(attention(block.q(block.norm1(x)), k, v, block.heads))
            x = x + block.mlp(block.norm2(x))
    else:
        x = m.decoder_embed(tokens)
        if m.mask_tokens_in_encoder:
            x = torch.cat([x[:prefix], x[prefix:] + where])
            places = prefix + asked
        else:
            x = torch.cat([x[:prefix], x[prefix:] + where[shown], m.mask_token[0] + where[asked]])
            places = torch.arange(len(x) - len(asked), len(x))
        for block in m.decoder_blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, 1)
            x = x + block.attn.proj(attention(q, k, v, block.attn.num_heads))
            x = x + block.mlp(block.norm2(x))
        x = x[places]
    predicted = m.decoder_pred(m.decoder_norm(x))
    total = torch.zeros(())
    for number, prediction in zip(asked.tolist(), predicted, strict=True):
        row, column = number // 4 * p, number % 4 * p
        target = image[:, row : row + p, column : column + p].permute(1, 2, 0).flatten()
        if m.norm_pix:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        total = total + F.mse_loss(prediction, target)
    return total / len(asked)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_equals_its_plain_computation(options: dict[str, Any]) -> None:
    model, images, noise = tiny(**options), pictures(), some_noise(3, 16)
    loss = model({"input": images}, noise)["loss"]
    shown = visible(model, noise)
    losses = []
    for image, seen, u in zip(images, shown, noise, strict=True):
        order = u.argsort()
        hidden = order[int(seen.sum()) :]
        asked = hidden[: max(1, round(options.get("reconstruct", 1) * len(hidden)))]
        losses.append(plain_loss(model, image, seen.nonzero().flatten(), asked))
    truth = torch.stack(losses).mean()
    torch.testing.assert_close(loss, truth, rtol=2e-6, atol=1e-6)
    mine = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(truth, list(model.parameters()), allow_unused=True)
    for (name, _), ours, other in zip(model.named_parameters(), mine, theirs, strict=True):
        assert ours is not None and other is not None, name
        assert (ours - other).norm() <= 1e-4 * other.norm() + 1e-6, name


@pytest.mark.parametrize("options", OPTIONS)
def test_recomputed_blocks_change_nothing(options: dict[str, Any]) -> None:
    batch = {"input": pictures(), "position": torch.arange(3)}
    gradients = []
    for recompute in (False, True):
        model = tiny(activation_checkpointing=recompute, **options)
        model(batch)["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and recomputed is not None and torch.equal(plain, recomputed)


@pytest.mark.parametrize("mask", ["random", "block", "grid"])
def test_several_masks_are_the_mean_of_their_losses(mask: str) -> None:
    model, images, position = tiny(mask=mask, masks_per_image=3), pictures(), torch.arange(3) + 7
    one = tiny(mask=mask)
    noise = model.noise(position).view(3, 3, 16)  # image, mask, patch
    losses = [one({"input": images}, noise[:, number])["loss"] for number in range(3)]
    together = model({"input": images, "position": position})["loss"]
    torch.testing.assert_close(together, torch.stack(losses).mean())
    assert torch.equal(noise[:, 0], one.noise(position))
    if mask == "random":
        assert noise.flatten().unique().numel() > 0.99 * noise.numel()
    # What is drawn is drawn with the first mask of each image.
    for drawn, single in zip(model.reconstruct(images), one.reconstruct(images), strict=True):
        torch.testing.assert_close(drawn, single)


@pytest.mark.parametrize("options", [{}, {"decoder": "cross"}, {"mask_tokens_in_encoder": True}])
def test_smaller_images_are_those_of_a_smaller_model(options: dict[str, Any]) -> None:
    model = tiny(image_size=48, **options)
    small = tiny(image_size=(32, 16), **options)
    state = model.state_dict()
    kept = {k: v for k, v in state.items() if "pos_embed" not in k}
    assert small.load_state_dict(kept, strict=False).unexpected_keys == []
    batch = {"input": pictures(3, 3, 32, 16), "position": torch.arange(3)}
    torch.testing.assert_close(model(batch)["loss"], small(batch)["loss"])
    with pytest.raises(ValueError, match="images are"):
        small({"input": pictures(3, 3, 16, 32), "position": torch.arange(3)})


@pytest.mark.parametrize("options", [{"decoder": "cross"}, {"mask_tokens_in_encoder": True}])
def test_what_is_drawn_is_what_is_trained(options: dict[str, Any]) -> None:
    """The loss of a drawing's masked patches is the loss."""
    model, images = tiny(norm_pix=False, **options), pictures()
    batch = {"input": images, "position": torch.arange(3)}
    drawn = model.reconstruct(images)
    hidden = (drawn.masked == 0).all(1, keepdim=True).expand_as(images)
    error = (drawn.reconstruction - images)[hidden].square().mean()
    torch.testing.assert_close(error, model(batch)["loss"])


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"reconstruct": 0.0}, "reconstruct 0.0 in"),
        ({"reconstruct": 1.5}, "reconstruct 1.5 in"),
        ({"masks_per_image": 0}, "masks_per_image 0 must be at least 1"),
        ({"reconstruct": 0.5, "mask": "block"}, "reconstruct 0.5 needs mask random"),
        ({"mask_tokens_in_encoder": True, "decoder": "cross"}, "needs decoder self"),
        ({"mask_tokens_in_encoder": True, "reconstruct": 0.5}, "needs decoder self"),
        ({"decoder_depth": 0}, "decoder_depth 0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        tiny(**arguments)
