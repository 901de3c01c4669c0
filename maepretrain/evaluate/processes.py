"""The processes of one evaluation: their shares of the work, and exchange of small objects."""

from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import distributed as dist


class Processes:
    """The processes of one evaluation, as torchrun or SLURM started them; a context manager.

    They share files and exchange small objects (gloo): no strategy, no gradients.
    """

    def __init__(self) -> None:
        self._environment = _launcher()
        if self._environment is None:
            self.rank = 0
            self.world_size = 1
            local_rank = 0
        else:
            self.rank = self._environment.global_rank()
            self.world_size = self._environment.world_size()
            local_rank = self._environment.local_rank()
        self.device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
        self._joined = False

    def __enter__(self) -> "Processes":
        if self._environment is not None and self.world_size > 1 and not dist.is_initialized():
            # A rank may wait for another's share of the images, so hours, not gloo's 30 minutes.
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://{self._environment.main_address}:{self._environment.main_port}",
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(hours=12),
            )
            self._joined = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._joined:
            dist.destroy_process_group()

    def share(self, n: int) -> range:
        """This rank's share of 0..n-1; the shares of all ranks are disjoint and cover it."""
        return self.share_of(self.rank, n)

    def share_of(self, rank: int, n: int) -> range:
        """The share of any rank."""
        return range(n * rank // self.world_size, n * (rank + 1) // self.world_size)

    def all(self, value: Any) -> list[Any]:
        """The values of every rank, in order of rank; all ranks come here."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def _launcher() -> ClusterEnvironment | None:
    """torchrun's or SLURM's environment; None in a process that neither started."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            return kind()
    return None
