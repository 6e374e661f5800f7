"""The processes that share each step: this one's rank, and what they exchange. One process needs no torch here."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from daemon.job import FailureKind
from daemon.trainer.errors import RunFailure

T = TypeVar("T")


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process writes what there is to write: rank 0 does."""
    return rank() == 0


def init_process_group() -> None:
    """Connect to the other processes; each takes a GPU of its own. A single process has nothing to do.

    Raises RunFailure(CONFIG) when there are fewer GPUs than processes.
    """
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        if torch.cuda.device_count() < world_size():
            raise RunFailure(
                FailureKind.CONFIG,
                f"num_processes is {world_size()}, and this machine shows {torch.cuda.device_count()} GPUs",
                hint="set num_processes under [training] to at most the number of GPUs",
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def destroy_process_group() -> None:
    """Disconnect from the other processes."""
    if world_size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def broadcast(value: T | None) -> T:
    """Return rank 0's value in every process; the others may pass None."""
    if world_size() == 1:
        assert value is not None  # noqa: S101  rank 0 always has one
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def all_reduce_sum(values: list[float]) -> list[float]:
    """Return each number summed over all processes."""
    if world_size() == 1:
        return values
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()  # type: ignore[no-any-return]
