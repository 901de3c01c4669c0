"""DeepSpeed's ZeRO (Rajbhandari et al. 2020) under Lightning, on any device.

Lightning's strategy assumes CUDA; this one runs the same on CPU processes over gloo, so that what a
cluster runs is what tests run. On CUDA every override of a device is Lightning's own. Two things
are ours everywhere: mixed precision is autocast over fp32 parameters, as under DDP (DeepSpeed's own
casts the parameters), and checkpoints are fragments (see `fragments.py`), which any engine resumes
on any number of processes.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import Tensor
from torch import distributed as dist

from maepretrain.checkpoints.sharded import WEIGHT, Fragment
from maepretrain.strategies.sharded import Sharded, made, require_shardable

AUTOCAST = {"bf16-mixed": "bfloat16"}


class _Precision(DeepSpeedPrecision):
    """Parameters and inputs stay as they are; DeepSpeed's engine opens torch's autocast."""

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(
        self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Gradients of a loss that Lightning has divided by the accumulated micro-batches, and
        DeepSpeed would divide again. AdamW hides it, clipping and SGD do not."""
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


class ZeRO(Sharded, DeepSpeedStrategy):
    """ZeRO: optimizer state (stage 1), also gradients (2), also parameters (3) divided among
    processes.

    Args:
        stage: 1, 2 or 3.
        offload: optimizer state and, at stage 3, parameters in the host's memory. Needs CUDA.
        bucket: numbers that travel at once.
        keep_whole: at stage 3, parameters of fewer numbers than this stay whole on each process.

    Raises:
        ValueError: offload without CUDA, or a precision other than 32-true and bf16-mixed.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload: bool = False,
        bucket: int = 50_000_000,
        keep_whole: int = 10_000,
    ) -> None:
        self.on_cuda = torch.cuda.is_available()
        _prepare(self.on_cuda)
        zero: dict[str, Any] = {
            "stage": stage,
            "overlap_comm": self.on_cuda,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = keep_whole
        if offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            if stage == 3:
                zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        settings = {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Known to the data, and to DeepSpeed only for its own speed log.
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
        }
        super().__init__(config=settings, logging_level=logging.ERROR)
        self.stage, self.offload = stage, offload

    def setup_environment(self) -> None:
        """Processes and devices; on CPU without the check that refuses it."""
        if self.offload and not self.on_cuda:
            raise ValueError("ZeRO's offload moves memory from a GPU, and this machine has none")
        precision = self.precision_plugin.precision
        if precision not in ("32-true", *AUTOCAST):
            raise ValueError(f"precision {precision} under ZeRO: take 32-true or bf16-mixed")
        self.precision_plugin = _Precision(cast(Any, precision))
        require_shardable(self.trained_module(), f"ZeRO-{self.stage}")
        if self.on_cuda:
            super().setup_environment()
            return
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """DeepSpeed's process group; devices that it can number."""
        if not self.on_cuda:
            assert self.parallel_devices is not None
            count = len(self.parallel_devices)
            self.parallel_devices = [torch.device("cpu", number) for number in range(count)]
        super().setup_distributed()

    @property
    def root_device(self) -> torch.device:
        """This process's device; with a number on CPU too."""
        return super().root_device if self.on_cuda else torch.device("cpu", self.local_rank)

    def _format_config(self) -> None:
        super()._format_config()
        assert isinstance(self.config, dict)
        dtype = AUTOCAST.get(self.precision_plugin.precision)
        if dtype is not None:
            self.config.pop("bf16", None)
            # DeepSpeed's own linear layer rounds a bias apart, and the loss would be another than
            # DDP's (.004 after 8 steps). Without it the backward pass keeps bf16 copies of weights,
            # two bytes a parameter, unless activations are checkpointed.
            self.config["zero_optimization"]["memory_efficient_linear"] = False
            # Gradients travel in fp32, as under DDP.
            self.config["torch_autocast"] = {
                "enabled": True,
                "dtype": dtype,
                "lower_precision_safe_modules": [],
            }

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return cast(Any, self.deepspeed_engine.optimizer)

    def optimizer_states(self) -> dict[Tensor, dict[str, Any]]:
        return self._zero.optimizer.state

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self._zero.param_groups

    def fragments(self, kinds: dict[str, bool] | None = None) -> Iterator[Fragment]:
        """What this process holds; of tensors that every process holds, rank zero writes."""
        module = self.trained_module()
        first = self.global_rank == 0
        cut = self._cut_by_parameter if self.stage == 3 else self._cut_flat
        for name, parameter in module.named_parameters():
            yield from cut(name, parameter, kinds)
        known = {name for name, _ in module.named_parameters()}
        for name, tensor in module.state_dict().items():
            if name not in known:
                yield Fragment(name, 0, {WEIGHT: tensor.view(-1)}, tuple(tensor.shape), first)

    def _cut_flat(
        self, name: str, parameter: Any, kinds: dict[str, bool] | None
    ) -> Iterator[Fragment]:
        """Stages 1 and 2: whole parameters everywhere, and one flat fp32 copy of a parameter group
        cut into equal parts, wherever a parameter may end."""
        shape, trained = tuple(parameter.shape), parameter.requires_grad
        written = self.global_rank == 0 and not trained
        yield Fragment(name, 0, {WEIGHT: parameter.data.view(-1)}, shape, written)
        mapping = parameter._hp_mapping if trained else None
        if mapping is None:
            return
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        here, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
        yield Fragment(
            name, start, self._narrowed(flat, here.start, here.numel, kinds), shape, True
        )

    def _cut_by_parameter(
        self, name: str, parameter: Any, kinds: dict[str, bool] | None
    ) -> Iterator[Fragment]:
        """Stage 3: each parameter cut into equal parts, the last one padded."""
        shape, part = tuple(parameter.ds_shape), parameter.ds_tensor.ds_numel
        start = dist.get_rank(parameter.ds_process_group) * part
        count = max(0, min(part, parameter.ds_numel - start))
        trained = parameter.requires_grad
        own = {WEIGHT: parameter.ds_tensor.data.view(-1)[:count]}
        yield Fragment(name, start, own, shape, not trained)
        if trained:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
            yield Fragment(name, start, self._narrowed(flat, offset, count, kinds), shape, True)

    def _narrowed(
        self, flat: Tensor, start: int, count: int, kinds: dict[str, bool] | None
    ) -> dict[str, Tensor]:
        """Part of a flat fp32 tensor and of its optimizer state."""
        fused = bool(self.optimizer_groups()[0].get("fused"))
        state = made(self.optimizer_states()[flat], flat, kinds, fused)
        cut = {k: v.narrow(0, start, count) if v.ndim else v for k, v in state.items()}
        return {WEIGHT: flat.data.narrow(0, start, count)} | cut

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of the LightningModule, run where parameters are gathered as it needs them; all
        processes call it together."""
        with self._outside_of_their_modules():
            return self._forward_redirection(
                cast(Any, self.model), self.trained_module(), method, *arguments
            )

    def _outside_of_their_modules(self) -> AbstractContextManager[Any]:
        """At stage 3, gathers what a model reads of a part without calling it (a convolution's
        weight, a token). DeepSpeed gathers it with the module that read it in training, which need
        not run in another method, and would hand it out on its way, empty."""
        if self.stage < 3:
            return nullcontext()
        from deepspeed import zero

        found: dict[int, Tensor] = {}
        for module in self.trained_module().modules():
            found |= vars(module).get("_external_params", {})
        return zero.GatheredParameters(list(found.values()))


def _prepare(on_cuda: bool) -> None:
    """Import DeepSpeed for this device; on CPU nothing is compiled.

    Raises:
        ValueError: it is not installed.
    """
    if not on_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_BUILD_OPS", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"ZeRO needs DeepSpeed, which is not to be had here: {error}") from None
    if not on_cuda:
        # Its kernel for collectives in shared memory takes two minutes to compile, and serves
        # inference.
        cast(Any, deepspeed).ops.__compatible_ops__ = {}
