"""Differences between one process, DDP, FSDP2 and DeepSpeed. The training loop is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transmla.heal.settings import Healing
from transmla.ranks import PATIENCE
from transmla.source.device import pick_device

if TYPE_CHECKING:
    from accelerate import Accelerator

# Names of the wrapper modules that accelerate and torch insert into a module's path.
WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def make_accelerator(settings: Healing, output: Path) -> Accelerator:
    """Make an ``Accelerator`` for the current launch, with the precision and trackers of ``settings``.

    Trackers write into ``OUTPUT.logs``.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

    device = None if settings.device == "auto" else pick_device(settings.device)
    precision, cpu = settings.precision, device is not None and device.type == "cpu"
    if precision == "auto":
        on_gpus = torch.cuda.is_available() and not (cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
        precision = "bf16" if on_gpus else "no"
    if device is not None and device.index is not None:
        PartialState().device = device
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=list(settings.track) or None,
        project_dir=str(output.with_name(output.name + ".logs")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def configure(accelerator: Any, settings: Healing) -> None:
    """Set gradient accumulation, DeepSpeed's step sizes and FSDP2's precision on ``accelerator``, in place."""
    accelerator.gradient_accumulation_steps = settings.accumulate
    if uses_deepspeed(accelerator):
        # DeepSpeed decides when to step, so its configuration needs these numbers.
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.batch // settings.accumulate // accelerator.num_processes,
            "gradient_accumulation_steps": settings.accumulate,
            "gradient_clipping": settings.clip,
        }
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # The same as under DDP: computation in bfloat16, but gradients are reduced and losses returned in float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def kind(accelerator: Any) -> str:
    """Return the precision and sharding of a launch. A saved state can only be loaded by a launch of the same kind."""
    if uses_deepspeed(accelerator):
        sharding = f"DeepSpeed's stage {accelerator.deepspeed_plugin.zero_stage}, {accelerator.num_processes} processes"
    else:
        alone = accelerator.num_processes == 1
        # States that several processes saved through DistributedDataParallel, as they once did, have other names.
        sharding = "FSDP2" if accelerator.is_fsdp2 else "whole" if alone else "whole in each process"
    return f"{accelerator.mixed_precision} {sharding}"


def shards(accelerator: Any) -> bool:
    """Return whether a launch shards weights, for which the weights of a layer need one dtype."""
    return uses_deepspeed(accelerator) or bool(accelerator.is_fsdp2)


def from_main(accelerator: Any, value: Any) -> Any:
    """Return the first process's ``value`` on all processes. Every process must call this function."""
    from accelerate.utils import broadcast_object_list

    return value if accelerator.num_processes == 1 else broadcast_object_list([value])[0]


def uses_deepspeed(accelerator: Any) -> bool:
    """Return whether DeepSpeed runs the steps."""
    return "DEEPSPEED" in str(accelerator.distributed_type)


def gather(accelerator: Any, model: nn.Module, names: set[str], into: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather full parameters of a prepared ``model``, in float32 on the CPU of the first process.

    All processes must call this function.

    Args:
        accelerator: the accelerator that prepared the model.
        model: the prepared model; its parameters may be sharded.
        names: parameters to gather, by their names before the model was wrapped.
        into: the result of an earlier call, whose memory is used again; or an empty dict.

    Returns:
        The parameters by name, each unsharded; on all other processes an empty dict.

    Raises:
        RuntimeError: if a name is missing from the prepared model.
    """
    if uses_deepspeed(accelerator):
        from deepspeed.utils import safe_get_full_fp32_param

        unshard: Callable[[Tensor], Tensor] = safe_get_full_fp32_param
        parameters: dict[str, Tensor] = dict(model.named_parameters())
    else:
        unshard, parameters = _identity, accelerator.get_state_dict(model)
    gathered = {}
    for wrapped_name, tensor in parameters.items():
        name = unwrapped(wrapped_name)
        if name in names:
            tensor = unshard(tensor)
            if accelerator.is_main_process:
                gathered[name] = into.get(name, torch.empty(0)).resize_(tensor.shape).copy_(tensor.detach())
    missing = names - set(gathered)
    if missing and accelerator.is_main_process:
        raise RuntimeError(f"accelerate wraps the student in a way that hides '{min(missing)}'")
    return gathered


def unwrapped(name: str) -> str:
    """Return a parameter's name without the wrappers of DDP, compilation and activation checkpointing."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _identity(tensor: Tensor) -> Tensor:
    return tensor
