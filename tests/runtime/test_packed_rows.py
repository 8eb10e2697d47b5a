"""Packed rows: rounding error, size in bytes, and every cache operation of generate()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.mla_models import FAMILIES, prompt, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

import transmla
from transmla.errors import TransmlaError
from transmla.runtime.latent_cache import LatentLayer, latent_bytes
from transmla.runtime.packed_rows import pack, row_bytes, unpack

FLOAT8 = "float8_e4m3fn"


@given(
    rank=st.integers(1, 40), half=st.integers(1, 12), power=st.integers(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_packing_keeps_rotary_keys_and_nearly_keeps_latents(
    rank: int, half: int, power: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rank)
    kv_c = (torch.randn(2, 3, rank, generator=generator) * 2.0**power).to(dtype)
    k_pe = torch.randn(2, 3, 2 * half, generator=generator).to(dtype)
    rows = pack(kv_c, k_pe)
    assert rows.shape[-1] == row_bytes(rank, 2 * half, dtype)
    rounded = unpack(rows, rank, 2 * half, dtype)
    assert torch.equal(rounded.k_pe, k_pe)
    largest = kv_c.float().abs().amax(-1, keepdim=True)
    # float8 e4m3 has three bits of mantissa. Values of 2^-15 of the largest, or less, are subnormal.
    error = (rounded.full()[0].float() - kv_c.float()).abs()
    assert (error <= kv_c.float().abs() * 2**-4 * 1.1 + largest * 2**-16).all()


def test_scales_are_bfloat16_numbers_that_no_latent_exceeds() -> None:
    kv_c = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 64)[:, None]
    scale = unpack(pack(kv_c, torch.ones(64, 4)), 40, 4, torch.float32).scale
    assert scale is not None
    assert torch.equal(scale.bfloat16().float(), scale)
    least = kv_c.abs().amax(-1) / 448
    assert ((least <= scale) & (scale <= least * (1 + 2**-7))).all()


def test_every_nan_stays_nan() -> None:
    bits = torch.tensor([0x7E00, 0x7FFF, 0x7C01, -1, -512], dtype=torch.int32).to(torch.int16)
    kv_c = torch.ones(5, 1, 16, dtype=torch.float16)
    kv_c[:, 0, 3] = bits.view(torch.float16)
    rows = unpack(pack(kv_c, torch.ones(5, 1, 4, dtype=torch.float16)), 16, 4, torch.float16)
    assert torch.isnan(rows.scale).all()
    assert torch.isnan(rows.full()[0]).all()


def test_a_row_of_zeros_stays_zero() -> None:
    rows = pack(torch.zeros(1, 2, 8), torch.ones(1, 2, 4))
    assert torch.equal(unpack(rows, 8, 4, torch.float32).full()[0], torch.zeros(1, 2, 8))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "lookup", "many"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_runs_over_packed_rows(family: str, settings: dict[str, Any]) -> None:
    model = transmla.accelerate(tiny(family), cache_dtype=FLOAT8)
    inputs = prompt(0) if "prompt_lookup_num_tokens" in settings else prompt()
    if "prompt_lookup_num_tokens" in settings:
        inputs = {name: t[:1] for name, t in inputs.items()}
    result = model.generate(
        **inputs, max_new_tokens=6, **{"do_sample": False, **settings}, return_dict_in_generate=True
    )
    layers = result.past_key_values.layers
    assert all(isinstance(layer, LatentLayer) and layer.keys.dtype == torch.uint8 for layer in layers)


def token_by_token(model: Any, tokens: Tensor) -> tuple[Tensor, DynamicCache]:
    """Return logits [B, T, V] of ``tokens`` [B, T], computed one token at a time, and the cache."""
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            logits.append(model(tokens[:, position : position + 1], past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


def test_the_cache_is_smaller_and_logits_stay_close() -> None:
    tokens = prompt(0)["input_ids"]
    settings = {"kv_lora_rank": 128, "qk_rope_head_dim": 8, "head_dim": 8}
    expected, full = token_by_token(transmla.accelerate(tiny(**settings)), tokens)
    actual, packed = token_by_token(transmla.accelerate(tiny(**settings), cache_dtype=FLOAT8), tokens)
    assert latent_bytes(packed) * 4 * (128 + 8) == latent_bytes(full) * row_bytes(128, 8, torch.float32)
    spread = expected.log_softmax(-1)
    assert (
        0
        < (spread.exp() * (spread - actual.log_softmax(-1))).sum(-1).mean()
        < 0.05 * -(spread.exp() * spread).sum(-1).mean()
    )


def test_a_prefilled_prompt_is_cached_like_one_read_token_by_token() -> None:
    model, tokens = transmla.accelerate(tiny(), cache_dtype=FLOAT8), prompt(0)["input_ids"]
    expected, _ = token_by_token(model, tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :-1], past_key_values=cache)
        actual = model(tokens[:, -1:], past_key_values=cache).logits
    assert torch.allclose(actual[:, -1], expected[:, -1], atol=1e-4)


def test_a_cache_filled_before_acceleration_is_packed() -> None:
    model, tokens = tiny(), prompt(0)["input_ids"]
    with torch.no_grad():
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        transmla.accelerate(model, cache_dtype=FLOAT8)
        model(tokens[:, -1:], past_key_values=cache)
    assert all(layer.keys.dtype == torch.uint8 for layer in cache.layers)


@pytest.mark.parametrize("kind", ["dynamic", "reset", "static"])
def test_rows_that_autocast_has_filled_are_read_without_it(kind: str) -> None:
    """DeepSeek-V2 rotates in the dtype of its activations, so that autocast makes rotary keys in bfloat16."""
    model, tokens = transmla.accelerate(tiny("deepseek_v2"), cache_dtype=FLOAT8), prompt(0)["input_ids"]
    cache = StaticCache(model.config, 64) if kind == "static" else DynamicCache(config=model.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens[:, :-2], past_key_values=cache)
    assert {layer.pe_dtype for layer in cache.layers} == {torch.bfloat16}
    rows = [layer.keys.clone() for layer in cache.layers]
    seen = tokens[:, -2:]
    if kind == "reset":
        cache.reset()
        seen = tokens
    with torch.no_grad():
        actual = [model(token, past_key_values=cache).logits for token in seen.split(1, 1)]
        expected = model(tokens).logits[:, -seen.shape[1] :]
    assert {layer.pe_dtype for layer in cache.layers} == {torch.float32}
    assert torch.allclose(torch.cat(actual, 1), expected, atol=0.6)
    for layer, before in zip(cache.layers, rows, strict=True):
        if kind != "reset":
            count = tokens.shape[1] - 2
            wide, narrow = (
                unpack(part[:, 0, :count], 16, 8, dtype)
                for part, dtype in ((layer.keys, torch.float32), (before, torch.bfloat16))
            )
            assert torch.equal(wide.full()[0].bfloat16(), narrow.full()[0])
            assert torch.equal(wide.k_pe, narrow.k_pe.float())


@pytest.mark.parametrize("width", [4, 8])
def test_a_cache_that_autocast_has_filled_and_a_crop_has_emptied_takes_wider_rows(width: int) -> None:
    """Rows of two widths may be equally long, so that the buffer alone does not tell how it is read."""
    layer, kv_c, k_pe = LatentLayer(packed=True), torch.randn(2, 1, 3, 16), torch.randn(2, 1, 3, width)
    with torch.no_grad():
        layer.update(kv_c.bfloat16(), k_pe.bfloat16())
        before = layer.rows
        layer.crop(-3)
        assert layer.get_seq_length() == 0
        rows, _ = layer.update(kv_c, k_pe)
    assert layer.pe_dtype == torch.float32
    assert torch.equal(unpack(rows, 16, width, torch.float32).k_pe, k_pe)
    assert layer.rows is not before


def test_rows_behind_a_shared_prefix_are_packed() -> None:
    model, tokens = transmla.accelerate(tiny(), cache_dtype=FLOAT8), prompt(0)["input_ids"]
    tokens = torch.cat([tokens[:1, :8].expand(len(tokens), -1), tokens], 1)
    cache = transmla.shared_prefix(model, tokens[:1, :8])
    model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, max_new_tokens=3)
    assert all(layer.prefix[0].dtype == torch.float32 for layer in cache.layers)
    assert all(layer.keys.dtype == torch.uint8 for layer in cache.layers)


def test_unknown_dtypes_and_sliding_caches_are_refused() -> None:
    with pytest.raises(TransmlaError, match="unknown cache_dtype 'int4'"):
        transmla.accelerate(tiny(), cache_dtype="int4")
    model = transmla.accelerate(tiny(), cache_dtype=FLOAT8)
    cache = StaticCache(model.config, 64)
    cache.layers = [StaticSlidingWindowLayer(64, sliding_window=32) for _ in cache.layers]
    with pytest.raises(ValueError, match="cannot hold float8 rows"):
        model.generate(**prompt(), max_new_tokens=2, past_key_values=cache)
