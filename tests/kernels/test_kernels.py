"""Every decode kernel against the reference in float64: odd shapes, poisoned memory, strided and paged caches.

Without a GPU, the kernels run in Triton's interpreter on a few small shapes.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.decode_cases import DEVICE, DTYPES, GPU, KERNELS, SCALING, Case, case, compare
from helpers.mla_models import prompt, tiny
from torch import Tensor

from transmla.core.reference_attention import causal_softmax
from transmla.kernels import hopper, triton_decode
from transmla.kernels import reference as plain
from transmla.kernels.custom_op import Compilable
from transmla.kernels.rows import Scores
from transmla.kernels.splits import CPU_UNITS, best_splits
from transmla.runtime.latent_attention import LatentAttention
from transmla.runtime.load import accelerate
from transmla.runtime.packed_rows import pack, unpack

if triton_decode.triton is None:
    pytest.skip("needs triton", allow_module_level=True)


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.BACKEND.name)
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.fixture(params=[1, 3, *([40] if GPU else [])], ids="{} splits".format, autouse=True)
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with one split, and with several splits of which some are empty."""
    for module in (triton_decode, hopper):
        monkeypatch.setattr(module, "best_splits", lambda *_: request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("total", [1, 2, 31, 64, 150, *([1024, 4097] if GPU else [])])
def test_lengths(kernel: ModuleType, total: int, dtype: torch.dtype) -> None:
    compare(kernel, case(total=total, dtype=dtype))


@pytest.mark.skipif(not GPU, reason="too large for the interpreter")
@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("new", [1, 3])
def test_the_widest_rows_masked_and_paged(kernel: ModuleType, new: int, page: int) -> None:
    c = case(new=new, total=320, batch=2, heads=70, rank=512, width=64, dtype=torch.float16)
    if not page:
        compare(kernel, c, mask=padded_mask(c))
        return
    pages = torch.cat([c.kv_c, c.k_pe], -1).reshape(10, 64, 576)
    table = torch.arange(10, dtype=torch.int32, device=DEVICE).view(2, 5)
    paged = Case(c.q_latent, c.q_pe, pages[..., :512], pages[..., 512:])
    lengths = torch.tensor([320, 70], dtype=torch.int32, device=DEVICE)
    compare(kernel, paged, lengths=lengths, block_table=table)


@pytest.mark.parametrize(("rank", "width"), [(16, 8), (48, 16), (96, 32), (160, 32), (448, 64), (512, 64)])
def test_ranks(kernel: ModuleType, rank: int, width: int) -> None:
    for dtype in DTYPES:
        compare(kernel, case(rank=rank, width=width, total=70, batch=1, dtype=dtype))


@pytest.mark.parametrize("heads", [1, 9, 17, *([32, 128] if GPU else [])])
@pytest.mark.parametrize("batch", [1, 3])
def test_heads_and_batches(kernel: ModuleType, heads: int, batch: int) -> None:
    compare(kernel, case(heads=heads, batch=batch, total=40))


@pytest.mark.parametrize("new", range(1, 9))
def test_new_tokens_attend_to_the_tokens_before_them(kernel: ModuleType, new: int) -> None:
    c = case(new=new, total=45, batch=3, heads=5)
    compare(kernel, c, lengths=torch.tensor([45, new, new + 13], dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("new", [1, 4])
def test_without_mask_and_lengths_tokens_attend_to_all_rows(kernel: ModuleType, new: int) -> None:
    """Sequences attend in this way to a shared prefix."""
    compare(kernel, case(new=new, total=45, batch=1, heads=5))


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_soft_capped_scores(kernel: ModuleType, softcap: float) -> None:
    """Scores are about one, so the first cap changes them a lot and the second hardly; with a mask and without."""
    c = case(new=2, total=70, heads=5)
    compare(kernel, c, falls_back=True, softcap=softcap)
    compare(kernel, c, falls_back=True, softcap=softcap, mask=padded_mask(c))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_any_integer_type(kernel: ModuleType, dtype: torch.dtype) -> None:
    compare(kernel, case(total=45), lengths=torch.tensor([45, 7], dtype=dtype, device=DEVICE))


def test_empty_and_short_sequences(kernel: ModuleType) -> None:
    """One sequence has no row yet, another has one row."""
    c = case(total=140, batch=3)
    c.kv_c[0], c.kv_c[1, 1:] = float("nan"), float("nan")
    compare(kernel, c, lengths=torch.tensor([0, 1, 140], dtype=torch.int32, device=DEVICE))


def padded_mask(c: Case) -> Tensor:
    """Return a causal mask [B, 1, n, T] with padding on the left and 18 unused rows at the end."""
    batch, new, total = c.q_latent.shape[0], c.q_latent.shape[1], c.kv_c.shape[1]
    keys = torch.arange(total, device=DEVICE)
    used = total - 18
    causal = keys <= used - new + torch.arange(new, device=DEVICE)[:, None]
    starts = torch.arange(batch, device=DEVICE)[:, None, None, None] * (used // 4)
    return causal[None, None] & (keys >= starts)


@pytest.mark.parametrize("total", [21, 200])
@pytest.mark.parametrize("new", [1, 3])
def test_masks_hide_padding_and_an_unused_tail(kernel: ModuleType, new: int, total: int) -> None:
    c = case(new=new, total=total, batch=3)
    c.kv_c[:, total - 15 :], c.k_pe[:, total - 15 :] = 0, 0
    compare(kernel, c, mask=padded_mask(c))


@pytest.mark.parametrize("new", [1, 3])
def test_a_mask_and_lengths(kernel: ModuleType, new: int) -> None:
    c = case(new=new, total=90, batch=3)
    lengths = torch.tensor([90, 33, new], dtype=torch.int32, device=DEVICE)
    compare(kernel, c, mask=(torch.arange(90, device=DEVICE) != 1)[None, None, None], lengths=lengths)


@pytest.mark.parametrize("page", [0, 16])
def test_float8_latents(kernel: ModuleType, page: int) -> None:
    c = case(total=96, batch=2, new=2, heads=5, dtype=torch.float16)
    rows = pack(c.kv_c, c.k_pe)
    if page:
        rows = rows.reshape(12, page, -1)
    table = torch.arange(12, dtype=torch.int32, device=DEVICE).view(2, 6) if page else None
    lengths = torch.tensor([96, 50], dtype=torch.int32, device=DEVICE)
    cached = replace(unpack(rows, 32, 16, torch.float16), lengths=lengths, block_table=table)
    actual = kernel.decode(c.q_latent, c.q_pe, cached, Scores(SCALING))
    kv_c, k_pe = (part.double() for part in cached.full())
    exact = replace(cached, kv_c=kv_c, k_pe=k_pe, scale=None)
    expected = plain.decode(c.q_latent.double(), c.q_pe.double(), exact, Scores(SCALING))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("size", [1e-3, 1.0, 6e4])
def test_small_and_large_float8_latents_in_float16(size: float) -> None:
    """Products of weights and scales are normal numbers, and do not overflow."""
    c = case(total=96, heads=5, dtype=torch.float16)
    latents = c.kv_c / c.kv_c.abs().amax() * size
    rows = unpack(pack(latents, c.k_pe), 32, 16, torch.float16)
    queries = c.q_latent / max(size, 1)
    actual = triton_decode.decode(queries, c.q_pe, rows, Scores(SCALING))[0].double()
    assert rows.scale is not None
    exact = replace(rows, kv_c=rows.kv_c.double() * rows.scale[..., None], k_pe=c.k_pe.double(), scale=None)
    expected = plain.decode(queries.double(), c.q_pe.double(), exact, Scores(SCALING))[0]
    assert (actual - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_and_tables_that_are_not_contiguous(kernel: ModuleType, dtype: torch.dtype) -> None:
    c = case(total=96, batch=3, dtype=torch.float16)
    columns = torch.tensor([[96, 5], [40, 5], [7, 5]], dtype=dtype, device=DEVICE)
    compare(kernel, c, lengths=columns[:, 0])
    compare(kernel, c, lengths=columns[1:2, 0].expand(3))
    pages = torch.cat([c.kv_c, c.k_pe], -1).reshape(6, 48, 48)
    paged = Case(c.q_latent, c.q_pe, pages[..., :32], pages[..., 32:])
    table = torch.arange(6, dtype=dtype, device=DEVICE).view(2, 3).T
    compare(kernel, paged, falls_back=True, lengths=columns[:, 0], block_table=table)


def test_latents_that_are_not_contiguous(kernel: ModuleType) -> None:
    c = case(total=40, dtype=torch.float16)
    strided = Case(c.q_latent, c.q_pe, c.kv_c.mT.contiguous().mT, c.k_pe)
    actual, expected = strided.decode(kernel)[0], c.decode(kernel)[0]
    assert torch.allclose(actual, expected, atol=1e-3)


def test_one_mask_for_all_sequences(kernel: ModuleType) -> None:
    c = case(total=90, batch=3)
    compare(kernel, c, mask=(torch.arange(90, device=DEVICE) % 3 > 0)[None, None, None])


def test_a_mask_that_hides_everything_from_one_sequence(kernel: ModuleType) -> None:
    c = case(total=90, batch=2)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    compare(kernel, c, mask=mask)


@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("new", [1, 2])
def test_paged_caches(kernel: ModuleType, new: int, page: int) -> None:
    total = 3 * page
    c = case(total=total, batch=3, new=new, dtype=torch.float16)
    lengths = torch.tensor([total, page + 2, 2], dtype=torch.int32, device=DEVICE)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    table = order.view(3, 3).to(torch.int32)
    pages = torch.full((11, page, 48), float("nan"), device=DEVICE, dtype=torch.float16)
    behind = torch.arange(total, device=DEVICE)[None, :, None] >= lengths[:, None, None]
    rows = torch.cat([c.kv_c, c.k_pe], -1).masked_fill(behind, 0)
    pages[order] = rows.view(9, page, 48)
    paged = Case(c.q_latent, c.q_pe, pages[..., :32], pages[..., 32:])
    compare(kernel, paged, falls_back=page == 16, lengths=lengths, block_table=table)
    ours = paged.decode(kernel, lengths=lengths, block_table=table)[0]
    flat = c.decode(kernel, lengths=lengths)[0]
    assert torch.allclose(ours, flat, atol=1e-3)


@pytest.mark.skipif(not GPU, reason="needs a buffer of 6 GB")
def test_rows_at_64_bit_offsets(kernel: ModuleType) -> None:
    """The rows start more than 2³¹ elements into their buffer."""
    rows = torch.zeros(3, 2**30 // 48 + 1, 48, dtype=torch.float16, device=DEVICE)
    c = case(total=100, batch=3, dtype=torch.float16)
    part = rows[:, -100:]
    part[..., :32], part[..., 32:] = c.kv_c, c.k_pe
    compare(kernel, Case(c.q_latent, c.q_pe, part[..., :32], part[..., 32:]))


def test_splits_fill_the_device_and_none_is_empty() -> None:
    units = torch.cuda.get_device_properties(DEVICE).multi_processor_count if GPU else CPU_UNITS
    counts = [best_splits(programs, 4096, DEVICE) for programs in (1, 2, units, 10 * units)]
    assert all(0.9 * units < n * splits <= units for n, splits in zip((1, 2, units), counts[:3], strict=True))
    assert counts[2:] == [1, 1]
    assert best_splits(1, 0, DEVICE) == best_splits(1, 1, DEVICE) == 1


def test_the_reference_is_attention() -> None:
    """The reference equals a softmax and weighted sums, written out."""
    c = case(total=12, new=12, batch=2, dtype=torch.float64)
    scores = torch.einsum("bnhr,btr->bhnt", c.q_latent, c.kv_c) + torch.einsum("bnhr,btr->bhnt", c.q_pe, c.k_pe)
    expected = torch.einsum("bhnt,btr->bnhr", causal_softmax(scores * SCALING), c.kv_c)
    lengths = torch.tensor([12, 12], device=DEVICE)
    mask = torch.ones(12, 12, dtype=torch.bool, device=DEVICE).tril()[None, None]
    for extra in ({"lengths": lengths}, {"mask": mask}):
        actual, lse = c.decode(plain, **extra)
        assert torch.allclose(actual, expected, atol=1e-12)
        visible = (scores * SCALING).masked_fill(~mask, float("-inf"))
        assert torch.allclose(lse, visible.logsumexp(-1).transpose(1, 2), atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_generate_gives_the_same_tokens(kernel: ModuleType, settings: dict[str, Any]) -> None:
    dtype = torch.float32 if torch.float32 in kernel.DTYPES else kernel.DTYPES[0]
    model = tiny(first_k_dense_replace=2).to(DEVICE, dtype)
    inputs = {name: t.to(DEVICE) for name, t in prompt().items()}
    settings = {"max_new_tokens": 8, "do_sample": False, **settings}
    accelerate(model, backend="torch")
    expected = model.generate(**inputs, **settings)
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.decode = Compilable(kernel.BACKEND.name)
    assert torch.equal(model.generate(**inputs, **settings), expected)
