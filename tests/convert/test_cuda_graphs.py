"""Steps replayed from a CUDA graph give the results of eager steps; changed settings are restored afterwards."""

from __future__ import annotations

import pytest
import torch

from transmla.convert.cuda_graphs import Graphs, deterministic, in_turn, side_stream, wait_for_side_stream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


@needs_gpu
def test_a_replayed_graph_gives_the_results_of_eager_steps() -> None:
    device = torch.device("cuda")
    eager, graph = (torch.zeros(3, device=device, dtype=torch.float64) for _ in range(2))
    for _ in range(10):
        eager.mul_(0.9).add_(1)
    advance = Graphs(device).captured(lambda: (graph.mul_(0.9).add_(1), None)[1])
    in_turn(*[advance] * 10)
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

    in_turn(*[Graphs(device).captured(advance)] * 7)
    assert total == 7 * ((values * values).sum() - values.sum())


def test_without_a_gpu_every_step_is_called() -> None:
    calls: list[int] = []
    graphs = Graphs(torch.device("cpu"))
    advances = [graphs.captured(lambda: calls.append(0)), graphs.captured(lambda: calls.append(1))]
    in_turn(*(advances[kind] for kind in (0, 1, 1, 0, 1)))
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
    graphs = Graphs(device)
    advances = [graphs.captured(lambda: grow(graph)), graphs.captured(lambda: shift(graph))]
    in_turn(*(advances[kind] for kind in kinds))
    assert torch.equal(eager, graph)


@needs_gpu
def test_a_backward_pass_may_be_a_graph_of_its_own() -> None:
    """As in a fit on several GPUs, which exchange numbers between the two passes."""
    device = torch.device("cuda")
    weight = torch.ones(1000, device=device, requires_grad=True)
    gradient, count, scale = (torch.zeros(size, device=device) for size in ((1000,), (), ()))
    computed: list[torch.Tensor] = []

    def forward() -> None:
        count.add_(1)
        scale.copy_(count)
        computed.append((weight * count).square().sum())

    def backward() -> None:
        gradient.copy_(torch.autograd.grad(computed.pop() / scale, weight)[0])

    graphs = Graphs(device)
    parts = [graphs.captured(forward), lambda: (scale.mul_(2), None)[1], graphs.captured(backward)]
    for step in range(8):
        in_turn(*parts)
        assert bool((gradient == step + 1).all())


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
