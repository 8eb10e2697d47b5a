"""Fitting a layer's factors to the source layer, after the closed form.

The layer reads the stream of the layers converted before it and is asked for the source's stream, so it also
repairs what they broke (error feedback). The source layer can be asked about any input, not only about the
calibration text: every step makes new inputs from it, cut together from several sequences, each token moved a
little along the difference of two others, with a random share of the accumulated error. That is what lets a
million weights be fitted on some ten thousand tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors
from transmla.calibrate import SourceLayer, steps
from transmla.core.coordinates import Coordinates, orthonormal_latents
from transmla.effort import Effort
from transmla.errors import TransmlaError

# Share of the calibration sequences that only judge the fit.
HELD_OUT = 1 / 32
# An input is cut together from pieces of about so many tokens, and a token moved by at most this share of its length.
PIECE = 256
JITTER = 0.2
WARM_UP = 20
# Steps run before a graph is captured, so that the optimizer's state and all workspaces exist.
EAGER = 3
BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Reconstruction:
    """Factors after the fit, and the relative error on held-out sequences ``before`` and ``after`` it."""

    factors: LayerFactors
    before: float
    after: float


def reconstruct(
    layer: SourceLayer, factors: LayerFactors, source: Tensor, converted: Tensor, effort: Effort, *, seed: int
) -> Reconstruction:
    """Fit ``factors`` so that the layer turns the ``converted`` stream into the source's.

    Args:
        layer: the source layer, its weights loaded.
        factors: where to start; never changed.
        source, converted: streams [N, T, D] that enter the layer in the source and in the export, N ≥ 2.
        effort: how long to fit.
        seed: of everything drawn; on a CPU equal seeds give equal factors.

    Returns the factors with the smaller error on the held-out sequences, the last ones of the stream.
    """
    held_out = max(1, round(len(source) * HELD_OUT))
    fitted = slice(0, len(source) - held_out)
    judged = source[-held_out:], converted[-held_out:]
    coordinates = Coordinates.of(factors, _input_moment(layer, converted[fitted]))
    parameters = {name: value.float().requires_grad_() for name, value in coordinates.enter(factors).items()}
    with _deterministic(), _enough_memory():
        problem = _Problem(layer, source[fitted], converted[fitted], effort)
        before = problem.error(factors, *judged)
        _descend(problem, coordinates, parameters, effort, seed)
    found = coordinates.leave({name: value.detach() for name, value in parameters.items()})
    found = orthonormal_latents(found.to(torch.float64))
    after = problem.error(found, *judged)
    # A comparison with NaN is false: a fit that diverged is thrown away.
    return Reconstruction(found, before, after) if after < before else Reconstruction(factors, before, before)


class _Problem:
    """The inputs a layer is fitted on, and the error it makes on them."""

    def __init__(self, layer: SourceLayer, source: Tensor, converted: Tensor, effort: Effort) -> None:
        self.layer, self.through_mlp = layer, effort.through_mlp
        self.source = source.to(layer.device)
        self.drift = (converted - source).to(layer.device)
        self.positions = torch.arange(source.shape[1], device=layer.device)
        self.rows = max(1, min(effort.tokens // source.shape[1], len(source)))

    def loss(self, factors: LayerFactors, source: Tensor, converted: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and energy over the tokens of two inputs [N, T, D], each token by its own energy.

        The energy is that of what the layer adds to the stream, in the same measure.
        """
        with torch.no_grad():
            wanted = self.layer.middle(source)
            if self.through_mlp:
                wanted = self.layer.finish(wanted)
            # The next norm divides every token by its length: so does the error.
            share = wanted.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            energy = ((wanted - source) * share).square().mean()
        got = self.layer.middle(converted, factors)
        if self.through_mlp:
            got = self.layer.finish(got)
        return ((got - wanted) * share).square().mean(), energy

    @torch.no_grad()
    def error(self, factors: LayerFactors, source: Tensor, converted: Tensor) -> float:
        """Relative squared error over whole streams [N, T, D]."""
        factors = factors.to(torch.float32)
        error = energy = 0.0
        for start, part in steps(source):
            other = converted[start : start + len(part)]
            losses = self.loss(factors, part.to(self.layer.device), other.to(self.layer.device))
            error, energy = error + float(losses[0]) * len(part), energy + float(losses[1]) * len(part)
        return error / max(energy, 1e-30)

    def inputs(self, rows: Tensor, cuts: Tensor, shares: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """New inputs [n, T, D] for the source and the converted layer.

        Args:
            rows: sequences [n, pieces] that each input is cut together from, every token at its own position.
            cuts: positions [pieces − 1] where the next sequence takes over.
            shares: [n] of the drift that stays.
            shifts: [2] how far away the two tokens stand whose difference moves a token.
        """
        row = rows[:, (self.positions[:, None] >= cuts).sum(-1)]
        source, drift = self.source[row, self.positions], self.drift[row, self.positions]
        tokens = source.flatten(0, 1)
        index = torch.arange(len(tokens), device=tokens.device)
        first, second = ((index + shift) % len(tokens) for shift in shifts)
        step = tokens[first] - tokens[second]
        longest = tokens.norm(dim=-1, keepdim=True) / step.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved = (tokens + JITTER * step * longest.clamp_max(1)).view_as(source)
        return moved, moved + drift * shares[:, None, None]


def _descend(
    problem: _Problem, coordinates: Coordinates, parameters: dict[str, Tensor], effort: Effort, seed: int
) -> None:
    """Adam over ``parameters``, which are changed in place."""
    device = problem.layer.device
    tables = [table.to(device) for table in _draw(problem, effort, seed)]
    rates = torch.tensor([_schedule(step, effort.steps) * effort.rate for step in range(effort.steps)], device=device)
    groups = [{"params": [value], "lr": torch.zeros((), device=device)} for value in parameters.values()]
    sizes = [float(value.detach().square().mean().sqrt()) for value in parameters.values()]
    # Gradients are of the order of the relative error over a tensor's size; eps only keeps dead tensors still.
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12, fused=True, capturable=device.type == "cuda")
    step = torch.zeros(1, dtype=torch.int64, device=device)

    def advance() -> None:
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"].copy_(rates.index_select(0, step)[0] * size)
        inputs = problem.inputs(*(table.index_select(0, step)[0] for table in tables))
        error, energy = problem.loss(coordinates.leave(parameters), *inputs)
        optimizer.zero_grad(set_to_none=True)
        (error / energy).backward()
        optimizer.step()
        step.add_(1)

    _repeat(advance, effort.steps, device)


