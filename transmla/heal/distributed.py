"""What differs between one process, DDP, FSDP2 and DeepSpeed; the loop is the same for all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transmla.heal.settings import Healing

if TYPE_CHECKING:
    from accelerate import Accelerator

# How long processes wait for each other.
PATIENCE = timedelta(hours=12)
# Modules that accelerate and torch put between others.
WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def make_accelerator(settings: Healing, output: Path) -> Accelerator:
    """Accelerate as it was launched, with the precision and trackers that ``settings`` ask for."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

    precision = settings.precision
    if precision == "auto":
        on_gpus = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        precision = "bf16" if on_gpus else "no"
    return Accelerator(
        mixed_precision=precision,
        log_with=list(settings.track) or None,
        project_dir=str(output.with_name(output.name + ".logs")),
        # While the first process samples, or writes the export, the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def configure(accelerator: Any, settings: Healing) -> None:
    """Tell ``accelerator``, however it was launched, what a step is made of."""
    accelerator.gradient_accumulation_steps = settings.accumulate
    if uses_deepspeed(accelerator):
        # DeepSpeed steps by itself, so it must know when.
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.batch // settings.accumulate // accelerator.num_processes,
            "gradient_accumulation_steps": settings.accumulate,
            "gradient_clipping": settings.clip,
        }
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # As DDP does: computed in bfloat16, but gradients are added up and losses told in float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def kind(accelerator: Any) -> str:
    """What a state was saved by, and so must be read by: precision and sharding."""
    if uses_deepspeed(accelerator):
        sharding = f"DeepSpeed's stage {accelerator.deepspeed_plugin.zero_stage}, {accelerator.num_processes} processes"
    else:
        sharding = "FSDP2" if accelerator.is_fsdp2 else "whole"
    return f"{accelerator.mixed_precision} {sharding}"


def uses_deepspeed(accelerator: Any) -> bool:
    """Whether DeepSpeed runs the steps."""
    return "DEEPSPEED" in str(accelerator.distributed_type)


def gather(accelerator: Any, model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """The parameters ``names`` of a prepared ``model``, whole, in float32 on the CPU of the first process.

    ``names`` are those that parameters had before anything was wrapped. All processes call this; on others than the
    first, nothing is found.
    """
    if uses_deepspeed(accelerator):
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Callable[[Tensor], Tensor] = safe_get_full_fp32_param
        full: dict[str, Tensor] = dict(model.named_parameters())
    else:
        whole, full = _as_it_is, accelerator.get_state_dict(model)
    found = {}
    for name, tensor in full.items():
        plain = unwrapped(name)
        if plain in names:
            tensor = whole(tensor)
            if accelerator.is_main_process:
                found[plain] = tensor.detach().to("cpu", torch.float32, copy=True)
    missing = names - set(found)
    if missing and accelerator.is_main_process:
        raise RuntimeError(f"accelerate wraps the student in a way that hides '{min(missing)}'")
    return found


def unwrapped(name: str) -> str:
    """The name that a parameter had before DDP, compilation or activation checkpointing came between."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
