"""Runs of a model over every kind of cache and padding, for comparisons of accelerated models with stock ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from helpers.mla_models import FAMILIES as MLA_FAMILIES
from helpers.mla_models import tiny
from helpers.uncut_exports import FAMILIES, make_source, uncut
from transmla.modeling.modeling_transmla import TransmlaForCausalLM
from transmla.modeling.transformers_api import CACHE_ARGUMENT

# Layers of every model. A wrong layer changes what all later layers read.
DEPTH = 4
# The layer of an export that keeps the source's attention. Layers with and without windows are left.
KEPT = 2
# Prompt tokens, all tokens, and padded tokens of the second row. Windows are shorter than either length.
PROMPT, LENGTH, PADDED = 12, 17, 4
# Ranges of tokens that a model reads at once: a prompt, one token, and a piece of several tokens.
STEPS = ((0, PROMPT), (12, 13), (13, LENGTH))
PADDINGS = ("unmasked", "none", "left", "right")
CACHES: dict[str, Callable[[Any], Any]] = {
    "no cache": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic, without config": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH + 9),
    "static, just fitting": lambda config: StaticCache(config=config, max_cache_len=LENGTH),
}
# Families of transmla's exports, and MLA families of transformers.
ALL_FAMILIES = (*FAMILIES, *MLA_FAMILIES)


def stock_model(family: str, folder: Path, *, keep: tuple[int, ...] = (KEPT,)) -> Any:
    """Return a random model of ``DEPTH`` layers: an uncut export in the transmla format, or an MLA model.

    Args:
        family: one of ``ALL_FAMILIES``.
        folder: folder for the source and the export.
        keep: layers of an export that keep the source's attention.
    """
    if family in MLA_FAMILIES:
        return tiny(family, num_hidden_layers=DEPTH)
    changes: dict[str, Any] = {"num_hidden_layers": DEPTH}
    for name in ("layer_types", "no_rope_layers"):
        if name in FAMILIES[family]:
            changes[name] = (FAMILIES[family][name] * DEPTH)[:DEPTH]
    source = make_source(family, folder / "source", **changes)
    export = uncut(source, folder / "source", folder / "export", keep=keep)
    return TransmlaForCausalLM.from_pretrained(export, attn_implementation="eager").eval()


def tokens() -> Tensor:
    """Return random tokens [2, LENGTH]."""
    return torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def attention_mask(padding: str) -> Tensor:
    """Return the mask [2, LENGTH] of a prompt that is padded in its second row, and of all later tokens."""
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if padding == "left":
        mask[1, :PADDED] = 0
    elif padding == "right":
        mask[1, PROMPT - PADDED : PROMPT] = 0
    return mask


@torch.no_grad()
def logits_by_step(model: Any, cache: Any, padding: str) -> Tensor:
    """Return the logits [tokens, vocabulary] of all tokens that are not padded, read in ``STEPS``.

    Args:
        model: a causal language model.
        cache: an empty cache, or None: every step reads all tokens.
        padding: one of ``PADDINGS``; "unmasked" passes no mask.
    """
    ids, mask, parts = tokens(), attention_mask(padding), []
    for start, stop in STEPS:
        given = {} if padding == "unmasked" else {"attention_mask": mask[:, :stop]}
        if cache is None:
            parts.append(model(ids[:, :stop], use_cache=False, **given).logits[:, start:])
        else:
            given[CACHE_ARGUMENT] = cache
            parts.append(model(ids[:, start:stop], use_cache=True, **given).logits)
    return torch.cat(parts, 1)[mask.bool()]


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the relative difference of two tensors; infinite if it is no number."""
    difference = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return difference if difference == difference else float("inf")
