"""scripts/speculation.py counts accepted tokens, and tokens that a draft changed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from helpers.mla_models import prompt, tiny
from torch import Tensor

import transmla


def test_a_way_is_compared_with_the_plain_one(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("speculation")
    model = transmla.accelerate(tiny(eos_token_id=None))
    texts = [prompt(0)["input_ids"][row : row + 1].repeat(1, 2) for row in (0, 1)]
    plain: list[Tensor] = []
    first = script.measure(model, texts, plain, 12)
    assert (first["tokens"], first["tokens a step"], first["changed"], first["gap"]) == (22, 1.0, 0, None)
    drafted = script.measure(model, texts, plain, 12, prompt_lookup_num_tokens=4)
    assert drafted["tokens"] == 22
    assert drafted["tokens a step"] >= 1
    assert drafted["changed"] == 0
    other = [torch.cat([new[:3], (new[3:4] + 1) % 96, new[4:]]) for new in plain]
    changed = script.measure(model, texts, other, 12)
    assert changed["changed"] == 2
    assert changed["gap"] >= 0
