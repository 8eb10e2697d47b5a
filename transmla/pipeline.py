"""The conversion from end to end: one pass, one decoder layer in memory at a time.

    source → AttentionSpec → Plan → [per layer: observe → factorize → write] → exported folder

Every layer ends with a shard, the hidden stream and a line of progress on disk, so a run that was killed
goes on where it stopped and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla import __version__
from transmla.artifacts import LayerFactors, Plan
from transmla.calibrate import NormRatio, SourceLayer, steps
from transmla.card import write_card
from transmla.core.absorb import expanded_attention, source_attention
from transmla.errors import TransmlaError
from transmla.estimate import disk_bytes
from transmla.export import (
    MANIFEST,
    Workspace,
    disk_errors,
    hash_files,
    write_index,
    write_json,
    write_text,
    write_tokenizer,
)
from transmla.factorize import export_tensors, factorize
from transmla.native import native_config
from transmla.plan import make_plan, method_named
from transmla.progress import Reporter, Silent
from transmla.recipe import Recipe, dump_recipe
from transmla.source import (
    Source,
    calibration_tokens,
    check_length,
    computes_in_bfloat16,
    load_tokenizer,
    open_source,
    pick_device,
)
from transmla.spec import skeleton

# Sequences on which each layer's error is measured.
ERROR_SEQUENCES = 2


def convert(
    recipe: Recipe, *, resume: bool = False, reporter: Reporter | None = None, calibration: Tensor | None = None
) -> Path:
    """Convert ``recipe.source`` into the folder ``recipe.output``; returns that folder.

    ``calibration`` [sequences, length] are token ids to use instead of the text that the recipe names.

    Raises:
        TransmlaError: for bad input, before anything is written; for a full disk, with what was written kept.
    """
    report = reporter or Silent()
    output = Path(recipe.output).expanduser()
    if not output.name:  # "." and its like have no name to put ".partial" behind
        output = output.resolve()
    source = open_source(recipe)
    plan = make_plan(source.spec, recipe, source.dtype)
    workspace = Workspace(output, shards=source.spec.num_hidden_layers + 2)
    workspace.refuse_overwrite(resume=resume)
    tokenizer = load_tokenizer(source.path)
    device = pick_device(recipe.device)
    needed = disk_bytes(plan, recipe.calibration.sequences * recipe.calibration.length)
    _check_disk(output, needed - workspace.size())

    check_length(source.spec, recipe.calibration.length)
    tokens = calibration
    if tokens is None and resume:
        tokens = workspace.tokens()
    if tokens is None and recipe.calibration.source != "self":
        tokens = calibration_tokens(recipe, source, tokenizer, report)
    report.stage("checking weights", len(source.checkpoint.shapes))
    fingerprint = source.checkpoint.fingerprint(lambda done, _: report.advance(done))
    for note in plan.notes:
        report.message(note)
    if tokens is None:
        tokens = calibration_tokens(recipe, source, tokenizer, report)

    with disk_errors(output):
        progress = workspace.open(_key(recipe, plan, fingerprint, tokens, device))
        workspace.save_tokens(tokens)
        _convert_layers(source, plan, workspace, progress, tokens, device, report)
        _write_rest(source, plan, recipe, workspace, progress, tokenizer, fingerprint)
        workspace.finish()
    return output


def _key(recipe: Recipe, plan: Plan, fingerprint: str, tokens: Tensor, device: torch.device) -> str:
    """What a resumed run must share with the one it continues."""
    text = hashlib.sha256(tokens.contiguous().numpy().data).hexdigest()
    settings = recipe.model_dump(exclude={"device", "eval"})
    everything = json.dumps([settings, plan.to_dict(), fingerprint, text, str(device), _versions()], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()


def _check_disk(output: Path, needed: int) -> None:
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise TransmlaError(
            f"cannot write to '{parent}'",
            limit="it is not a folder, or this user may not write there",
            remedy="choose another --output",
        )
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise TransmlaError(
            f"the export needs about {needed / 1e9:.1f} GB",
            limit=f"'{parent}' has {free / 1e9:.1f} GB free",
            remedy="free some space or choose another --output",
        )


def _convert_layers(
    source: Source,
    plan: Plan,
    workspace: Workspace,
    progress: dict[str, Any],
    tokens: Tensor,
    device: torch.device,
    report: Reporter,
) -> None:
    """Write the embedding shard and one shard a layer, carrying the hidden stream from each to the next."""
    names, read = source.family.tensors, source.checkpoint.read
    half = computes_in_bfloat16(source, device)
    layer = SourceLayer(skeleton(source.config), source.config, source.spec, device, half=half)
    dtype = getattr(torch, plan.dtype)
    first_phase = method_named(plan.method).first_phase
    start, layers = progress["next_layer"], plan.spec.num_hidden_layers
    if "final_norm" in progress:  # the stream may be gone, and nothing needs it any more
        return
    if start:
        streams = workspace.stream(start, progress["checksum"])
    else:
        embedding = read(names["embed"])
        progress["hashes"][workspace.shard_name(0)] = workspace.write_shard(0, {names["embed"]: embedding.to(dtype)})
        streams = torch.nn.functional.embedding(tokens, embedding).float()[None]
        if first_phase is not None:
            streams = streams.repeat(2, 1, 1, 1)
        del embedding
    report.stage("converting layers", layers)
    report.advance(start)
    for i in range(start, layers):
        prefix = names["layer"].format(i=i)
        layer.load(source.checkpoint.layer(prefix))
        stream = streams[0]
        seen = layer.observe(stream)
        stats, following = seen.stats, [seen.hidden]
        if first_phase is not None:
            halfway = first_phase(layer.weights().to(torch.float64), stats.to(torch.float64), plan)
            moment, hidden = layer.follow(streams[1], _single(halfway))
            stats = replace(stats, converted_moment=moment)
            following.append(hidden)
        factors = factorize(layer.weights(), stats, plan)
        inputs = partial(_attention_inputs, layer, stream)
        attention, scale = export_tensors(factors, plan, inputs)
        shard = {prefix + "self_attn." + name: tensor for name, tensor in attention.items()}
        shard |= _untouched(source, prefix, dtype, seen.input_norm, seen.output_norm)
        progress["hashes"][workspace.shard_name(i + 1)] = workspace.write_shard(i + 1, shard)
        error = _relative_error(layer, factors, stream[-ERROR_SEQUENCES:])
        progress["layers"].append(
            {
                "layer": i,
                "relative_error": error,
                "latent_mean_square": scale.mean_square,
                "latent_max_square": scale.max_square,
                "norm_residual": max(seen.input_norm.residual, seen.output_norm.residual),
            }
        )
        streams = torch.stack(following) if len(following) > 1 else seen.hidden[None]
        progress["checksum"] = workspace.save_stream(i + 1, streams)
        progress["next_layer"] = i + 1
        workspace.save_progress(progress)
        workspace.drop_stream(i)
        report.advance(i + 1, f"error {error:.3f}")
    final = NormRatio(plan.spec.rms_norm_eps)
    for _, hidden in steps(streams[0]):
        final.add(hidden)
    progress["final_norm"] = final.correction
    workspace.save_progress(progress)


def _attention_inputs(layer: SourceLayer, stream: Tensor) -> Any:
    return (layer.attention_input(hidden) for _, hidden in steps(stream))


def _untouched(
    source: Source, prefix: str, dtype: torch.dtype, input_norm: NormRatio, output_norm: NormRatio
) -> dict[str, Tensor]:
    """The layer's tensors outside the attention, its norms corrected for the export's eps."""
    corrections = {
        "input_layernorm.weight": input_norm.correction,
        "post_attention_layernorm.weight": output_norm.correction,
    }
    tensors = {}
    for name in source.checkpoint.shapes:
        if name.startswith(prefix) and not name.startswith(prefix + "self_attn."):
            tensor = source.checkpoint.read(name)
            correction = corrections.get(name.removeprefix(prefix))
            tensors[name] = (tensor if correction is None else tensor.double() * correction).to(dtype)
    return tensors


@torch.no_grad()
def _relative_error(layer: SourceLayer, factors: LayerFactors, stream: Tensor) -> float:
    """‖MLA − source‖²/‖source‖² of the attention output on a few calibration sequences."""
    spec, single = layer.spec, _single(factors)
    weights = layer.weights()
    difference = energy = 0.0
    for hidden in stream:
        x = layer.attention_input(hidden[None])
        target = source_attention(x, weights, layer.inv_freq, scaling=spec.scaling, gain=spec.attention_factor**2)
        difference += float((expanded_attention(x, single) - target).square().sum())
        energy += float(target.square().sum())
    return difference / max(energy, 1e-30)


def _single(factors: LayerFactors) -> LayerFactors:
    """The factors in float32."""
    tensors = {name: value.float() for name, value in vars(factors).items() if isinstance(value, Tensor)}
    return replace(factors, **tensors)  # type: ignore[arg-type]


def _write_rest(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    workspace: Workspace,
    progress: dict[str, Any],
    tokenizer: Any,
    fingerprint: str,
) -> None:
    """The last shard, config, tokenizer, recipe, manifest and card."""
    from transformers import GenerationConfig

    names, read = source.family.tensors, source.checkpoint.read
    dtype, folder = getattr(torch, plan.dtype), workspace.folder
    head = names["embed"] if plan.spec.tie_word_embeddings else names["head"]
    last = {
        names["norm"]: (read(names["norm"]).double() * progress["final_norm"]).to(dtype),
        names["head"]: read(head).to(dtype),
    }
    progress["hashes"][workspace.shard_name(workspace.shards - 1)] = workspace.write_shard(workspace.shards - 1, last)
    workspace.drop_stream(plan.spec.num_hidden_layers)
    write_index(folder)
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
        "format": "native",
        "plan": plan.to_dict(),
        "source": {
            "name": recipe.source,
            "revision": recipe.revision,
            "commit": _hub_commit(source.path),
            "fingerprint": fingerprint,
        },
        "versions": _versions(),
        "layers": progress["layers"],
        "final_norm_correction": progress["final_norm"],
        "hashes": hash_files(folder, progress["hashes"]),
    }
    write_json(folder / MANIFEST, manifest)
    write_card(folder, manifest, recipe)


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"transmla": __version__, **libraries, "python": platform.python_version()}


def _hub_commit(path: Path) -> str | None:
    """The commit of a Hub snapshot, which is the name of its cache folder."""
    return path.name if path.parent.name == "snapshots" else None
