"""Head of a classifier: from an encoder's tokens, pooled or attended to, to logits.

Linear probe and fine-tuning of He et al. 2021 (arXiv 2111.06377, appendix A), attentive probe of
V-JEPA (Bardes et al. 2024, section 4).

Axes: b images, n patches, d features, k outputs.
"""

from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn
from torch import distributed as dist

HeadKind = Literal["linear", "fc_norm", "batchnorm", "attentive"]

TokenPool = Literal["mean", "cls"]


class BatchNorm(nn.Module):
    """Batch normalisation without affine whose statistics are those of all processes' samples (He
    et al. 2021, appendix A.1).

    Equal to `BatchNorm1d(d, affine=False)` in one process over the global batch, also with unequal
    counts; SyncBatchNorm refuses CPU. No gradient goes through the statistics: its input is frozen.

    Args:
        width: features.
        momentum: share of a batch in the running statistics.
        eps: added to the variance; the official code's.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-6) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Features of mean 0 and variance 1 over the global batch, or by the running statistics in
        evaluation; float32.

        Raises:
            ValueError: one sample in all to train on, which has no variance.
        """
        x = x.float()
        if self.training:
            mean, var = self._update_statistics(x)
        else:
            mean = self.running_mean
            var = self.running_var
        return (x - mean) * (var + self.eps).rsqrt()

    @torch.no_grad()
    def _update_statistics(self, x: Float[Tensor, "b d"]) -> tuple[Tensor, Tensor]:
        count_and_sum = _summed_over_processes(torch.cat([x.new_tensor([len(x)]), x.sum(0)]))
        n = count_and_sum[0]
        mean = count_and_sum[1:] / n
        if n < 2:
            raise ValueError("a BatchNorm needs two samples or more in a training batch")
        # Around the mean, in a second pass: E[x^2] - E[x]^2 cancels in float32.
        var = _summed_over_processes((x - mean).square().sum(0)) / n
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return mean, var


def _summed_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes; `x` itself where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


class ClassifierHead(nn.Module):
    """From an encoder's features to logits (b, k).

    Linear on pooled tokens, or attentive: a learned query over the patch tokens.

    Initial values: linear weights N(0, .01) after "batchnorm" (He et al. 2021, appendix A.1),
    otherwise N(0, 2e-5) as in the official fine-tuning; zero biases; LayerNorm 1 and 0; attention
    as timm's AttentionPoolLatent.

    Args:
        width: features of a token.
        outputs: logits.
        kind: "linear" on pooled tokens after the encoder's norm; "fc_norm" on the mean of the
            patch tokens before it, with a norm of its own (the official fine-tuning); "batchnorm"
            (the paper's linear probe); "attentive" on all patch tokens.
        pool: "mean" of the patch tokens or "cls", for "linear" and "batchnorm".
        heads: attention heads of "attentive".

    Raises:
        ValueError: heads that do not divide the width; pool "cls" for a head that does not pool so.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        kind: HeadKind = "linear",
        pool: TokenPool = "mean",
        heads: int = 8,
    ) -> None:
        super().__init__()
        if kind in ("fc_norm", "attentive") and pool == "cls":
            raise ValueError(f'head "{kind}" takes the patch tokens: leave pool at "mean"')
        if kind == "attentive" and (heads < 1 or width % heads):
            raise ValueError(f"{heads} attention heads do not divide a width of {width}")
        self.kind = kind
        self.pool = pool
        self.outputs = outputs
        self.norm: nn.Module = nn.Identity()
        if kind == "attentive":
            self.norm = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        elif kind == "fc_norm":
            self.norm = nn.LayerNorm(width, eps=1e-6)
        elif kind == "batchnorm":
            self.norm = BatchNorm(width)
        self.linear = nn.Linear(width, outputs)
        nn.init.normal_(self.linear.weight, std=0.01 if kind == "batchnorm" else 2e-5)
        nn.init.zeros_(self.linear.bias)

    def features(self, encoder: nn.Module, images: Float[Tensor, "b c *size"]) -> Tensor:
        """The encoder's features that this head needs: (b, d), or (b, n, d) for "attentive"."""
        vit = cast(Any, encoder)
        if self.kind == "fc_norm":
            (tokens,) = vit.features(images, [-1])
            return tokens[:, vit.prefix :].mean(1)
        if self.kind == "attentive":
            return vit.encode(images, pool="tokens")
        if self.pool == "cls":
            return vit.encode(images, pool="cls")
        # Encoders without tokens know no other way to pool.
        return vit.encode(images)

    def forward(self, features: Tensor) -> Float[Tensor, "b k"]:
        """Logits of the features of `features`."""
        return self.linear(self.norm(features))
