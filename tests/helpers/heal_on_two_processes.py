"""``torchrun … heal_on_two_processes.py ddp|fsdp|deepspeed[-sick] DIR --teacher …``: `transmla heal` on CPU processes.

accelerate takes FSDP and DeepSpeed on GPUs only; what makes it take them on CPUs is here, the rest is what a user runs.
``-sick``: the loss of one of the processes is no number at its seventh step.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

from transmla.cli import main
from transmla.heal import run
from transmla.heal.losses import Distiller
from transmla.heal.settings import Healing


def sharded(settings: Healing, output: Path) -> Any:
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


def staged(settings: Healing, output: Path) -> Any:
    from deepspeed.ops import __compatible_ops__

    # What CPU processes share memory by takes minutes to compile.
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


def sicken() -> None:
    real, calls = Distiller.forward, 0

    def sick(self: Distiller, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        loss, kl = real(self, rows)
        calls += self.training
        # The gradient stays what it is: nothing but the loss tells the other process.
        return (loss + math.nan if calls == 7 and PartialState().process_index == 1 else loss), kl

    Distiller.forward = sick


if __name__ == "__main__":
    kind, _, health = sys.argv[1].partition("-")
    run.make_accelerator = {"fsdp": sharded, "deepspeed": staged}.get(kind, run.make_accelerator)
    if health == "sick":
        sicken()
    sys.argv[1] = "heal"
    main()
