"""Write the model card of an export: what the model is, how to load it, its measurements, and how it was made."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from transmla.artifacts import AttentionSpec, Plan, value_bytes
from transmla.export.evaluation_table import caption, table_columns, table_rows
from transmla.export.hashes import CARD
from transmla.export.manifest import Manifest
from transmla.files import write_text
from transmla.recipe import Recipe, dump_recipe
from transmla.shares import name_and_weight, percentages

_TEMPLATE = """---
{metadata}---

# {name}

This model is `{source}` with its {attention} attention converted to Multi-head Latent Attention (MLA), the attention
of DeepSeek-V3. For each token, a converted layer caches one latent vector and one rotary key, instead of the keys and
values of all heads. The model was converted with [transmla](https://pypi.org/project/transmla) {version}.
{layout}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{name}"  # this folder, or the id of this model on the Hub
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto"{load_arguments})
tokenizer = AutoTokenizer.from_pretrained(path{load_arguments})
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

With transmla installed, `transmla.load` in the place of `from_pretrained` decodes over the latent cache without
expanding it:

```python
import transmla

model = transmla.load(path, dtype="auto")
```
{precision}
## Compared with the source

| | source | this model |
|---|---|---|
{rows}
{evaluation}
## How it was made

This command converted the source:

```
transmla convert recipe.yaml
```

The file `recipe.yaml` holds these settings (local paths are shortened here):

```yaml
{recipe}```

The settings in effect were `method: {method}`, `freqfold: {fold}` and `reconstruct: {reconstruct}`.

Each layer was compared with the same layer of the source, on calibration text. Both layers read the source's hidden
states.{texts} The relative squared error of the attention output is {mean_error:.3f} on average over the layers, and
{max_error:.3f} in the worst layer. The file `transmla.json` lists the errors of every layer, the software versions and
the hashes of the files.
{promise}{healing}{changed}{notes}"""

_NOT_EVALUATED = """
What the conversion costs in quality was not evaluated: run `transmla eval {name} --baseline {source}`.
"""

_EVALUATION = """
## Evaluation

{table}

The baseline is the source. {caption} The file `evaluation.json` has more numbers, such as the KL by position.
"""

_PROMISE = """
The cache is the smallest that was expected to keep the KL to the source at {accepted:g} nats per token. Before any
healing, it is {measured:.4f} on text that neither calibrated the conversion nor chose the cache.
"""

_HEALING = """
## Healing

After the conversion, the model was distilled from `{teacher}` on {tokens:,} tokens of {data}. The training took
{minutes:.1f} minutes, with `trainable: {trainable}`. On held-out sequences, the KL divergence from the teacher went
from {before:.4f} to {after:.4f} nats per token. The file `transmla.json` records the settings and the training curve.
{picture}"""


# What the card says of an export that other software has saved again, by whether its weights have changed.
_CHANGED = {
    True: """
## Changed after the conversion

Other software has changed the weights since, for example by fine-tuning. The errors above describe the model before.
""",
    False: """
## Saved again

Other software has saved the model since, with the same weights.
""",
}


@dataclass(frozen=True)
class CardWords:
    """The sentences and settings that an export's format adds to the model card.

    Attributes:
        layout: sentences on what the export is and how it is loaded. "It" in the first sentence is the model.
        load_arguments: further arguments of ``from_pretrained``, with a comma in front.
        precision: advice on the dtype for inference; empty if there is none.
        tags: tags of the card's metadata, besides the tags of all exports.
    """

    layout: str
    load_arguments: str = ""
    precision: str = ""
    tags: tuple[str, ...] = ()


def cache_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Return the card's rows on the cache. Each row is a label, the source's value and the export's value."""
    spec, width = plan.spec, value_bytes(plan.dtype)
    before, after = spec.cache_values, plan.shape.cache_values
    values, layer = f"{after} ({after / before:.1%})", "converted layer" if plan.kept else "layer"
    if plan.layer_shapes:
        mean = plan.model_cache_values / spec.num_hidden_layers
        values = f"{by_layer(plan, 'cache_values')}, mean {mean:.0f} ({mean / before:.1%})"
    return [
        (f"cache values per token and {layer}", f"{before}", values),
        (
            "cache bytes per token",
            f"{before * spec.num_hidden_layers * width:,}",
            f"{plan.model_cache_values * width:,}",
        ),
    ]


def by_layer(plan: Plan, width: str) -> str:
    """Return a width of the converted layers, the name of an attribute of ``MLAShape``: "64", or "48 to 160"."""
    layers = [i for i in range(plan.spec.num_hidden_layers) if i not in plan.kept]
    widths = {getattr(plan.at(i).shape, width) for i in layers} if plan.layer_shapes else {getattr(plan.shape, width)}
    return f"{min(widths)}" if len(widths) == 1 else f"{min(widths)} to {max(widths)}"


def attention_kind(spec: AttentionSpec) -> str:
    """Return the common name of the source's attention: multi-head, grouped-query or multi-query."""
    if spec.num_key_value_heads == spec.num_attention_heads:
        return "multi-head"
    return "multi-query" if spec.num_key_value_heads == 1 else "grouped-query"


def public_name(name: str) -> str:
    """Return a name that may be published on the card.

    A Hub id or the alias of a text stays as it is. A local path is cut to its last part.
    """
    if name.startswith("package:"):
        return Path(name).name
    path = os.path.expanduser(name)
    local = name.startswith((".", "/", "~")) or os.path.exists(path)
    return os.path.basename(os.path.abspath(path)) if local else name


def _public_entry(entry: str) -> str:
    """Return an entry ``NAME`` or ``NAME:WEIGHT`` of a mixture with a public name."""
    name, weight = name_and_weight(entry)
    return public_name(name) if weight is None else f"{public_name(name)}:{weight:g}"


def public_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with every local path cut to its last part, because the card is published."""
    calibration, evaluation = recipe.calibration, recipe.eval
    return recipe.model_copy(
        update={
            "source": public_name(recipe.source),
            "output": Path(recipe.output).name,
            "calibration": calibration.model_copy(update={"source": tuple(map(_public_entry, calibration.source))}),
            "eval": evaluation
            and evaluation.model_copy(update={"text": tuple(public_name(name) for name in evaluation.text)}),
        }
    )


def public_healing(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a healing with every local path cut to its last part, because they are published."""
    names: dict[str, Any] = {
        key: public_name(settings[key]) for key in ("student", "teacher", "output") if key in settings
    }
    return {**settings, **names, "data": [_public_entry(entry) for entry in settings["data"]]}


def public_evaluation(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation with every local path cut to its last part, because it is published.

    Args:
        result: the result of ``evaluate.compare.evaluate_models``, with a baseline.
    """
    names = {key: public_name(result[key]) for key in ("model", "baseline")}
    texts = [{**text, "text": public_name(text["text"])} for text in result["texts"]]
    return {**result, **names, "texts": texts}


def _healings(folder: Path, records: list[dict[str, Any]]) -> str:
    """Return the card's sections on all healings. The folder's picture shows the last one."""
    drawn = (folder / "healing.png").is_file()
    return "".join(_healing(record, drawn=drawn and i == len(records)) for i, record in enumerate(records, 1))


def _healing(record: dict[str, Any], *, drawn: bool) -> str:
    """Return the card's section on one healing, with the picture of its curve if it is ``drawn``."""
    settings = record["settings"]
    return _HEALING.format(
        teacher=public_name(settings["teacher"]),
        tokens=record["tokens"],
        data=", ".join(f"`{_public_entry(entry)}`" for entry in settings["data"]),
        trainable=settings["trainable"],
        minutes=record["seconds"] / 60,
        before=record["held_out_kl"]["before"],
        after=record["held_out_kl"]["after"],
        picture="\n![healing](healing.png)\n" if drawn else "",
    )


def write_card(
    folder: Path, manifest: Manifest, recipe: Recipe, words: CardWords, evaluation: Mapping[str, Any] | None = None
) -> None:
    """Write ``README.md`` into ``folder``.

    Args:
        folder: folder of the export.
        manifest: the export's manifest.
        recipe: recipe of the conversion.
        words: the sentences and settings of the export's format.
        evaluation: comparison with the source, as ``public_evaluation`` returns it; None before an evaluation.
    """
    plan, shown = manifest.plan, public_recipe(recipe)
    errors = [layer["relative_error"] for layer in manifest.layers]
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["mla", "transmla", *words.tags]}
    metadata |= manifest.source.card
    if recipe.source.count("/") == 1 and shown.source == recipe.source:  # a Hub id
        metadata["base_model"] = recipe.source
    notes, name = "".join(f"\n- {note}" for note in plan.notes), Path(recipe.output).name
    card = _TEMPLATE.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=name,
        source=shown.source,
        attention=attention_kind(plan.spec),
        version=manifest.versions["transmla"],
        layout=words.layout,
        load_arguments=words.load_arguments,
        precision=f"\n{words.precision}\n" if words.precision else "",
        rows="\n".join(f"| {label} | {left} | {right} |" for label, left, right in _plan_rows(plan)),
        evaluation=_evaluation(evaluation)
        if evaluation
        else _NOT_EVALUATED.format(name=shlex.quote(name), source=shlex.quote(shown.source)),
        recipe=dump_recipe(shown),
        method=plan.method,
        fold=plan.rotary.freqfold,
        reconstruct=manifest.reconstruct,
        texts=_texts(manifest.texts),
        mean_error=sum(errors) / len(errors),
        max_error=max(errors),
        promise=_PROMISE.format(**vars(manifest.promise)) if manifest.promise else "",
        healing=_healings(folder, manifest.healing),
        changed=_CHANGED[manifest.weights_changed] if manifest.resaved or manifest.weights_changed else "",
        notes=f"\n## Notes\n{notes}\n" if notes else "",
    )
    write_text(folder / CARD, card)


def _texts(shares: dict[str, float]) -> str:
    """Return the card's sentence on the calibration texts; empty if they are unknown."""
    listed = ", ".join(f"{share} `{public_name(name)}`" for name, share in percentages(shares).items())
    return f" The text was {listed}." if shares else ""


def _plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    spec = plan.spec
    latent, rotary = by_layer(plan, "kv_lora_rank"), by_layer(plan, "qk_rope_head_dim")
    attention = (
        "attention",
        f"{spec.num_attention_heads} query heads, {spec.num_key_value_heads} key/value heads, width {spec.head_dim}",
        f"latent of width {latent}, rotary key of width {rotary}",
    )
    return [*cache_rows(plan), attention]


def _evaluation(result: Mapping[str, Any]) -> str:
    """Return the card's section on an evaluation."""
    columns = table_columns(result)
    lines = [columns, ["---"] * len(columns), *table_rows(result)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return _EVALUATION.format(table=table, caption=caption(result))
