"""Run the steps of a fit: Adam on one vector of parameters, with each step divided among the processes of a launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transmla.convert.fit_inputs import kinds_of_steps
from transmla.convert.fit_vector import FitParameters
from transmla.convert.step_parts import part_of_step
from transmla.cuda_graphs import Graphs, in_turn
from transmla.plan.fit_settings import FitSettings

if TYPE_CHECKING:
    from transmla.convert.fit_layers import FitProblem

# Steps of linear warm-up of the learning rate.
WARM_UP = 20
# Adam's coefficients for the running averages of the gradient and its square.
BETAS = (0.9, 0.98)


def descend(problem: FitProblem, parameters: FitParameters, fit: FitSettings, seed: int) -> None:
    """Minimise the relative error with Adam; changes ``parameters`` in place, each process its share.

    Args:
        problem: the inputs and the error.
        parameters: the parameters to fit.
        fit: settings of the fit.
        seed: seed of all random numbers.
    """
    device, ranks = problem.device, problem.ranks
    generator = torch.Generator().manual_seed(seed)
    kinds = kinds_of_steps(fit.steps, len(problem.inputs))
    tables = [
        [table.to(device) for table in inputs.draw(kinds.count(kind), generator)]
        for kind, inputs in enumerate(problem.inputs)
    ]
    rates = torch.tensor([_schedule(step, fit.steps) * fit.rate for step in range(fit.steps)], device=device)
    # Gradients are about as large as the relative error. The tiny eps only prevents 0/0 for weights without a gradient.
    optimizer = torch.optim.Adam(
        [parameters.vector],
        lr=torch.zeros((), device=device),
        betas=BETAS,
        eps=1e-12,
        fused=True,
        capturable=device.type == "cuda",
    )
    step = torch.zeros(1, dtype=torch.int64, device=device)
    drawn = [torch.zeros_like(step) for _ in problem.inputs]
    heads = min(layer.spec.num_attention_heads for layer in problem.layers)
    parts = [part_of_step(ranks, inputs.rows, inputs.length, heads) for inputs in problem.inputs]
    energies = torch.zeros(len(problem.layers), device=device)
    computed: list[Tensor] = []  # the errors, between the two passes

    def forward(kind: int) -> None:
        part = parts[kind]
        arguments = [table.index_select(0, drawn[kind])[0] for table in tables[kind]]
        inputs = problem.inputs[kind].make(*arguments, part=part.place)
        errors, own_energies = problem.losses(parameters.factors(), *inputs, part.split)
        computed.append(errors * part.weight)
        energies.copy_(own_energies * part.weight)
        drawn[kind].add_(1)

    def backward() -> None:
        parameters.differentiate((computed.pop() / energies).mean())

    def update() -> None:
        parameters.pull_back()
        optimizer.param_groups[0]["lr"].copy_(rates.index_select(0, step)[0])
        optimizer.step()
        step.add_(1)
        parameters.renew()

    graphs, several = Graphs(device), ranks.size > 1
    # The processes exchange numbers between graphs, never inside one. Their attention to divided tokens is no graph.
    end = graphs.captured(update) if several else update
    exchange = partial(ranks.exchange, parameters.values)
    advances = []
    for kind, part in enumerate(parts):
        passes: list[Callable[[], None]] = [partial(forward, kind), backward]
        if several and part.split is None:
            passes = [graphs.captured(function) for function in passes]
        sums = partial(ranks.add_up, energies), partial(ranks.add_up_own, parameters.gradients)
        advance = partial(in_turn, passes[0], sums[0], passes[1], sums[1], end, exchange)
        advances.append(advance if several else graphs.captured(advance))
    parameters.renew()
    exchange()
    for kind in kinds:
        advances[kind]()


def _schedule(step: int, total: int) -> float:
    """Return the factor on the learning rate at ``step``: linear warm-up times cosine decay to zero."""
    return min(1.0, (step + 1) / min(WARM_UP, max(1, total // 3))) * 0.5 * (1 + math.cos(math.pi * step / total))
