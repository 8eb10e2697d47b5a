"""Fit the factors of consecutive layers to the source's layers, starting from the closed form.

The inputs are the hidden states of the layers converted before, and the target of each layer is the source's hidden
states. The fit therefore also corrects the errors of earlier layers (error feedback).

The source's layers give a target for any input, not only for the calibration text. Each step therefore makes new
inputs (``fit_inputs.py``). Such inputs suffice to fit a million weights on about ten thousand tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors
from transmla.convert.deterministic import deterministic
from transmla.convert.factorize import from_first
from transmla.convert.fit_inputs import sizes_of_steps
from transmla.convert.fit_steps import descend
from transmla.convert.fit_vector import FitParameters
from transmla.convert.side_stream import side_stream, wait_for_side_stream
from transmla.convert.source_layer import SourceLayer, steps
from transmla.core.factors import orthonormal_latents
from transmla.core.fit_coordinates import Coordinates
from transmla.plan.fit_settings import FitSettings
from transmla.token_split import TokenSplit

# Learning-rate factor for the second attempt. On a small Mixtral at half the cache, all fast fits failed at a rate of
# 5e-3 (KL 0.51 nats per token), and all succeeded at 1e-3 (KL 0.25). Measured on one H200, pydoc's test split.
RETRY_RATE = 0.2
# Share of the calibration sequences that are held out to evaluate the fit: of 64, enough for one of each text of the
# default mixture.
HELD_OUT = 0.16
# Tokens for each feature that suffice to measure the moments of a layer's inputs.
TOKENS_PER_FEATURE = 32


@dataclass(frozen=True)
class Reconstruction:
    """Result of fitting consecutive layers, with one entry per layer.

    Attributes:
        factors: the layer's factors after the fit.
        before: relative squared error on held-out text before the fit.
        after: relative squared error on held-out text after the fit.
        attempts: number of fits that were run.
    """

    factors: tuple[LayerFactors, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    attempts: int


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
    training, ranks = slice(0, len(source) - held_out(len(source))), layers[0].ranks
    evaluated = source[training.stop :], converted[training.stop :]
    coordinates = _coordinates(layers, factors, converted[training])
    masks = [layer.view.masks() for layer in layers]
    with deterministic():
        problem = FitProblem(layers, source[training], converted[training], fit)
        before = problem.error(factors, *evaluated)
        rates = 1.0, RETRY_RATE
        for attempt, rate_factor in enumerate(rates, start=1):
            parameters = FitParameters(coordinates, factors, masks, ranks, half=layers[0].half)
            with layers[0].fast_products():
                descend(problem, parameters, replace(fit, rate=fit.rate * rate_factor), seed)
            fitted = tuple(from_first(orthonormal_latents(f.to(torch.float64)), ranks) for f in parameters.result())
            after = problem.error(fitted, *evaluated)
            # A comparison with NaN is false, so a fit that diverged is discarded.
            if sum(after) < sum(before):
                return Reconstruction(fitted, before, after, attempt)
    return Reconstruction(tuple(factors), before, before, len(rates))


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
        self.device, self.ranks = layers[0].device, layers[0].ranks
        self.inputs = sizes_of_steps(source.to(self.device), (converted - source).to(self.device), fit.tokens)

    def losses(
        self,
        factors: Sequence[LayerFactors],
        source: Tensor,
        converted: Tensor,
        positions: Tensor | None = None,
        split: TokenSplit | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of every layer, and the mean square of what the source's layer adds.

        Both divide each token by the root mean square of the source's hidden state after the layer, and bound what one
        token can contribute.

        Args:
            factors: the factors of each layer.
            source: hidden states [N, T, D] that enter the first layer in the source.
            converted: hidden states [N, T, D] that enter the first layer in the export.
            positions: increasing positions [T] of the tokens; None means 0 to T − 1.
            split: which tokens of a sequence these are, if several processes share its tokens.

        Returns:
            (errors [L], energies [L]) for L layers; their ratio is the relative squared error.
        """
        # One layer is too small to fill a GPU, so the source and the export run in parallel.
        with side_stream(self.device), torch.no_grad():
            targets = self._run(source, [None] * len(self.layers), positions, split)
            # The next layer's RMSNorm divides every token by its root mean square, so the error is measured likewise.
            weights = [after.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt() for after in targets]
            added = [after - before for before, after in pairwise([source, *targets])]
            energies = [
                _bounded((add * weight).square().mean(-1)).mean() for add, weight in zip(added, weights, strict=True)
            ]
        outputs = self._run(converted, factors, positions, split)
        wait_for_side_stream(self.device)
        triples = zip(outputs, targets, weights, strict=True)
        errors = [_bounded(((output - target) * weight).square().mean(-1)).mean() for output, target, weight in triples]
        return torch.stack(errors), torch.stack(energies)

    def _run(
        self,
        stream: Tensor,
        factors: Sequence[LayerFactors | None],
        positions: Tensor | None,
        split: TokenSplit | None,
    ) -> list[Tensor]:
        """Return the hidden states [N, T, D] after each layer, with ``factors`` or, for None, the source's attention.

        Without ``through_mlp``, the last layer stops before its MLP.
        """
        outputs = []
        for layer, f in zip(self.layers, factors, strict=True):
            through_mlp = self.through_mlp or layer is not self.layers[-1]
            stream = layer.run(stream, f, positions=positions, through_mlp=through_mlp, split=split)
            outputs.append(stream)
        return outputs

    @torch.no_grad()
    def error(self, factors: Sequence[LayerFactors], source: Tensor, converted: Tensor) -> tuple[float, ...]:
        """Return the relative squared error of every layer for hidden states ``source``, ``converted`` [N, T, D]."""
        factors = [f.to(torch.float32) for f in factors]
        total = torch.zeros(2, len(factors), device=self.device)
        for start, part in steps(source, self.ranks):
            other = converted[start : start + len(part)]
            losses = self.losses(factors, part.to(self.device), other.to(self.device))
            total += torch.stack(losses) * len(part)
        self.ranks.add_up(total)
        return tuple((total[0] / total[1].clamp_min(1e-30)).tolist())


