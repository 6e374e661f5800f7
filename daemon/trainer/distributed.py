"""One process, or several that share each step: who this one is, and the few words they exchange."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from daemon.job import FailureKind
from daemon.trainer.errors import RunFailure

T = TypeVar("T")


def process() -> int:
    """This process's number, from 0; process 0 writes what there is to write."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meet the other processes; each GPU process takes a GPU of its own. Nothing to do for a single one.

    Raises RunFailure(CONFIG) when there are fewer GPUs than processes.
    """
    if processes() == 1:
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        if torch.cuda.device_count() < processes():
            raise RunFailure(
                FailureKind.CONFIG,
                f"{processes()} processes share the run, and {torch.cuda.device_count()} GPUs can be seen",
                hint="num_processes under [training] is at most the number of GPUs",
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def leave() -> None:
    """Part from the others."""
    if processes() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def from_first(value: T | None) -> T:
    """What process 0 has, in every process."""
    if processes() == 1:
        assert value is not None  # noqa: S101  process 0 always has it
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def total(values: list[float]) -> list[float]:
    """Each number summed over all processes."""
    if processes() == 1:
        return values
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()  # type: ignore[no-any-return]
