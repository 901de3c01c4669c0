"""The masked autoencoder against loops, timm, Hugging Face and the paper's numbers."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, cast

import pytest
import timm
import torch
from support.models import pictures, some_noise, tiny, visible
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from maepretrain.models.mae.masking import BLOCKS_TRIED
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.models.mae.patches import gather_patches, unpatchify
from maepretrain.models.mae.positions import sincos_positions
from maepretrain.randomness import uniform

# Class token or none, registers, positions with and without them, LayerScale, a norm before the
# blocks without a patch bias, attention pooling.
ENCODERS = [
    "vit_base_patch16_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
]


# Patches


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (4, 1), (3, 3)])
def test_gather_patches_reads_what_loops_read(rows: int, columns: int, channels: int) -> None:
    p, images = 4, pictures(2, channels, rows * 4, columns * 4)
    ids = torch.stack([torch.randperm(rows * columns)[:2] for _ in range(2)])
    orders: dict[Literal["cpp", "ppc"], tuple[int, ...]] = {"cpp": (0, 1, 2), "ppc": (1, 2, 0)}
    for order, axes in orders.items():
        gathered = gather_patches(images, ids, (rows, columns), order)
        for sample in range(2):
            for place, number in enumerate(ids[sample].tolist()):
                top, left = number // columns * p, number % columns * p
                patch = images[sample, :, top : top + p, left : left + p]
                assert torch.equal(gathered[sample, place], patch.permute(axes).flatten())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (4, 1), (3, 3)])
def test_unpatchify_puts_patches_back(rows: int, columns: int, channels: int) -> None:
    p, n = 4, rows * columns
    patches = torch.randn(2, n, p * p * channels)
    images = unpatchify(patches, (rows, columns), channels)
    for number in range(n):
        for place in range(p * p * channels):
            row, column, channel = place // channels // p, place // channels % p, place % channels
            y, x = number // columns * p + row, number % columns * p + column
            assert torch.equal(images[:, channel, y, x], patches[:, number, place])
    every = torch.arange(n).expand(2, -1)
    assert torch.equal(gather_patches(images, every, (rows, columns), "ppc"), patches)


# Parity with Hugging Face


def hugging_face(model: MaskedAutoencoder) -> ViTMAEForPreTraining:
    """The same model in transformers 5, with the same weights."""
    encoder = model.encoder
    first, decoder = (cast(Any, blocks[0]) for blocks in (encoder.blocks, model.decoder_blocks))
    peer = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=encoder.embed_dim,
            num_hidden_layers=len(encoder.blocks),
            num_attention_heads=first.attn.num_heads,
            intermediate_size=first.mlp.fc1.out_features,
            image_size=model.grid[0] * model.patch_size,
            patch_size=model.patch_size,
            num_channels=model.channels,
            decoder_hidden_size=model.decoder_embed.out_features,
            decoder_num_hidden_layers=len(model.decoder_blocks),
            decoder_num_attention_heads=decoder.attn.num_heads,
            decoder_intermediate_size=decoder.mlp.fc1.out_features,
            mask_ratio=model.masking.ratio,
            norm_pix_loss=model.norm_pix,
            layer_norm_eps=1e-6,
        )
    )
    state = model.state_dict()
    # All of them: a fresh peer has zero decoder positions and a zero mask token.
    peer.load_state_dict({name: as_hugging_face(name, state) for name in peer.state_dict()})
    return peer


HUGGING_FACE_NAMES = (
    (r"^vit\.layers\.", "encoder.blocks."),
    (r"^vit\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj"),
    (r"^vit\.embeddings\.position_embeddings", "encoder.pos_embed"),
    (r"^vit\.embeddings\.", "encoder."),
    (r"^vit\.layernorm", "encoder.norm"),
    (r"^decoder\.decoder_layers\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.[qkv]_proj", "attn.qkv"),
)


def as_hugging_face(name: str, ours: dict[str, Tensor]) -> Tensor:
    """Our tensor (weight or gradient) for a name of the peer, which keeps q, k and v apart."""
    our_name = name
    for pattern, replacement in HUGGING_FACE_NAMES:
        our_name = re.sub(pattern, replacement, our_name)
    part = re.search(r"attention\.([qkv])_proj", name)
    return ours[our_name].chunk(3)["qkv".index(part[1])] if part else ours[our_name]


SIZES: list[dict[str, Any]] = [
    {},
    {
        "image_size": 30,
        "patch_size": 5,
        "channels": 1,
        "encoder_width": 32,
        "encoder_heads": 4,
        "decoder_width": 24,
        "decoder_heads": 3,
        "decoder_depth": 1,
        "mask_ratio": 0.6,
    },
]


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_loss_and_gradients_equal_hugging_face(sizes: dict[str, Any], norm_pix: bool) -> None:
    model = tiny(norm_pix=norm_pix, **sizes)
    peer = hugging_face(model)
    side = sizes.get("image_size", 32)
    images = pictures(3, model.channels, side, side) * 0.7 + 0.3
    images[:, :, : side // 2] *= 1e-3  # nearly flat, where the variance's epsilon counts
    noise = some_noise(3, model.grid[0] * model.grid[1])

    loss, truth = model({"input": images}, noise)["loss"], peer(images, noise=noise)
    assert loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    assert torch.equal(visible(model, noise), 1 - truth.mask)

    loss.backward()
    truth.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    for name, parameter in peer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            gap = (as_hugging_face(name, gradients) - parameter.grad).norm()
            # The gradient of a key's bias is 0 but for rounding.
            assert gap <= 1e-5 * parameter.grad.norm() + 1e-7, name


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_equals_hugging_face_logits(norm_pix: bool) -> None:
    model, images, noise = tiny(norm_pix=norm_pix), pictures() * 2 + 1, some_noise(3, 16)
    peer = hugging_face(model)
    with torch.no_grad():
        logits = peer(images, noise=noise).logits
    for sample in range(3):
        for number in range(16):
            top, left = number // 4 * 8, number % 4 * 8
            patch = images[sample, :, top : top + 8, left : left + 8]
            if norm_pix:
                scale = (patch.var() + 1e-6).sqrt()
                logits[sample, number] = logits[sample, number] * scale + patch.mean()
    drawn = model.reconstruct(images, noise).reconstruction
    torch.testing.assert_close(drawn, peer.unpatchify(logits), rtol=1e-4, atol=1e-5)


# Positions


def test_positions_equal_hugging_face() -> None:
    config = ViTMAEConfig(image_size=80, decoder_hidden_size=24, num_hidden_layers=0)
    decoder = ViTMAEForPreTraining(config).decoder
    decoder.initialize_weights(25)  # transformers 5.23 leaves both positions zero without this
    truth = decoder.decoder_pos_embed.detach()
    assert truth.any()
    torch.testing.assert_close(sincos_positions(24, (5, 5), 1), truth)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [(3, 5), (4, 2), (1, 1)])
def test_positions_equal_loops(grid: tuple[int, int], prefix: int) -> None:
    width = 16
    positions = sincos_positions(width, grid, prefix)
    assert positions.shape == (1, prefix + grid[0] * grid[1], width)
    assert not positions[0, :prefix].any()
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [[x / 10000 ** (i / 4) for i in range(4)] for x in (column, row)]
            truth = [f(a) for half in angles for f in (math.sin, math.cos) for a in half]
            place = prefix + row * grid[1] + column
            torch.testing.assert_close(positions[0, place], torch.tensor(truth))


# Encoder


@pytest.mark.parametrize("encoder", ENCODERS)
def test_visible_patches_are_encoded_as_timm_encodes_them(encoder: str) -> None:
    model, images = tiny(encoder=encoder, image_size=(32, 48)).eval(), pictures(2, 3, 32, 48)
    vit, prefix = cast(Any, model.encoder), model.encoder.num_prefix_tokens
    vit.pos_embed.normal_()  # those of prefix tokens too, which are zero until they are trained
    embedded = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for count in (1, 6, 23, 24):
        keep = torch.stack([torch.randperm(24)[:count] for _ in range(2)])
        seen = [embedded[sample, prefix + keep[sample]] for sample in range(2)]
        truth = vit.norm(vit.blocks(torch.cat([embedded[:, :prefix], torch.stack(seen)], 1)))
        torch.testing.assert_close(model._encode_visible(images, keep, keep[:, :0])[-1], truth)
    every = torch.arange(24).expand(2, -1)
    encoded = model._encode_visible(images, every, every[:, :0])[-1]
    torch.testing.assert_close(encoded, vit.forward_features(images))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encode_equals_timm_pooled(encoder: str) -> None:
    model, images = tiny(encoder=encoder).eval(), pictures()
    vit = timm.create_model(
        encoder,
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=0,
        global_pool="avg",
        fc_norm=False,
    ).eval()
    vit.load_state_dict(model.encoder.state_dict())
    vit = cast(Any, vit)
    torch.testing.assert_close(model.encode(images), vit(images))
    tokens = vit.forward_features(images)
    torch.testing.assert_close(model.encode(images, "tokens"), tokens[:, -16:])
    if model.encoder.cls_token is None:
        with pytest.raises(ValueError, match="no class token"):
            model.encode(images, "cls")
    else:
        torch.testing.assert_close(model.encode(images, "cls"), tokens[:, 0])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_is_trained_and_has_a_layer(encoder: str) -> None:
    """DDP waits for the gradient of each parameter; layer decay and weight decay want each once."""
    model = tiny(encoder=encoder)
    model({"input": pictures(), "position": torch.arange(3)})["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name

    names = {id(p): name for name, p in model.encoder.named_parameters()}
    layers = [[names[id(p)] for p in layer] for layer in model.layers()]
    assert sorted(itertools.chain(*layers)) == sorted(names.values())
    prefixes = (("patch_embed.", "cls_token", "reg_token", "norm_pre."), "blocks.0.", "blocks.1.")
    for layer, prefix in zip(layers, (*prefixes, "norm."), strict=True):
        assert layer and all(name.startswith(prefix) for name in layer)


# Masks


@pytest.mark.parametrize("mask", ["random", "block"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
def test_masks_leave_the_exact_number_visible(mask: str, ratio: float) -> None:
    model = tiny(image_size=(32, 80), mask=mask, mask_ratio=ratio)
    shown = visible(model, model.noise(torch.arange(50))).sum(1)
    assert shown.eq(int(40 * (1 - ratio))).all()


def test_random_masks_are_uniform() -> None:
    """Single patches and pairs are visible as often as in a draw of 4 of 16 without replacement."""
    model, draws = tiny(), 20_000
    keep, _ = model.masking.split(model.noise(torch.arange(draws) * 7), model.grid)
    shown = torch.zeros(draws, 16).scatter(1, keep, 1.0)
    single, pair = 4 / 16, 4 * 3 / (16 * 15)
    square = (shown.sum(0) - draws * single) ** 2 / (draws * single * (1 - single))
    assert 15 / 16 * square.sum() < 44.3  # chi-square, 15 degrees of freedom, p = .0001
    together = (shown.T @ shown).triu(1)
    deviation = (together[together > 0] - draws * pair) / math.sqrt(draws * pair * (1 - pair))
    assert len(deviation) == 120
    assert deviation.abs().max() < 4.5
    assert deviation.std() < 1.3


@pytest.mark.parametrize("mask", ["random", "block", "grid"])
def test_masks_depend_on_seed_and_position_alone(mask: str) -> None:
    model, position = tiny(mask=mask), torch.tensor([5, 2**40, 5, 0])
    noise = model.noise(position)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1:2], model.noise(position[1:2]))
    assert torch.equal(noise, tiny(mask=mask, norm_pix=False).noise(position))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, tiny(mask=mask, seed=1).noise(position))
    loss = model({"input": pictures(4), "position": position})["loss"]
    assert loss == model({"input": pictures(4)}, noise)["loss"]


def test_grid_keeps_one_patch_of_each_square() -> None:
    model = tiny(image_size=(32, 48), mask="grid")
    truth = [float(row % 2 == 0 and column % 2 == 0) for row in range(4) for column in range(6)]
    shown = visible(model, model.noise(torch.arange(5)))
    assert torch.equal(shown, torch.tensor(truth).expand(5, -1))


def largest_rectangle(hidden: list[list[bool]]) -> int:
    """Cells of the largest rectangle that is wholly hidden, by trying all."""
    rows, columns = len(hidden), len(hidden[0])
    return max(
        (bottom - top) * (right - left)
        for top in range(rows)
        for bottom in range(top + 1, rows + 1)
        for left in range(columns)
        for right in range(left + 1, columns + 1)
        if all(all(row[left:right]) for row in hidden[top:bottom])
    )


def test_block_masks_hide_rectangles() -> None:
    """A rectangle of a twelfth of the patches or more is hidden whole; chance does not do that."""
    found: dict[str, list[int]] = {}
    for mask in ("block", "random"):
        model = tiny(image_size=(64, 96), mask=mask, mask_ratio=0.5)
        hidden = visible(model, model.noise(torch.arange(20))).view(-1, 8, 12) == 0
        found[mask] = [largest_rectangle(sample) for sample in hidden.tolist()]
    assert min(found["block"]) >= 0.9 * 96 / 12
    assert sum(found["block"]) > 2 * sum(found["random"])


def test_block_masks_fill_up_rectangle_by_rectangle() -> None:
    """The first rectangles are hidden whole, the last in part, as a loop over them finds."""
    rows, columns = 8, 12
    model = tiny(image_size=(64, 96), mask="block", mask_ratio=0.6, seed=3)
    position = torch.arange(30)
    shown = visible(model, model.noise(position))
    draws = uniform(3, "mask blocks", position, 4 * BLOCKS_TRIED).view(30, -1, 4)
    for sample in range(30):
        hidden = {n for n in range(96) if not shown[sample, n]}
        whole: set[int] = set()
        for share, shape, top, left in draws[sample].tolist():
            area = 96 * (1 / 12 + (0.4 - 1 / 12) * share)
            aspect = math.exp(math.log(0.3) * (1 - 2 * shape))
            height = min(rows, max(1, round(math.sqrt(area * aspect))))
            width = min(columns, max(1, round(math.sqrt(area / aspect))))
            top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
            ys, xs = range(top, top + height), range(left, left + width)
            rectangle = {y * columns + x for y in ys for x in xs}
            if len(whole | rectangle) > len(hidden):
                assert whole <= hidden <= whole | rectangle
                break
            whole |= rectangle


def test_the_smallest_noise_stays_visible_and_ties_keep_their_order() -> None:
    model = tiny(image_size=64, patch_size=2)  # 1024 patches: short rows are sorted stably anyway
    distinct = torch.stack([torch.randperm(1024) for _ in range(2)]).float()
    assert torch.equal(visible(model, distinct), (distinct < 256).float())
    assert torch.equal(visible(model, torch.zeros(2, 1024))[0], (torch.arange(1024) < 256).float())
    coarse = torch.randint(0, 4, (2, 1024)).float()
    keep, masked = model.masking.split(coarse, model.grid)
    for sample in range(2):
        values = coarse[sample].tolist()
        truth = sorted(range(1024), key=values.__getitem__)  # Python's sort is stable
        assert torch.cat([keep[sample], masked[sample]]).tolist() == truth


# Initial values


def test_initial_values_are_the_official_ones() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        image_size=32, encoder_width=384, encoder_depth=1, encoder_heads=6, decoder_depth=1
    )
    kinds: dict[type, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight.flatten(1)
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.98 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
            assert module.bias is not None and not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name
            assert module.weight.eq(1).all() and module.bias.eq(0).all(), name
        kinds[type(module)] = kinds.get(type(module), 0) + 1
    assert (kinds[nn.Linear], kinds[nn.Conv2d]) == (10, 1)
    for token in (model.encoder.cls_token, model.mask_token):
        assert token is not None
        assert token.std().item() == pytest.approx(0.02, rel=0.15)
        assert abs(token.mean().item()) < 0.004


def test_positions_are_fixed_and_saved() -> None:
    model = tiny(image_size=(32, 48))
    trained = dict(model.named_parameters())
    for name, width in (("encoder.pos_embed", 24), ("decoder_pos_embed", 16)):
        assert name not in trained
        assert torch.equal(model.state_dict()[name], sincos_positions(width, (4, 6), 1))


def test_trained_positions_start_from_the_fixed_ones() -> None:
    model, images = tiny(), pictures()
    names, features = set(model.state_dict()), model.encode(images)
    model.train_positions()
    positions = dict(model.named_parameters())["encoder.pos_embed"]
    assert set(model.state_dict()) == names
    assert any(positions is parameter for parameter in model.layers()[0])
    assert torch.equal(model.encode(images), features)
    model.encode(images).sum().backward()
    assert positions.grad is not None and positions.grad.any()


# Cost


class Allocations(TorchDispatchMode):
    """The largest number of elements that an operation allocated, views left out."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.kept: list[Any] = []  # so that no storage is freed and its address used again
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kept.append(result)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                address = tensor.untyped_storage().data_ptr()
                if address not in self.known:
                    self.known.add(address)
                    self.largest = max(self.largest, tensor.numel())
        return result


