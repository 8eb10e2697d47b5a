"""Walk every field of every family's config: an export changes as its source does, or the field is refused by name.

    python scripts/config_walk.py
    python scripts/config_walk.py --families llama mistral --fields sliding_window layer_types

Each case changes one field in the config.json of a tiny source with three layers, converts the source without a cut,
and compares the logits of export and source, both run by stock transformers: of whole texts, and decoded over the
cache. Besides the fields of its own config class, each family gets the fields of all other families, and the fields
that transformers' shared code reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

import torch  # noqa: E402
from config_walk_fields import CHANGES, SHELF, Case, adapted, base, cases  # noqa: E402
from helpers.tiny_sources import build_tokenizer  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, logging  # noqa: E402
from transformers.modeling_utils import PreTrainedModel  # noqa: E402

import transmla  # noqa: E402
from transmla.convert.pipeline import convert  # noqa: E402
from transmla.errors import TransmlaError  # noqa: E402
from transmla.modeling.transformers_api import CACHE_ARGUMENT  # noqa: E402
from transmla.recipe import parse_recipe  # noqa: E402
from transmla.source.describe import describe  # noqa: E402

# Other words that a refusal may name a field by.
ALIASES = {
    "rope_parameters": ("rope_type", "partial_rotary_factor", "longrope", "mscale_all_dim", "llama_4_scaling_beta"),
    "rope_scaling": ("rope_type", "longrope"),
    "use_bidirectional_attention": ("non-causal",),
    "text_config": ("multimodal",),
    "layer_types": ("sliding_window", "unknown model family"),
}
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened to a case.

    Attributes:
        kind: "same", "refused", "stock refuses", "unlike" or "unnamed"; the last two are faults.
        changed: whether the field changed the source's logits.
        detail: the error's text, or the largest relative difference.
    """

    kind: str
    changed: bool
    detail: str


FAULTS = ("unlike", "unnamed")


def build(fields: dict[str, Any], folder: Path) -> Any:
    """Write a source whose config.json holds ``fields``, and return the model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    model = random_model(AutoConfig.from_pretrained(folder))
    edited = (folder / "config.json").read_text()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(edited)
    build_tokenizer(folder, 128)
    return model


def random_model(config: Any) -> Any:
    """Return a model of a config. The values of a tensor follow from its name."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.normal_(std=0.3, generator=generator)
            if parameter.dim() == 1 and "bias" not in name and "sinks" not in name:
                parameter.add_(0.0 if "gemma" in config.model_type else 1.0)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return logits [2, 24 + 4, V]: of a whole text, and of its last four tokens decoded over the cache."""
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    whole = model(tokens, use_cache=False).logits
    out = model(tokens[:, :20], use_cache=True)
    pieces = [whole]
    for i in range(20, 24):
        out = model(tokens[:, i : i + 1], use_cache=True, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]})
        pieces.append(out.logits)
    return torch.cat(pieces, 1).float()


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference in parts of the largest logit; infinite for other shapes or NaN."""
    if left.shape != right.shape or not bool(left.isfinite().all() and right.isfinite().all()):
        return float("inf")
    return float((left - right).abs().max() / right.abs().max())


def uncut(config: Any, form: str) -> dict[str, Any]:
    """Return recipe settings with which nothing of the attention is cut."""
    spec = describe(config)
    rotated = max(kind.rotary_pairs for kind in spec.kinds or (spec.kind(0),))
    groups, unrotated = spec.num_key_value_heads, spec.head_dim - 2 * max(rotated, 1)
    rank = min(groups * (spec.head_dim + unrotated) + 1, spec.features, 2 * groups * spec.head_dim)
    if form == "native":
        rank = min(2 * groups * spec.head_dim, spec.hidden_size)
    return {
        "kv_lora_rank": rank,
        "qk_rope_head_dim": 2 * max(rotated, 1) * groups,
        "allow_no_saving": True,
        "custom_rope": form == "native" and groups > 1,
    }


def walk(case: Case, folder: Path) -> Outcome:
    """Convert the source of a case in ``folder``, which must not exist, and compare both models."""
    before = _base_logits(case.family)
    try:
        model, stock = build(adapted(case), folder / "source"), ""
        expected = logits(load(folder / "source"))
    except Exception as error:  # config classes raise any type; what they refuse, transmla must refuse too
        model, stock = None, f"{type(error).__name__}: {error}"
    changed = model is not None and difference(expected, before) > TOLERANCE
    (folder / "text.txt").write_text("the cat sat on the mat and the dog ran " * 100)
    recipe = {"source": str(folder / "source"), "output": str(folder / "out"), "format": case.format}
    calibration = {"source": str(folder / "text.txt"), "sequences": 6, "length": 24}
    fixed = {"device": "cpu", "reconstruct": "off", "calibration": calibration}
    try:
        settings = {"cache_ratio": 0.9} if model is None else uncut(model.config, case.format)
        out = convert(parse_recipe({**recipe, **fixed, **settings}, "config_walk"))
    except TransmlaError as error:
        words = {word for field in case.changes for word in (field, *ALIASES.get(field, ()))}
        named = any(word in str(error) for word in words)
        return Outcome("stock refuses" if stock else "refused" if named else "unnamed", changed, str(error))
    if stock:
        return Outcome("unlike", changed, f"stock transformers refuses the source: {stock}")
    worst = difference(logits(load(out)), expected)
    # A native export's eps is 1e-6. A factor on the norms' weights makes up for another one, on average over tokens.
    tolerance = 1e-3 if case.format == "native" and "rms_norm_eps" in case.changes else TOLERANCE
    return Outcome("same" if worst <= tolerance else "unlike", changed, f"relative difference {worst:.1e}")


def load(folder: Path) -> Any:
    """Load a source or an export as stock transformers does, with eager attention."""
    transmla.register()
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@cache
def _base_logits(family: str) -> torch.Tensor:
    return logits(random_model(AutoConfig.for_model(**base(family))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(SHELF), choices=list(SHELF))
    parser.add_argument("--fields", nargs="+", default=list(CHANGES), help="fields to change")
    parser.add_argument("--verbose", action="store_true", help="print every case, not the faults alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    counts: Counter[str] = Counter()
    start = time.process_time()
    for family in arguments.families:
        native = describe(AutoConfig.for_model(family, **{k: v for k, v in base(family).items() if k != "model_type"}))
        for form in ("transmla", *([] if native.native_gap else ["native"])):
            for case in cases(family, form):
                if not set(case.changes) & set(arguments.fields):
                    continue
                folder = Path(tempfile.mkdtemp(prefix="config-walk-"))
                try:
                    outcome = walk(case, folder)
                finally:
                    shutil.rmtree(folder)
                counts[outcome.kind] += 1
                if arguments.verbose or outcome.kind in FAULTS:
                    print(
                        f"{outcome.kind:13} {family:12} {form:8} {'own' if case.own else 'foreign':7} "
                        f"{'changed' if outcome.changed else '       '} {case.changes}: {outcome.detail[:260]}",
                        flush=True,
                    )
    total = sum(counts.values())
    print(f"{total} cases: {dict(counts)}; {time.process_time() - start:.0f} CPU seconds")
    sys.exit(1 if any(counts[kind] for kind in FAULTS) else 0)


if __name__ == "__main__":
    main()
