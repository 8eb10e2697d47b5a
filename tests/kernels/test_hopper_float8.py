"""The Hopper kernel over float8 latents, against the reference in float64. Needs a Hopper GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.decode_cases import DEVICE, KERNELS, SCALING, TOLERANCE, Case, case
from torch import Tensor

from transmla.kernels import hopper, ragged, triton_decode
from transmla.kernels import reference as plain
from transmla.kernels.rows import Rows, Scores
from transmla.runtime.packed_rows import pack, unpack

if hopper not in KERNELS:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

DTYPES = [torch.float16, torch.bfloat16]
# Widths of the latent and of the rotary key, and query heads.
SHAPES = [(512, 64, 1), (512, 64, 32), (448, 64, 70), (512, 32, 128), (256, 64, 28), (136, 16, 9)]
SHAPE_NAMES = ["{}+{}, {} heads".format(*shape) for shape in SHAPES]


@pytest.fixture(params=[1, 3], ids="{} splits".format, autouse=True)
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with one split and with several, and let no call go to the Triton backend."""
    monkeypatch.setattr(hopper, "best_splits", lambda *_: request.param)
    monkeypatch.setattr(triton_decode, "decode", None)


def batch_of(shape: tuple[int, int, int], dtype: torch.dtype, new: int = 1, total: int = 300, batch: int = 3) -> Case:
    rank, width, heads = shape
    return case(batch=batch, new=new, heads=heads, total=total, rank=rank, width=width, dtype=dtype)


def packed(c: Case, page: int = 0) -> Rows:
    """Return the rows of ``c`` in float8, between rows of bytes that are NaN."""
    batch, total, rank = c.kv_c.shape
    rows = pack(c.kv_c, c.k_pe)
    room = torch.full((batch, total + 37, rows.shape[-1]), 255, dtype=torch.uint8, device=DEVICE)
    room[:, :total] = rows
    if not page:
        return unpack(room[:, :total], rank, c.k_pe.shape[-1], c.k_pe.dtype)
    pages = -(-total // page)
    whole = torch.full((batch, pages * page, rows.shape[-1]), 255, dtype=torch.uint8, device=DEVICE)
    whole[:, :total] = rows
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    pool = torch.empty(batch * pages, page, rows.shape[-1], dtype=torch.uint8, device=DEVICE)
    pool[order] = whole.view(batch * pages, page, -1)
    parts = unpack(pool, rank, c.k_pe.shape[-1], c.k_pe.dtype)
    lengths = torch.full((batch,), total, dtype=torch.int32, device=DEVICE)
    return replace(parts, lengths=lengths, block_table=order.view(batch, pages).int())


def compare(c: Case, rows: Rows, mask: Tensor | None = None) -> None:
    """Compare the kernel with the reference, on the values that the float8 numbers stand for."""
    actual = hopper.decode(c.q_latent, c.q_pe, rows, Scores(SCALING, mask))
    wide = torch.float64
    kv_c, k_pe = rows.kv_c.to(wide) * rows.scale[..., None].to(wide), rows.k_pe.to(wide)
    exact = Rows(kv_c, k_pe, lengths=rows.lengths, block_table=rows.block_table)
    expected = plain.decode(c.q_latent.to(wide), c.q_pe.to(wide), exact, Scores(SCALING, mask))
    # Widened latents and weights are rounded once each.
    limit = TOLERANCE[c.k_pe.dtype]
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(torch.isinf(ours), torch.isinf(theirs))
        seen = torch.isfinite(theirs)
        assert (ours.double() - theirs)[seen].norm() <= limit * theirs[seen].norm()
        assert torch.allclose(ours.double()[seen], theirs[seen], atol=4 * limit, rtol=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("total", [1, 63, 64, 129, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_shapes_and_lengths(shape: tuple[int, int, int], total: int, dtype: torch.dtype) -> None:
    c = batch_of(shape, dtype, total=total)
    compare(c, packed(c))
    lengths = torch.tensor([total, total // 2, 0], dtype=torch.int32, device=DEVICE)
    compare(c, replace(packed(c), lengths=lengths))


@pytest.mark.parametrize("page", [0, 64, 128])
@pytest.mark.parametrize("new", [1, 2, 4, 8])
def test_new_tokens_in_pages_and_without(new: int, page: int) -> None:
    c = batch_of((512, 64, 20), torch.bfloat16, new)
    lengths = torch.tensor([300, new, 77], dtype=torch.int32, device=DEVICE)
    compare(c, replace(packed(c, page), lengths=lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("new", [1, 3])
def test_masks(new: int, dtype: torch.dtype) -> None:
    c = batch_of((512, 64, 32), dtype, new)
    mask = torch.rand(3, 1, new, 300, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.3
    mask[1, ..., :150] = False
    mask[2] = False
    compare(c, packed(c), mask)
    compare(c, replace(packed(c), lengths=torch.tensor([300, 200, 5], dtype=torch.int32, device=DEVICE)), mask)


def test_divided_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of different lengths are divided by tokens."""
    divided = []
    divide = ragged.divide
    monkeypatch.setattr(hopper, "LONG_QUEUE", 0)
    monkeypatch.setattr(ragged, "divide", lambda *arguments: divided.append(1) or divide(*arguments))
    c = batch_of((512, 64, 40), torch.bfloat16, total=2000, batch=5)
    lengths = torch.tensor([2000, 0, 1, 65, 700], dtype=torch.int32, device=DEVICE)
    compare(c, replace(packed(c), lengths=lengths))
    assert divided


def test_large_small_and_subnormal_latents() -> None:
    c = batch_of((512, 64, 16), torch.bfloat16)
    sizes = torch.tensor([1e-20, 1.0, 3e5], device=DEVICE)[:, None, None]
    queries = torch.tensor([1e20, 1.0, 3e-6], device=DEVICE)[:, None, None, None]
    spread = torch.exp2(-8 * torch.rand(c.kv_c.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    c = Case((c.q_latent * queries).bfloat16(), c.q_pe, (c.kv_c * sizes * spread).bfloat16(), c.k_pe)
    rows = packed(c)
    actual = hopper.decode(c.q_latent, c.q_pe, rows, Scores(SCALING))[0].double() / sizes[..., None].double()
    exact = Rows(rows.kv_c.double() * rows.scale[..., None].double(), rows.k_pe.double())
    expected = plain.decode(c.q_latent.double(), c.q_pe.double(), exact, Scores(SCALING))[0] / sizes[..., None].double()
    assert (actual - expected).norm() <= TOLERANCE[torch.bfloat16] * expected.norm()


@pytest.mark.parametrize("size", [1e-3, 3e-4])
def test_small_latents_in_float16(size: float) -> None:
    """In float16, the factors of such rows are subnormal numbers."""
    c = batch_of((512, 64, 16), torch.float16)
    c = Case((c.q_latent.float() / size).half(), c.q_pe, (c.kv_c.float() * size).half(), c.k_pe)
    compare(c, packed(c))


def test_nan_in_a_row_reaches_the_result() -> None:
    c = batch_of((512, 64, 16), torch.bfloat16)
    latents = c.kv_c.clone()
    latents[1, 5, 7] = float("nan")
    rows = packed(Case(c.q_latent, c.q_pe, latents, c.k_pe))
    out = hopper.decode(c.q_latent, c.q_pe, rows, Scores(SCALING))[0]
    assert torch.isnan(out[1]).any()
    assert torch.isfinite(out[0]).all()
