"""RoPE as complex multiplication, the two layouts of a rotary slice, and the matching of frequencies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from transmla.core.rope import halves_to_interleaved, match_slots, rotate, to_complex, to_halves


def frequencies(pairs: int, theta: float = 10000.0) -> torch.Tensor:
    return theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


@settings(deadline=None, max_examples=25)
@given(pairs=st.integers(1, 8), length=st.integers(1, 9), seed=st.integers(0, 99))
def test_complex_product_is_the_halves_rotation(pairs: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, 2 * pairs, generator=generator, dtype=torch.float64)
    positions = torch.arange(length) + seed
    rotated = rotate(x, frequencies(pairs), positions)
    # ``to_complex`` expects the rotary channels in the second to last dimension.
    z = to_complex(x[..., None]).squeeze(-1)
    wave = torch.polar(torch.ones(length, pairs).double(), positions[:, None] * frequencies(pairs))
    expected = to_halves((z * wave)[..., None]).squeeze(-1)
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-12)


def test_complex_and_halves_are_inverse() -> None:
    weight = torch.randn(3, 10, 7, dtype=torch.float64)
    assert to_complex(weight).shape == (3, 5, 7)
    assert torch.equal(to_halves(to_complex(weight)), weight)


def test_score_depends_on_distance_alone() -> None:
    """The score is Re Σ conj(q)·k·e^{−iθΔ}, the formula on which ``core`` is based."""
    q, k = torch.randn(2, 12, dtype=torch.float64)
    theta = frequencies(6)
    product = to_complex(q[:, None]).conj() * to_complex(k[:, None])
    for i, j in ((5, 5), (9, 2), (40, 13)):
        score = rotate(q[None], theta, torch.tensor([i])) @ rotate(k[None], theta, torch.tensor([j])).T
        expected = (product.squeeze(-1) * torch.exp(-1j * theta * (i - j))).real.sum()
        torch.testing.assert_close(score.squeeze(), expected)


@pytest.mark.parametrize("width", [2, 8, 16])
def test_interleaved_order_equals_transformers(width: int) -> None:
    """Permuted rows with the interleaved rotation equal the rotation in halves layout."""
    q, k = torch.randn(2, 2, 3, 5, width, dtype=torch.float64)
    angle = torch.arange(5)[:, None] * frequencies(width // 2)
    cos, sin = torch.cat([angle, angle], -1).cos()[None], torch.cat([angle, angle], -1).sin()[None]
    order = halves_to_interleaved(width)
    assert sorted(order.tolist()) == list(range(width))
    # transformers returns the result in halves layout, so the rotated vectors are equal.
    permuted = apply_rotary_pos_emb_interleave(q[..., order], k[..., order], cos, sin)
    plain = apply_rotary_pos_emb(q, k, cos, sin)
    for vectors, interleaved, halves in zip((q, k), permuted, plain, strict=True):
        rotated = rotate(vectors, frequencies(width // 2), torch.arange(5))
        torch.testing.assert_close(interleaved, rotated, rtol=0, atol=1e-12)
        torch.testing.assert_close(halves, rotated, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), pairs=st.integers(1, 32))
def test_match_slots_finds_any_subset(data: st.DataObject, pairs: int) -> None:
    chosen = data.draw(st.lists(st.integers(0, pairs - 1), min_size=1, max_size=2 * pairs))
    source = frequencies(pairs)
    # Runtimes compute frequencies in float32.
    assert match_slots(source[chosen].float().double(), source) == tuple(chosen)


def test_match_slots_returns_none_for_unknown_frequencies() -> None:
    source = frequencies(8)
    assert match_slots(frequencies(4), source) == (0, 2, 4, 6)
    assert match_slots(frequencies(3), source) is None
    assert match_slots(source * (1 + 1e-4), source) is None
    assert match_slots(source * (1 + 1e-4), source, tolerance=1e-3) == tuple(range(8))
