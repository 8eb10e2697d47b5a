"""Write what follows the layers: last shard, config, tokenizer, recipe, manifest and card."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from transmla import __version__
from transmla.convert.layers import Layerwise
from transmla.export.card import write_card
from transmla.export.files import write_json, write_text
from transmla.export.manifest import MANIFEST, hash_files, write_index
from transmla.export.tokenizer import write_tokenizer
from transmla.export.workspace import Workspace
from transmla.formats.base import OWN
from transmla.formats.native import native_config
from transmla.formats.transmla import own_config
from transmla.modeling.configuration_transmla import write_code
from transmla.recipe import Recipe, dump_recipe
from transmla.source.open_source import Source


def _write_rest(
    source: Source,
    layerwise: Layerwise,
    recipe: Recipe,
    workspace: Workspace,
    progress: dict[str, Any],
    tokenizer: Any,
    fingerprint: str,
) -> None:
    """The last shard, config, tokenizer, recipe, manifest and card."""
    from transformers import GenerationConfig

    plan, folder = layerwise.plan, workspace.folder
    last = _last_tensors(source, layerwise, progress["final_norm"])
    progress["hashes"][workspace.shard_name(workspace.shards - 1)] = workspace.write_shard(workspace.shards - 1, last)
    workspace.drop_streams()
    write_index(folder)
    if plan.format == OWN:
        config = own_config(source.config, plan)
        write_code(folder)
    else:
        config = native_config(plan.spec, plan.shape, plan.rope_parameters, source.config, plan.dtype)
    write_json(folder / "config.json", config)
    write_tokenizer(
        folder,
        source.checkpoint.folder,
        tokenizer,
        copy=source.checkpoint.gguf is None,
        generation=GenerationConfig.from_model_config(source.config),
    )
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    manifest = {
        "format": plan.format,
        "plan": plan.to_dict(),
        "source": {
            "name": recipe.source,
            "revision": recipe.revision,
            "commit": _hub_commit(source.path),
            "fingerprint": fingerprint,
        },
        "reconstruct": recipe.reconstruct,
        "versions": _versions(),
        "layers": progress["layers"],
        "final_norm_correction": progress["final_norm"],
        "hashes": hash_files(folder, progress["hashes"]),
    }
    write_json(folder / MANIFEST, manifest)
    write_card(folder, manifest, recipe)


def _last_tensors(source: Source, layerwise: Layerwise, correction: float) -> dict[str, Tensor]:
    """What stands behind the layers: the last norm, corrected, and the head."""
    names, read = source.family.tensors, source.checkpoint.read
    if layerwise.plan.format == OWN:
        layers = tuple(names["layer"].format(i=i) for i in range(source.spec.num_hidden_layers))
        rest = [n for n in source.checkpoint.shapes if n != names["embed"] and not n.startswith(layers)]
        return {name: layerwise.as_written(read(name)) for name in rest}
    head = names["embed"] if source.spec.tie_word_embeddings else names["head"]
    return {
        names["norm"]: (read(names["norm"]).double() * correction).to(layerwise.dtype),
        names["head"]: read(head).to(layerwise.dtype),
    }


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"transmla": __version__, **libraries, "python": platform.python_version()}


def _hub_commit(path: Path) -> str | None:
    """The commit of a Hub snapshot, which is the name of its cache folder."""
    return path.name if path.parent.name == "snapshots" else None
