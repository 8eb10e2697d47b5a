"""The linear features and weights of a family's attention compute the same output as the family's code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.random_layer import relative
from helpers.uncut_exports import FAMILIES, attention_view, make_source, rotary_table
from torch import Tensor

from transmla.core.reference_attention import source_attention
from transmla.source.attention_view import halves_order


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_and_weights_give_the_familys_attention_output(family: str, tmp_path: Path) -> None:
    model = make_source(family, tmp_path)
    recorded: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, output: recorded.append(((*args, kwargs.get("hidden_states"))[0], output[0])),
            with_kwargs=True,
        )
    model(torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1)))
    for i, (x, expected) in enumerate(recorded):
        attention = model.model.layers[i].self_attn
        inv_freq, factor = rotary_table(model, i)
        d, rotary = attention.head_dim, 2 * len(inv_freq)
        view = attention_view(model, i)
        features, weights = view.features(x).double(), view.weights().to(torch.float64)
        assert features.shape[-1] == view.width == weights.q.shape[-1]
        frequencies = torch.cat([inv_freq.double(), torch.zeros((d - rotary) // 2, dtype=torch.float64)])
        # ``gain`` scales whole scores, but the factor of cosines and sines scales rotary channels only.
        assert factor == 1 or rotary == d
        output = source_attention(features, weights, frequencies, scaling=attention.scaling, gain=factor**2)
        if attention.o_proj.bias is not None:
            output = output + attention.o_proj.bias
        assert relative(output, expected.double()) < 1e-5, (family, i)  # the model is float32


def test_halves_order_pairs_the_channels_that_rope_rotates_together() -> None:
    assert halves_order(8, 8, interleaved=False) == tuple(range(8))
    assert halves_order(8, 8, interleaved=True) == (0, 2, 4, 6, 1, 3, 5, 7)
    assert halves_order(8, 4, interleaved=False) == (0, 1, 4, 5, 2, 3, 6, 7)
    with pytest.raises(ValueError, match="cannot be paired"):
        halves_order(8, 3, interleaved=False)
