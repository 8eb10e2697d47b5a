"""The norm kernel gives the results of transformers' norms, which round before they multiply by the weight."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from transmla.kernels.rms_norm import rms_norm
from transmla.runtime.fused_norms import FusedNorms, agrees, fused, is_llama_norm

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Triton's interpreter rounds bfloat16 towards zero.
HALF = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(1, 1, 4096), (3, 2, 4, 128), (2, 24), (5, 1000), (0, 16)])
def test_the_kernel_equals_the_module(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(shape[-1], eps=1e-6).to(DEVICE, dtype)
    norm.weight.data = torch.randn_like(norm.weight)
    x = torch.randn(*shape, device=DEVICE).to(dtype) * 3
    for rows in (x, x.transpose(0, -2) if x.dim() > 2 else x):
        expected, found = norm(rows), rms_norm(rows, norm.weight, norm.variance_epsilon)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        # Sums in another order may round a value the other way.
        assert torch.allclose(found.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert (found != expected).float().sum() <= 0.02 * found.numel() or dtype == torch.float32


def test_norms_with_the_code_of_llama_are_found() -> None:
    assert all(is_llama_norm(norm) for norm in (LlamaRMSNorm, Qwen3RMSNorm, DeepseekV3RMSNorm))
    assert not is_llama_norm(Gemma2RMSNorm)
    assert agrees(Qwen3RMSNorm(64).to(DEVICE))


def test_modules_keep_their_forward_outside_of_the_context() -> None:
    norms = FusedNorms([LlamaRMSNorm(8)], torch.device("cpu"))
    assert norms.modules == []
    norms.modules = [LlamaRMSNorm(8)]
    with norms.used():
        assert "forward" in norms.modules[0].__dict__
        assert torch.allclose(norms.modules[0](torch.ones(2, 8)), torch.ones(2, 8))
    assert "forward" not in norms.modules[0].__dict__


def test_gradients_are_those_of_the_module() -> None:
    norm, x = LlamaRMSNorm(8), torch.randn(2, 8, requires_grad=True)
    fused(norm, x).sum().backward()
    assert x.grad is not None
