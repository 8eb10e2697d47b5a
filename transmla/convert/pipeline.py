"""Run a conversion from end to end: one pass, with one or two decoder layers in memory at a time.

    source → AttentionSpec → Plan → [per layer: observe → factorize → reconstruct → write] → exported folder

Each layer is written as one shard. The hidden states and the progress are saved now and then (``shard_writer.py``). A
killed run can resume from the last save, and ends with the same bytes as an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from transmla.convert.calibration_text import calibration_tokens, check_length, read_calibration
from transmla.convert.choose_budget import Choice, choose_budget, describe, with_choice
from transmla.convert.finish import write_rest
from transmla.convert.finite import check_tensors
from transmla.convert.held_rows import Rows, check_rows, split_rows, with_held_rows
from transmla.convert.layers import LayerConverter
from transmla.convert.memory import holds_streams
from transmla.convert.prepare import Prepared, prepare
from transmla.convert.resume import early_facts, is_complete, refuse_other_run, run_facts
from transmla.convert.room import check_room
from transmla.convert.shard_writer import ShardWriter
from transmla.convert.streams import Streams
from transmla.errors import TransmlaError
from transmla.export.output import output_path
from transmla.export.workspace import Progress, Workspace
from transmla.files import disk_errors
from transmla.formats.base import format_named
from transmla.ranks import Ranks, launched
from transmla.recipe import Recipe
from transmla.reporter import Reporter, Silent
from transmla.source.load import load_tokenizer


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

    Every process that accelerate or torchrun started must call this function. They share the work; the first one
    reports and writes.

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
    ranks = launched(recipe.device)
    report = (reporter or Silent()) if ranks.first else Silent()
    output = folder or output_folder(recipe)
    sequences = None if calibration is None else len(calibration)
    prepared = prepared or ranks.first_then_others(lambda: prepare(recipe, sequences=sequences))
    with Workspace(output, shards=prepared.source.spec.num_hidden_layers + 2) as workspace:
        ranks.on_first(lambda: _refuse(workspace, partial(early_facts, prepared, ranks.size), resume=resume))
        tokenizer = load_tokenizer(prepared.source.path)
        begin = partial(_begin, prepared, workspace, tokenizer, calibration, report, resume=resume, pool=pool)
        inputs = ranks.on_first(partial(begin, notes=notes))
        if inputs is not None:
            with disk_errors(output):
                _write(prepared, ranks, workspace, inputs, tokenizer, report)
    return output


@dataclass(frozen=True)
class _Inputs:
    """What a conversion reads beside the weights.

    Attributes:
        tokens: calibration tokens [N, T].
        shares: shares of the calibration texts by name; empty if the workspace has saved the tokens.
        fingerprint: hash of the source's tensors.
    """

    tokens: Tensor
    shares: dict[str, float]
    fingerprint: str


def _refuse(workspace: Workspace, facts: Callable[[], dict[str, Any]], *, resume: bool) -> None:
    """Check that the run may write into ``workspace``; raises as its two checks do.

    Args:
        workspace: the folder to write.
        facts: returns the ``early_facts`` of the run.
        resume: whether it continues an unfinished run.
    """
    workspace.refuse_overwrite(resume=resume)
    workspace.refuse_foreign(facts)


def _begin(
    prepared: Prepared,
    workspace: Workspace,
    tokenizer: Any,
    calibration: Tensor | None,
    report: Reporter,
    *,
    resume: bool,
    pool: int,
    notes: tuple[str, ...],
) -> _Inputs | None:
    """Check the input, and read or sample the calibration text.

    Args:
        prepared: the conversion.
        workspace: the folder to write.
        tokenizer: the source's tokenizer.
        calibration: as for ``convert``, like ``resume``, ``pool`` and ``notes``.
        report: receives progress.

    Returns:
        None if the run that is resumed was complete; its folder then has its final name.
    """
    source, recipe = prepared.source, prepared.recipe
    amount = (recipe.calibration.sequences or 0, recipe.calibration.length or 0)
    sequences, length = amount if calibration is None else calibration.shape
    check_length(source.spec, length)
    check_room(prepared, workspace.output, (sequences, length), written=workspace.size())
    if calibration is not None:
        check_rows(prepared, sequences)
    tokens, text = calibration, None
    complete = resume and is_complete(workspace.folder)
    if tokens is None and resume:
        tokens = workspace.tokens()
    if tokens is None and not complete:
        text = read_calibration(with_held_rows(recipe), source, tokenizer, report)
    report.stage("checking weights", len(source.checkpoint.shapes))
    fingerprint = source.checkpoint.fingerprint(lambda done, _: report.advance(done))
    if complete:
        refuse_other_run(workspace.folder, prepared, fingerprint)
        workspace.finish()
        return None
    for note in (*prepared.plan.notes, *notes):
        report.message(note)
    if resume and not workspace.begun():
        report.message(f"nothing to resume in '{workspace.folder}': starting anew")
    if tokens is None:
        assert text is not None
        tokens = calibration_tokens(recipe, source, tokenizer, text, fingerprint, report, pool=pool)
    return _Inputs(tokens, {} if text is None else text.shares, fingerprint)


def _write(
    prepared: Prepared, ranks: Ranks, workspace: Workspace, inputs: _Inputs, tokenizer: Any, report: Reporter
) -> None:
    """Convert, and write the whole export.

    Args:
        prepared: the conversion.
        ranks: the processes that share the work; the first writes.
        workspace: the folder to write, new or of the run that is resumed.
        inputs: the calibration text.
        tokenizer: the source's tokenizer.
        report: receives progress.
    """
    progress = ranks.on_first(lambda: _open(prepared, ranks.size, workspace, inputs, report))
    rows = split_rows(prepared, inputs.tokens)
    if prepared.recipe.accepted_kl is not None:
        prepared = with_choice(prepared, ranks.on_first(partial(_chosen, prepared, workspace, progress, rows, report)))
    final_norm = _convert_layers(prepared, ranks, workspace, progress, rows, report)
    ranks.on_first(lambda: write_rest(prepared, workspace, progress, final_norm, tokenizer, inputs.fingerprint, report))
    ranks.on_first(workspace.finish)


def _open(prepared: Prepared, processes: int, workspace: Workspace, inputs: _Inputs, report: Reporter) -> Progress:
    """Open the workspace, save what a resumed run needs, and return the progress so far."""
    facts = run_facts(prepared, processes, inputs.fingerprint, inputs.tokens, workspace.facts())
    begun = workspace.begun()
    progress = workspace.open(facts, report.message)
    if begun:
        layers = prepared.source.spec.num_hidden_layers
        done = progress.final_norm is not None
        report.message(
            "resuming after the last layer" if done else f"resuming at layer {progress.next_layer} of {layers}"
        )
    if inputs.shares:
        progress.texts = inputs.shares
        workspace.save_progress(progress)
    # Save the tokens last: a resumed run that finds them does not read the texts again.
    workspace.save_tokens(inputs.tokens)
    return progress


def _chosen(prepared: Prepared, workspace: Workspace, progress: Progress, rows: Rows, report: Reporter) -> Choice:
    """Return the sizes that this run has chosen before, or choose and save them.

    Several processes wait for the first one, which measures alone.

    Raises:
        TransmlaError: as ``choose_budget``. There is then nothing to resume, and another loss can be tried at once.
    """
    if not progress.choice:
        folder = None if holds_streams(prepared, rows.calibration.numel()) else workspace.folder
        try:
            progress.choice = choose_budget(prepared, rows, folder, report).to_dict()
        except TransmlaError:
            workspace.discard()
            raise
        workspace.save_progress(progress)
    choice = Choice(**progress.choice | {"ratios": tuple(progress.choice["ratios"])})
    for line in describe(with_choice(prepared, choice), choice):
        report.message(line)
    return choice


def output_folder(recipe: Recipe) -> Path:
    """Return the folder of the recipe's export; raises as ``output_path`` does."""
    return output_path(recipe.output)


