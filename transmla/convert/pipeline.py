"""Run a conversion from end to end: one pass, with one or two decoder layers in memory at a time.

    source → AttentionSpec → Plan → [per layer: observe → factorize → reconstruct → write] → exported folder

Each layer is written as one shard. The hidden states and the progress are saved every SAVE_SECONDS. A killed run can
resume from the last save, and ends with the same bytes as an uninterrupted run.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from transmla.convert.calibration_text import calibration_tokens, check_length, read_calibration
from transmla.convert.finish import write_rest
from transmla.convert.finite import check_tensors
from transmla.convert.layers import LayerConverter
from transmla.convert.memory import check_memory, holds_streams
from transmla.convert.prepare import Prepared, prepare
from transmla.convert.resume import is_complete, refuse_other_run, resume_key
from transmla.convert.streams import Streams
from transmla.errors import TransmlaError
from transmla.export.output import check_writable, output_path
from transmla.export.workspace import Progress, Workspace
from transmla.files import disk_errors
from transmla.formats.base import format_named
from transmla.plan.estimate import disk_bytes
from transmla.recipe import Recipe
from transmla.reporter import Reporter, Silent
from transmla.source.load import load_tokenizer

# Seconds between saves of the hidden states (hundreds of MB each); as many for every half second that a save takes, if
# it takes longer, so that saves take at most a fortieth of the time. A killed run loses at most this much work and the
# current layer. The first save is assumed to write SAVE_RATE bytes a second.
SAVE_SECONDS, SAVE_RATE = 20.0, 1e9


def convert(
    recipe: Recipe,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    calibration: Tensor | None = None,
    prepared: Prepared | None = None,
    folder: Path | None = None,
    pool: int = 0,
    notes: tuple[str, ...] = (),
) -> Path:
    """Convert ``recipe.source`` into the folder ``recipe.output``, without healing.

    Args:
        recipe: the recipe of the conversion.
        resume: continue an unfinished conversion of the same recipe.
        reporter: receives progress; None reports nothing.
        calibration: token ids [sequences, length] to use instead of the recipe's calibration text.
        prepared: the decisions about this recipe, if they were made before; None makes them.
        folder: folder to write instead of ``recipe.output``.
        pool: tokens to sample at least if the calibration text holds samples, for a healing that follows.
        notes: further lines for the user, reported once all input is checked.

    Returns:
        The folder of the export.

    Raises:
        TransmlaError: if the input cannot be used, before anything is written; or if the disk is full, in which case
            the files written so far remain for ``resume``.
    """
    report = reporter or Silent()
    output = folder or output_folder(recipe)
    prepared = prepared or prepare(recipe, sequences=None if calibration is None else len(calibration))
    source, recipe = prepared.source, prepared.recipe
    amount = (recipe.calibration.sequences or 0, recipe.calibration.length or 0)
    sequences, length = amount if calibration is None else calibration.shape
    with Workspace(output, shards=source.spec.num_hidden_layers + 2) as workspace:
        workspace.refuse_overwrite(resume=resume)
        workspace.refuse_foreign()
        tokenizer = load_tokenizer(source.path)
        check_room(prepared, output, (sequences, length), written=workspace.size())
        check_length(source.spec, length)
        tokens, text = calibration, None
        complete = resume and is_complete(workspace.folder)
        if tokens is None and resume:
            tokens = workspace.tokens()
        if tokens is None and not complete:
            text = read_calibration(recipe, source, tokenizer, report)
        report.stage("checking weights", len(source.checkpoint.shapes))
        fingerprint = source.checkpoint.fingerprint(lambda done, _: report.advance(done))
        if complete:
            refuse_other_run(workspace.folder, prepared, fingerprint)
            workspace.finish()
            return output
        for note in (*prepared.plan.notes, *notes):
            report.message(note)
        if tokens is None:
            assert text is not None
            tokens = calibration_tokens(recipe, source, tokenizer, text, fingerprint, report, pool=pool)
        with disk_errors(output):
            _write(prepared, workspace, tokens, {} if text is None else text.shares, tokenizer, fingerprint, report)
    return output


def _write(
    prepared: Prepared,
    workspace: Workspace,
    tokens: Tensor,
    shares: dict[str, float],
    tokenizer: Any,
    fingerprint: str,
    report: Reporter,
) -> None:
    """Convert, and write the whole export.

    Args:
        prepared: the conversion.
        workspace: the folder to write, new or of the run that is resumed.
        tokens: calibration tokens [N, T].
        shares: shares of the calibration texts by name; empty if the workspace has saved the tokens.
        tokenizer: the source's tokenizer.
        fingerprint: hash of the source's tensors.
        report: receives progress.
    """
    progress = workspace.open(resume_key(prepared, fingerprint, tokens), report.message)
    if shares:
        progress.texts = shares
        workspace.save_progress(progress)
    # Save the tokens last: a resumed run that finds them does not read the texts again.
    workspace.save_tokens(tokens)
    final_norm = _convert_layers(prepared, workspace, progress, tokens, report)
    write_rest(prepared, workspace, progress, final_norm, tokenizer, fingerprint, report)
    workspace.finish()


def output_folder(recipe: Recipe) -> Path:
    """Return the folder of the recipe's export; raises as ``output_path`` does."""
    return output_path(recipe.output)


