"""What may change, and how fast: rates in units of each tensor's own size."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from transmla.heal.settings import Healing

BETAS = (0.9, 0.98)
ATTENTION = ".self_attn."
# The highest learning rate at one nat, in steps of so many tokens. Best of two to four rates on held-out validation
# text, SmolLM2-135M, 3 million tokens, one H200: 1e-3 to 2e-3 at 0.06 nats, 4e-3 at 0.22, 6e-3 to 1e-2 at 0.68.
RATE_AT_ONE_NAT = 8e-3
RATED_TOKENS = 16_384
# Moments of fewer steps are too noisy for full ones.
FEWEST_RISING = 10


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


def make_optimiser(model: nn.Module, settings: Healing, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW whose rate for a tensor is the learning rate times its group's ``unit``: the tensor's root mean square.

    Units are rounded to quarter powers of two (9 % at most), so that tensors share groups and a step is few kernels.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if parameter.requires_grad:
            share = 1.0 if ATTENTION in name else settings.other_rate
            size = _rank_update_size(name, named) if ".lora_B." in name else _size(parameter)
            # What begins at zero grows to the size of a random matrix.
            size = size or 1 / math.sqrt(parameter.shape[-1])
            unit = 2.0 ** (round(4 * math.log2(share * size)) / 4)
            groups.setdefault(unit, []).append(parameter)
    listed = [{"params": parameters, "lr": 0.0, "unit": unit} for unit, parameters in groups.items()]
    return torch.optim.AdamW(listed, betas=BETAS, weight_decay=0.0, fused=fused)


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


def _rank_update_size(name: str, named: dict[str, nn.Parameter]) -> float:
    """What a step of B, which begins at zero, is measured by: the product B A shall move as the weight itself would."""
    before, _, adapter = name.partition(".lora_B.")
    weight, a = named[f"{before}.base_layer.weight"], named[f"{before}.lora_A.{adapter}"]
    return _size(weight) / (_size(a) * math.sqrt(len(a)))


def highest_rate(settings: Healing, kl: float) -> float:
    """The learning rate asked for, or one that fits a student at ``kl`` nats from its teacher.

    The way to go grows with the root of the KL, and so do the steps; those of few tokens are noisier, and so shorter.
    """
    if settings.learning_rate is not None:
        return settings.learning_rate
    noise = min(1.0, settings.batch * settings.length / RATED_TOKENS)
    return RATE_AT_ONE_NAT * math.sqrt(min(max(kl, 0.0), 1.0) * noise)


def set_rates(optimiser: Any, progress: float, step: int, highest: float, warmup: float) -> float:
    """Rise to ``highest`` in the share ``warmup`` of the way, then follow a cosine to zero; returns the rate.

    ``progress`` is the share of the way behind, in [0, 1); ``step`` counts from 0. The rise takes ten steps at least.
    """
    rising = min(1.0, progress / warmup, (step + 1) / FEWEST_RISING) if warmup else 1.0
    rate = highest * max(rising, 1e-3) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimiser.param_groups:
        group["lr"] = group["unit"] * rate
    return rate
