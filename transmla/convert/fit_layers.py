"""Fit the factors of consecutive layers to the source's layers, starting from the closed form.

The inputs are the hidden states of the layers converted before, and the target of each layer is the source's hidden
states. The fit therefore also corrects the errors of earlier layers (error feedback).

The source's layers give a target for any input, not only for the calibration text. Each step therefore makes new
inputs (``fit_inputs.py``). Such inputs suffice to fit a million weights on about ten thousand tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors
from transmla.convert.cuda_graphs import deterministic, run_steps, side_stream, wait_for_side_stream
from transmla.convert.fit_inputs import kinds_of_steps, sizes_of_steps
from transmla.convert.fit_vector import FitParameters
from transmla.convert.source_layer import SourceLayer, steps
from transmla.core.factors import orthonormal_latents
from transmla.core.fit_coordinates import Coordinates
from transmla.plan.fit_settings import FitSettings

# Learning-rate factor for the second attempt. On a small Mixtral at half the cache, all fast fits failed at a rate of
# 5e-3 (KL 0.51 nats per token), and all succeeded at 1e-3 (KL 0.25). Measured on one H200, pydoc's test split.
RETRY_RATE = 0.2
# Share of the calibration sequences that are held out to evaluate the fit: of 64, enough for one of each text of the
# default mixture.
HELD_OUT = 0.16
# Tokens for each feature that suffice to measure the moments of a layer's inputs.
TOKENS_PER_FEATURE = 32
# Steps of linear warm-up of the learning rate.
WARM_UP = 20
# Adam's coefficients for the running averages of the gradient and its square.
BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Reconstruction:
    """Result of fitting consecutive layers, with one entry per layer.

    Attributes:
        factors: the layer's factors after the fit.
        before: relative squared error on held-out text before the fit.
        after: relative squared error on held-out text after the fit.
    """

    factors: tuple[LayerFactors, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


def held_out(sequences: int) -> int:
    """Return how many of ``sequences`` calibration sequences, counted from the end, are held out."""
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
    """Fit ``factors`` so that consecutive layers map the ``converted`` hidden states to the source's.

    If the fit does not lower the error on the held-out sequences, it is repeated once with a lower learning rate.

    Args:
        layers: consecutive source layers, with their weights.
        factors: starting point for each layer; never changed.
        source: hidden states [N, T, D] that enter the first layer in the source, N ≥ 2.
        converted: hidden states [N, T, D] that enter the first layer in the export.
        fit: settings of the fit.
        seed: seed of all random numbers; equal seeds give equal factors.

    Returns:
        The fitted factors in float64; or the starting point, if no attempt lowers the summed held-out error.
    """
    training = slice(0, len(source) - held_out(len(source)))
    evaluated = source[training.stop :], converted[training.stop :]
    moments = _input_moments(layers, factors, converted[training])
    starts = zip(layers, factors, moments, strict=True)
    coordinates = [Coordinates.of(f, m, layer.view.blocks()) for layer, f, m in starts]
    masks = [layer.view.masks() for layer in layers]
    with deterministic():
        problem = FitProblem(layers, source[training], converted[training], fit)
        before = problem.error(factors, *evaluated)
        for rate_factor in (1.0, RETRY_RATE):
            parameters = FitParameters(coordinates, factors, masks)
            with layers[0].fast_products():
                descend(problem, parameters, replace(fit, rate=fit.rate * rate_factor), seed)
            with torch.no_grad():
                fitted = tuple(orthonormal_latents(f.to(torch.float64)) for f in parameters.factors())
            after = problem.error(fitted, *evaluated)
            # A comparison with NaN is false, so a fit that diverged is discarded.
            if sum(after) < sum(before):
                return Reconstruction(fitted, before, after)
    return Reconstruction(tuple(factors), before, before)


class FitProblem:
    """The inputs that layers are fitted on, and the error of given factors on these inputs.

    Attributes:
        inputs: makers of the inputs of each kind of step.
    """

    def __init__(self, layers: Sequence[SourceLayer], source: Tensor, converted: Tensor, fit: FitSettings) -> None:
        """Move the training sequences to the layers' device.

        Args:
            layers: consecutive source layers, with their weights.
            source: hidden states [N, T, D] that enter the first layer in the source.
            converted: hidden states [N, T, D] that enter the first layer in the export.
            fit: settings of the fit.
        """
        self.layers, self.through_mlp = layers, fit.through_mlp
        self.device = layers[0].device
        self.inputs = sizes_of_steps(source.to(self.device), (converted - source).to(self.device), fit.tokens)

    def losses(
        self, factors: Sequence[LayerFactors], source: Tensor, converted: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of every layer, and the mean square of what the source's layer adds.

        Both divide each token by the root mean square of the source's hidden state after the layer, and bound what one
        token can contribute.

        Args:
            factors: the factors of each layer.
            source: hidden states [N, T, D] that enter the first layer in the source.
            converted: hidden states [N, T, D] that enter the first layer in the export.
            positions: increasing positions [T] of the tokens; None means 0 to T − 1.

        Returns:
            (errors [L], energies [L]) for L layers; their ratio is the relative squared error.
        """
        # One layer is too small to fill a GPU, so the source and the export run in parallel.
        with side_stream(self.device), torch.no_grad():
            targets = self._run(source, [None] * len(self.layers), positions)
            # The next layer's RMSNorm divides every token by its root mean square, so the error is measured likewise.
            weights = [after.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt() for after in targets]
            added = [after - before for before, after in pairwise([source, *targets])]
            energies = [
                _bounded((add * weight).square().mean(-1)).mean() for add, weight in zip(added, weights, strict=True)
            ]
        outputs = self._run(converted, factors, positions)
        wait_for_side_stream(self.device)
        triples = zip(outputs, targets, weights, strict=True)
        errors = [_bounded(((output - target) * weight).square().mean(-1)).mean() for output, target, weight in triples]
        return torch.stack(errors), torch.stack(energies)

    def _run(self, stream: Tensor, factors: Sequence[LayerFactors | None], positions: Tensor | None) -> list[Tensor]:
        """Return the hidden states [N, T, D] after each layer, with ``factors`` or, for None, the source's attention.

        Without ``through_mlp``, the last layer stops before its MLP.
        """
        outputs = []
        for layer, f in zip(self.layers, factors, strict=True):
            through_mlp = self.through_mlp or layer is not self.layers[-1]
            stream = layer.run(stream, f, positions=positions, through_mlp=through_mlp)
            outputs.append(stream)
        return outputs

    @torch.no_grad()
    def error(self, factors: Sequence[LayerFactors], source: Tensor, converted: Tensor) -> tuple[float, ...]:
        """Return the relative squared error of every layer for hidden states ``source``, ``converted`` [N, T, D]."""
        factors = [f.to(torch.float32) for f in factors]
        total = torch.zeros(2, len(factors), device=self.device)
        for start, part in steps(source):
            other = converted[start : start + len(part)]
            losses = self.losses(factors, part.to(self.device), other.to(self.device))
            total += torch.stack(losses) * len(part)
        return tuple((total[0] / total[1].clamp_min(1e-30)).tolist())


