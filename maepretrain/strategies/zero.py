"""DeepSpeed's ZeRO (Rajbhandari et al. 2020) under Lightning, on any device.

Lightning's strategy assumes CUDA; this one runs the same on CPU processes over gloo, so that what a
cluster runs is what tests run. On CUDA every override of a device is Lightning's own. Two things
are ours everywhere: mixed precision is autocast over fp32 parameters, as under DDP (DeepSpeed's own
casts the parameters), and checkpoints are fragments (see `checkpoints/fragments.py`), which any
strategy resumes on any number of processes.
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

from maepretrain.checkpoints.fragments import WEIGHT, Fragment
from maepretrain.lightning_internals import call_through_wrapper
from maepretrain.strategies.deepspeed_internals import (
    Part,
    disable_kernels,
    external_parameters,
    part_of_group,
    part_of_parameter,
)
from maepretrain.strategies.sharded import ShardedStrategy, require_shardable, state_tensors

AUTOCAST = {"bf16-mixed": "bfloat16"}


class _Precision(DeepSpeedPrecision):
    """Parameters and inputs stay as they are; DeepSpeed opens torch's autocast."""

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(
        self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Compute gradients of a loss that Lightning has divided by the accumulated micro-batches.

        DeepSpeed would divide again. AdamW hides it, clipping and SGD do not.
        """
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


class ZeRO(ShardedStrategy, DeepSpeedStrategy):
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
        import_deepspeed(on_cuda=self.on_cuda)
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
        self.stage = stage
        self.offload = offload

    def setup_environment(self) -> None:
        """Set up processes and devices; on CPU without Lightning's check, which refuses it."""
        if self.offload and not self.on_cuda:
            raise ValueError("ZeRO's offload moves memory from a GPU, and this machine has none")
        precision = self.precision_plugin.precision
        if precision not in ("32-true", *AUTOCAST):
            raise ValueError(f"precision {precision} under ZeRO: take 32-true or bf16-mixed")
        self.precision_plugin = _Precision(cast(Any, precision))
        if precision in AUTOCAST:
            self._use_autocast(AUTOCAST[precision])
        require_shardable(self.trained_module(), f"ZeRO-{self.stage}")
        if self.on_cuda:
            super().setup_environment()
            return
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def _use_autocast(self, dtype: str) -> None:
        """Configure torch's autocast in the place of DeepSpeed's own mixed precision."""
        assert isinstance(self.config, dict)
        # Lightning turns DeepSpeed's own on where this key is missing.
        self.config["bf16"] = {"enabled": False}
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

    def setup_distributed(self) -> None:
        """Start DeepSpeed's process group, with devices that it can number."""
        if not self.on_cuda:
            assert self.parallel_devices is not None
            count = len(self.parallel_devices)
            self.parallel_devices = [torch.device("cpu", number) for number in range(count)]
        super().setup_distributed()

    @property
    def root_device(self) -> torch.device:
        """This process's device; with a number on CPU too."""
        return super().root_device if self.on_cuda else torch.device("cpu", self.local_rank)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return cast(Any, self.deepspeed_engine.optimizer)

    def optimizer_states(self) -> dict[Tensor, dict[str, Any]]:
        return self._zero.optimizer.state

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self._zero.param_groups

    def fragments(self, expected: dict[str, bool] | None = None) -> Iterator[Fragment]:
        """Yield this process's numbers; of tensors that every process holds, rank zero writes."""
        module = self.trained_module()
        parameters = dict(module.named_parameters())
        cut = self._cut_by_parameter if self.stage == 3 else self._cut_by_group
        for name, parameter in parameters.items():
            yield from cut(name, parameter, expected)
        for name, tensor in module.state_dict().items():
            if name not in parameters:
                yield Fragment(
                    name,
                    start=0,
                    values={WEIGHT: tensor.view(-1)},
                    shape=tuple(tensor.shape),
                    written=self.global_rank == 0,
                )

    def _cut_by_group(
        self, name: str, parameter: Any, expected: dict[str, bool] | None
    ) -> Iterator[Fragment]:
        """Stages 1 and 2: whole parameters everywhere, and parts of fp32 copies of groups."""
        shape = tuple(parameter.shape)
        yield Fragment(
            name,
            start=0,
            values={WEIGHT: parameter.data.view(-1)},
            shape=shape,
            written=self.global_rank == 0 and not parameter.requires_grad,
        )
        part = part_of_group(self._zero, parameter)
        if part.flat is not None:
            values = self._values(part.flat, part, expected)
            yield Fragment(name, part.start, values, shape, written=True)

    def _cut_by_parameter(
        self, name: str, parameter: Any, expected: dict[str, bool] | None
    ) -> Iterator[Fragment]:
        """Stage 3: parts of parameters, and of their fp32 copies."""
        shape = tuple(parameter.ds_shape)
        part = part_of_parameter(self._zero, parameter)
        own = {WEIGHT: parameter.ds_tensor.data.view(-1)[: part.length]}
        yield Fragment(name, part.start, own, shape, written=not parameter.requires_grad)
        if part.flat is not None:
            values = self._values(part.flat, part, expected)
            yield Fragment(name, part.start, values, shape, written=True)

    def _values(
        self, flat: Tensor, part: Part, expected: dict[str, bool] | None
    ) -> dict[str, Tensor]:
        """A part of a flat fp32 tensor, and of its optimizer state."""
        fused = bool(self.optimizer_groups()[0].get("fused"))
        state = state_tensors(self.optimizer_states()[flat], flat, expected, on_device=fused)
        values = {WEIGHT: flat.data.narrow(0, part.offset, part.length)}
        for kind, tensor in state.items():
            values[kind] = tensor.narrow(0, part.offset, part.length) if tensor.ndim else tensor
        return values

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the LightningModule where parameters are gathered as it needs them.

        All processes call it together.
        """
        with self._gathered_external_parameters():
            return call_through_wrapper(self, method, *arguments)

    def _gathered_external_parameters(self) -> AbstractContextManager[Any]:
        """At stage 3, gather what a model reads of a child without calling it (a convolution's
        weight, a token).

        DeepSpeed gathers it with the module that read it in training, which need not run in another
        method, and would pass it on empty.
        """
        if self.stage < 3:
            return nullcontext()
        from deepspeed import zero

        return zero.GatheredParameters(external_parameters(self.trained_module()))


def import_deepspeed(*, on_cuda: bool) -> None:
    """Import DeepSpeed for this device; on CPU nothing is compiled.

    Raises:
        ValueError: it is not installed.
    """
    if not on_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_BUILD_OPS", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ZeRO needs DeepSpeed, which cannot be imported: {error}") from None
    if not on_cuda:
        disable_kernels()
