"""``Rows.paged`` views a buffer of whole pages as pages, and returns None for every other layout."""

from __future__ import annotations

import pytest
import torch

from transmla.kernels import reference as plain
from transmla.kernels.rows import Rows, Scores


@pytest.mark.parametrize("with_lengths", [True, False])
def test_buffers_of_whole_pages_are_viewed_as_pages(with_lengths: bool) -> None:
    q_latent, q_pe = torch.randn(3, 2, 5, 48, dtype=torch.float64).split([32, 16], -1)
    kv_c, k_pe = torch.randn(3, 96, 48, dtype=torch.float64)[:, :91].split([32, 16], -1)
    lengths = torch.tensor([91, 2, 40]) if with_lengths else None
    rows = Rows(kv_c, k_pe, lengths=lengths)
    assert rows.paged(64) is None
    pages = rows.paged(32)
    assert pages is not None
    assert pages.page == 32
    assert pages.kv_c.data_ptr() == kv_c.data_ptr()
    assert pages.paged(32) is pages
    assert pages.paged(16) is None
    contiguous = Rows(kv_c, k_pe, lengths=pages.lengths)
    actual, expected = (plain.decode(q_latent, q_pe, r, Scores(0.11))[0] for r in (pages, contiguous))
    assert torch.allclose(actual, expected, atol=1e-12)
    assert with_lengths or pages.lengths.tolist() == [91] * 3


def test_other_layouts_are_not_viewed_as_pages() -> None:
    whole = torch.zeros(2, 128, 48)
    cut = whole[:, 10:70]
    overlapping = whole.as_strided((2, 128, 48), (64 * 48, 48, 1))
    shared = whole[:1, :64].expand(3, -1, -1)
    for rows in (cut, cut[1:], overlapping, shared):
        assert Rows(*rows.split([32, 16], -1)).paged(64) is None
    assert Rows(*whole.split([32, 16], -1), scale=whole[..., 0]).paged(64) is None
    with pytest.raises(ValueError, match="need lengths"):
        Rows(*whole.split([32, 16], -1), block_table=torch.zeros(1, 2, dtype=torch.int32))
