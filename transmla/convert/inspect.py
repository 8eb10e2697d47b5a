"""Looking at a source before converting it: per-layer spectra, rotary energy, phases, loss per budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from transmla.artifacts import AttentionSpec, Plan
from transmla.convert.calibration_text import calibration_tokens, check_length
from transmla.convert.factorize import factorize
from transmla.convert.layers import relative_error
from transmla.convert.reconstruct import held_out
from transmla.convert.source_layer import SourceLayer
from transmla.core.spectrum import Spectrum, spectrum
from transmla.errors import TransmlaError
from transmla.export.card import public_name
from transmla.plan.make_plan import make_plan
from transmla.recipe import Recipe
from transmla.reporter import Reporter
from transmla.source.decoder_layer import embedded
from transmla.source.device import pick_device
from transmla.source.load import load_tokenizer
from transmla.source.open_source import computes_in_bfloat16, open_source

# Shares of the source's cache for which the loss is predicted.
BUDGETS = (0.5, 1 / 3, 0.25, 0.125)


@dataclass(frozen=True)
class LayerSurvey:
    """One layer's spectrum, and the closed form's relative attention error by budget."""

    spectrum: Spectrum
    errors: dict[float, float]


@dataclass(frozen=True)
class Survey:
    """All layers of one source; ``plans`` holds the shape each budget stands for."""

    source: str
    plans: dict[float, Plan]
    layers: list[LayerSurvey]

    def mean_error(self, budget: float) -> float:
        """Relative attention error at ``budget``, averaged over layers."""
        return sum(layer.errors[budget] for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "source": self.source,
            "budgets": [
                {
                    "cache_ratio": plan.cache_ratio,
                    "kv_lora_rank": plan.shape.kv_lora_rank,
                    "qk_rope_head_dim": plan.shape.qk_rope_head_dim,
                    "mean_error": self.mean_error(budget),
                }
                for budget, plan in self.plans.items()
            ],
            "layers": [
                {
                    **{name: value.tolist() for name, value in vars(layer.spectrum).items()},
                    "errors": list(layer.errors.values()),
                }
                for layer in self.layers
            ],
        }


def survey(recipe: Recipe, reporter: Reporter) -> Survey:
    """Run the source over the recipe's calibration text and measure every layer.

    The recipe's method is the one whose loss is predicted, its first phase alone and before any reconstruction;
    its widths are each budget's own. Layers that keep the source's attention have no error.

    Raises:
        TransmlaError: for bad input, and where no budget has a shape that fits.
    """
    source = open_source(recipe)
    plans = _plans(source.spec, recipe, source.dtype, reporter)
    check_length(source.spec, recipe.calibration.length)
    tokens = calibration_tokens(recipe, source, load_tokenizer(source.path), reporter)
    source.checkpoint.fingerprint()  # refuses weights that are not finite
    device = pick_device(recipe.device)
    half = computes_in_bfloat16(source, device)
    layer = SourceLayer(source.model, source.family, source.spec, device, half=half)
    stream = embedded(source.model, tokens, source.checkpoint.read(source.family.tensors["embed"]))
    layers = []
    reporter.stage("surveying layers", source.spec.num_hidden_layers)
    for i in range(source.spec.num_hidden_layers):
        layer.load(source.checkpoint.layer(source.family.tensors["layer"].format(i=i)), i)
        seen = layer.observe(stream)
        judged = stream[-held_out(len(stream)) :]
        errors = {}
        for budget, plan in plans.items():
            if i in plan.kept:
                errors[budget] = 0.0
                continue
            factors = factorize(layer.weights(), seen.stats, plan.at(i))
            errors[budget] = relative_error(layer, factors.to(torch.float32), judged)
        exact = seen.stats.to(torch.float64)
        layers.append(LayerSurvey(spectrum(layer.weights().to(torch.float64), exact, layer.spec), errors))
        stream = seen.hidden
        reporter.advance(i + 1)
    return Survey(public_name(recipe.source), plans, layers)


def _plans(spec: AttentionSpec, recipe: Recipe, dtype: str, reporter: Reporter) -> dict[float, Plan]:
    """The plan of every budget that has a shape; the others are reported."""
    plans: dict[float, Plan] = {}
    refusal = None
    for budget in BUDGETS:
        widths = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "pad_for")
        shape = {**dict.fromkeys(widths), "cache_ratio": budget, "reconstruct": "off"}
        try:
            plans[budget] = make_plan(spec, recipe.model_copy(update=shape), dtype)
        except TransmlaError as error:
            refusal = refusal or error
            reporter.message(f"no shape at {budget:.1%} of the cache: {error}")
    if refusal and not plans:
        raise refusal
    return plans
