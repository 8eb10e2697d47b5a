"""Trainable parameters, and an optimiser whose units are each tensor's own size."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from transmla.heal.settings import Healing

BETAS = (0.9, 0.98)
ATTENTION = ".self_attn."


def choose_trainable(student: Any, settings: Healing) -> Any:
    """Enable gradients of the parameters that ``settings.trainable`` names, and disable all others, in place.

    Returns:
        ``student``; for LoRA, the peft model around it.
    """
    student.requires_grad_(settings.trainable == "all")
    if settings.trainable == "attention":
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(ATTENTION in name)
    if settings.trainable != "lora":
        return student
    from peft import LoraConfig, get_peft_model

    linear = {
        name.rpartition(".")[2] for name, m in student.named_modules() if ATTENTION in name and type(m) is nn.Linear
    }
    return get_peft_model(
        student, LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=sorted(linear))
    )


def store_frozen_in_half(student: nn.Module) -> None:
    """Store the frozen weights of linear layers in bfloat16, in place.

    No result changes under autocast, which casts these weights in every step. A weight that an embedding shares stays
    as it is, because the residual stream has the embedding's dtype.
    """
    linear = [module for module in student.modules() if isinstance(module, nn.Linear)]
    others = (module for module in student.modules() if not isinstance(module, nn.Linear))
    shared = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    for module in linear:
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and id(parameter) not in shared:
                parameter.data = parameter.data.bfloat16()


def make_optimiser(model: nn.Module, settings: Healing, *, fused: bool) -> torch.optim.Optimizer:
    """Make an AdamW optimiser whose groups have a ``unit``; a tensor's learning rate is the rate times its unit.

    The unit is the tensor's root mean square, times ``settings.other_rate`` outside the attention. Units are rounded
    to quarter powers of two (error at most 9 %). Tensors then share groups, and a step launches few kernels.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if parameter.requires_grad:
            share = 1.0 if ATTENTION in name else settings.other_rate
            size = _lora_b_size(name, named) if ".lora_B." in name else _rms(parameter)
            # A tensor of zeros gets the size of a random matrix.
            size = size or 1 / math.sqrt(parameter.shape[-1])
            unit = 2.0 ** (round(4 * math.log2(share * size)) / 4)
            groups.setdefault(unit, []).append(parameter)
    listed = [{"params": parameters, "lr": 0.0, "unit": unit} for unit, parameters in groups.items()]
    return torch.optim.AdamW(listed, betas=BETAS, weight_decay=0.0, fused=fused)


def _rms(tensor: Tensor) -> float:
    # Frozen weights may be bfloat16, whose rounding could move a unit to the next quarter power.
    return float(tensor.detach().float().square().mean().sqrt())


def _lora_b_size(name: str, named: dict[str, nn.Parameter]) -> float:
    """Return the size that a step of LoRA's B is relative to, because B itself starts at zero.

    With this size, a step changes the product B A as much as it would change the adapted weight.
    """
    module, _, adapter = name.partition(".lora_B.")
    weight, a = named[f"{module}.base_layer.weight"], named[f"{module}.lora_A.{adapter}"]
    return _rms(weight) / (_rms(a) * math.sqrt(len(a)))
