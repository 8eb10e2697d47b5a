"""`transmla heal` on one or two CPU processes, with the variables that torchrun sets for them.

accelerate supports FSDP and DeepSpeed on GPUs only. This module patches it to accept CPUs; all else is the command that
a user runs. The processes are forked from a server that has imported torch, transformers and DeepSpeed, which takes
longer than a tiny healing.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

from transmla.cli import main
from transmla.heal import run
from transmla.heal.losses import Distiller
from transmla.heal.settings import Healing

ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
FORKS = multiprocessing.get_context("forkserver")
# The server's sys.path does not have the folder of the tests.
IMPORTED_BEFORE = (
    "accelerate",
    "deepspeed",
    "matplotlib.figure",
    "pytest",
    "torch._inductor.compile_fx",  # DeepSpeed imports it when it starts
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.llama.modeling_llama",
    "transmla.cli.export_verbs",
    "transmla.convert.pipeline",
    "transmla.evaluate.verify",
    "transmla.heal.run",
)


def start_server() -> None:
    """Start the process that all others are forked from, with ENVIRONMENT."""
    FORKS.set_forkserver_preload(list(IMPORTED_BEFORE))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ensure_running()


def make_fsdp_accelerator(settings: Healing, output: Path) -> Any:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="full_state_dict",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, mixed_precision=settings.precision)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert accelerator.is_fsdp2
    assert accelerator.num_processes == 2
    return accelerator


def make_deepspeed_accelerator(settings: Healing, output: Path) -> Any:
    from deepspeed.ops import __compatible_ops__

    # DeepSpeed would compile its shared-memory communication for CPUs, which takes minutes.
    __compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(zero_stage=2)
    accelerator = Accelerator(cpu=True)
    plugin.set_mixed_precision(settings.precision)
    plugin.select(_from_accelerator_state=True)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    AcceleratorState._shared_state["deepspeed_plugins"] = plugin
    accelerator.deepspeed_engine_wrapped = None
    assert accelerator.num_processes == 2
    return accelerator


def make_one_loss_nan() -> None:
    original_forward, calls = Distiller.forward, 0

    def forward(self: Distiller, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        loss, kl = original_forward(self, rows)
        calls += self.training
        # Adding NaN leaves the gradient unchanged, so the other process can learn of it only through the loss.
        return (loss + math.nan if calls == 7 and PartialState().process_index == 1 else loss), kl

    Distiller.forward = forward


def heal(kind: str, rank: int, processes: int, port: int, argv: list[str], log: str) -> None:
    """Run ``transmla heal`` as one of ``processes`` processes, and write what it prints into the file ``log``."""
    with Path(log).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    if kind != "alone":
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kind, _, variant = kind.partition("-")
    makers = {"fsdp": make_fsdp_accelerator, "deepspeed": make_deepspeed_accelerator}
    run.make_accelerator = makers.get(kind, run.make_accelerator)
    if variant == "nan":
        make_one_loss_nan()
    sys.argv = ["transmla", "heal", *argv]
    main()


class Launch:
    """Processes of one healing, which have started.

    ``kind`` is ``alone`` for one process, or ``ddp``, ``fsdp`` or ``deepspeed`` for two. With ``-nan``, the loss of the
    second process is NaN at its seventh step.
    """

    def __init__(self, kind: str, argv: list[str], folder: Path) -> None:
        """Start ``transmla heal`` with the arguments ``argv``. The processes write their logs into ``folder``."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = 1 if kind == "alone" else 2
        folder.mkdir()
        self.logs = [folder / f"{rank}.log" for rank in range(count)]
        self.processes: list[BaseProcess] = []
        for rank, log in enumerate(self.logs):
            self.processes.append(FORKS.Process(target=heal, args=(kind, rank, count, port, argv, str(log))))
            self.processes[-1].start()

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def log(self) -> str:
        """Return the end of every process's log."""
        return "\n".join(log.read_text()[-3000:] for log in self.logs if log.exists())

    def wait(self, seconds: float = 300) -> None:
        """Wait until all processes have ended; fail, and kill the rest, if one fails or the time is over."""
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes):
            if time.monotonic() > deadline or any(process.exitcode for process in self.processes):
                break
            self.processes[0].join(0.05)
        self.kill()
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes), self.log()
