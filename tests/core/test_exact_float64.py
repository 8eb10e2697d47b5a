"""In the context, transformers' models compute in float64 throughout."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softmax
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from transmla.core.exact_float64 import ExactFloat64


def test_a_norm_of_transformers_is_exact() -> None:
    norm, rows = Qwen2RMSNorm(64, eps=1e-6).double(), torch.randn(5, 64, dtype=torch.float64)
    exact = norm.weight * rows * (rows.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    rounded = (norm(rows) - exact).abs().max()
    with ExactFloat64():
        found = norm(rows)
    assert rounded > 1e-9
    torch.testing.assert_close(found, exact, rtol=1e-14, atol=1e-14)


def test_casts_to_float32_are_left_out_for_float64_alone() -> None:
    exact, other = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.bfloat16)
    with ExactFloat64():
        for kept in (exact.float(), exact.to(torch.float32), exact.to(dtype=torch.float32), exact.type(torch.float32)):
            assert torch.equal(kept, exact)
        assert softmax(exact, dim=-1, dtype=torch.float32).dtype == torch.float64
        assert other.float().dtype == other.to(torch.float32).dtype == torch.float32
        assert exact.to(torch.bfloat16).dtype == torch.bfloat16
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float32
        assert exact.to("cpu", torch.float32).dtype == torch.float64
    assert exact.float().dtype == torch.float32


def test_other_operands_become_float64() -> None:
    """The rotary embedding of transformers 5.17 multiplies frequencies by positions in float32."""
    frequencies, positions = torch.rand(4, 1, dtype=torch.float64), torch.arange(5)[None]
    with ExactFloat64():
        angles = frequencies.float() @ positions.float()
        kept = frequencies.type_as(positions.float())
    torch.testing.assert_close(angles, frequencies * positions, rtol=1e-14, atol=0)
    assert torch.equal(kept, frequencies)


def test_the_context_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError), ExactFloat64():
        raise RuntimeError
    assert torch.zeros(2, dtype=torch.float64).float().dtype == torch.float32
