"""The conversion from end to end: one pass, one or two decoder layers in memory at a time.

    source → AttentionSpec → Plan → [per layer: observe → factorize → reconstruct → write] → exported folder

Every layer ends with a shard on disk, and every so often the hidden streams and the progress follow it, so a run
that was killed goes on from there and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import Plan
from transmla.convert.calibration_text import calibration_tokens, check_length
from transmla.convert.finish import _versions, _write_rest
from transmla.convert.layers import Layerwise
from transmla.core.methods.base import method_named
from transmla.errors import TransmlaError
from transmla.export.files import disk_errors
from transmla.export.workspace import Workspace
from transmla.formats.base import OWN
from transmla.plan.effort import EFFORTS, choose_effort, effort_for
from transmla.plan.estimate import disk_bytes
from transmla.plan.make_plan import make_plan
from transmla.recipe import Recipe
from transmla.reporter import Reporter, Silent
from transmla.source.device import bfloat16_pays, pick_device
from transmla.source.load import load_tokenizer
from transmla.source.open_source import Source, open_source

# Streams are hundreds of megabytes: a run that is killed may lose so many seconds of work, and the layer begun.
SAVE_SECONDS = 20.0


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
    device = pick_device(recipe.device)
    shape = (recipe.calibration.sequences, recipe.calibration.length) if calibration is None else calibration.shape
    published = method_named(recipe.method).published
    effort = choose_effort(recipe.reconstruct, device, shape[0], published=published)
    recipe = recipe.model_copy(update={"reconstruct": effort})
    plan = make_plan(source.spec, recipe, source.dtype)
    workspace = Workspace(output, shards=source.spec.num_hidden_layers + 2)
    workspace.refuse_overwrite(resume=resume)
    tokenizer = load_tokenizer(source.path)
    needed = disk_bytes(plan, shape[0] * shape[1], effort_for(effort, plan.cache_ratio))
    _check_disk(output, needed - workspace.size())

    check_length(source.spec, shape[1])
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
        layerwise = Layerwise(source, plan, effort, device, seed=recipe.seed)
        _convert_layers(source, layerwise, workspace, progress, tokens, report)
        _write_rest(source, layerwise, recipe, workspace, progress, tokenizer, fingerprint)
        workspace.finish()
    return output


def _key(recipe: Recipe, plan: Plan, fingerprint: str, tokens: Tensor, device: torch.device) -> str:
    """What a resumed run must share with the one it continues."""
    text = hashlib.sha256(tokens.contiguous().numpy().data).hexdigest()
    settings = recipe.model_dump(exclude={"device", "eval"})
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    numbers = [machine, bfloat16_pays(device), EFFORTS.get(recipe.reconstruct) and asdict(EFFORTS[recipe.reconstruct])]
    everything = json.dumps([settings, plan.to_dict(), fingerprint, text, numbers, _versions()], sort_keys=True)
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
    layerwise: Layerwise,
    workspace: Workspace,
    progress: dict[str, Any],
    tokens: Tensor,
    report: Reporter,
) -> None:
    """Write the embedding shard and one shard a layer, carrying the streams from each to the next."""
    if "final_norm" in progress:  # the streams may be gone, and nothing needs them any more
        return
    start, layers = progress["next_layer"], source.spec.num_hidden_layers
    if start:
        streams = layerwise.place(workspace.streams(start, progress["checksum"]))
        workspace.drop_streams(keep=start)
    else:
        name = source.family.tensors["embed"]
        embedding = source.checkpoint.read(name)
        progress["hashes"][workspace.shard_name(0)] = workspace.write_shard(0, {name: layerwise.as_written(embedding)})
        streams = layerwise.start(tokens, embedding)
        del embedding
    report.stage("converting layers", layers)
    report.advance(start)
    saved = time.monotonic()
    for i in range(start, layers):
        converted = layerwise.convert(i, streams)
        progress["hashes"][workspace.shard_name(i + 1)] = workspace.write_shard(i + 1, converted.tensors)
        progress["layers"].append(converted.record)
        streams = converted.streams
        if time.monotonic() - saved >= SAVE_SECONDS:
            progress["checksum"] = workspace.save_streams(i + 1, streams)
            progress["next_layer"] = i + 1
            workspace.save_progress(progress)
            workspace.drop_streams(keep=i + 1)
            saved = time.monotonic()
        report.advance(i + 1, f"error {converted.record.get('held_out_after', converted.record['relative_error']):.3f}")
    progress["final_norm"] = layerwise.final_norm(streams) if layerwise.plan.format != OWN else 1.0
    workspace.save_progress(progress)
