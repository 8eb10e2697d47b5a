"""``torchrun … heal_processes.py ddp|fsdp DIR --teacher …``: `transmla heal` on CPU processes.

accelerate takes FSDP on GPUs only; what makes it take it on CPUs is here, the rest is what a user runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from transmla.cli import main
from transmla.heal import run
from transmla.heal.settings import Healing


def sharded(settings: Healing, output: Path) -> Any:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["DeepseekV3DecoderLayer"],
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


if __name__ == "__main__":
    if sys.argv[1] == "fsdp":
        run.make_accelerator = sharded
    sys.argv[1] = "heal"
    main()
