"""The LightningModule of pretraining, for any model of the project."""

from typing import Any, cast

from torch import Tensor, nn

from maepretrain.data.batch import Batch
from maepretrain.data.module import ShardData
from maepretrain.models.protocol import Summarises
from maepretrain.training.module import TrainingModule
from maepretrain.training.nonfinite import NonFinite
from maepretrain.training.optimizer import Optimization


class Pretrain(TrainingModule):
    """Trains any model with `model(batch) -> {"loss": ..., ...}` on batches of uint8 images."""

    def __init__(
        self,
        model: nn.Module,
        optim: Optimization,
        data: ShardData,
        steps: int,
        seed: int = 0,
        guard: NonFinite | None = None,
    ) -> None:
        super().__init__(optim, data, steps, seed)
        self.model = model
        self.guard = guard or NonFinite()

    def training_step_model(self) -> nn.Module:
        """The model."""
        return self.model

    def summary(self) -> dict[str, str]:
        """The model's own lines, if it has any."""
        return self.model.summary() if isinstance(self.model, Summarises) else {}

    def encode(self, images: Tensor) -> Tensor:
        """Features (b, d) of uint8 images."""
        return cast(Any, self.model).encode(self.normalise(images))

    def reconstruct(self, images: Tensor) -> Any:
        """The rows of a picture of uint8 images."""
        return cast(Any, self.model).reconstruct(self.normalise(images))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        def losses(images: Tensor) -> Batch:
            return self.model(batch | {"input": images})

        return self.guard.loss(self, batch, batch_idx, self.normalise(batch["input"]), losses)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.model(batch | {"input": self.normalise(batch["input"])})
        named = {f"val_{name}": value for name, value in losses.items()}
        self.log_dict(named, batch_size=len(batch["position"]), sync_dist=True, prog_bar=True)
