"""Fitting the factors of a few layers to the source's layers, after the closed form.

The first layer reads the stream of the layers converted before it, every other the one before; each is asked for
the source's stream, so they also repair what was broken before them (error feedback) and share out what they can
carry. The source can be asked about any input, not only about the calibration text: every step makes new inputs
from it, cut together from several sequences, each token moved a little along the difference of two others, with a
random share of the accumulated error. That is what lets a million weights be fitted on some ten thousand tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors
from transmla.convert.cuda_graphs import deterministic, run_steps, side_stream, wait_for_side_stream
from transmla.convert.source_layer import SourceLayer, steps
from transmla.core.factors import orthonormal_latents
from transmla.core.fit_coordinates import Coordinates
from transmla.plan.fit_settings import FitSettings

# What the rate is multiplied by for a second try. A small Mixtral's fast fits all failed at 5e-3 and all succeeded at
# 1e-3: a KL of 0.51 and 0.25 at half the cache (one H200, pydoc's test split).
RETRY_RATE = 0.2
# Share of the calibration sequences that only judge the fit.
HELD_OUT = 1 / 32
# An input is cut together from pieces of about so many tokens, and a token moved by at most this share of its length.
PIECE = 256
JITTER = 0.2
WARM_UP = 20
BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Reconstruction:
    """For each layer its factors after the fit, and its relative error on held-out text ``before`` and ``after`` it."""

    factors: tuple[LayerFactors, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


def held_out(sequences: int) -> int:
    """How many of the ``sequences``, the last ones, only judge."""
    return max(1, round(sequences * HELD_OUT))


def reconstruct(
    layers: Sequence[SourceLayer],
    factors: Sequence[LayerFactors],
    source: Tensor,
    converted: Tensor,
    fit: FitSettings,
    *,
    seed: int,
) -> Reconstruction:
    """Fit ``factors`` so that consecutive layers turn the ``converted`` stream into the source's.

    Args:
        layers: consecutive source layers, their weights loaded.
        factors: where to start, for each layer; never changed.
        source, converted: streams [N, T, D] that to_coordinates the first layer in the source and in the export, N ≥ 2.
        fit: how long to fit.
        seed: of everything drawn; equal seeds give equal factors.

    Returns the factors with the smaller error on the held-out sequences, summed over the layers. A fit that is not
    better there is tried once more, gently.
    """
    fitted = slice(0, len(source) - held_out(len(source)))
    judged = source[fitted.stop :], converted[fitted.stop :]
    moments = _input_moments(layers, factors, converted[fitted])
    starts = zip(layers, factors, moments, strict=True)
    coordinates = [Coordinates.of(f, m, layer.view.blocks()) for layer, f, m in starts]
    masks = [layer.view.masks() for layer in layers]
    with deterministic():
        problem = FitProblem(layers, source[fitted], converted[fitted], fit)
        before = problem.error(factors, *judged)
        for share in (1.0, RETRY_RATE):
            parameters = FitParameters(coordinates, factors, masks)
            descend(problem, parameters, replace(fit, rate=fit.rate * share), seed)
            with torch.no_grad():
                found = tuple(orthonormal_latents(f.to(torch.float64)) for f in parameters.factors())
            after = problem.error(found, *judged)
            # A comparison with NaN is false: a fit that diverged is thrown away.
            if sum(after) < sum(before):
                return Reconstruction(found, before, after)
    return Reconstruction(tuple(factors), before, before)


class FitParameters:
    """What is fitted: all tensors of all layers as one vector, each in units of its own root mean square.

    ``masks`` are nought where a layer's tensor, by its name, stays nought.
    """

    def __init__(
        self,
        coordinates: Sequence[Coordinates],
        factors: Sequence[LayerFactors],
        masks: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self.coordinates = coordinates
        tensors = [c.to_coordinates(f) for c, f in zip(coordinates, factors, strict=True)]
        self.shapes = [{name: value.shape for name, value in layer.items()} for layer in tensors]
        smallest = torch.finfo(torch.float32).tiny
        flat, scales = [], []
        for layer, there in zip(tensors, masks, strict=True):
            for name, value in layer.items():
                mask = there.get(name, value.new_ones(())).to(value).expand_as(value).flatten().float()
                flat.append(value.flatten().float() * mask)
                scales.append((flat[-1].square().sum() / mask.sum()).sqrt().clamp_min(smallest) * mask)
        self.scale = torch.cat(scales)
        self.vector = (torch.cat(flat) / self.scale.clamp_min(smallest)).requires_grad_()

    def factors(self) -> list[LayerFactors]:
        """The layers that the vector stands for; differentiable."""
        pieces = iter((self.vector * self.scale).split([shape.numel() for s in self.shapes for shape in s.values()]))
        return [
            c.to_factors({name: next(pieces).view(shape) for name, shape in shapes.items()})
            for c, shapes in zip(self.coordinates, self.shapes, strict=True)
        ]


class FitProblem:
    """The inputs that layers are fitted on, and the error they make on them."""

    def __init__(self, layers: Sequence[SourceLayer], source: Tensor, converted: Tensor, fit: FitSettings) -> None:
        self.layers, self.through_mlp = layers, fit.through_mlp
        self.device = layers[0].device
        self.source = source.to(self.device)
        self.drift = (converted - source).to(self.device)
        self.positions = torch.arange(source.shape[1], device=self.device)
        self.rows = max(1, min(fit.tokens // source.shape[1], len(source)))

    def losses(self, factors: Sequence[LayerFactors], source: Tensor, converted: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and energy [layers] over the tokens of two inputs [N, T, D], each token by its own energy.

        The energy is that of what a layer adds to the stream, in the same measure.
        """
        # These layers are too small to fill a GPU: source and export run at the same time.
        with side_stream(self.device), torch.no_grad():
            wanted = self._run(source, [None] * len(self.layers))
            # The next norm divides every token by its length: so does the error.
            shares = [after.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt() for after in wanted]
            added = [after - before for before, after in pairwise([source, *wanted])]
            energies = [(add * share).square().mean() for add, share in zip(added, shares, strict=True)]
        got = self._run(converted, factors)
        wait_for_side_stream(self.device)
        errors = [((g - w) * share).square().mean() for g, w, share in zip(got, wanted, shares, strict=True)]
        return torch.stack(errors), torch.stack(energies)

    def _run(self, stream: Tensor, factors: Sequence[LayerFactors | None]) -> list[Tensor]:
        """What leaves each layer, the last one perhaps before its MLP, with ``factors`` or the source's attention."""
        found = []
        for layer, f in zip(self.layers, factors, strict=True):
            stream = layer.run(stream, f, through_mlp=self.through_mlp or layer is not self.layers[-1])
            found.append(stream)
        return found

    @torch.no_grad()
    def error(self, factors: Sequence[LayerFactors], source: Tensor, converted: Tensor) -> tuple[float, ...]:
        """Relative squared error of every layer over whole streams [N, T, D]."""
        factors = [f.to(torch.float32) for f in factors]
        total = torch.zeros(2, len(factors), device=self.device)
        for start, part in steps(source):
            other = converted[start : start + len(part)]
            losses = self.losses(factors, part.to(self.device), other.to(self.device))
            total += torch.stack(losses) * len(part)
        return tuple((total[0] / total[1].clamp_min(1e-30)).tolist())

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


