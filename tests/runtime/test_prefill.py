"""Prompts are read without copies that the source does not make, and with the results of transformers' own code."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.behaviour import ALL_FAMILIES, CACHES, DEPTH, PADDINGS, logits_by_step, relative, stock_model
from helpers.graph_models import LONG, MODELS, longer, plain_model, prompts, written
from helpers.mla_models import tiny
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import transmla
from transmla.kernels.rows import Rows
from transmla.modeling import sdpa
from transmla.modeling.modeling_transmla import TransmlaAttention
from transmla.runtime import expansion, family_attention, latent_attention
from transmla.runtime.head_widths import one_width
from transmla.runtime.load import mla_layers

ROUNDING = 2e-5
# Joined tensors of a layer, for each of ``MODELS``. The model joins its own rotary angles once.
JOINED = {"deepseek_v3": 3, "llama": 1, "qwen3": 2}


class Operations(TorchDispatchMode):
    """Numbers of operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.numbers[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def random_rows(layer: Any, batch: int, tokens: int) -> Rows:
    """Return rows as views of a cache's buffer with spare rows."""
    rank = layer.kv_lora_rank
    rows = torch.randn(batch, tokens + 3, rank + layer.qk_rope_head_dim)[:, :tokens]
    return Rows(rows[..., :rank], rows[..., rank:])


@torch.no_grad()
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_one_buffer_holds_what_the_family_expands(family: str, tmp_path: Path) -> None:
    model = transmla.accelerate(stock_model(family, tmp_path))
    for layer in mla_layers(model):
        rows = random_rows(layer, 2, 5)
        assert expansion.can_expand(layer, rows)
        found = layer.expanded(rows)
        layer.config._attn_implementation = "eager"
        expected = layer.expanded(rows)
        layer.config._attn_implementation = "latent_attention"
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=1e-5)
        assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()