def _draw(problem: _Problem, effort: Effort, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything random about a fit, for all its steps: the arguments of ``_Problem.inputs``."""
    generator = torch.Generator().manual_seed(seed)
    count, length = problem.source.shape[:2]
    pieces = max(2, length // PIECE)
    rows = torch.randint(count, (effort.steps, problem.rows, pieces), generator=generator)
    cuts = torch.randint(1, length, (effort.steps, pieces - 1), generator=generator)
    shares = torch.rand(effort.steps, problem.rows, generator=generator)
    shifts = torch.randint(1, problem.rows * length, (effort.steps, 2), generator=generator)
    return rows, cuts, shares, shifts


def _schedule(step: int, total: int) -> float:
    """Linear warm-up, cosine to zero."""
    return min(1.0, (step + 1) / min(WARM_UP, max(1, total // 3))) * 0.5 * (1 + math.cos(math.pi * step / total))


def _repeat(advance: Callable[[], None], times: int, device: torch.device) -> None:
    """Call ``advance`` ``times`` times; on a GPU all but the first few as one CUDA graph, replayed."""
    if device.type != "cuda" or times <= EAGER:
        for _ in range(times):
            advance()
        return
    with torch.cuda.device(device):
        stream = _capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(EAGER):
                advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            advance()
        for _ in range(times - EAGER):
            graph.replay()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: libraries keep a workspace for every stream they ever saw."""
    return torch.cuda.Stream(device)


def _input_moment(layer: SourceLayer, stream: Tensor) -> Tensor:
    """E[x xᵀ] [D, D] of the attention's input."""
    width = stream.shape[-1]
    moment = torch.zeros(width, width, dtype=torch.float64, device=layer.device)
    for _, hidden in steps(stream):
        x = layer.attention_input(hidden).flatten(0, 1)
        moment += (x.mT @ x).double()
    return moment / (stream.shape[0] * stream.shape[1])


@contextmanager
def _deterministic() -> Iterator[None]:
    """Backward passes that give the same bits every time, where PyTorch has one that does.

    On a GPU the attention's backward pass may not be one of them, which is no reason to stop.
    """
    enabled, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warned)
        memory.fill_uninitialized_memory = filled


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TransmlaError(
            "not enough GPU memory to fit a layer",
            limit=str(error).splitlines()[0],
            remedy="use less calibration text, --reconstruct fast, or --device cpu",
        ) from error
