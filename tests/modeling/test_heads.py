"""Exports as classifiers and feature extractors: equal to the source's, accelerated or not, and saved again."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mla_models import tiny
from helpers.uncut_exports import make_source, uncut
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import transmla

HEADS = {"features": AutoModel, "texts": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification}


def outputs(model: Any) -> Tensor:
    """Return the outputs for three texts: whole, padded on the left, and on the right."""
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, -4:] = 0, 0
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    with torch.no_grad():
        first = model(ids, attention_mask=mask, use_cache=False)[0]
    return first[mask.bool()] if first.dim() == 3 else first


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() < 2e-5 * expected.norm())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_heads_of_the_transmla_format(family: str, head: str, tmp_path: Path) -> None:
    transmla.register()
    layers = {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    causal = make_source(family, tmp_path / "source", **(layers if family == "gemma2" else {"num_hidden_layers": 3}))
    export = uncut(causal, tmp_path / "source", tmp_path / "export")
    source = HEADS[head].from_pretrained(tmp_path / "source", attn_implementation="eager").eval()
    model = HEADS[head].from_pretrained(export, attn_implementation="eager").eval()
    if head != "features":
        model.score.load_state_dict(source.score.state_dict())
    expected = outputs(source)
    assert close(outputs(model), expected)
    transmla.accelerate(model).save_pretrained(tmp_path / "saved")
    again = HEADS[head].from_pretrained(tmp_path / "saved", attn_implementation="eager")
    for one in (model, again, pickle.loads(pickle.dumps(model))):
        assert close(outputs(one), expected)
    # The class that reads the saved model: TransmlaQwen3ForSequenceClassification is read by the one without a family.
    name = type(model).__name__
    assert again.config.architectures == ["Transmla" + (name[name.find("For") :] if "For" in name else "Model")]


def test_a_head_that_the_family_lacks_is_refused(tmp_path: Path) -> None:
    transmla.register()
    source = make_source("granite", tmp_path / "source")
    export = uncut(source, tmp_path / "source", tmp_path / "export")
    with pytest.raises(ValueError, match="transformers has no SequenceClassification class for granite"):
        AutoModelForSequenceClassification.from_pretrained(export)


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_the_native_format(head: str, tmp_path: Path) -> None:
    tiny(num_hidden_layers=3).save_pretrained(tmp_path)
    stock = HEADS[head].from_pretrained(tmp_path).eval()
    expected = outputs(stock)
    assert close(outputs(transmla.accelerate(stock)), expected)
