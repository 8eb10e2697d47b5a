"""Deterministic kernels for the steps of a fit, and the second stream beside them."""

from __future__ import annotations

import pytest
import torch

from transmla.convert.deterministic import deterministic
from transmla.convert.side_stream import side_stream, wait_for_side_stream
from transmla.cuda_graphs import Graphs, in_turn


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_side_stream_results_are_ready_after_waiting() -> None:
    device = torch.device("cuda")
    total = torch.zeros((), device=device, dtype=torch.float64)
    values = torch.arange(1 << 20, device=device, dtype=torch.float64)

    def advance() -> None:
        with side_stream(device):
            squares = (values * values).sum()
        plain = values.sum()
        wait_for_side_stream(device)
        total.add_(squares - plain)

    in_turn(*[Graphs(device).captured(advance)] * 7)
    assert total == 7 * ((values * values).sum() - values.sum())


def test_the_callers_settings_are_restored() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        with deterministic():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)
