"""Compare two ways to convert attention with normed queries and keys.

    python scripts/qk_norm_routes.py small-qwen3 small-gemma3

A normed key is not a linear map of the hidden state. A latent that is such a map therefore loses information.

- The first way makes the latent from the normed keys and the values. This is exact before anything is cut, and the
  source's projections stay. Conversions use this way.
- The second way regresses the normed keys on the hidden state. It needs fewer weights, but only imitates the key norm.

Layers are converted one after the other on the train split of `pydoc`. Perplexity is measured on its test split.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, write_result
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from transmla.artifacts import LayerWeights
from transmla.convert.factorize import factorize
from transmla.convert.fit_layers import reconstruct
from transmla.convert.observe import observe
from transmla.convert.source_layer import SourceLayer, steps
from transmla.core.linalg import regularise
from transmla.plan.fit_settings import FITS
from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe
from transmla.source.attention_view import AttentionView
from transmla.source.decoder_layer import attention_input, embedded
from transmla.source.device import pick_device
from transmla.source.load import load_model, load_tokenizer
from transmla.source.open_source import open_source
from transmla.source.text import load_tokens

# Tokens per sequence.
LENGTH = 256


class Regressed(AttentionView):
    """Attention view of the second way: features are the normed queries and the hidden states.

    Normed keys are regressed on the hidden states.
    """

    def __init__(self, plain: AttentionView, inputs: Tensor) -> None:
        """Regress the normed keys of ``plain`` on ``inputs`` [n, D], the inputs of the attention."""
        vars(self).update(vars(plain))
        h, d = self.heads, self.heads.width
        self.queries = h.queries * d
        key = super().features(inputs)[..., self.queries : self.queries + h.groups * d].double()
        x = inputs.double()
        moment = regularise(x.mT @ x)
        self.keys = torch.linalg.solve(moment, x.mT @ key).mT.float()
        self.values = self.projection[-h.groups * d :].float()

    @property
    def width(self) -> int:
        return self.queries + self.projection.shape[1]

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([super().features(x)[..., : self.queries], x], -1)

    def heads_of(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().heads_of(super().features(features[..., self.queries :]))

    def weights(self) -> LayerWeights:
        d, order = self.heads.width, list(self.heads.order)
        q = pad(torch.eye(self.queries, device=self.keys.device), (0, self.projection.shape[1]))
        k, v = (pad(rows, (self.queries, 0)).unflatten(0, (-1, d)) for rows in (self.keys, self.values))
        o = self.attention.o_proj.weight.detach().float().unflatten(1, (self.heads.queries, d)).transpose(0, 1)
        return LayerWeights(q.unflatten(0, (-1, d))[:, order], k[:, order], v, o, self.rules)

    def blocks(self) -> Tensor:
        counts = torch.tensor([self.heads.width] * self.heads.queries + [self.projection.shape[1]])
        return torch.arange(self.heads.queries + 1).repeat_interleave(counts).to(self.projection.device)


@torch.no_grad()
def perplexity(model: Any, hidden: Tensor, tokens: Tensor) -> float:
    """Return the perplexity of ``tokens`` [N, T], given the last layer's output ``hidden`` [N, T, D]."""
    total = 0.0
    for start, part in steps(hidden):
        logits = model.lm_head(model.model.norm(part.to(model.device))).float()[:, :-1]
        targets = tokens[start : start + len(part), 1:].to(model.device)
        total += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    return float(torch.tensor(total / tokens[:, 1:].numel()).exp())


def measure(folder: Path, ratio: float, fit: str, regressed: bool, device: torch.device) -> float:
    """Convert on the train split of `pydoc` and return the perplexity on its test split.

    Args:
        folder: checkpoint folder of the source.
        ratio: share of the source's cache to keep.
        fit: value of --reconstruct.
        regressed: whether to regress the keys on the hidden states (the second way).
        device: where to convert.
    """
    recipe = parse_recipe({"source": str(folder), "output": "-", "cache_ratio": ratio, "reconstruct": fit}, "script")
    source = open_source(recipe)
    plan, tokenizer = make_plan(source.spec, recipe, source.dtype), load_tokenizer(source.path)
    texts = [load_tokens("pydoc", tokenizer, split=split, limit=64 * LENGTH) for split in ("train", "test")]
    train, test = (text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH) for text in texts)
    embedding = source.checkpoint.read(source.family.tensors["embed"])
    original, judged = (embedded(source.model, tokens, embedding).to(device) for tokens in (train, test))
    converted = original
    layer = SourceLayer(source.model, source.family, source.spec, device)
    for i in range(source.spec.num_hidden_layers):
        layer.load(source.checkpoint.layer(source.family.tensors["layer"].format(i=i)), i)
        if regressed:
            layer.view = Regressed(layer.view, attention_input(layer.module, original).flatten(0, 1))
        observed = observe(layer, original)
        factors = factorize(layer.weights(), observed.stats, plan.at(i))
        if fit in FITS:
            factors = reconstruct([layer], [factors], original, converted, FITS[fit], seed=i).factors[0]
        factors = factors.to(torch.float32)
        converted, judged = (layer.run_stream(stream, factors)[1] for stream in (converted, judged))
        original = observed.hidden
    return perplexity(load_model(source.path, dtype=torch.float32).to(device), judged, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of scripts/train_small.py, with q/k norms")
    parser.add_argument("--budgets", nargs="*", type=float, default=(0.5, 0.25), help="shares of the cache to keep")
    parser.add_argument("--reconstruct", nargs="*", default=("off", "fast"), help="fits to compare under")
    parser.add_argument("--device", default="auto", help="device to run on: auto, cpu, cuda, …")
    parser.add_argument("--result", type=Path, default=RESULTS / "qk_norm_routes/small.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    device, rows = pick_device(arguments.device), []
    for model in arguments.models:
        for budget in arguments.budgets:
            for fit in arguments.reconstruct:
                values = [measure(model, budget, fit, regressed, device) for regressed in (False, True)]
                names = ("normed keys and values", "regressed on hidden states")
                perplexities = {name: round(value, 3) for name, value in zip(names, values, strict=True)}
                rows.append({"model": model.name, "budget": budget, "reconstruct": fit, "perplexity": perplexities})
                print(f"{model.name}, {budget:.0%}, {fit}: {perplexities}", flush=True)
                write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
