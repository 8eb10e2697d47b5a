"""The model card of an export: what it is, what it was made from, the numbers, the command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from transmla.artifacts import value_bytes
from transmla.export.files import write_text
from transmla.export.manifest import CARD
from transmla.recipe import Recipe, dump_recipe

_TEMPLATE = """---
{metadata}---

# {name}, converted to Multi-head Latent Attention

`{source}` with its {attention} attention factored into MLA by [transmla](https://pypi.org/project/transmla)
{version}. {format}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
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


_NATIVE = {
    "format": "It is a dense `DeepseekV3ForCausalLM`: transformers loads it with no custom code.",
    "trust": "",
    "precision": "Use bfloat16 or float32: in half precision the latent norm underflows.\n\n",
}
_OWN = {
    "format": "It keeps the classes of its family ({family}); only their attention is another. Its code is in this "
    "repository, and in transmla: where that is installed, `transmla.load` reads the model without trusting remote "
    "code, and decodes over the latent itself.",
    "trust": ", trust_remote_code=True",
    "precision": "",
}


def cache_rows(plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, source and MLA of what a token caches, from a plan's plain values."""
    spec, shape = plan["spec"], plan["shape"]
    before = 2 * spec["num_key_value_heads"] * spec["head_dim"]
    after = shape["kv_lora_rank"] + shape["qk_rope_head_dim"]
    layers, bytes_each = spec["num_hidden_layers"], value_bytes(plan["dtype"])
    all_layers = plan.get("model_cache_values", after * layers)
    return [
        ("cache values per token and layer", f"{before}", f"{after} ({after / before:.1%})"),
        ("cache bytes per token", f"{before * layers * bytes_each:,}", f"{all_layers * bytes_each:,}"),
    ]


def attention_kind(spec: dict[str, Any]) -> str:
    """What the literature calls the source's attention."""
    if spec["num_key_value_heads"] == spec["num_attention_heads"]:
        return "multi-head"
    return "multi-query" if spec["num_key_value_heads"] == 1 else "grouped-query"


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


def _healing(folder: Path, told: dict[str, Any]) -> str:
    """What a card says of one healing."""
    settings = told["settings"]
    return _HEALING.format(
        teacher=public_name(settings["teacher"]),
        tokens=told["tokens"],
        data=", ".join(f"`{public_name(name)}`" for name in settings["data"]),
        trainable=settings["trainable"],
        minutes=told["seconds"] / 60,
        before=told["held_out_kl"]["before"],
        after=told["held_out_kl"]["after"],
        picture="\n![healing](healing.png)\n" if (folder / "healing.png").is_file() else "",
    )


def write_card(
    folder: Path, manifest: dict[str, Any], recipe: Recipe, evaluation: dict[str, Any] | None = None
) -> None:
    """Write ``README.md``; ``evaluation`` adds perplexity and divergence from the source."""
    plan = manifest["plan"]
    spec, shape = plan["spec"], plan["shape"]
    rows = [
        *cache_rows(plan),
        (
            "attention",
            f"{spec['num_attention_heads']} query, {spec['num_key_value_heads']} key/value heads of {spec['head_dim']}",
            f"latent {shape['kv_lora_rank']} + rotary key {shape['qk_rope_head_dim']}",
        ),
    ]
    if evaluation:
        text = f"{public_name(evaluation['text'])}, {evaluation['windows']} × {evaluation['window']} tokens"
        rows += [
            (
                f"perplexity ({text})",
                f"{evaluation['baseline_perplexity']:.2f}",
                f"{evaluation['perplexity']:.2f}",
            ),
            ("KL to the source, nats per token", "–", f"{evaluation['kl']:.4f}"),
            ("same most likely token as the source", "–", f"{evaluation['top1_agreement']:.1%}"),
        ]
    errors = [layer["relative_error"] for layer in manifest["layers"]]
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["mla", "transmla"]}
    shown = public_recipe(recipe)
    words = _NATIVE if manifest["format"] == "native" else _OWN
    if words is _OWN:
        metadata["tags"].append("custom_code")
    if recipe.source.count("/") == 1 and shown.source == recipe.source:  # a Hub id
        metadata["base_model"] = recipe.source
    notes = "".join(f"\n- {note}" for note in plan["notes"])
    card = _TEMPLATE.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=Path(recipe.output).name,
        source=shown.source,
        attention=attention_kind(spec),
        version=manifest["versions"]["transmla"],
        rows="\n".join(f"| {label} | {left} | {right} |" for label, left, right in rows),
        recipe=dump_recipe(shown),
        method=plan["method"],
        fold=plan["rotary"]["freqfold"],
        reconstruct=manifest["reconstruct"],
        mean_error=sum(errors) / len(errors),
        max_error=max(errors),
        healing="".join(_healing(folder, told) for told in manifest.get("healing", [])),
        notes=f"\nNotes:\n{notes}\n" if notes else "",
        **{key: text.format(family=spec["family"]) for key, text in words.items()},
    )
    write_text(folder / CARD, card)
