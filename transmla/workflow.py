"""One run from a source to a healed export: ``transmla convert``.

The conversion is written to ``OUTPUT.unhealed`` and healed into ``OUTPUT``. A killed run leaves at least one of
``OUTPUT.unhealed.partial``, ``OUTPUT.unhealed`` and ``OUTPUT.partial``, and ``resume`` continues from each of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transmla.convert.calibration_text import check_length, longest_sequence
from transmla.convert.pipeline import convert, output_folder
from transmla.convert.prepare import Prepared, prepare, with_plan
from transmla.convert.resume import refuse_other_run
from transmla.convert.room import check_disk, check_room
from transmla.errors import TransmlaError
from transmla.export.hashes import MANIFEST, UNFINISHED_SUFFIX
from transmla.export.manifest import Manifest
from transmla.export.unfinished import refuse_no_folder
from transmla.export.workspace import Workspace
from transmla.files import remove_folder
from transmla.heal.batches import HealingTexts, read_texts
from transmla.heal.checks import TooLittleText
from transmla.heal.choose import Choice, choose_healing, estimated_seconds
from transmla.heal.memory import load_of, memory_bytes
from transmla.heal.resume import Store
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.plan.estimate_time import Rates
from transmla.ranks import check_launch, launched
from transmla.recipe import Recipe
from transmla.recipe_values import HEAL_AUTO
from transmla.reporter import Reporter, Silent
from transmla.shares import shares
from transmla.source.load import check_tokenizer, load_tokenizer
from transmla.source.memory import free_memory_of
from transmla.source.mixture import check_options
from transmla.source.text import check_text


def convert_and_heal(recipe: Recipe, *, resume: bool = False, reporter: Reporter | None = None) -> Path:
    """Convert ``recipe.source`` into ``recipe.output``, and heal it as ``recipe.heal`` asks.

    Every process that accelerate or torchrun started must call this function.

    Args:
        recipe: the recipe of the conversion.
        resume: continue an unfinished run of the same recipe, in whichever part it was killed.
        reporter: receives progress; None reports nothing.

    Returns:
        The folder of the export, healed if healing was chosen.

    Raises:
        TransmlaError: as ``convert`` and ``heal``; all input is checked before a model is loaded.
    """
    ranks = launched(recipe.device)
    report = (reporter or Silent()) if ranks.first else Silent()
    output = output_folder(recipe)
    unhealed = output.with_name(output.name + ".unhealed")
    if ranks.on_first(lambda: (resume and _remove_rest(output, unhealed)) or _refuse(output, unhealed, resume=resume)):
        return output
    prepared = ranks.first_then_others(lambda: prepare(recipe))
    choice = _divided(ranks.on_first(partial(choice_for, prepared)), ranks.size)
    settings, texts, note = ranks.on_first(partial(_open_healing, prepared, choice, unhealed, output))
    notes = (note,) if note else ()
    if settings is None:
        return convert(recipe, resume=resume, reporter=report, prepared=prepared, notes=notes)
    if not resume:
        ranks.on_first(lambda: check_disk(output, choice.disk_bytes or 0, healing=True))
    if not (resume and ranks.on_first(partial(_is_conversion_of, prepared, unhealed, report))):
        pool = settings.self_tokens
        convert(recipe, resume=resume, reporter=report, prepared=prepared, folder=unhealed, pool=pool, notes=notes)
    if recipe.accepted_kl is not None:
        chosen = with_plan(prepared, Manifest.read(unhealed).plan)
        healing = partial(_healing_of, chosen, settings, texts, unhealed, output, ranks.size, report)
        settings, texts = ranks.on_first(healing)
    # Pickled weights may be in memory, and healing loads its own.
    del prepared
    gc.collect()
    fingerprint = Manifest.read(unhealed).source.fingerprint
    heal(settings, resume=resume, reporter=report, teacher_fingerprint=fingerprint, texts=texts)
    if ranks.first:
        remove_folder(unhealed, last=MANIFEST)
    return output


def _refuse(output: Path, unhealed: Path, *, resume: bool) -> bool:
    """Check that the run overwrites nothing, and return False.

    Raises:
        TransmlaError: if ``output`` is taken, or if there is an unfinished run and ``resume`` is off.
    """
    with Workspace(output, shards=0) as workspace:
        workspace.refuse_overwrite(resume=resume)
    refuse_no_folder(unhealed)
    if unhealed.exists() and not resume:
        raise TransmlaError(
            f"an unfinished run is in '{unhealed}'",
            limit="nothing is ever overwritten",
            remedy="continue that run with --resume, or delete the folder",
        )
    return False


def _remove_rest(output: Path, unhealed: Path) -> bool:
    """Delete what is left of a run that was killed after ``output`` was finished; return whether there was something.

    Raises:
        TransmlaError: if a manifest cannot be read.
    """
    if not (output / MANIFEST).is_file() or not Manifest.read(output).healing:
        return False
    partial = Store(output.with_name(output.name + UNFINISHED_SUFFIX)).remove_finished(output)
    if not unhealed.is_dir() or unhealed.is_symlink():
        return partial
    ours = not any(unhealed.iterdir()) or ((unhealed / MANIFEST).is_file() and _same_conversion(output, unhealed))
    if ours:
        remove_folder(unhealed, last=MANIFEST)
    return partial or ours


def _same_conversion(healed: Path, unhealed: Path) -> bool:
    """Return whether ``healed`` is a healing of the conversion in ``unhealed``."""
    ours, theirs = Manifest.read(healed), Manifest.read(unhealed)
    return (ours.recipe, ours.source, ours.layers) == (theirs.recipe, theirs.source, theirs.layers)


def _open_healing(
    prepared: Prepared, choice: Choice, unhealed: Path, output: Path
) -> tuple[Healing | None, HealingTexts | None, str]:
    """Return the settings and the texts of the healing, and one line for the user.

    The texts are read before the conversion, because a healing may need more text than the conversion. If there is too
    little for the default healing, there is none.

    Raises:
        TransmlaError: if the recipe asks for minutes of healing, and the texts do not suffice.
    """
    if choice.settings is None:
        return None, None, choice.reason
    settings = healing_settings(prepared, unhealed, output, choice)
    try:
        texts = read_texts(settings, load_tokenizer(prepared.source.path), Silent())
    except TransmlaError as error:
        if isinstance(error, TooLittleText):  # its remedy names flags that `convert` does not have
            error = TransmlaError(error.what, limit=error.limit, remedy="give a longer text, or pass --heal off")
        if prepared.recipe.heal != HEAL_AUTO:
            raise error from None
        return None, None, f"not healed: {error}"
    return settings, texts, choice.reason


def _healing_of(
    chosen: Prepared,
    settings: Healing,
    texts: HealingTexts | None,
    unhealed: Path,
    output: Path,
    processes: int,
    report: Reporter,
) -> tuple[Healing, HealingTexts | None]:
    """Return the healing for the cache that the conversion has chosen: a small cache is healed longer.

    Args:
        chosen: the conversion, with the plan that it has chosen.
        settings: the healing that was checked for the largest cache, which remains if the memory or the texts do not
            suffice for another one.
        texts: its texts.
        unhealed: folder of the conversion.
        output: folder of the healed export.
        processes: number of processes.
        report: receives one line if another healing is chosen.
    """
    again, more, reason = _open_healing(chosen, _divided(choice_for(chosen), processes), unhealed, output)
    if again is None or again == settings:
        return settings, texts
    report.message(reason)
    return again, more


def choice_for(prepared: Prepared) -> Choice:
    """Return the healing that ends the conversion ``prepared``, or why there is none."""
    device = prepared.device
    return choose_healing(prepared.recipe, prepared.plan, device, free_memory_of(device))


def _divided(choice: Choice, processes: int) -> Choice:
    """Return the same healing for several processes: each computes its share of a batch, in fewer parts.

    Raises:
        TransmlaError: if the batch cannot be divided among the processes.
    """
    if choice.settings is None or processes == 1:
        return choice
    parts, batch = max(1, choice.settings["accumulate"] // processes), choice.settings["batch"]
    if batch % (parts * processes):
        able = [n for n in range(2, batch + 1) if batch % (max(1, choice.settings["accumulate"] // n) * n) == 0]
        raise TransmlaError(
            f"{processes} processes cannot share the batches of {batch} sequences of the healing",
            limit="each process computes equally many sequences",
            remedy=f"launch {', '.join(map(str, able[:-1]))} or {able[-1]} processes, or leave the healing out "
            "(--heal off)",
        )
    return replace(choice, settings=choice.settings | {"accumulate": parts})


def refusals(prepared: Prepared, choice: Choice) -> list[str]:
    """Return why ``convert_and_heal`` would refuse a conversion here, one line each.

    These are a source without a tokenizer, missing files of calibration text, a split or column that no text takes,
    calibration sequences beyond the source's context, too many processes, and too little memory or disk.

    Args:
        prepared: the conversion; all its processes run on this computer.
        choice: the healing that ends it.
    """
    output, calibration = Path(prepared.recipe.output), prepared.recipe.calibration
    checks: list[Callable[[], object]] = [partial(check_tokenizer, prepared.source.path)]
    checks += [partial(check_text, name) for name in shares(calibration.source)]
    checks.append(partial(check_options, calibration.source, split=calibration.split, column=calibration.column))
    if (processes := prepared.processes) > 1:
        checks += [partial(check_launch, prepared.recipe.device, processes, processes)]
        checks += [partial(_divided, choice, processes)]
    sequences, length = calibration.sequences or 0, calibration.length or 0
    checks.append(partial(check_length, prepared.source.spec, length))
    if length <= longest_sequence(prepared.source.spec):
        checks.append(partial(check_room, prepared, output, (sequences, length)))
    if choice.disk_bytes:
        checks.append(partial(check_disk, output, choice.disk_bytes, healing=True))
    found = []
    for check in checks:
        try:
            check()
        except TransmlaError as error:
            found.append(str(error))
    return found


def healing_by_way(prepared: Prepared, choice: Choice, rates: Rates) -> dict[str, dict[str, Any]]:
    """Return what each process of the healing ``choice`` needs, by the way in which the processes divide it.

    Args:
        prepared: the conversion, of several processes on this computer.
        choice: the healing that ends it.
        rates: rates of the device of one process.

    Returns:
        ``ddp`` (the whole student in each process) and on GPUs ``fsdp2`` (its weights divided), each with
        ``memory_bytes`` of one process and ``seconds`` (None if minutes were asked); empty if there is no healing.
    """
    processes, device = prepared.processes, prepared.device
    try:
        divided = _divided(choice, processes)
    except TransmlaError:  # one of the refusals
        return {}
    if divided.settings is None:
        return {}
    settings = healing_settings(prepared, Path("unhealed"), Path(prepared.recipe.output), divided)
    on_gpus, ways = device.type == "cuda", {}
    # accelerate shards on GPUs only.
    for way, sharded in (("ddp", False), ("fsdp2", True))[: 2 if on_gpus else 1]:
        load = load_of(settings, processes, half=on_gpus, sharded=sharded)
        seconds = estimated_seconds(divided, prepared.plan, rates, processes, sharded=sharded)
        ways[way] = {"memory_bytes": memory_bytes(prepared.plan, load), "seconds": seconds}
    return ways


def healing_settings(prepared: Prepared, unhealed: Path, output: Path, choice: Choice) -> Healing:
    """Return the settings of the healing: the choice, on the texts of the conversion."""
    recipe, calibration = prepared.recipe, prepared.recipe.calibration
    return Healing.model_validate(
        {
            "student": str(unhealed),
            "teacher": recipe.source,
            "output": str(output),
            "revision": recipe.revision,
            "allow_pickle": recipe.allow_pickle,
            "data": calibration.source,
            "split": calibration.split,
            "column": calibration.column,
            "device": str(prepared.device),
            "seed": recipe.seed,
            **(choice.settings or {}),
        }
    )


def _is_conversion_of(prepared: Prepared, folder: Path, report: Reporter) -> bool:
    """Return whether ``folder`` holds the finished conversion ``prepared``.

    Raises:
        TransmlaError: if it holds another conversion, or was changed.
    """
    if not (folder / MANIFEST).is_file():
        return False
    report.stage("checking weights", len(prepared.source.checkpoint.shapes))
    refuse_other_run(folder, prepared, prepared.source.checkpoint.fingerprint(lambda done, _: report.advance(done)))
    return True
