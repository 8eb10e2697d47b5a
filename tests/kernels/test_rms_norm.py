"""The norm kernel gives the results of transformers' norms, which round before they multiply by the weight."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.behaviour import relative
from helpers.graph_models import LONG, longer, plain_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import register_parametrization
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from transmla.kernels.rms_norm import rms_norm
from transmla.runtime import fused_norms
from transmla.runtime.fused_norms import agrees, fuse_norms, is_llama_norm
from transmla.runtime.latent_attention import LATENT_ATTENTION

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
    wide = torch.cat([x, x], -1)[..., : shape[-1]]
    for rows in (x, wide, x.transpose(0, -2) if x.dim() > 2 else x):
        expected, found = norm(rows), rms_norm(rows, norm.weight, norm.variance_epsilon)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        # Sums in another order may round a value the other way.
        assert torch.allclose(found.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert (found != expected).float().sum() <= 0.02 * found.numel() or dtype == torch.float32


def test_norms_with_the_code_of_llama_are_found() -> None:
    assert all(is_llama_norm(norm) for norm in (LlamaRMSNorm, Qwen3RMSNorm, DeepseekV3RMSNorm))
    assert not is_llama_norm(Gemma2RMSNorm)
    assert agrees(fused_norm(Qwen3RMSNorm(64).to(DEVICE)))


def fused_norm(norm: Any) -> Any:
    """Fuse ``norm`` of a model with ``latent_attention``, and return it."""
    fuse_norms(norm, SimpleNamespace(_attn_implementation=LATENT_ATTENTION))
    return norm


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Inputs of the kernel, which counts as usable on every device."""
    inputs: list[Tensor] = []

    def recorded(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inputs.append(x)
        return rms_norm(x, weight, eps)

    monkeypatch.setattr(fused_norms.kernel, "rms_norm", recorded)
    monkeypatch.setattr(fused_norms, "on_gpu", lambda x: True)
    return inputs


@torch.no_grad()
def test_a_fused_norm_is_copied_pickled_and_saved_as_its_family_names_it(calls: list[Tensor]) -> None:
    norm, x = LlamaRMSNorm(8).to(DEVICE), torch.randn(2, 8, device=DEVICE)
    expected, names = norm(x), [*norm.state_dict()]
    fused_norm(norm)
    for one in (norm, fused_norm(norm), copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        calls.clear()
        assert torch.allclose(one(x), expected)
        assert len(calls) > 0
        assert isinstance(one, LlamaRMSNorm)
        assert type(one).__name__ == "LlamaRMSNorm"
        assert [*one.state_dict()] == names


def test_the_family_computes_what_the_kernel_may_not(calls: list[Tensor]) -> None:
    norm, x = fused_norm(LlamaRMSNorm(8).to(DEVICE)), torch.randn(2, 8, device=DEVICE, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), torch.ones(2, 8, device=DEVICE))
            assert forward_ad.unpack_dual(norm(dual)).tangent is not None
        assert torch.vmap(norm)(x).shape == x.shape
        norm(x.double())
        norm.fused_config._attn_implementation = "sdpa"
        norm(x)
        assert not calls
        norm.fused_config._attn_implementation = LATENT_ATTENTION
        norm(x)
        assert calls


@torch.no_grad()
def test_a_norm_on_one_of_several_devices(calls: list[Tensor]) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    norm, x = LlamaRMSNorm(8).to(DEVICE), torch.randn(2, 8, device=DEVICE)
    expected = norm(x)
    fused_norm(hooks.add_hook_to_module(norm, hooks.AlignDevicesHook(io_same_device=True)))
    assert torch.allclose(norm(x), expected)
    assert calls


class Doubled(nn.Module):
    """Weights that are twice their parameter."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@torch.no_grad()
def test_a_norm_whose_weight_is_computed(calls: list[Tensor]) -> None:
    norm, x = fused_norm(LlamaRMSNorm(8).to(DEVICE)), torch.randn(2, 8, device=DEVICE)
    expected = 2 * norm(x)
    register_parametrization(norm, "weight", Doubled())
    calls.clear()
    assert torch.allclose(norm(x), expected)
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_prompts_are_read_with_fused_norms(family: str, tmp_path: Path, calls: list[Tensor]) -> None:
    model = plain_model(family, tmp_path, DEVICE)
    tokens = longer(model, LONG)
    found, norms = model(tokens).logits, len(calls)
    # Four layers with norms of the hidden states, and of the latent or of queries and keys.
    assert norms >= 4 * 3 + 1
    model.set_attn_implementation("sdpa")
    assert relative(found, model(tokens).logits) < 1e-5
