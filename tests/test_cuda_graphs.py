"""Steps replayed from a CUDA graph give the results of eager steps."""

from __future__ import annotations

import pytest
import torch

from transmla.cuda_graphs import Graphs, in_turn

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


@needs_gpu
def test_a_step_that_cannot_be_captured_runs_as_it_is() -> None:
    """Reading a value on the host is impossible during a capture."""
    device = torch.device("cuda")
    total, reasons = torch.zeros((), device=device), list[str]()

    def add_if_small() -> None:
        if float(total) < 5:
            total.add_(1)

    advance = Graphs(device).captured(add_if_small, reasons.append)
    in_turn(*[advance] * 10)
    assert float(total) == 5
    assert len(reasons) == 1
    with pytest.raises(RuntimeError):
        in_turn(*[Graphs(device).captured(add_if_small)] * 5)
