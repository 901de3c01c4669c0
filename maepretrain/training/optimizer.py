"""Optimizer, parameter groups and learning-rate schedule: the scaling rule, no decay for vectors,
layer decay, warm-up, cosine.

The learning rate is a pure function of the step, set before each step. There is no scheduler whose
saved state could bring an old learning rate back on a resume, and the hyperparameters of a resumed
optimizer are set anew from the configuration.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

Group = dict[str, Any]


class Optimization:
    """One optimizer and one schedule.

    Args:
        optimizer: a name that timm's optimizer factory knows.
        base_lr: learning rate for a global batch of 256; lr = base_lr * global_batch / 256.
        weight_decay: for matrices; vectors (biases, norms) are not decayed.
        betas: of Adam-like optimizers.
        momentum: of SGD-like optimizers.
        warmup_epochs: epochs of linear warm-up from 0.
        min_lr: learning rate at the end of the cosine.
        layer_decay: factor on the learning rate from each encoder layer to the one below it; 1 for
            none.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        optimizer: Literal["adamw", "sgd", "lars"] = "adamw",
        base_lr: float = 1.5e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.9,
        warmup_epochs: float = 40.0,
        min_lr: float = 0.0,
        layer_decay: float = 1.0,
    ) -> None:
        if min(base_lr, weight_decay, warmup_epochs, min_lr) < 0:
            raise ValueError(
                f"base_lr {base_lr}, weight_decay {weight_decay}, warmup_epochs {warmup_epochs} "
                f"and min_lr {min_lr} must not be negative"
            )
        if not all(0 <= factor < 1 for factor in (*betas, momentum)) or not 0 < layer_decay <= 1:
            raise ValueError(
                f"betas {betas} and momentum {momentum} must be in [0, 1), layer_decay "
                f"{layer_decay} in (0, 1]"
            )
        self.optimizer = optimizer
        self.base_lr = base_lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.momentum = momentum
        self.warmup_epochs = warmup_epochs
        self.min_lr = min_lr
        self.layer_decay = layer_decay

    def lr(self, global_batch: int) -> float:
        """The peak learning rate: base_lr x global batch / 256 (Goyal et al. 2017)."""
        return self.base_lr * global_batch / 256

    def lr_at(self, step: int, steps: int, steps_per_epoch: int, global_batch: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine to `min_lr` at the last
        step's end.

        As facebookresearch/mae's `lr_sched.py`, per step. A warm-up as long as the run never gets
        past its ramp.
        """
        peak = self.lr(global_batch)
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return peak * step / warmup
        done = (step - warmup) / max(1.0, steps - warmup)
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def groups(
        self,
        layers: list[list[nn.Parameter]],
        rest: Iterable[nn.Parameter],
        undecayed: Iterable[nn.Parameter] = (),
    ) -> list[Group]:
        """Parameter groups with `lr_scale`: per layer and rest, each split into decayed and not
        decayed.

        Args:
            layers: the encoder's parameters from input to output.
            rest: all other parameters (decoder, head), at the full learning rate.
            undecayed: parameters without weight decay besides the vectors.

        Raises:
            ValueError: a layer decay that changes the learning rate of nothing that is trained.
        """
        exempt = {id(p) for p in undecayed}
        if self.layer_decay == 1.0:
            in_layers = self._split([p for layer in layers for p in layer], exempt, lr_scale=1.0)
            return _merged([*in_layers, *self._split(rest, exempt, lr_scale=1.0)])
        groups: list[Group] = []
        for number, layer in enumerate(layers):
            # The last layer (the final norm) goes with the head, as in the official `lr_decay.py`.
            lr_scale = self.layer_decay ** (len(layers) - 1 - number)
            groups += self._split(layer, exempt, lr_scale=lr_scale)
        groups += self._split(rest, exempt, lr_scale=1.0)
        if all(group["lr_scale"] == 1.0 for group in groups):
            raise ValueError(
                f"layer_decay {self.layer_decay} changes nothing: no layer below the last is "
                "trained; set optim.layer_decay to 1"
            )
        return groups

    def _split(
        self, parameters: Iterable[nn.Parameter], exempt: set[int], *, lr_scale: float
    ) -> list[Group]:
        """A group of trained matrices, with weight decay, and one of the rest; none is empty."""
        decayed: list[nn.Parameter] = []
        undecayed: list[nn.Parameter] = []
        for p in parameters:
            if p.requires_grad:
                is_decayed = p.ndim > 1 and id(p) not in exempt
                (decayed if is_decayed else undecayed).append(p)
        groups: list[Group] = [
            {"params": decayed, "weight_decay": self.weight_decay, "lr_scale": lr_scale},
            {"params": undecayed, "weight_decay": 0.0, "lr_scale": lr_scale},
        ]
        if self.optimizer == "lars":
            # timm's LARS adapts only decayed parameters unless it is set; the paper's probe decays
            # nothing, and would be plain SGD.
            groups[0]["always_adapt"] = True
            groups[1]["always_adapt"] = False
        return [group for group in groups if group["params"]]

    def check_strategy(self, strategy: str) -> None:
        """Refuse what an optimizer cannot be run under.

        Args:
            strategy: name of the strategy's class.

        Raises:
            ValueError: LARS on divided memory, which knows no norm of a tensor.
        """
        if self.optimizer == "lars" and strategy in ("ZeRO", "FSDP2", "DeepSpeedStrategy"):
            raise ValueError(
                f"optimizer lars needs the norm of each tensor, which {strategy} does not keep: "
                "take another strategy (ddp) or optimizer"
            )

    def make(
        self, groups: list[Group], global_batch: int, *, fused: bool = True
    ) -> torch.optim.Optimizer:
        """The optimizer over these groups; AdamW is fused where it may (one pass over memory, the
        same numbers)."""
        lr = self.lr(global_batch)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=self.betas, weight_decay=0.0, fused=fused)
        return create_optimizer_v2(
            groups, opt=self.optimizer, lr=lr, momentum=self.momentum, weight_decay=0.0
        )

    def refresh(self, optimizer: torch.optim.Optimizer, groups: list[Group]) -> None:
        """Set the hyperparameters as configured now: a loaded optimizer state brings those of its
        own run."""
        for loaded, configured in zip(optimizer.param_groups, groups, strict=True):
            loaded.update({k: v for k, v in configured.items() if k != "params"})
            if "betas" in loaded:
                loaded["betas"] = self.betas
            if "momentum" in loaded:
                loaded["momentum"] = self.momentum


def _merged(groups: list[Group]) -> list[Group]:
    """Groups of the same settings joined into one."""
    joined: dict[tuple[float, ...], Group] = {}
    for group in groups:
        settings = tuple(value for name, value in group.items() if name != "params")
        known = joined.setdefault(settings, group | {"params": []})
        known["params"] += group["params"]
    return list(joined.values())


def check_groups(groups: list[Group], parameters: Iterable[nn.Parameter]) -> None:
    """Refuse groups that do not hold each trained parameter once, and no other.

    Raises:
        ValueError: groups and trained parameters that do not add up.
    """
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = {id(p) for p in parameters if p.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != trained:
        raise ValueError(
            f"parameter groups hold {len(grouped)} tensors ({len(set(grouped))} different ones), "
            f"but {len(trained)} are trained: layers() and the frozen parameters do not add up"
        )


def describe(groups: list[Group], lr: float) -> list[str]:
    """One line a group: how many tensors and numbers, weight decay, learning rate; with a layer
    decay also the first and the last layer's learning rate."""
    lines: list[str] = []
    for group in groups:
        parameters = group["params"]
        numbers = sum(p.numel() for p in parameters)
        lines.append(
            f"{len(parameters)} tensors, {numbers:,} numbers, weight decay "
            f"{group['weight_decay']}, lr {lr * group['lr_scale']:.3g}"
        )
    rates = [lr * g["lr_scale"] for g in groups]
    if len(set(rates)) > 1:
        lines.append(f"lr of {len(set(rates))} layers from {min(rates):.3g} to {max(rates):.3g}")
    return lines
