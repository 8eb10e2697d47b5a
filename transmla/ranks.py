"""The processes that accelerate or torchrun started for one run: split its work over them, and add up their results.

A run of one process calls the same functions. They then return at once, and torch.distributed is never started.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from transmla.errors import TransmlaError

T = TypeVar("T")

# Variables by which launchers say how many processes they started.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Longest time that a process waits for another one: the first process samples and writes exports alone.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """The processes of one launch. Each must call the same methods, in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this process's share of ``count`` things: consecutive ones, as many as others have or one more."""
        return self.share_of(self.rank, count)

    def share_of(self, rank: int, count: int) -> slice:
        """Return the share of process ``rank``, as ``share`` does."""
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def on_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process, and return its result in all.

        Raises:
            Exception: what ``work`` raised, in all processes. All errors but the first process's have ``told`` set, so
                that one process tells the user.
        """
        if self.size == 1:
            return work()
        result: list[Any] = [None, None]
        if self.first:
            try:
                result[0] = work()
            except Exception as error:
                result[1] = _portable(error)
                distributed.broadcast_object_list(result)
                raise
        distributed.broadcast_object_list(result)
        if result[1] is not None:
            result[1].told = True
            raise result[1]
        return result[0]  # type: ignore[no-any-return]

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process and then in all others, which find the files that the first has made.

        Raises:
            Exception: what ``work`` raised in the first process.
        """
        results: list[T] = []
        self.on_first(lambda: results.append(work()))
        return results[0] if self.first else work()

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor, in place, by its sum over the processes."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def copy_first(self, *tensors: Tensor) -> None:
        """Replace each contiguous tensor, in place, by the first process's tensor."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the contiguous ``tensor`` [...] of every process, stacked in the order of ranks: [size, ...]."""
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty(self.size, *tensor.shape)
        _all_gather(gathered.view(-1), tensor.view(-1))
        return gathered

    def exchange(self, rows: Tensor) -> None:
        """Replace each row of the contiguous ``rows`` [size, S], in place, by that of the process with its number."""
        if self.size > 1:
            _all_gather(rows.view(-1), rows[self.rank])

    def add_up_own(self, rows: Tensor) -> None:
        """Replace this process's row of the contiguous ``rows`` [size, S], in place, by its sum over the processes.

        The other rows hold no meaningful values afterwards.
        """
        if self.size > 1:
            _reduce_scatter(rows[self.rank], rows.view(-1))

    def complete(self, rows: Tensor | Sequence[Tensor], device: torch.device) -> None:
        """Fill in the rows that other processes have computed, in place, one at a time.

        Args:
            rows: [N, …], or N contiguous tensors, of which this process has computed its share.
            device: the device that the processes exchange tensors from; ``rows`` may be in the computer's memory.
        """
        if self.size == 1:
            return
        for owner in range(self.size):
            for row in rows[self.share_of(owner, len(rows))]:
                sent = row.to(device) if owner == self.rank else torch.empty_like(row, device=device)
                distributed.broadcast(sent, owner)
                if owner != self.rank:
                    row.copy_(sent)


def local_size() -> int:
    """Return how many processes of this launch run on this computer."""
    if "LOCAL_RANK" not in os.environ:
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))


def counted(processes: int) -> str:
    """Return a number of processes in words."""
    return f"{processes} process" + ("" if processes == 1 else "es")


def starts_first() -> bool:
    """Return whether this process is the first of its launch, by the launcher's variables. Nothing is connected."""
    return os.environ.get("RANK", "0") == "0"


def describe_launch() -> str:
    """Return a line for the user about the processes of this launch; empty for a command that runs alone.

    It is empty in all processes but the first.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and "LOCAL_RANK" in os.environ:
        return f"{size} processes share the work" if starts_first() else ""
    # Without --multi_gpu or the like, accelerate starts one process, whatever --num_processes says. It sets an address
    # for several processes then, and no number of them.
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and not any(name in os.environ for name in SIZES)
    if alone and "MASTER_ADDR" in os.environ:
        return "accelerate has started one process alone; to start several, use --multi_gpu, or torchrun on a CPU"
    return ""


def check_launch(device: str, size: int, local: int) -> None:
    """Check that each of several processes can have a GPU of its own, or that all use the CPU.

    Args:
        device: name of the device that the user chose.
        size: number of processes, at least 2.
        local: number of those on this computer.

    Raises:
        TransmlaError: if the device is one certain GPU, or if there are more processes than GPUs.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise TransmlaError(
            f"--device {device} was given to {size} processes",
            limit="each process takes the GPU of its own number",
            remedy="leave --device out, and choose GPUs with CUDA_VISIBLE_DEVICES",
        )
    if not _on_cpu(device) and local > torch.cuda.device_count():
        raise TransmlaError(
            f"{local} processes were started for {torch.cuda.device_count()} GPUs",
            limit="each process needs a GPU of its own",
            remedy=f"start {counted(torch.cuda.device_count())}",
        )


def launched(device: str) -> Ranks:
    """Return the processes that accelerate or torchrun started for this run, after connecting them.

    Each process uses the GPU of its own number from then on.

    Args:
        device: name of the device that the user chose; ``auto``, ``cuda`` or ``cpu`` if there are several processes.

    Raises:
        TransmlaError: as ``check_launch``.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "LOCAL_RANK" not in os.environ:
        return Ranks()
    from accelerate import PartialState

    check_launch(device, size, local_size())
    state = PartialState(cpu=_on_cpu(device), timeout=PATIENCE)
    return Ranks(state.process_index, state.num_processes)


def leave() -> None:
    """End the connection that ``launched`` made, if it is still there."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _on_cpu(device: str) -> bool:
    """Return whether processes that were started with the device called ``device`` use the CPU."""
    return device == "cpu" or not torch.cuda.is_available()


def _all_gather(rows: Tensor, own: Tensor) -> None:
    renamed = getattr(distributed, "all_gather_single", None)  # by torch 2.13
    (renamed or distributed.all_gather_into_tensor)(rows, own)


def _reduce_scatter(own: Tensor, rows: Tensor) -> None:
    renamed = getattr(distributed, "reduce_scatter_single", None)  # by torch 2.13
    (renamed or distributed.reduce_scatter_tensor)(own, rows)


def _portable(error: Exception) -> Exception:
    """Return ``error``, or an error with the same words if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
