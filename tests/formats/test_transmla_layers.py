"""The closed form with nothing cut, written in the own format, is the source: for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.random_layer import make_spec, measure, relative
from helpers.uncut_exports import FAMILIES, attention_view, make_source, rotary_table

from transmla.artifacts import MLAShape, Plan, RotaryPlan
from transmla.core.methods.calibrated import METHOD
from transmla.formats.transmla import layer_kind, layer_tensors
from transmla.modeling.configuration_transmla import converted_config
from transmla.modeling.modeling_transmla import attention_class
from transmla.source.decoder_layer import attention_input, run_layer


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_closed_form_written_and_read_is_the_source(family: str, tmp_path: Path) -> None:
    from dataclasses import replace

    model = make_source(family, tmp_path)
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    hidden = torch.randn(64, 30, config.hidden_size, generator=torch.Generator().manual_seed(0))
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        inv_freq, factor = rotary_table(model, i)
        d, turned = attention.head_dim, 2 * len(inv_freq)
        front = attention_view(model, i)
        rules = front.rules
        x = attention_input(layer, hidden)
        features = front.features(x).double()
        frequencies = (*inv_freq.double().tolist(), *[0.0] * ((d - turned) // 2))
        # What never turns needs no slot.
        slots = tuple(f for f, omega in enumerate(frequencies) for _ in range(groups) if omega)
        still = groups * (d - turned) if any(frequencies) else groups * d
        rank = groups * d + still
        shape = MLAShape(rank, 2 * len(slots) or 2, d, d)
        spec = replace(
            make_spec("gqa"),
            hidden_size=front.width,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=d,
            inv_freq=frequencies,
            attention_factor=factor,
            scaling=attention.scaling,
        )
        plan = Plan(spec, shape, RotaryPlan(slots or (0,), 1), "calibrated", "float32", {})
        mass = torch.rand(heads, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        stats = measure(features, mass / mass.sum(-1, keepdim=True))
        factors = METHOD.factorize(front.weights().to(torch.float64), stats, plan)
        kind = layer_kind(replace(plan, shape=replace(shape, kv_lora_rank=len(factors.latent))), spec.kind(i))
        export = converted_config(config, {"layers": [0] * len(model.model.layers), "kinds": [kind]})
        export._attn_implementation = "eager"
        made = attention_class(type(attention))(attention, export, i)
        made.load_state_dict(layer_tensors(factors, front, torch.float32), strict=True)
        few = hidden[:2]
        mask = torch.full((30, 30), torch.finfo(torch.float32).min).triu(1)
        if rules.window is not None:
            mask = mask + torch.full((30, 30), torch.finfo(torch.float32).min).tril(-rules.window)
        mask = mask.clamp_min(torch.finfo(torch.float32).min)[None, None]
        positions = torch.arange(30)[None]
        cos, sin = (f(positions[..., None] * inv_freq) * factor for f in (torch.cos, torch.sin))
        double = 1 if family == "gpt_oss" else 2
        turns = tuple(t.repeat(1, 1, double) for t in (cos, sin))

        def theirs(x: torch.Tensor) -> torch.Tensor:
            return attention_forward(x, position_embeddings=turns, attention_mask=mask)[0]  # noqa: B023

        attention_forward = type(attention).forward.__get__(attention)
        wanted = run_layer(layer, few, theirs)
        found = run_layer(layer, few, lambda x: made(x, attention_mask=mask, position_ids=positions)[0])  # noqa: B023
        assert relative(found.double() - few, wanted.double() - few) < 1e-4, (family, i)
