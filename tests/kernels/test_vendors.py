"""FlashMLA and FlashInfer backends against the reference; needs a GPU and the packages."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from transmla.kernels import DecodeShape, flashinfer, flashmla, hopper
from transmla.kernels import reference as plain
from transmla.kernels.rows import Rows, Scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = DecodeShape(32, 512, 64, torch.bfloat16, DEVICE)
SCALING = 0.07


@pytest.fixture(params=[flashmla, flashinfer], ids=lambda vendor: vendor.BACKEND.name)
def vendor(request: pytest.FixtureRequest) -> ModuleType:
    reason = request.param.refuses(SHAPE)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def cache(batch: int, total: int) -> Tensor:
    """Return random rows [batch, total, r + d_r] in the layout of the latent cache."""
    generator = torch.Generator().manual_seed(total)
    return torch.randn(batch, total, 576, generator=generator).to(DEVICE, torch.bfloat16)


def compare(vendor: ModuleType, rows: Rows, new: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a backend with the reference in float64; a call to the Hopper backend is an error."""
    generator = torch.Generator().manual_seed(new)
    queries = torch.randn(batch, new, SHAPE.heads, 576, generator=generator).to(DEVICE, torch.bfloat16)
    q_latent, q_pe = queries.split([512, 64], -1)
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "decode", None)
        actual = vendor.decode(q_latent, q_pe, rows, Scores(SCALING))
    exact = Rows(rows.kv_c.double(), rows.k_pe.double(), None, rows.lengths, rows.block_table)
    expected = plain.decode(q_latent.double(), q_pe.double(), exact, Scores(SCALING))
    for ours, theirs in zip(actual, expected, strict=True):
        blind = theirs == float("-inf")
        assert torch.equal(blind, ours == float("-inf"))
        assert (ours.double() - theirs).masked_fill(blind, 0).abs().max() < 3e-2 * max(1.0, float(theirs.max()))


def test_a_plan_is_reused_and_replaced(vendor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = cache(2, 192)
    for total in (150, 150, 91, 150):
        compare(vendor, Rows(*buffer[:, :total].split([512, 64], -1)), 1, 2, monkeypatch)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("ragged", [True, False])
def test_buffers_with_spare_rows(vendor: ModuleType, ragged: bool, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is the first 150 rows of a buffer of 192."""
    kv_c, k_pe = (part[:, :150] for part in cache(3, 192).split([512, 64], -1))
    lengths = torch.tensor([150, 7, 65], dtype=torch.int32, device=DEVICE) if ragged else None
    compare(vendor, Rows(kv_c, k_pe, lengths=lengths), new, 3, monkeypatch)


@pytest.mark.parametrize("new", [1, 2])
def test_paged_caches(vendor: ModuleType, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kv_c, k_pe = cache(9, 64).split([512, 64], -1)
    table = torch.tensor([[4, 1, 8], [0, 2, 3]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([190, 66], dtype=torch.int32, device=DEVICE)
    compare(vendor, Rows(kv_c, k_pe, lengths=lengths, block_table=table), new, 2, monkeypatch)


def test_a_step_with_a_mask_goes_to_the_hopper_backend(vendor: ModuleType) -> None:
    kv_c, k_pe = cache(2, 128).split([512, 64], -1)
    q = torch.randn(2, 1, SHAPE.heads, 576, device=DEVICE, dtype=torch.bfloat16)
    mask = torch.arange(128, device=DEVICE)[None, None, None] < 100
    q_latent, q_pe = q.split([512, 64], -1)
    actual = vendor.decode(q_latent, q_pe, Rows(kv_c, k_pe), Scores(SCALING, mask))[0]
    expected = hopper.decode(q_latent, q_pe, Rows(kv_c, k_pe), Scores(SCALING, mask))[0]
    assert torch.equal(actual, expected)
