"""What may change, and how fast: rates in units of each tensor's own size."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from transmla.heal.settings import Healing

BETAS = (0.9, 0.98)
ATTENTION = ".self_attn."


def choose_trainable(student: Any, settings: Healing) -> Any:
    """``student`` with gradients where ``settings`` wants them; for LoRA, wrapped by peft."""
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


def make_optimiser(model: nn.Module, settings: Healing) -> torch.optim.Optimizer:
    """AdamW whose rate for a tensor is the learning rate times the tensor's root mean square."""
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = 1.0 if ATTENTION in name else settings.other_rate
            size = float(parameter.detach().square().mean().sqrt())
            # A low-rank update begins at zero, and grows to the size of a random matrix.
            size = size or 1 / math.sqrt(parameter.shape[-1])
            rate = settings.learning_rate * share * size
            groups.append({"params": [parameter], "lr": rate, "full": rate})
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)


def set_rates(optimiser: Any, progress: float, settings: Healing, slowed: float) -> float:
    """Warm up, then follow a cosine to zero; ``progress`` in [0, 1). Returns the share of the full rates."""
    rising = min(1.0, progress / settings.warmup) if settings.warmup else 1.0
    share = max(rising, 1e-3) * 0.5 * (1 + math.cos(math.pi * progress)) * slowed
    for group in optimiser.param_groups:
        group["lr"] = group["full"] * share
    return share
