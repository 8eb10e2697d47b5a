"""The model card of an export: what it is, what it was made from, the numbers, the command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from transmla.artifacts import AttentionSpec, Plan, value_bytes
from transmla.export.files import write_text
from transmla.export.hashes import CARD
from transmla.export.manifest import Manifest
from transmla.recipe import Recipe, dump_recipe

_TEMPLATE = """---
{metadata}---

# {name}, converted to Multi-head Latent Attention

`{source}` with its {attention} attention factored into MLA by [transmla](https://pypi.org/project/transmla)
{version}. {layout}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{load_arguments})
tokenizer = AutoTokenizer.from_pretrained("{name}"{load_arguments})
```

| | source | this model |
|---|---|---|
{rows}

{precision}## How it was made

```
transmla convert recipe.yaml
```

```yaml
{recipe}```

Method `{method}`, rotary frequencies folded by {fold}, reconstruction `{reconstruct}`. The attention output of a
layer, given the source's own input, differs from the source's by {mean_error:.3f} on average and {max_error:.3f}
at most (relative squared error on calibration text). Hashes, versions and every layer's numbers are in `transmla.json`.
{healing}{notes}"""

_HEALING = """
## Healing

Distilled from `{teacher}` over {tokens:,} tokens of {data} ({trainable} trained, {minutes:.1f} minutes): on sequences
kept aside, KL to the teacher went from {before:.4f} to {after:.4f} nats per token (`healing.yaml`, `transmla.json`).
{picture}"""


@dataclass(frozen=True)
class CardWords:
    """What the card says of the export's format.

    Attributes:
        layout: what the export is, in one or two sentences.
        load_arguments: more arguments of ``from_pretrained``, from a comma on.
        precision: advice on the dtype to run it in.
        tags: of the model card's metadata, beside those of all exports.
    """

    layout: str
    load_arguments: str = ""
    precision: str = ""
    tags: tuple[str, ...] = ()


def cache_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Label, source and MLA of what a token caches."""
    spec, width = plan.spec, value_bytes(plan.dtype)
    before, after = spec.cache_values, plan.shape.cache_values
    return [
        ("cache values per token and layer", f"{before}", f"{after} ({after / before:.1%})"),
        (
            "cache bytes per token",
            f"{before * spec.num_hidden_layers * width:,}",
            f"{plan.model_cache_values * width:,}",
        ),
    ]


def attention_kind(spec: AttentionSpec) -> str:
    """What the literature calls the source's attention."""
    if spec.num_key_value_heads == spec.num_attention_heads:
        return "multi-head"
    return "multi-query" if spec.num_key_value_heads == 1 else "grouped-query"


def public_name(name: str) -> str:
    """A Hub id or a text's alias as it is; of a file or folder only the last part, for a card is published."""
    if name.startswith("package:"):
        return Path(name).name
    path = os.path.expanduser(name)
    local = name.startswith((".", "/", "~")) or os.path.exists(path)
    return os.path.basename(os.path.abspath(path)) if local else name


def public_recipe(recipe: Recipe) -> Recipe:
    """The recipe as the card shows it, without anybody's folders."""
    calibration, evaluation = recipe.calibration, recipe.eval
    return recipe.model_copy(
        update={
            "source": public_name(recipe.source),
            "output": Path(recipe.output).name,
            "calibration": calibration.model_copy(update={"source": public_name(calibration.source)}),
            "eval": evaluation and evaluation.model_copy(update={"text": public_name(evaluation.text)}),
        }
    )


def _healing(folder: Path, record: dict[str, Any]) -> str:
    """What a card says of one healing."""
    settings = record["settings"]
    return _HEALING.format(
        teacher=public_name(settings["teacher"]),
        tokens=record["tokens"],
        data=", ".join(f"`{public_name(name)}`" for name in settings["data"]),
        trainable=settings["trainable"],
        minutes=record["seconds"] / 60,
        before=record["held_out_kl"]["before"],
        after=record["held_out_kl"]["after"],
        picture="\n![healing](healing.png)\n" if (folder / "healing.png").is_file() else "",
    )


def write_card(
    folder: Path, manifest: Manifest, recipe: Recipe, words: CardWords, evaluation: dict[str, Any] | None = None
) -> None:
    """Write ``README.md`` into ``folder``.

    Args:
        folder: the export.
        manifest: of the export.
        recipe: of its conversion.
        words: what its format says of itself.
        evaluation: perplexity and divergence from the source, as ``transmla eval`` measures them.
    """
    plan, shown = manifest.plan, public_recipe(recipe)
    errors = [layer["relative_error"] for layer in manifest.layers]
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["mla", "transmla", *words.tags]}
    if recipe.source.count("/") == 1 and shown.source == recipe.source:  # a Hub id
        metadata["base_model"] = recipe.source
    rows = [*_plan_rows(plan), *(_evaluation_rows(evaluation) if evaluation else [])]
    notes = "".join(f"\n- {note}" for note in plan.notes)
    card = _TEMPLATE.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=Path(recipe.output).name,
        source=shown.source,
        attention=attention_kind(plan.spec),
        version=manifest.versions["transmla"],
        layout=words.layout,
        load_arguments=words.load_arguments,
        precision=f"{words.precision}\n\n" if words.precision else "",
        rows="\n".join(f"| {label} | {left} | {right} |" for label, left, right in rows),
        recipe=dump_recipe(shown),
        method=plan.method,
        fold=plan.rotary.freqfold,
        reconstruct=manifest.reconstruct,
        mean_error=sum(errors) / len(errors),
        max_error=max(errors),
        healing="".join(_healing(folder, record) for record in manifest.healing),
        notes=f"\nNotes:\n{notes}\n" if notes else "",
    )
    write_text(folder / CARD, card)


def _plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    spec, shape = plan.spec, plan.shape
    attention = (
        "attention",
        f"{spec.num_attention_heads} query, {spec.num_key_value_heads} key/value heads of {spec.head_dim}",
        f"latent {shape.kv_lora_rank} + rotary key {shape.qk_rope_head_dim}",
    )
    return [*cache_rows(plan), attention]


def _evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    text = f"{public_name(evaluation['text'])}, {evaluation['windows']} × {evaluation['window']} tokens"
    before, after = evaluation["baseline_perplexity"], evaluation["perplexity"]
    return [
        (f"perplexity ({text})", f"{before:.2f}", f"{after:.2f}"),
        ("KL to the source, nats per token", "–", f"{evaluation['kl']:.4f}"),
        ("same most likely token as the source", "–", f"{evaluation['top1_agreement']:.1%}"),
    ]
