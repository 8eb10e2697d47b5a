"""``torchrun … heal_on_two_processes.py ddp|fsdp|deepspeed[-nan] DIR --teacher …``: `transmla heal` on CPU processes.

accelerate supports FSDP and DeepSpeed on GPUs only. This script patches it to accept CPUs; all else is the command that
a user runs. ``-nan``: the loss of the second process is NaN at its seventh step.
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


if __name__ == "__main__":
    kind, _, variant = sys.argv[1].partition("-")
    makers = {"fsdp": make_fsdp_accelerator, "deepspeed": make_deepspeed_accelerator}
    run.make_accelerator = makers.get(kind, run.make_accelerator)
    if variant == "nan":
        make_one_loss_nan()
    sys.argv[1] = "heal"
    main()
