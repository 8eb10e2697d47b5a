"""Write the files that follow the layers: last shard, config, tokenizer, recipe, manifest and card."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transmla.convert.finite import check_tensors
from transmla.convert.prepare import Prepared
from transmla.convert.resume import recipe_hash
from transmla.export.card import public_name, public_recipe, write_card
from transmla.export.hashes import hash_files, write_index
from transmla.export.manifest import FitRecord, Manifest, Promise, SourceRecord, versions
from transmla.export.tokenizer import write_tokenizer
from transmla.export.travel import put_record, weights_fingerprint
from transmla.export.workspace import Progress, Workspace
from transmla.files import write_json, write_text
from transmla.formats.base import format_named
from transmla.recipe import dump_recipe
from transmla.reporter import Reporter
from transmla.signature.sign import sign
from transmla.source.open_source import default_generation


def write_rest(
    prepared: Prepared,
    workspace: Workspace,
    progress: Progress,
    final_norm: float,
    tokenizer: Any,
    fingerprint: str,
    report: Reporter,
) -> None:
    """Complete the export in ``workspace`` after all layers have been written.

    Args:
        prepared: the conversion.
        workspace: the unfinished output folder.
        progress: the conversion's progress, with the records and hashes of all layers.
        final_norm: factor on the last norm's weight.
        tokenizer: the source's tokenizer.
        fingerprint: hash of the source's tensors.
        report: receives the progress of signing.
    """
    source, recipe, plan, folder = prepared.source, prepared.recipe, prepared.plan, workspace.folder
    form = format_named(plan.format)
    last = form.last_tensors(source, plan, final_norm)
    check_tensors("the model's end", last)
    progress.hashes[workspace.shard_name(workspace.shards - 1)] = workspace.write_shard(workspace.shards - 1, last)
    workspace.drop_streams()
    write_index(folder)
    form.write_code(folder)
    manifest = Manifest(
        format=plan.format,
        plan=plan,
        source=_source_record(prepared, fingerprint),
        reconstruct=recipe.reconstruct,
        recipe=recipe_hash(recipe),
        texts=_public_texts(progress.texts),
        fit=_fit_record(prepared),
        versions=versions(),
        layers=progress.layers,
        final_norm_correction=final_norm,
        hashes={},
        weights=weights_fingerprint(folder),
        promise=_promise(prepared, progress),
    )
    write_json(folder / "config.json", form.config(source.config, manifest.converted_plan))
    write_tokenizer(
        folder,
        source.checkpoint.folder,
        tokenizer,
        copy=source.checkpoint.gguf is None,
        generation=default_generation(source),
    )
    published = dump_recipe(public_recipe(recipe))
    write_text(folder / "recipe.yaml", published)
    if form.signed:
        signature = sign(folder, plan.spec.family, prepared.device, source=source, reporter=report)
        manifest = replace(manifest, signature=signature)
    if form.carries_record:
        put_record(folder, manifest.to_dict(), published)
    manifest = replace(manifest, hashes=hash_files(folder, progress.hashes))
    manifest.write(folder)
    write_card(folder, manifest, recipe, form.card_words(plan.spec))


def _source_record(prepared: Prepared, fingerprint: str) -> SourceRecord:
    """Return the manifest's record of the source."""
    source, recipe = prepared.source, prepared.recipe
    name, commit = public_name(recipe.source), _hub_commit(source.path)
    return SourceRecord(name, recipe.revision, commit, fingerprint, source.card)


def _promise(prepared: Prepared, progress: Progress) -> Promise | None:
    """Return the loss that chose the cache, and what was measured; None if the recipe gave a size."""
    accepted, measured = prepared.recipe.accepted_kl, progress.measured_kl
    if accepted is None or measured is None:
        return None
    return Promise(accepted, progress.choice["expected"], measured)


def _public_texts(texts: dict[str, float]) -> dict[str, float]:
    """Return the shares of texts by public name. Files of the same name in different folders become one text."""
    shares: dict[str, float] = {}
    for name, share in texts.items():
        shares[public_name(name)] = shares.get(public_name(name), 0.0) + share
    return shares


def _fit_record(prepared: Prepared) -> FitRecord | None:
    """Return the settings of the fit for the manifest; None if layers were not fitted."""
    fit = prepared.fit
    return None if fit is None else FitRecord(**{f.name: getattr(fit, f.name) for f in fields(FitRecord)})


def _hub_commit(path: Path) -> str | None:
    """Return the commit of a source from the Hub, which is the name of its snapshot folder; None for other sources."""
    return path.name if path.parent.name == "snapshots" else None