def descend(problem: FitProblem, parameters: FitParameters, fit: FitSettings, seed: int) -> None:
    """Adam over ``parameters``, which are changed in place."""
    device = problem.device
    tables = [table.to(device) for table in _draw(problem, fit, seed)]
    rates = torch.tensor([_schedule(step, fit.steps) * fit.rate for step in range(fit.steps)], device=device)
    # Gradients are of the order of the relative error; eps only keeps dead weights still.
    optimizer = torch.optim.Adam(
        [parameters.vector],
        lr=torch.zeros((), device=device),
        betas=BETAS,
        eps=1e-12,
        fused=True,
        capturable=device.type == "cuda",
    )
    step = torch.zeros(1, dtype=torch.int64, device=device)

    def advance() -> None:
        optimizer.param_groups[0]["lr"].copy_(rates.index_select(0, step)[0])
        inputs = problem.inputs(*(table.index_select(0, step)[0] for table in tables))
        errors, energies = problem.losses(parameters.factors(), *inputs)
        optimizer.zero_grad(set_to_none=True)
        (errors / energies).mean().backward()
        optimizer.step()
        step.add_(1)

    run_steps(advance, fit.steps, device)


def _draw(problem: FitProblem, fit: FitSettings, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything random about a fit, for all its steps: the arguments of ``FitProblem.inputs``."""
    generator = torch.Generator().manual_seed(seed)
    count, length = problem.source.shape[:2]
    pieces = max(2, length // PIECE)
    rows = torch.randint(count, (fit.steps, problem.rows, pieces), generator=generator)
    cuts = torch.randint(1, length, (fit.steps, pieces - 1), generator=generator)
    shares = torch.rand(fit.steps, problem.rows, generator=generator)
    shifts = torch.randint(1, problem.rows * length, (fit.steps, 2), generator=generator)
    return rows, cuts, shares, shifts


def _schedule(step: int, total: int) -> float:
    """Linear warm-up, cosine to zero."""
    return min(1.0, (step + 1) / min(WARM_UP, max(1, total // 3))) * 0.5 * (1 + math.cos(math.pi * step / total))


def _input_moments(layers: Sequence[SourceLayer], factors: Sequence[LayerFactors], stream: Tensor) -> Iterator[Tensor]:
    """E[x xᵀ] [D, D] of every attention's input, for the ``stream`` [N, T, D] that enters the first layer."""
    for layer, f in zip(layers[:-1], factors, strict=False):
        moment, stream = layer.run_stream(stream, f.to(torch.float32))
        yield moment
    width = layers[-1].view.width
    moment = torch.zeros(width, width, dtype=torch.float64, device=layers[-1].device)
    for _, hidden in steps(stream):
        x = layers[-1].features(hidden).flatten(0, 1)
        moment += (x.mT @ x).double()
    yield moment / (stream.shape[0] * stream.shape[1])