def _bounded(errors: Tensor) -> Tensor:
    """Return e / (1 + e) for relative squared errors e of tokens.

    Some models give a few tokens massive activations (arXiv 2402.17762). A token that has them only in the source, or
    only in the export, has an error a thousand times that of all others, which no later layer can mend. Without the
    bound, it would be all that a fit sees.
    """
    return errors / (1 + errors)


def descend(problem: FitProblem, parameters: FitParameters, fit: FitSettings, seed: int) -> None:
    """Minimise the relative error with Adam; changes ``parameters`` in place.

    Args:
        problem: the inputs and the error.
        parameters: the parameters to fit.
        fit: settings of the fit.
        seed: seed of all random numbers.
    """
    device = problem.device
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

    def advance(kind: int) -> None:
        optimizer.param_groups[0]["lr"].copy_(rates.index_select(0, step)[0])
        arguments = [table.index_select(0, drawn[kind])[0] for table in tables[kind]]
        errors, energies = problem.losses(parameters.factors(), *problem.inputs[kind].make(*arguments))
        optimizer.zero_grad(set_to_none=True)
        (errors / energies).mean().backward()
        optimizer.step()
        step.add_(1)
        drawn[kind].add_(1)

    run_steps([partial(advance, kind) for kind in range(len(problem.inputs))], kinds, device)


def _schedule(step: int, total: int) -> float:
    """Return the factor on the learning rate at ``step``: linear warm-up times cosine decay to zero."""
    return min(1.0, (step + 1) / min(WARM_UP, max(1, total // 3))) * 0.5 * (1 + math.cos(math.pi * step / total))


def _input_moments(layers: Sequence[SourceLayer], factors: Sequence[LayerFactors], stream: Tensor) -> Iterator[Tensor]:
    """Yield E[x xᵀ] [F, F] of the features of every layer's attention.

    Hidden states ``stream`` [N, T, D] enter the first layer; each other layer reads the layer before, with ``factors``.
    Of long texts, every second to fourth sequence is read.
    """
    width = layers[-1].view.width
    enough = stream.shape[0] * stream.shape[1] // (TOKENS_PER_FEATURE * width)
    stream = stream[:: max(1, min(4, enough))]
    for layer, f in zip(layers[:-1], factors, strict=False):
        moment, stream = layer.run_stream(stream, f.to(torch.float32))
        yield moment
    moment = torch.zeros(width, width, dtype=torch.float64, device=layers[-1].device)
    for _, hidden in steps(stream):
        moment += layers[-1].moment(layers[-1].features(hidden).flatten(0, 1))
    yield moment / (stream.shape[0] * stream.shape[1])