def test_forward_never_makes_all_patches() -> None:
    """No (b, n, p * p * c) tensor: pixels are gathered before anything is made of them."""
    model, images = tiny(), pictures(2)
    noise = some_noise(2, 16)
    with Allocations([images, noise, *model.parameters(), *model.buffers()]) as allocations:
        model({"input": images}, noise)
    assert allocations.largest == 2 * 12 * 192  # the target and the prediction of masked patches


def loss_and_gradients(
    model: MaskedAutoencoder, forward: Callable[..., dict[str, Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = forward({"input": pictures(), "position": torch.arange(3)})["loss"]
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def test_activation_checkpointing_saves_memory_and_changes_nothing() -> None:
    calls: list[int] = []
    saved: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        saved[-1] += tensor.numel()
        return tensor

    results = []
    for recompute in (False, True):
        model = tiny(activation_checkpointing=recompute, encoder_depth=6)
        calls.append(0)
        saved.append(0)

        def called(*_: object) -> None:
            calls[-1] += 1

        # Before the block: a recomputation ends as soon as the backward has what it needs.
        model.encoder.blocks[0].register_forward_pre_hook(called)
        model.decoder_blocks[0].register_forward_pre_hook(called)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model({"input": pictures(), "position": torch.arange(3)})["loss"]
        results.append((loss.detach(), loss_and_gradients(model, model)[1]))
        calls[-1] -= 2  # of the pass without a backward
    assert calls == [2, 4]
    assert saved[1] < saved[0] / 4
    assert torch.equal(results[0][0], results[1][0])
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(plain, recomputed)


def test_autocast_changes_the_loss_within_its_precision() -> None:
    model = tiny()
    loss, gradients = loss_and_gradients(model, model)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_gradients = loss_and_gradients(model, model)
    assert low.dtype == torch.float32
    assert low != loss  # autocast was on
    assert low.item() == pytest.approx(loss.item(), rel=1e-2)
    for exact, rough in zip(gradients, low_gradients, strict=True):
        assert (exact - rough).norm() < 0.1 * exact.norm() + 1e-3


@pytest.mark.slow
def test_compiling_does_not_change_the_loss() -> None:
    model = tiny(encoder_depth=1, decoder_depth=1)
    loss, gradients = loss_and_gradients(model, model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")  # inductor: equal, but minutes of g++
    fast, fast_gradients = loss_and_gradients(model, compiled)
    torch.testing.assert_close(fast, loss)
    for plain, made in zip(gradients, fast_gradients, strict=True):
        torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-5)


# Pictures


def test_pasted_keeps_visible_patches() -> None:
    model, images = tiny(image_size=(32, 48)), pictures(3, 3, 32, 48)
    noise = some_noise(3, 24)
    drawn = model.reconstruct(images, noise)
    every = visible(model, noise).view(3, 1, 4, 6)
    seen = every.repeat_interleave(8, 2).repeat_interleave(8, 3).bool().expand(-1, 3, -1, -1)
    assert torch.equal(drawn.original, images)
    assert torch.equal(drawn.pasted[seen], images[seen])
    assert torch.equal(drawn.pasted[~seen], drawn.reconstruction[~seen])
    assert torch.equal(drawn.masked, images * seen)
    assert not torch.equal(drawn.reconstruction[seen], images[seen])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_is_drawn_as_the_original(norm_pix: bool) -> None:
    """Images whose patches are one pattern, scaled and shifted where norm_pix must undo that; the
    bias of the last layer is this pattern."""
    model = tiny(image_size=(32, 48), norm_pix=norm_pix)
    pattern = torch.randn(3, 8, 8)
    pattern = (pattern - pattern.mean()) / pattern.std()
    scale, shift = torch.ones(2, 1, 4, 6), torch.zeros(2, 1, 4, 6)
    if norm_pix:
        scale, shift = torch.rand(2, 1, 4, 6) + 0.5, torch.randn(2, 1, 4, 6)
    images = torch.kron(scale, pattern[None]) + torch.kron(shift, torch.ones(1, 3, 8, 8))
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
        model.decoder_pred.bias.copy_(pattern.permute(1, 2, 0).flatten())
    torch.testing.assert_close(model.reconstruct(images).reconstruction, images, rtol=0, atol=1e-4)
    assert model({"input": images, "position": torch.arange(2)})["loss"] < 1e-8


def test_reconstruct_shows_the_masks_of_the_first_positions() -> None:
    model, images = tiny(), pictures()
    drawn, again = (
        model.reconstruct(images),
        model.reconstruct(images, model.noise(torch.arange(3))),
    )
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not drawn.reconstruction.requires_grad


# Refusals


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"image_size": 36}, "image size 36x36 must be divisible by patch size 8"),
        ({"image_size": (32, 36)}, "image size 32x36 must be divisible by patch size 8"),
        ({"mask_ratio": 0.99}, "mask_ratio 0.99 leaves 0 of 16 patches visible"),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0 leaves 16 of 16 patches visible"),
        ({"mask": "grid", "mask_ratio": 0.5}, "mask grid .* needs mask_ratio 0.75"),
        ({"mask": "grid", "image_size": (24, 32)}, r"an even patch grid \(not 3x4\)"),
        ({"encoder": "resnet18"}, "timm cannot make encoder resnet18"),
        ({"encoder": "vit_of_tomorrow"}, "timm cannot make encoder vit_of_tomorrow"),
        ({"encoder": "vit_relpos_small_patch16_224"}, "no plain timm VisionTransformer"),
        ({"encoder": "vit_tiny_r_s16_p8_224"}, "no plain timm VisionTransformer"),
        ({"decoder_width": 20, "decoder_heads": 3}, "decoder_width 20 is not divisible by 3 heads"),
        ({"encoder_heads": 5}, "timm cannot make encoder vit_base_patch16_224"),
        ({"encoder_width": 26}, "width divisible by 4, not 26"),
        ({"decoder_width": 18}, "width divisible by 4, not 18"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        tiny(**arguments)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 32, 32), (3, 30, 30)])
def test_images_of_another_shape_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"images are {shape}, the model takes (3, 32,")):
        tiny()({"input": pictures(2, *shape), "position": torch.arange(2)})
