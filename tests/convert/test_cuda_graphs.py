"""Steps replayed from a CUDA graph give the results of eager steps; changed settings are restored afterwards."""

from __future__ import annotations

import pytest
import torch

from transmla.convert.cuda_graphs import deterministic, run_steps, side_stream, wait_for_side_stream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


@needs_gpu
def test_a_replayed_graph_gives_the_results_of_eager_steps() -> None:
    device = torch.device("cuda")
    eager, graph = (torch.zeros(3, device=device, dtype=torch.float64) for _ in range(2))
    for _ in range(10):
        eager.mul_(0.9).add_(1)
    run_steps([lambda: (graph.mul_(0.9).add_(1), None)[1]], [0] * 10, device)
    assert torch.equal(eager, graph)


@needs_gpu
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

    run_steps([advance], [0] * 7, device)
    assert total == 7 * ((values * values).sum() - values.sum())


def test_without_a_gpu_every_step_is_called() -> None:
    calls: list[int] = []
    run_steps([lambda: calls.append(0), lambda: calls.append(1)], [0, 1, 1, 0, 1], torch.device("cpu"))
    assert calls == [0, 1, 1, 0, 1]


@needs_gpu
def test_two_graphs_alternate_in_order() -> None:
    """Steps of two sizes share their memory and keep their order, which the result depends on."""
    device = torch.device("cuda")
    eager, graph = (torch.ones(3, device=device, dtype=torch.float64) for _ in range(2))
    kinds = [0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1]

    def grow(total: torch.Tensor) -> None:
        total.mul_(torch.full((1000, 3), 1.1, device=device, dtype=torch.float64).mean(0))

    def shift(total: torch.Tensor) -> None:
        total.add_(torch.ones(500, 3, device=device, dtype=torch.float64).mean(0))

    for kind in kinds:
        (grow, shift)[kind](eager)
    run_steps([lambda: grow(graph), lambda: shift(graph)], kinds, device)
    assert torch.equal(eager, graph)


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
