"""Quantisers of GGUF's K types: small errors, decoded by the gguf package, also for zeros and extremes."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from transmla.serve.gguf_quantise import HALF_MAX, SUPER, quantise

# Largest relative error on normal values, by type.
ERRORS = {"Q4_K": 0.073, "Q6_K": 0.018, "Q5_0": 0.045, "Q8_0": 0.006, "F16": 4e-4, "BF16": 3e-3, "F32": 0.0}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def decoded(data: Any, kind: str) -> Tensor:
    return torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[kind]))


def error(x: Tensor, kind: str, data: Any = None) -> float:
    found = decoded(quantise(x, kind) if data is None else data, kind)
    return float(((found - x).square().mean() / x.square().mean()).sqrt())


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_small(kind: str) -> None:
    assert error(normal(64, 512), kind) <= ERRORS[kind]
    assert error(normal(3, 5, 256) * 1e-3, kind) <= ERRORS[kind] * 1.05


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_values_of_one_sign_and_outliers(kind: str, sign: float) -> None:
    assert error(sign * (normal(16, 256).abs() + 2.0), kind) < ERRORS[kind]
    outlier = normal(16, 256)
    outlier[:, 7] = sign * 100.0
    # The scales are coarse beside such a value.
    assert error(outlier, kind) < 0.07


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", "Q5_0"])
def test_zero_blocks_stay_zero(kind: str) -> None:
    x = normal(4, 2 * SUPER)
    x[1] = 0.0
    x[2, :SUPER] = 0.0
    x[3, 32:64] = 0.0
    found = decoded(quantise(x, kind), kind)
    assert torch.isfinite(found).all()
    assert not found[1].any()
    assert not found[2, :SUPER].any()
    assert not found[3, 32:64].any()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("size", [1.0, -1.0])
def test_the_largest_values_stay_finite(kind: str, size: float) -> None:
    x = normal(2, SUPER).clamp(-1, 1) * HALF_MAX
    x[0, 0], x[1] = size * HALF_MAX, size * HALF_MAX
    found = decoded(quantise(x, kind), kind)
    assert torch.isfinite(found).all()
    assert float((found - x).abs().max()) < 0.1 * HALF_MAX


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_a_constant_block_is_kept(kind: str) -> None:
    x = torch.full((1, SUPER), 0.25)
    torch.testing.assert_close(decoded(quantise(x, kind), kind), x, rtol=2e-3, atol=0)
    torch.testing.assert_close(decoded(quantise(-x, kind), kind), -x, rtol=2e-3, atol=0)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_errors_are_those_of_ggml(kind: str) -> None:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    ggml = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so")))).ggml_quantize_chunk
    ggml.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    for x in (normal(64, 256), normal(64, 256) ** 3):
        ours, rows = quantise(x, kind), x.numpy()
        theirs = ours.copy()
        ggml(int(GGMLQuantizationType[kind]), rows.ctypes.data, theirs.ctypes.data, 0, *rows.shape, None)
        assert error(x, kind, ours) < 1.01 * error(x, kind, theirs)
