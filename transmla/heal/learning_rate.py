"""The learning rate of healing: its peak, from the distance to the teacher, and its schedule."""

from __future__ import annotations

import math
from typing import Any

from transmla.heal.settings import Healing

# Peak learning rate for a student one nat from its teacher, with batches of RATED_TOKENS tokens. Chosen by KL on
# validation text among four rates at 0.13 and 0.67 nats (Qwen2.5-Coder-0.5B, 4 million tokens, one H200): 2e-3 heals 2
# and 6 % worse, 8e-3 heals 9 and 5 % worse, and 1.6e-2 leaves the first student further away than it was. The narrower
# SmolLM2-135M bears twice this rate.
RATE_AT_ONE_NAT = 4e-3
RATED_TOKENS = 16_384
# Smallest number of warm-up steps: Adam's moments over fewer steps are too noisy for the full learning rate.
FEWEST_RISING = 10


def highest_rate(settings: Healing, kl: float) -> float:
    """Return the peak learning rate: ``settings.learning_rate``, or one that fits a student at ``kl`` nats.

    The distance between the weights grows with the square root of the KL, and so does the rate. Batches below
    RATED_TOKENS are noisier and get a lower rate.
    """
    if settings.learning_rate is not None:
        return settings.learning_rate
    noise = min(1.0, settings.batch * settings.length / RATED_TOKENS)
    return RATE_AT_ONE_NAT * math.sqrt(min(max(kl, 0.0), 1.0) * noise)


def set_rates(optimiser: Any, progress: float, step: int, highest: float, warmup: float) -> float:
    """Set the learning rates of a step: linear warm-up times a cosine decay to zero.

    Args:
        optimiser: an optimiser of ``make_optimiser``.
        progress: used share of the budget, in [0, 1).
        step: number of the step, from 0.
        highest: peak learning rate.
        warmup: share of the budget for the warm-up, which takes at least FEWEST_RISING steps; 0: no warm-up.

    Returns:
        The learning rate, before each group multiplies it by its ``unit``.
    """
    rising = min(1.0, progress / warmup, (step + 1) / FEWEST_RISING) if warmup else 1.0
    rate = highest * max(rising, 1e-3) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimiser.param_groups:
        group["lr"] = group["unit"] * rate
    return rate
