"""scripts/draft_head.py trains a draft head that changes no token of a source or of its export."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.graph_models import with_graphs
from torch import Tensor
from transformers import AutoModelForCausalLM

import transmla
from transmla.convert.pipeline import convert

# Blocks, tokens of a block, and tokens that the model writes behind it.
BLOCKS, LENGTH, WRITTEN = 4, 10, 30


@pytest.fixture
def source(make_source: Callable[..., Path]) -> Path:
    return make_source("llama", num_hidden_layers=3, eos_token_id=None)


def trained(load_script: Callable[[str], ModuleType], model: Any, steps: int) -> tuple[Any, Tensor, list[Any]]:
    """Return a head that was trained on what ``model`` writes, the prompts, and the history of the training."""
    script, parts = load_script("draft_head"), load_script("draft_head_model")
    blocks = torch.randint(3, 100, (BLOCKS, LENGTH), generator=torch.Generator().manual_seed(0))
    data = script.collect(model.requires_grad_(False), blocks, WRITTEN)
    assert data["states"].shape == (BLOCKS, LENGTH + WRITTEN, 3, model.config.hidden_size)
    torch.manual_seed(0)
    head = parts.new_head(model.config, script.frequent(data["tokens"], 48, model.config.vocab_size))
    history = script.train(parts.Drafter(head, model), data, steps=steps, batch=2, rate=3e-3, unroll=3)
    # The first block is held out.
    return head.eval(), blocks[1:], history


def plain(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :]


@pytest.mark.parametrize("form", ["native", "transmla"])
def test_a_head_changes_no_token_of_source_and_export(
    load_script: Callable[[str], ModuleType], source: Path, make_recipe: Callable[..., Any], form: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    head, prompts, history = trained(load_script, model, 60)
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    recipe = make_recipe(source, format=form, cache_ratio=0.5)
    convert(recipe)
    export = transmla.load(recipe.output)
    with_graphs(export)
    parts = load_script("draft_head_model")
    for target in (model, export):
        drafter, steps = parts.Drafter(head, target), []
        for drafted in (0, 1, 2, 3, 7):
            for prompt in prompts[:, None]:
                # One new token, and numbers that a whole draft does not divide.
                for tokens in (1, 2, WRITTEN - 1):
                    new, passes, _ = parts.write_drafted(target, prompt, tokens, drafter=drafter, drafted=drafted)
                    assert torch.equal(new, plain(target, prompt, tokens))
                steps.append(passes)
        assert steps[: len(prompts)] == [WRITTEN - 2] * len(prompts)
        if target is model:
            assert min(steps) < WRITTEN / 2, "drafts are accepted"


def test_a_text_ends_where_generate_ends_it(load_script: Callable[[str], ModuleType], source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    head, prompts, _ = trained(load_script, model, 60)
    parts = load_script("draft_head_model")
    drafter, prompt = parts.Drafter(head, model), prompts[:1]
    new = plain(model, prompt, WRITTEN)
    for end in new[[0, 3, 8]]:
        model.generation_config.eos_token_id = int(end)
        expected = plain(model, prompt, WRITTEN)
        assert len(expected) < WRITTEN
        assert torch.equal(parts.write_drafted(model, prompt, WRITTEN, drafter=drafter, drafted=4)[0], expected)


def test_unrolled_training_is_what_decoding_does(load_script: Callable[[str], ModuleType], source: Path) -> None:
    """The agreement of a training step is counted from drafts that the head writes one by one."""
    model = AutoModelForCausalLM.from_pretrained(source).requires_grad_(False)
    parts = load_script("draft_head_model")
    torch.manual_seed(0)
    drafter = parts.Drafter(parts.new_head(model.config, torch.arange(model.config.vocab_size)), model)
    tokens = plain(model, torch.tensor([[5, 6, 7]]), 12)[None]
    states = model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    _, agreement = parts.unrolled_loss(drafter, parts.read_states(model, states), states[-1], tokens, 3)
    hits: list[list[bool]] = [[], [], []]
    best = (states[-1] @ drafter.rows.T).argmax(-1)[0]
    for place in range(tokens.shape[1] - 1):
        cache = parts.DynamicCache()
        fused = drafter.head.fused(parts.read_states(model, states)[:, : place + 1])
        feature = drafter.extend(fused, tokens[:, 1 : place + 2], cache)[:, -1:]
        for step in range(min(3, tokens.shape[1] - 1 - place)):
            if step:  # training follows the text, not the draft
                following = tokens[:, place + 1 + step][None]
                feature = drafter.extend(feature, following, cache)
            hits[step].append(bool(drafter.logits(feature)[0, -1].argmax() == best[place + 1 + step]))
    assert agreement.tolist() == pytest.approx([sum(found) / len(found) for found in hits])


def test_the_script_measures_source_and_export(
    load_script: Callable[[str], ModuleType],
    pair: tuple[Path, Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script, (source, export) = load_script("draft_head"), map(str, pair)
    states, head, adapted, result = (str(tmp_path / name) for name in ("states", "head", "adapted", "result.json"))
    text, few = ["--text", str(text_file)], ["--steps", "3", "--commit", "none"]
    small = ["--prompts", "2", "--length", "12", "--tokens", "9", "--drafted", "1", "3", "--result", result]
    for verb in (
        ["collect", source, states, *text, "--sequences", "4", "--length", "12", "--written", "8"],
        ["train", source, states, head, "--vocabulary", "32", *few],
        ["train", export, states, adapted, "--start", head, *few],
        ["measure", source, export, head, "--adapted", adapted, *text, "--commit", "none", *small],
    ):
        monkeypatch.setattr(sys, "argv", ["draft_head.py", *verb, "--device", "cpu"])
        script.main()
    rows = json.loads(Path(result).read_text())["rows"]
    assert [(row["model"], row["head"]) for row in rows[::6]] == [
        ("source", "head"),
        ("export", "head"),
        ("export", "adapted"),
    ]
    assert all(row["changed"] == 0 and row["tokens a step"] >= 1 for row in rows)
