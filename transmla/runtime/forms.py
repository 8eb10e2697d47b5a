"""Which of two forms of attention to cached latents costs less, by multiplications and the rates of devices.

The absorbed form attends to the latents. The expanded form attends to keys and values of all heads, which it rebuilds
from the latents at every step, except those of a shared prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Names of the forms.
ABSORBED, EXPANDED = "absorbed", "expanded"


@dataclass(frozen=True)
class Rates:
    """Rates at which a device multiplies in long attention, in any common unit: only their ratios count.

    Attributes:
        absorbed: attention to latents.
        rebuild: keys and values of all heads, rebuilt from latents.
        attend: attention to the rebuilt keys and values.
        most: largest number of new tokens per sequence for the absorbed form.
    """

    absorbed: float
    rebuild: float
    attend: float
    most: int


# Rates by type of device. Other devices have those of the CPU. Equal rates choose the form with fewer products.
# CPU: the chosen form is the faster one, or at most 14 % slower, at every point of scripts/results/form_bench/cpu.json.
# GPU: at 8 × 16,384 tokens on an H200, the forms take equally long with about 360 new tokens for 512 + 64 and 32 heads
# (extrapolated), and with about 160 for 96 + 32 and 14 heads. These rates give 303 and 170
# (scripts/results/form_bench/h200.json).
RATES = {
    "cpu": Rates(absorbed=1.0, rebuild=1.0, attend=1.0, most=128),
    "cuda": Rates(absorbed=1.0, rebuild=0.45, attend=2.5, most=256),
}
# Products that a GPU computes in the time in which it reads one value. The expanded form is faster if the products that
# it saves take longer than reading its wider rows. Chosen on an H200 with rows of 512 + 64 and 32 heads of 128, where
# the expanded form is faster from about 42 queries on (scripts/results/kernel_bench/prefix.json).
PRODUCTS_PER_VALUE = 100


def crossover(module: Any, rates: Rates) -> float:
    """Return the number n of new tokens above which the expanded form costs less than the absorbed form.

    Multiplications on a long cache, per cached token and head: r(d_n + d_v) to rebuild keys and values, then
    n(d_n + d_r + d_v) to attend to them; n(2r + d_r) to attend to the latent. Each part has a rate.
    """
    rank, rope = module.kv_lora_rank, module.qk_rope_head_dim
    rebuilt = module.qk_nope_head_dim + module.v_head_dim
    saved = (2 * rank + rope) / rates.absorbed - (rebuilt + rope) / rates.attend
    return rank * rebuilt / rates.rebuild / saved if saved > 0 else float("inf")


def most_absorbed(module: Any, device: str) -> int:
    """Return the largest number of new tokens per sequence for the absorbed form, on a type of ``device``."""
    rates = RATES.get(device, RATES["cpu"])
    return max(1, int(min(crossover(module, rates), rates.most)))


def absorbing_is_cheaper(module: Any, query: Tensor, total: int, mask: Tensor | None) -> bool:
    """Return whether the absorbed form costs less than the expanded form.

    Args:
        module: the attention layer.
        query: [B, H, n, d_n + d_r].
        total: number of cached rows, those of the n new tokens included.
        mask: the attention mask, or None.
    """
    new = query.shape[2]
    return new == 1 or (new < total and mask is not None and new <= most_absorbed(module, query.device.type))


def expanding_is_cheaper(module: Any, queries: int) -> bool:
    """Return whether ``queries`` new tokens, summed over all sequences, attend to a prefix faster in expanded form.

    The keys and values of a shared prefix are kept, so that reading them counts instead of rebuilding them.
    """
    expanded = module.qk_nope_head_dim + module.qk_rope_head_dim + module.v_head_dim
    absorbed = 2 * module.kv_lora_rank + module.qk_rope_head_dim
    return queries * (absorbed - expanded) > PRODUCTS_PER_VALUE * expanded