def check_room(prepared: Prepared, output: Path, text: tuple[int, int], *, written: int = 0) -> None:
    """Check that memory and disk have room for a conversion.

    Args:
        prepared: the conversion.
        output: folder of the export.
        text: number of calibration sequences, and tokens per sequence.
        written: bytes that an unfinished run has written.

    Raises:
        TransmlaError: if they certainly do not.
    """
    check_memory(prepared, *text)
    tokens = text[0] * text[1]
    on_disk = not holds_streams(prepared, tokens)
    check_disk(output, disk_bytes(prepared.plan, tokens, prepared.fit, streams=on_disk) - written)


def check_disk(output: Path, needed: int, *, healing: bool = False) -> None:
    """Check that the disk of ``output`` is writable and has the ``needed`` bytes free of a conversion or ``healing``.

    Raises:
        TransmlaError: if it is not writable, or has too little space.
    """
    parent = check_writable(output)
    free = shutil.disk_usage(parent).free
    if free < needed:
        what, or_else = ("healing", "leave it out (--heal off), ") if healing else ("export", "")
        raise TransmlaError(
            f"the {what} needs about {needed / 1e9:.1f} GB of disk",
            limit=f"'{parent}' has {free / 1e9:.1f} GB free",
            remedy=f"free some disk space, {or_else}or choose another --output",
        )


def _convert_layers(
    prepared: Prepared, workspace: Workspace, progress: Progress, tokens: Tensor, report: Reporter
) -> float:
    """Write the shard of the embedding and one shard per layer; return the factor on the last norm's weight."""
    if progress.final_norm is not None:  # all layers are written, and the saved streams may be deleted
        return progress.final_norm
    on_disk = not holds_streams(prepared, tokens.numel())
    if on_disk:
        report.message("the memory does not hold the hidden states of the calibration text: they lie on the disk")
    source, converter = prepared.source, LayerConverter(prepared, workspace.folder if on_disk else None)
    form = format_named(prepared.plan.format)
    check_tensors("the model's end", form.last_tensors(source, prepared.plan, 1.0))
    start, layers = progress.next_layer, source.spec.num_hidden_layers
    if start:
        streams = converter.place(Streams.from_tensors(workspace.streams(start, progress.checksum)))
        workspace.drop_streams(keep=start)
    else:
        name = source.family.tensors["embed"]
        embedding = source.checkpoint.read(name)
        streams = converter.start(tokens, embedding)
        first = {name: converter.cast(embedding)}
        check_tensors("the embedding", first)
        progress.hashes[workspace.shard_name(0)] = workspace.write_shard(0, first)
        del embedding, first
    report.stage("converting layers", layers)
    report.advance(start)
    saved, pause = time.monotonic(), _pause(streams.nbytes() / SAVE_RATE)
    for i in range(start, layers):
        converted = converter.convert(i, streams)
        with converter.phases.measure("write"):
            progress.hashes[workspace.shard_name(i + 1)] = workspace.write_shard(i + 1, converted.tensors)
        progress.layers.append(converted.record)
        streams = converted.streams
        if (began := time.monotonic()) - saved >= pause:
            with converter.phases.measure("write"):
                progress.checksum = workspace.save_streams(i + 1, streams.to_tensors())
                progress.next_layer = i + 1
                workspace.save_progress(progress)
                workspace.drop_streams(keep=i + 1)
            saved = time.monotonic()
            pause = _pause(saved - began)
        report.advance(i + 1, f"error {converted.record.get('held_out_after', converted.record['relative_error']):.3f}")
    for phase, seconds in converter.phases.seconds.items():
        report.spent(phase, seconds)
    progress.final_norm = converter.final_norm(streams)
    workspace.save_progress(progress)
    return progress.final_norm


def _pause(seconds: float) -> float:
    """Return the seconds until the next save of the hidden states, if one takes ``seconds``."""
    return SAVE_SECONDS * max(1.0, 2 * seconds)
