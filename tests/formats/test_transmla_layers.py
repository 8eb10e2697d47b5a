"""For every family, the closed form with nothing cut, written in the transmla format, equals the source."""

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
def test_an_uncut_closed_form_equals_the_source(family: str, tmp_path: Path) -> None:
    from dataclasses import replace

    model = make_source(family, tmp_path)
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    hidden = torch.randn(64, 30, config.hidden_size, generator=torch.Generator().manual_seed(0))
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        inv_freq, factor = rotary_table(model, i)
        d, rotary_width = attention.head_dim, 2 * len(inv_freq)
        view = attention_view(model, i)
        rules = view.rules
        x = attention_input(layer, hidden)
        features = view.features(x).double()
        frequencies = (*inv_freq.double().tolist(), *[0.0] * ((d - rotary_width) // 2))
        # Channels without rotary positions (frequency 0) need no rotary slot.
        slots = tuple(f for f, omega in enumerate(frequencies) for _ in range(groups) if omega)
        unrotated = groups * (d - rotary_width) if any(frequencies) else groups * d
        rank = groups * d + unrotated
        shape = MLAShape(rank, 2 * len(slots) or 2, d, d)
        spec = replace(
            make_spec("gqa"),
            hidden_size=view.width,
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
        factors = METHOD.factorize(view.weights().to(torch.float64), stats, plan)
        kind = layer_kind(replace(plan, shape=replace(shape, kv_lora_rank=len(factors.latent))), spec.kind(i))
        export = converted_config(config, {"layers": [0] * len(model.model.layers), "kinds": [kind]})
        export._attn_implementation = "eager"
        converted = attention_class(type(attention))(attention, export, i)
        converted.load_state_dict(layer_tensors(factors, view, torch.float32), strict=True)
        few = hidden[:2]
        mask = torch.full((30, 30), torch.finfo(torch.float32).min).triu(1)
        if rules.window is not None:
            mask = mask + torch.full((30, 30), torch.finfo(torch.float32).min).tril(-rules.window)
        mask = mask.clamp_min(torch.finfo(torch.float32).min)[None, None]
        positions = torch.arange(30)[None]
        cos, sin = (f(positions[..., None] * inv_freq) * factor for f in (torch.cos, torch.sin))
        double = 1 if family == "gpt_oss" else 2
        embeddings = tuple(t.repeat(1, 1, double) for t in (cos, sin))

        def source_attention(x: torch.Tensor) -> torch.Tensor:
            return attention_forward(x, position_embeddings=embeddings, attention_mask=mask)[0]  # noqa: B023

        attention_forward = type(attention).forward.__get__(attention)
        expected = run_layer(layer, few, source_attention)
        actual = run_layer(layer, few, lambda x: converted(x, attention_mask=mask, position_ids=positions)[0])  # noqa: B023
        assert relative(actual.double() - few, expected.double() - few) < 1e-4, (family, i)