def test_gradients_adapters_and_hooks_keep_the_family_s_expansion(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    layer = mla_layers(model)[0]
    rows = random_rows(layer, 1, 4)
    assert not expansion.can_expand(layer, rows)
    with torch.no_grad():
        assert expansion.can_expand(layer, rows)
        half = Rows(rows.kv_c.half(), rows.k_pe)
        assert not expansion.can_expand(layer, half)
        with torch.autocast("cpu"):
            assert not expansion.can_expand(layer, rows)
        hook = layer.kv_b_proj.register_forward_hook(lambda *_: None)
        assert not expansion.can_expand(layer, rows)
        hook.remove()
        assert expansion.can_expand(layer, rows)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_the_model_s(dtype: torch.dtype, tmp_path: Path) -> None:
    layer = mla_layers(plain_model("llama", tmp_path))[0]
    positions = torch.arange(40, 45)[None].expand(2, -1)
    rows = torch.randn(2, 5, 5, layer.qk_rope_head_dim).to(dtype).transpose(1, 2)
    before = rows.clone()
    found, expected = layer._rotate(positions, rows), TransmlaAttention._rotate(layer, positions, rows)
    assert found.dtype == dtype
    assert torch.equal(rows, before)
    assert torch.allclose(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_values_are_widened_without_a_copy() -> None:
    torch.manual_seed(0)
    query, buffer = torch.randn(2, 3, 7, 24), torch.randn(2, 7, 3, 24 + 16)
    keys, values = buffer.transpose(1, 2).split([24, 16], -1)
    _, same, wide = one_width(query, keys, values)
    assert same is keys
    assert wide.shape == keys.shape
    assert wide.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert torch.equal(wide[..., -16:], values)
    # The columns in front may hold anything.
    copied = one_width(query, keys, values.clone())[2]
    assert torch.equal(copied[..., :8], torch.zeros(2, 3, 7, 8))
    expected = scaled_dot_product_attention(query, keys, values, is_causal=True)
    for padded in (wide, copied, torch.cat([copied[..., :8] + float("inf"), values], -1)):
        found = scaled_dot_product_attention(query, keys, padded, is_causal=True)[..., -16:]
        assert torch.allclose(found, expected, atol=1e-6)
    # Narrower queries and keys get zeros, so that the scores stay.
    narrow = one_width(query[..., :8], keys[..., :8], values)
    assert torch.allclose(narrow[0] @ narrow[1].mT, query[..., :8] @ keys[..., :8].mT, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_reads_prompts_of_other_lengths(tmp_path: Path) -> None:
    model = plain_model("deepseek_v3", tmp_path).requires_grad_(False)
    traced = torch.jit.trace(
        lambda tokens: model(tokens, use_cache=False).logits, longer(model, LONG), check_trace=False
    )
    tokens = longer(model, 2 * LONG)
    assert relative(traced(tokens), model(tokens).logits) < ROUNDING


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("family", MODELS)
def test_models_are_mapped_and_differentiated_forwards(family: str, tmp_path: Path) -> None:
    model = plain_model(family, tmp_path)
    other, tokens = copy.deepcopy(model), longer(model, LONG)
    for parameter in other.parameters():
        parameter *= 1.1
    # torch 2.11 cannot map the view of bits in which the buffer of frequencies is read, so buffers are shared.
    parameters, buffers = torch.func.stack_module_state([model, other])[0], dict(model.named_buffers())

    def logits(parameters: Any, buffers: Any) -> Tensor:
        given = (tokens,), {"use_cache": False}
        found: Tensor = torch.func.functional_call(model, (parameters, buffers), *given).logits
        return found

    mapped = torch.vmap(logits, in_dims=(0, None))(parameters, buffers)
    assert relative(mapped[1], other(tokens).logits) < ROUNDING
    embedded = model.get_input_embeddings()(tokens)
    tangents = []
    for implementation in ("latent_attention", "eager"):
        model.set_attn_implementation(implementation)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
            tangents.append(forward_ad.unpack_dual(model(inputs_embeds=dual, use_cache=False).logits).tangent)
    assert relative(*tangents) < 10 * ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_a_prompt_is_not_padded_copied_or_joined(family: str, tmp_path: Path) -> None:
    model = plain_model(family, tmp_path)
    with Operations() as found:
        model(longer(model, LONG))
    assert found.numbers["constant_pad_nd"] == 0
    # Rotary embeddings join halves; qwen3 joins keys and values; transformers joins the queries of a native layer.
    assert found.numbers["cat"] == JOINED[family] * DEPTH + 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_hook_sees_the_queries_that_the_projection_gave(family: str, tmp_path: Path) -> None:
    model = plain_model(family, tmp_path)
    tokens, seen = longer(model, LONG), []
    expected = model(tokens).logits
    for layer in mla_layers(model):
        projection = layer.q_b_proj or layer.q_proj
        projection.register_forward_hook(lambda *call: seen.append((call[2], call[2].clone())) or None)
    assert torch.allclose(model(tokens).logits, expected, atol=1e-5)
    assert len(seen) == DEPTH
    assert all(torch.equal(kept, copied) for kept, copied in seen)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_replaced_forward_keeps_the_queries_that_it_gave(family: str, tmp_path: Path) -> None:
    model, seen = plain_model(family, tmp_path), []

    def recorded(forward: Any, x: Tensor) -> Tensor:
        query = forward(x)
        seen.append((query, query.clone()))
        return query

    for layer in mla_layers(model):
        projection = layer.q_b_proj or layer.q_proj
        projection.forward = partial(recorded, projection.forward)
    model(longer(model, LONG))
    assert len(seen) == DEPTH
    assert all(torch.equal(kept, copied) for kept, copied in seen)


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3", "mistral", "gemma2", "gpt_oss"])
def test_values_of_their_own_width_give_the_same_logits(
    family: str, padding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where cuDNN attends: prompts, pieces behind cached tokens, static caches, windows and padding."""
    model = stock_model(family, tmp_path, keep=())
    model.set_attn_implementation("eager")
    expected, asked = logits_by_step(model, CACHES["dynamic"](model.config), padding), []
    transmla.accelerate(model)
    monkeypatch.setattr(latent_attention, "absorbing_is_cheaper", lambda *_: False)

    def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        asked.append((query.shape[-1], value.shape[-1]))
        return True

    monkeypatch.setattr(family_attention, "takes_two_widths", takes)
    for cache in ("no cache", "dynamic", "static"):
        assert relative(logits_by_step(model, CACHES[cache](model.config), padding), expected) < ROUNDING
    # Soft-caps and sinks are computed by the family.
    assert (asked == []) == (family in ("gemma2", "gpt_oss"))


@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("family", MODELS)
def test_the_same_tokens_are_written(family: str, padded: int, tmp_path: Path) -> None:
    model = plain_model(family, tmp_path)
    inputs = prompts(model.device, padded=padded)
    found = written(model, inputs)
    model.set_attn_implementation("sdpa")
    assert torch.equal(found, written(model, inputs))


@torch.no_grad()
def test_only_the_written_rows_of_a_static_cache_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model("llama", tmp_path)
    totals, expand = [], latent_attention.expand

    def counted(module: Any, rows: Rows) -> tuple[Tensor, Tensor]:
        totals.append(rows.total)
        return expand(module, rows)

    monkeypatch.setattr(latent_attention, "expand", counted)
    logits_by_step(model, CACHES["static"](model.config), "unmasked")
    assert totals[:DEPTH] == [12] * DEPTH


def heads(new: int = 8, *, width: int = 16, cuda: bool = True) -> tuple[Any, Any, Any]:
    """Return shapes of queries and keys of width 24, and of values of ``width``."""
    query, key, value = (SimpleNamespace(is_cuda=cuda, shape=(1, 2, n, d)) for n, d in ((new, 24), (8, 24), (8, width)))
    return query, key, value


@torch.no_grad()
def test_the_kernel_of_pytorch_s_choice_decides_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    mask: Any = object()
    chosen = SDPBackend.CUDNN_ATTENTION
    monkeypatch.setattr(sdpa, "choice", lambda *_: chosen)
    assert sdpa.takes_two_widths(*heads(), None)
    assert sdpa.takes_two_widths(*heads(), mask)
    assert not sdpa.takes_two_widths(*heads(width=24), None)
    assert not sdpa.takes_two_widths(*heads(cuda=False), None)
    with torch.enable_grad():
        assert not sdpa.takes_two_widths(*heads(), None)
    # Without cuDNN, padded values get flash attention, which takes no mask.
    chosen = SDPBackend.EFFICIENT_ATTENTION
    assert not sdpa.takes_two_widths(*heads(), None)
    assert sdpa.takes_two_widths(*heads(), mask)
    chosen = SDPBackend.MATH
    assert not sdpa.takes_two_widths(*heads(), mask)


def test_pytorch_is_asked_for_the_heads_that_it_will_get(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.zeros(1, 2, 4, 24), torch.zeros(1, 2, 8, 24), torch.zeros(1, 2, 8, 16)
    assert sdpa.choice(query, key, value, None) == SDPBackend.MATH
    asked = []

    def ask(query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, causal: bool) -> int:
        asked.append((key.shape[2], value.shape[2], mask is None, causal))
        return 0

    monkeypatch.setattr(torch, "_fused_sdp_choice", ask)
    for new, mask in ((4, None), (4, torch.ones(1, 1, 4, 8, dtype=torch.bool)), (1, None)):
        sdpa.choice(query[:, :, :new], key, value, mask)
    assert asked == [(4, 4, True, True), (8, 8, False, False), (8, 8, True, False)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs kernels of a GPU")
@pytest.mark.parametrize("length", [512, 1000])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_gpu_attends_to_heads_of_two_widths(length: int, masked: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, length, 192, device="cuda", dtype=torch.bfloat16)
    buffer = torch.randn(2, length, 4, 192 + 128, device="cuda", dtype=torch.bfloat16)
    keys, values = buffer.transpose(1, 2).split([192, 128], -1)
    mask = torch.ones(length, length, device="cuda", dtype=torch.bool).tril()[None, None] if masked else None
    if not sdpa.takes_two_widths(query, keys, values, mask):
        pytest.skip("PyTorch has no kernel for these widths here")
    exact = scaled_dot_product_attention(query.float(), keys.float(), values.float(), is_causal=True)
    for parts in ((query, keys, values), one_width(query, keys, values)):
        found = scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=not masked)[..., -128:]
        assert relative(found, exact) < 0.01


@pytest.mark.parametrize(("widths", "aligned"), [((16, 8, 16), True), ((16, 8, 12), False), ((12, 8, 16), False)])
def test_a_gpu_gets_one_buffer_only_if_its_kernels_can_read_it(widths: tuple[int, int, int], aligned: bool) -> None:
    names = "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
    module = SimpleNamespace(**dict(zip(names, widths, strict=True)))
    assert expansion._kernels_read(module, torch.zeros(1, dtype=torch.float32))
    assert not expansion._kernels_read(module, torch.zeros(1, dtype=torch.bfloat16))
    k_pe: Any = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    assert expansion._kernels_read(module, k_pe) == aligned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs kernels of a GPU")
@torch.no_grad()
def test_a_gpu_expands_native_layers_into_one_buffer() -> None:
    model: Any = transmla.accelerate(tiny(num_hidden_layers=4, first_k_dense_replace=4, v_head_dim=16).to("cuda"))
    tokens = longer(model, 3 * LONG)
    exact = model(tokens).logits
    found = model.to(torch.bfloat16)(tokens).logits
    model.set_attn_implementation("sdpa")
    half = model(tokens).logits
    assert relative(found, exact) < 1.5 * relative(half, exact) + 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs kernels of a GPU")
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_gpu_reads_prompts_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = plain_model(family, tmp_path, "cuda").to(torch.bfloat16)
    tokens = longer(model, 3 * LONG)
    found = model(tokens).logits
    model.set_attn_implementation("sdpa")
    half = model(tokens).logits
    exact = model.float()(tokens).logits
    assert relative(found, exact) < 1.5 * relative(half, exact) + 1e-3
