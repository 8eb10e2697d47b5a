"""The input of the first layer is made in parts, with the family's own multipliers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from transmla.source import decoder_layer
from transmla.source.decoder_layer import embedded

SIZES = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("part", [5, 16, 1024])
def test_parts_of_any_size_give_the_models_own_input(family: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    multiplier = {"embedding_multiplier": 7.0} if family == "granite" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **HEADS, **multiplier)).eval()
    tokens = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(decoder_layer, "PART", part)
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(embedded(model, tokens, model.model.embed_tokens.weight), expected)
