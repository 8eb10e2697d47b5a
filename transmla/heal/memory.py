"""Memory of a healing, estimated before anything is read, and the refusal of one that certainly does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from transmla.artifacts import Plan
from transmla.errors import TransmlaError
from transmla.formats.base import format_named
from transmla.heal.distributed import from_main, uses_deepspeed
from transmla.heal.settings import Healing
from transmla.plan.estimate import parameters
from transmla.source.memory import free_memory_of

# Bytes per trained weight: the float32 weight, its gradient, and Adam's two moments.
TRAINED_BYTES = 16
# Share of the device's free memory that a healing may plan with; the allocator and kernels' workspaces need the rest.
USABLE = 0.85
# A healing is refused if this share of its least memory exceeds the free memory, because estimates err.
CERTAIN = 0.9
# Activation values per token, layer and unit of width that a backward pass keeps: residual stream, norms, projections,
# attention and MLP.
ACTIVATIONS = 34
# Bytes of the logits of one chunk and of their gradients (``losses.CHUNK_VALUES``).
LOGITS_BYTES = 6 * 2**30


@dataclass(frozen=True)
class Load:
    """What decides the memory of one process that heals.

    Attributes:
        trainable: ``all``, ``attention`` or ``lora``.
        tokens: tokens of one forward and backward pass.
        checkpointing: whether activations are recomputed.
        half: whether it runs in bfloat16, except for the trained weights; otherwise all is float32.
        shards: processes among which the student's weights, their gradients and moments are divided.
    """

    trainable: str
    tokens: int
    checkpointing: bool
    half: bool
    shards: int = 1


def load_of(settings: Healing, processes: int, *, half: bool, sharded: bool) -> Load:
    """Return what decides the memory of each of several processes.

    Args:
        settings: the options.
        processes: number of processes.
        half: whether the healing runs in bfloat16.
        sharded: whether the processes divide the student's weights; otherwise each holds the whole student.
    """
    sequences = max(1, settings.batch // (processes * settings.accumulate))
    tokens, shards = sequences * settings.length, processes if sharded else 1
    return Load(settings.trainable, tokens, settings.checkpointing, half, shards)


def trained_weights(plan: Plan, trainable: str) -> int:
    """Return the number of weights that a healing trains."""
    weights = parameters(plan)
    attention = plan.spec.num_hidden_layers * format_named(plan.format).attention_parameters(plan)
    return {"all": weights, "attention": attention, "lora": attention // 16}[trainable]


def memory_bytes(plan: Plan, load: Load) -> int:
    """Return the estimated peak memory of one process that heals an export of ``plan``, in bytes."""
    spec, weights = plan.spec, parameters(plan)
    size = 2 if load.half else 4
    # The MLP's inner width counts three times: gate, up and their product.
    values = ACTIVATIONS * spec.hidden_size + 3 * spec.intermediate_size
    kept = spec.hidden_size if load.checkpointing else values
    activations = size * load.tokens * (spec.num_hidden_layers * kept + values)
    logits = min(LOGITS_BYTES, 6 * 4 * load.tokens * spec.vocab_size)
    if load.half and not load.checkpointing:
        # The CUDA graph of a pass keeps its memory, so evaluations need memory of their own.
        logits *= 2
    # The head's gradient of all chunks together lies beside the weights' gradients.
    if load.trainable == "all":
        logits += 4 * spec.vocab_size * spec.hidden_size
    # Shards of a layer's weights need one dtype.
    student = _student_bytes(plan, load.trainable) if load.half and load.shards == 1 else 4 * weights
    student += (TRAINED_BYTES - 4) * trained_weights(plan, load.trainable)
    # Every process holds the whole teacher.
    return student // load.shards + size * weights + activations + logits


def _student_bytes(plan: Plan, trainable: str) -> int:
    """Return the bytes of a student whose frozen linear layers are bfloat16, and the rest float32."""
    spec, weights = plan.spec, parameters(plan)
    # Experts' weights are no linear layers.
    if trainable == "all" or spec.experts:
        return 4 * weights
    wide = spec.vocab_size * spec.hidden_size + (trained_weights(plan, trainable) if trainable == "attention" else 0)
    return 2 * weights + 2 * wide


def check_memory(settings: Healing, plan: Plan, accelerator: Any) -> None:
    """Refuse a healing that the free memory of the first process's device certainly does not hold.

    Every process must call this function.

    Args:
        settings: the options.
        plan: plan of the export.
        accelerator: the launched processes.

    Raises:
        TransmlaError: names the memory that is needed and free, and the first change of the options that fits.
    """
    if uses_deepspeed(accelerator):
        return  # its own settings decide what is divided, and what goes to the computer's memory
    device, half = accelerator.device, accelerator.mixed_precision == "bf16"
    load = load_of(settings, accelerator.num_processes, half=half, sharded=accelerator.is_fsdp2)
    free = from_main(accelerator, free_memory_of(device))
    # Compiled layers keep fewer activations than the estimate counts: 65,536 tokens of Qwen2.5-0.5B's sizes fit 80 GB.
    least = memory_bytes(plan, replace(load, checkpointing=True))
    if CERTAIN * least <= free:
        return
    where = f"memory on {device}" if device.type == "cuda" else "memory"
    raise TransmlaError(
        f"this healing needs at least {least / 1e9:.0f} GB of {where}",
        limit=f"{free / 1e9:.0f} GB are free",
        remedy=_remedy(settings, plan, load, free, device),
    )


def _remedy(settings: Healing, plan: Plan, load: Load, free: int, device: torch.device) -> str:
    for options, changed in _changes(settings, load, plan):
        if memory_bytes(plan, changed) <= USABLE * free:
            return "use " + " ".join(options)
    if device.type == "cuda" and load.shards == 1:
        return "divide the weights among several GPUs: accelerate launch --config_file recipes/accelerate/fsdp2.yaml …"
    return "use a device with more memory, or end other programs"


def _changes(settings: Healing, load: Load, plan: Plan) -> Iterator[tuple[list[str], Load]]:
    """Yield options and what they lead to, from those that change least."""
    smaller: list[tuple[list[str], Load]] = []
    parts, tokens = settings.accumulate, load.tokens
    while tokens % (2 * settings.length) == 0:
        parts, tokens = 2 * parts, tokens // 2
        smaller.append(([f"--accumulate {parts}"], replace(load, tokens=tokens)))
    if not load.checkpointing:
        recomputed = [([], load), *smaller]
        smaller += [(["--checkpointing", *options], replace(one, checkpointing=True)) for options, one in recomputed]
    yield from smaller
    fewer = ["attention", *(["lora"] if find_spec("peft") else [])]
    for trainable in fewer[fewer.index(load.trainable) + 1 :] if load.trainable in fewer else fewer:
        for options, one in [([], load), *smaller]:
            yield [f"--trainable {trainable}", *options], replace(one, trainable=trainable)
