"""What is relied on of Lightning's private names, seen in runs of its own Trainer."""

import csv
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from maepretrain.lightning_internals import (
    TrainingBar,
    call_through_wrapper,
    disable_signal_handlers,
    is_logging_step,
    repeat_validation,
    set_logged_step,
    set_progress,
)


class Module(L.LightningModule):
    """A line through the origin; notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
        self.logging_steps: list[bool] = []
        self.batches: list[int] = []
        self.handlers: list[Any] = []
        self.validations = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.logging_steps.append(is_logging_step(self.trainer))
        self.batches.append(batch_idx)
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        self.log("loss", loss := self.line(batch).square().mean())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validations += 1

    def twice(self, number: int) -> int:
        return 2 * number

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        **options,
    )


def batches() -> DataLoader[Any]:
    return DataLoader(torch.ones(20, 1), batch_size=1)  # pyright: ignore[reportArgumentType]


pytestmark = pytest.mark.filterwarnings("ignore")


def test_logging_steps_are_those_in_the_log(tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path, max_steps=6, log_every_n_steps=3, val_check_interval=6).fit(module, batches())
    assert module.logging_steps == [False, False, True] * 2


def test_the_logged_step_can_be_set(tmp_path: Path) -> None:
    class Shifted(Module):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            set_logged_step(self.trainer, 100 + batch_idx)

    trainer(tmp_path, max_steps=3, log_every_n_steps=1, val_check_interval=3).fit(
        Shifted(), batches()
    )
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["100", "101", "102"]


@pytest.mark.parametrize("disabled", [False, True])
def test_lightning_takes_sigterm_unless_it_is_kept_from_it(tmp_path: Path, disabled: bool) -> None:
    ours = signal.getsignal(signal.SIGTERM)
    module = Module()
    one = trainer(tmp_path, max_steps=1, log_every_n_steps=1, val_check_interval=1)
    if disabled:
        disable_signal_handlers(one)
    one.fit(module, batches())
    assert (module.handlers == [ours]) == disabled


def test_progress_in_a_checkpoint_decides_where_a_run_goes_on(tmp_path: Path) -> None:
    """Four steps are saved, and told to be six."""
    options: dict[str, Any] = {"log_every_n_steps": 1, "val_check_interval": 100}
    first = trainer(tmp_path / "a", max_steps=4, limit_val_batches=0, **options)
    first.fit(Module(), batches())
    first.save_checkpoint(tmp_path / "last.ckpt")

    class Further(Module):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            set_progress(checkpoint, micro_batches=6, steps=6)

    module = Further()
    second = trainer(tmp_path / "b", max_steps=9, limit_val_batches=0, **options)
    second.fit(module, batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert (module.batches, second.global_step) == ([6, 7, 8], 9)


def test_a_validation_can_be_repeated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"log_every_n_steps": 1, "val_check_interval": 4}
    first = trainer(tmp_path / "a", max_steps=4, limit_val_batches=2, **options)
    first.fit(Module(), batches(), batches())
    first.save_checkpoint(tmp_path / "last.ckpt")

    class Repeated(Module):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            repeat_validation(checkpoint)

    for kind, validations in ((Module, 2), (Repeated, 4)):
        module = kind()
        second = trainer(tmp_path / "b", max_steps=8, limit_val_batches=2, **options)
        second.fit(
            module, batches(), batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
        assert module.validations == validations


def test_other_methods_run_inside_the_wrapper(tmp_path: Path) -> None:
    class Calls(Module):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            assert call_through_wrapper(self.trainer.strategy, "twice", batch_idx) == 2 * batch_idx

    trainer(tmp_path, max_steps=2, log_every_n_steps=1, val_check_interval=2).fit(
        Calls(), batches()
    )


def test_the_bar_asks_for_its_description() -> None:
    from lightning.pytorch.callbacks import RichProgressBar

    assert "_get_train_description" in vars(RichProgressBar)
    assert TrainingBar()._get_train_description(0) == "training"
