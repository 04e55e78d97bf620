"""The processes of a run: one, or those that torchrun started.

Rows of a batch are divided by rank in order, so that the order of the data is the same for any number of ranks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> World:
        """Find the other processes; under torchrun, the process group is started.

        Raises:
            ValueError: a device that this machine or this build of torch does not have.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        found = _device(device, local)
        if size > 1 and not dist.is_initialized():
            if found.type == "cuda":
                torch.cuda.set_device(found)
            dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo")
        return cls(rank, size, found)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, num_rows: int) -> tuple[int, int]:
        """(first, number) of the rows of a batch that this rank has.

        Raises:
            ValueError: the ranks do not divide the batch.
        """
        if num_rows % self.size:
            raise ValueError(f"batch_size={num_rows} is not divisible by {self.size} ranks: use a multiple")
        size = num_rows // self.size
        return self.rank * size, size

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.size > 1:
            dist.barrier()


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device={name!r}: this machine or this build of torch has no such device, use cpu") from None
    return device