def _bounded(errors: Tensor) -> Tensor:
    """Return e / (1 + e) for relative squared errors e of tokens.

    Some models give a few tokens massive activations (arXiv 2402.17762). A token that has them only in the source, or
    only in the export, has an error a thousand times that of all others, which no later layer can mend. Without the
    bound, it would be all that a fit sees.
    """
    return errors / (1 + errors)


def _coordinates(layers: Sequence[SourceLayer], factors: Sequence[LayerFactors], stream: Tensor) -> list[Coordinates]:
    """Return the coordinates of every layer, for hidden states ``stream`` [N, T, D] that enter the first.

    The decomposition of a layer's moments takes as long as many steps, so each process does it for other layers.

    Raises:
        LinAlgError: in all processes, if the decomposition of one layer fails.
    """
    ranks = layers[0].ranks
    own = range(len(layers))[ranks.share(len(layers))]
    # All moments are measured first, because the processes measure them together.
    starts = zip(layers, factors, list(_input_moments(layers, factors, stream)), strict=True)
    coordinates, failure = list[Coordinates](), None
    for i, (layer, f, moment) in enumerate(starts):
        try:
            coordinates.append(Coordinates.of(f, moment, layer.view.blocks(), empty=i not in own))
        except torch.linalg.LinAlgError as error:
            failure = error
    # The other processes would wait for the matrices.
    failures = torch.tensor(float(failure is not None), device=layers[0].device)
    ranks.add_up(failures)
    if bool(failures):
        raise failure or torch.linalg.LinAlgError("another process could not decompose them")
    ranks.complete([c.shrink for c in coordinates], layers[0].device)
    ranks.complete([c.grow for c in coordinates], layers[0].device)
    return coordinates


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
    for _, hidden in steps(stream, layers[-1].ranks):
        moment += layers[-1].moment(layers[-1].features(hidden).flatten(0, 1))
    layers[-1].ranks.add_up(moment)
    yield moment / (stream.shape[0] * stream.shape[1])
