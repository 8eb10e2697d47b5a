"""Plant faults in finished exports, write their hashes again, and count what ``transmla verify`` sees.

    python scripts/faults_planted.py --limit 40

Every fault changes a copy of an export of a tiny random model: a weight, the config, the tokenizer, the code or the
manifest; or it verifies the export against another source. Then the manifest's file hashes are made again, as a bug of
the converter or a careful editor would leave them. ``scripts/faults.py`` prints this table beside its others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]
# Variables that libraries read when they are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from faults_planted_changes import changes  # noqa: E402

LAYERS = 4
TEXT_WORDS = 3000
WORDS = ("the", "cat", "dog", "sat", "on", "a", "mat", "log", "ran", "far", "and", "saw", "big", "red", "sun")


@dataclass(frozen=True)
class Base:
    """An export that receives faults.

    Attributes:
        family: the source's family.
        model: changes of the tiny model's config.
        recipe: changes of the recipe.
        dtype: dtype of the source.
        healed: whether the export is healed.
    """

    family: str
    model: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    healed: bool = False


WINDOWED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
BASES = {
    "llama native": Base("llama"),
    "llama native bfloat16, compressed queries": Base("llama", recipe={"q_lora_rank": 48}, dtype="bfloat16"),
    "llama native, tied": Base("llama", model={"tie_word_embeddings": True}),
    "llama native, healed": Base("llama", healed=True),
    "qwen2": Base("qwen2"),
    "qwen3": Base("qwen3", dtype="bfloat16"),
    "qwen3, two layers kept": Base("qwen3", recipe={"layers": "1-2"}),
    "gemma2": Base("gemma2", model={"layer_types": WINDOWED}),
    "gemma3": Base("gemma3_text", model={"layer_types": WINDOWED}),
    "gpt_oss": Base("gpt_oss", model={"layer_types": WINDOWED}),
    "qwen3_moe": Base("qwen3_moe"),
    "starcoder2": Base("starcoder2", dtype="bfloat16"),
}


@dataclass(frozen=True)
class Planted:
    """A finished export with its surroundings.

    Attributes:
        export, source: folders of the export and its source.
        sibling: another conversion of the same source.
        stranger: another source, with the same embeddings and MLPs.
    """

    export: Path
    source: Path
    sibling: Path
    stranger: Path


def run(limit: int | None = None, only: tuple[str, ...] = (), seed: int = 0) -> list[tuple[str, bool, bool]]:
    """Plant faults one by one.

    Args:
        limit: number of faults, drawn evenly from all bases; None plants all.
        only: names of the bases; empty means all.
        seed: seed of the drawing.

    Returns:
        For each fault its name, whether ``verify`` caught it, and whether ``verify --source`` caught it.
    """
    rows = []
    names = only or tuple(BASES)
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(names):
            share = None if limit is None else limit // len(names) + (i < limit % len(names))
            if share == 0:
                continue
            planted = build(name, Path(folder) / f"base{i}")
            every = list(changes(planted.export, planted.source, planted.sibling))
            chosen = every if share is None else random.Random(f"{seed} {name}").sample(every, min(share, len(every)))
            rows += [(f"{name}: {fault}", *plant(planted, change)) for fault, change in chosen]
            if share is None or share > len(chosen):
                _, by_source = verdict(planted.export, planted.stranger)
                rows.append((f"{name}: another source with the same embeddings and MLPs", False, by_source))
            shutil.rmtree(Path(folder) / f"base{i}")
    return rows


def build(name: str, folder: Path) -> Planted:
    """Write the sources and exports of the base called ``name`` into ``folder``."""
    import torch
    from conftest import build_recipe
    from helpers.tiny_sources import SMALL_HEALING, build_model, build_tokenizer

    from transmla.convert.pipeline import convert
    from transmla.heal.run import heal
    from transmla.heal.settings import Healing

    base = BASES[name]
    folder.mkdir(parents=True)
    words = random.Random(0).choices(WORDS, k=TEXT_WORDS)
    (folder / "text.txt").write_text(" ".join(words))
    model = build_model(base.family, num_hidden_layers=LAYERS, **base.model)
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            if tensor_name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.5)
    model = model.to(getattr(torch, base.dtype))
    for source in ("source", "stranger"):
        if source == "stranger":
            with torch.no_grad():
                for tensor_name, parameter in model.named_parameters():
                    if ".self_attn." in tensor_name:
                        parameter.mul_(1.25)
        model.save_pretrained(folder / source)
        build_tokenizer(folder / source, model.config.vocab_size)
        settings = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6}
        (folder / source / "generation_config.json").write_text(json.dumps(settings))
    for export, ratio in (("export", 0.5), ("sibling", 0.4)):
        text, recipe = folder / "text.txt", {"cache_ratio": ratio, "seed": int(ratio * 10), **base.recipe}
        convert(build_recipe(folder / "source", folder / export, text, **recipe))
    if base.healed:
        (folder / "export").rename(folder / "unhealed")
        named = {"student": str(folder / "unhealed"), "teacher": str(folder / "source"), "device": "cpu"}
        heal(Healing(**named, output=str(folder / "export"), data=(str(folder / "text.txt"),), **SMALL_HEALING))
    return Planted(folder / "export", folder / "source", folder / "sibling", folder / "stranger")


def plant(planted: Planted, change: Callable[[Path], None]) -> tuple[bool, bool]:
    """Change a copy of the export, write its hashes again, and return what caught it (see ``verdict``)."""
    copy = planted.export.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(planted.export, copy)
    before = _bytes(copy)
    change(copy)
    assert _bytes(copy) != before, "the fault changes nothing"
    rehash(copy)
    return verdict(copy, planted.source)


def rehash(folder: Path) -> None:
    """Write the hashes of all present files into the manifest."""
    from transmla.export.hashes import MANIFEST, hash_files

    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"hashes": hash_files(folder, {})}))


def verdict(folder: Path, source: Path) -> tuple[bool, bool]:
    """Return whether ``verify`` and ``verify --source`` catch the fault in ``folder``.

    Both come from one run: the second makes the checks of the first, and then those called ``NAMES``.
    """
    from transmla.errors import TransmlaError
    from transmla.evaluate.verify import verify
    from transmla.evaluate.verify_source import NAMES

    by_source = False
    try:
        for check in verify(folder, source=str(source)):
            if not check.passed and check.name not in NAMES:
                return True, True
            by_source |= not check.passed
    except TransmlaError:
        return True, True
    return False, by_source


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def table(rows: list[tuple[str, bool, bool]]) -> str:
    """Return the counts by base as a Markdown table."""
    lines = ["| export | planted | caught by `verify` | by `verify --source` |", "|---|---|---|---|"]
    names = list(dict.fromkeys(name.partition(":")[0] for name, *_ in rows))
    for name in [*names, "all"]:
        part = [row for row in rows if name in ("all", row[0].partition(":")[0])]
        lines.append(f"| {name} | {len(part)} | {sum(row[1] for row in part)} | {sum(row[2] for row in part)} |")
    return "\n".join(lines)


def main() -> None:
    """Plant faults, and print the counts and what was not caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--limit", type=int, help="number of faults; all if not given")
    parser.add_argument("--only", action="append", choices=list(BASES), default=[], help="plant in this export only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing")
    parser.add_argument("--json", type=Path, help="write the rows with their provenance to this file")
    parser.add_argument("--commit", help="commit to record, for a copy without git history")
    arguments = parser.parse_args()
    rows = run(arguments.limit, tuple(arguments.only), arguments.seed)
    print(table(rows))
    for name, by_verify, by_source in rows:
        if not (by_verify and by_source):
            print(f"not caught by {'verify' if by_source else 'verify --source'}: {name}")
    if arguments.json:
        from provenance import write_result

        listed = [{"fault": name, "verify": plain, "verify --source": full} for name, plain, full in rows]
        write_result(arguments.json, listed, arguments.commit)
    raise SystemExit(not all(by_source for *_, by_source in rows))


if __name__ == "__main__":
    main()
