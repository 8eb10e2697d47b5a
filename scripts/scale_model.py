"""Compute what conversions of very large models would take, from rates that were measured on smaller ones.

    python scripts/scale_model.py

Prints the tables of docs/scale.md. Nothing here is measured; the rates come from ``layer_speed/`` in the results.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from provenance import RESULTS
from transformers import AutoConfig

from transmla.artifacts import AttentionSpec
from transmla.convert.prepare import default_amounts
from transmla.plan.estimate import device_bytes, disk_bytes, memory_bytes
from transmla.plan.estimate_time import (
    EXPERT_SECONDS,
    FITTING_UNDIVIDED,
    OBSERVING_UNDIVIDED,
    PASSES,
    TOKENS_PER_STEP,
    divided,
)
from transmla.plan.fit_settings import FitSettings, fit_settings
from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe
from transmla.source.describe import describe

# The measured layer: Llama-3-8B's, with the window and steps of its fit, and its tokens.
MEASURED = RESULTS / "layer_speed/llama-3-8b-600-steps.json"
WIDTH, ATTENTION, MLP = 4096, 41_943_040, 176_160_768
STEPS, WINDOW, TOKENS = 600, 2, 64 * 8192
# Bytes of a GPU's memory (an H200), and numbers of processes.
GPU, PROCESSES = 141e9, (1, 8, 64)
RATIO = 0.5


@dataclass(frozen=True)
class Model:
    """A model's sizes.

    Attributes:
        config: settings of its config.
        active: experts that a token reads; None for a dense model.
    """

    config: dict[str, Any]
    active: int | None = None


def sizes(layers: int, width: int, mlp: int, heads: int, **others: Any) -> dict[str, Any]:
    """Return the settings of a config with 8 key/value heads of 128 channels."""
    common = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
    named = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp, "num_attention_heads": heads}
    return common | named | others


MODELS = {
    "70B": Model(sizes(80, 8192, 28672, 64)),
    "405B": Model(sizes(126, 16384, 53248, 128)),
    "671B": Model(sizes(61, 7168, 2048, 64, num_local_experts=257), 9),
    "1T": Model(sizes(61, 7168, 2048, 64, num_local_experts=385), 9),
}


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer on one GPU, by what several processes can share of it."""

    read: float
    observe: float
    factorise: float
    fit: float
    write: float

    def seconds(self, processes: int) -> float:
        """Return the seconds of a layer on ``processes`` GPUs that share sequences and steps."""
        shared = divided(self.observe, processes, OBSERVING_UNDIVIDED) + divided(self.fit, processes, FITTING_UNDIVIDED)
        return self.read + shared + self.factorise + self.write


def cost(spec: AttentionSpec, active: int | None, tokens: int, fit: FitSettings) -> Cost:
    """Scale the measured seconds of a layer to another layer."""
    measured = json.loads(MEASURED.read_text())["rows"][0]["seconds by layer"]
    attention = 2 * spec.hidden_size * spec.head_dim * (spec.num_attention_heads + spec.num_key_value_heads)
    read = spec.layer_parameters * (1 if active is None else active / spec.experts)
    # A step costs 5 units for each weight of the attention and 3 for each of the MLP (plan/estimate.py, ``seconds``).
    step = 5 * attention + (3 * read if fit.through_mlp else 0)
    steps = fit.steps * fit.window * step / (STEPS * WINDOW * (5 * ATTENTION + 3 * MLP))
    experts = PASSES * tokens / TOKENS_PER_STEP * spec.experts * EXPERT_SECONDS
    size = (attention + spec.layer_parameters) / (ATTENTION + MLP)
    return Cost(
        read=measured["read"] * size,
        observe=measured["observe"] * tokens / TOKENS * (attention + read) / (ATTENTION + MLP) + experts,
        factorise=measured["factorise"] * (spec.hidden_size / WIDTH) ** 3,
        fit=measured["fit"] * steps,
        write=measured["write"] * size,
    )


def row(name: str, model: Model) -> str:
    """Return the line of the table for one model."""
    family = "llama" if model.active is None else "mixtral"
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    spec = describe(AutoConfig.for_model(family, **model.config, rope_parameters=rope))
    plan = make_plan(spec, parse_recipe({"source": "s", "output": "o", "cache_ratio": RATIO}, "x"), "bfloat16")
    fit = fit_settings("full", RATIO, layer_parameters=spec.layer_parameters, experts=bool(spec.experts))
    assert fit is not None
    sequences, length = default_amounts(spec, int(GPU))
    tokens, layers = sequences * length, spec.num_hidden_layers
    layer = cost(spec, model.active, tokens, fit)
    attention = plan.spec.hidden_size * spec.head_dim * 2 * (spec.num_attention_heads + spec.num_key_value_heads)
    memory = memory_bytes(plan, tokens, fit, torch.device("cuda"))
    # Sums over all processes: two moments in float64 for a layer, and in every step the gradients in float32.
    shared = layers * (2 * 8 * spec.hidden_size**2 + fit.steps * fit.window * 4 * attention)
    cells = [
        name,
        f"{layers} × {(attention + spec.layer_parameters) / 1e9:.1f}",
        f"{sequences} × {length:,}",
        " + ".join(f"{part:.0f}" for part in (layer.read, layer.observe, layer.factorise, layer.fit, layer.write)),
        *(f"{layers * layer.seconds(n) / 3600:.1f}" for n in PROCESSES),
        f"{device_bytes(plan, sequences, length, fit) / 1e9:.0f}",
        f"{memory / 1e9:.0f}",
        f"{disk_bytes(plan, tokens, fit) / 1e12:.2f}",
        f"{shared / 1e12:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    heads = ["model", "layers × 10⁹ weights", "text", "seconds a layer"]
    heads += [f"hours, {n} GPU{'s' if n > 1 else ''}" for n in PROCESSES]
    heads += ["GPU memory, GB", "RAM, GB", "disk, TB", "summed, TB"]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for name, model in MODELS.items():
        print(row(name, model))


if __name__ == "__main__":
    main()