def _convert_layers(
    prepared: Prepared, ranks: Ranks, workspace: Workspace, progress: Progress, rows: Rows, report: Reporter
) -> float:
    """Write the shard of the embedding and one shard per layer; return the factor on the last norm's weight."""
    if progress.final_norm is not None:  # all layers are written, and the saved streams may be deleted
        return progress.final_norm
    tokens = rows.calibration
    on_disk = not ranks.on_first(lambda: holds_streams(prepared, tokens.numel()))
    if on_disk:
        report.message("the memory does not hold the hidden states of the calibration text: they lie on the disk")
    source, converter = prepared.source, LayerConverter(prepared, ranks, workspace.folder if on_disk else None)
    form = format_named(prepared.plan.format)
    ranks.on_first(lambda: check_tensors("the model's end", form.last_tensors(source, prepared.plan, 1.0)))
    start, layers = progress.next_layer, source.spec.num_hidden_layers
    with ThreadPoolExecutor(1) as pool:
        writer = ShardWriter(workspace, progress, converter.phases, pool)
        if start:
            streams = converter.place(Streams.from_tensors(workspace.streams(start, progress.checksum)))
            ranks.on_first(lambda: workspace.drop_streams(keep=start))
        else:
            name = source.family.tensors["embed"]
            embedding = source.checkpoint.read(name)
            streams = converter.start(tokens, embedding, rows.checking)
            ranks.on_first(lambda: writer.embedding({name: converter.cast(embedding)}))
            del embedding
        report.stage("converting layers", layers)
        report.advance(start)
        writer.start(streams)
        for i in range(start, layers):
            converted = converter.convert(i, streams)
            streams = converted.streams
            ranks.on_first(partial(writer.layer, i, converted))
            record = converted.record
            report.advance(i + 1, f"error {record['relative_error']:.3f}")
        with converter.phases.measure("write"):
            ranks.on_first(writer.settle)
    for phase, seconds in converter.phases.seconds.items():
        report.spent(phase, seconds)
    progress.final_norm = converter.final_norm(streams)
    if streams.held_export is not None:
        progress.measured_kl = converter.divergence(streams)
    ranks.on_first(lambda: workspace.save_progress(progress))
    return progress.final_norm
