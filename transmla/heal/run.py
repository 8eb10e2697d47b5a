"""One healing from start to finish: student, teacher and texts in, a healed export out."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transmla.boundary import local_path
from transmla.export.hashes import export_fingerprint
from transmla.export.manifest import Manifest
from transmla.export.output import output_path
from transmla.export.state import key_of
from transmla.export.workspace import Workspace
from transmla.files import disk_errors, remove_folder, remove_temporaries
from transmla.formats.base import Format, format_named
from transmla.heal import natural_coordinates as natural
from transmla.heal.attention import attend_to_whole_sequences
from transmla.heal.batches import Batches, HealingTexts, make_batches, read_texts
from transmla.heal.checks import (
    check_models,
    check_same_texts,
    check_settings,
    check_student,
    check_tokenizers,
    check_trackers,
)
from transmla.heal.distributed import configure, from_main, kind, make_accelerator, shards
from transmla.heal.loop import Loop
from transmla.heal.losses import Distiller
from transmla.heal.memory import check_memory
from transmla.heal.optimiser import ATTENTION, choose_trainable, make_optimiser, store_frozen_in_half
from transmla.heal.passes import Passes, Sharded, Whole
from transmla.heal.resume import FILE, State, Store, run_facts, summary
from transmla.heal.settings import Healing
from transmla.heal.write_export import write_export
from transmla.modeling.registration import register
from transmla.reporter import Reporter, Silent
from transmla.source.checkpoint import open_checkpoint
from transmla.source.load import load_model, load_tokenizer
from transmla.source.locate import resolve_source

if TYPE_CHECKING:
    from accelerate import Accelerator

# Attributes in which modules of transformers and torch store their dropout rate.
DROPOUTS = ("attention_dropout", "residual_dropout", "dropout", "p")
# Training batches that latents are measured on, in addition to the held-out sequences.
MEASURED = 4
# Fewest steps for which compilation pays: a shorter run ends before the compile time is recovered.
WORTH_COMPILING = 100
# The same limit in minutes, for runs with `max_minutes`.
MINUTES_WORTH_COMPILING = 3


def heal(
    settings: Healing,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    accelerator: Accelerator | None = None,
    teacher_fingerprint: str | None = None,
    texts: HealingTexts | None = None,
) -> Path:
    """Heal the export ``settings.student`` into the new folder ``settings.output``.

    Every process that accelerate started must call this function.

    Args:
        settings: the options.
        resume: whether to continue the run that ``OUTPUT.partial`` holds.
        reporter: receives the progress in the first process; None: no reports.
        accelerator: replaces the accelerator that ``settings`` would make.
        teacher_fingerprint: hash of the teacher's weights, if it was computed before; None computes it.
        texts: what ``read_texts`` returned for these settings, if it was called before; None reads the texts.

    Returns:
        The new folder.

    Raises:
        TransmlaError: for bad input, before anything is written; for a loss that stays NaN or infinite; for a healed
            export that fails its verification; for a full disk.
    """
    output, student = output_path(settings.output), local_path(settings.student)
    manifest = Manifest.read(student)
    check_trackers(settings.track)
    accelerator = accelerator or make_accelerator(settings, output)
    check_settings(settings, accelerator)
    check_memory(settings, manifest.plan, accelerator)
    configure(accelerator, settings)
    with Workspace(output, shards=0) as workspace:
        store = Store(workspace.folder)
        if resume and from_main(accelerator, store.remove_finished(output) if accelerator.is_main_process else None):
            return output
        if accelerator.is_main_process:
            workspace.refuse_overwrite(resume=resume)
            store.refuse_foreign()
        report = (reporter or Silent()) if accelerator.is_main_process else Silent()
        check_student(student, manifest.hashes)
        if settings.track:
            accelerator.init_trackers("transmla", config=_tracker_config(settings))
        with disk_errors(output):
            learned = _train(settings, manifest, workspace, accelerator, report, teacher_fingerprint, texts)
            gc.collect()
            torch.cuda.empty_cache()
            if accelerator.is_main_process:
                _finish(settings, manifest, learned, workspace, accelerator.device, report)
            accelerator.wait_for_everyone()
            accelerator.end_training()
    return output


@dataclass(frozen=True)
class Learned:
    """Result of the training.

    Attributes:
        best: the trained weights with the lowest held-out KL, by name, in natural coordinates; empty on all processes
            but the first.
        state: steps, curve and best evaluation of the run.
        batches: the texts.
    """

    best: dict[str, Tensor]
    state: State
    batches: Batches


def _train(
    settings: Healing,
    manifest: Manifest,
    workspace: Workspace,
    accelerator: Any,
    report: Reporter,
    fingerprint: str | None,
    texts: HealingTexts | None,
) -> Learned:
    """Load models and texts, and train the student.

    Models and optimiser are freed on return, because writing the export needs the memory.
    """
    teacher_path = resolve_source(settings.teacher, revision=settings.revision, allow_pickle=settings.allow_pickle)
    tokenizer = load_tokenizer(teacher_path)
    check_tokenizers(load_tokenizer(Path(settings.student).expanduser()), tokenizer)
    with accelerator.main_process_first():
        texts = texts or read_texts(settings, tokenizer, report)
    fingerprint = fingerprint or _teacher_fingerprint(teacher_path, report, settings)
    model, teacher = _load_models(settings, manifest, teacher_path, accelerator)
    with accelerator.main_process_first():
        batches = make_batches(settings, texts, tokenizer, teacher, fingerprint, report)
    text_fingerprint = batches.fingerprint()
    check_same_texts(text_fingerprint)

    maskless = all([attend_to_whole_sequences(model), attend_to_whole_sequences(teacher)])
    distiller = _make_distiller(model, teacher, settings)
    sharded = shards(accelerator)
    if accelerator.mixed_precision == "bf16" and not sharded:
        store_frozen_in_half(distiller.student)
    compiles = _compiles(settings, accelerator.device)
    if compiles:
        distiller.compile_parts()
    # Names and learning rates need whole tensors, so both are computed before anything is sharded.
    trainable = {name for name, p in distiller.named_parameters() if p.requires_grad}
    fused = accelerator.device.type == "cuda"
    optimiser = make_optimiser(distiller, settings, fused=fused)
    passes: Passes
    if sharded:
        passes = Sharded(accelerator, distiller, optimiser)
    else:
        # Checkpointing reads the state of random numbers, which a graph forbids.
        graphed = compiles and maskless and not settings.checkpointing
        passes = Whole(accelerator, distiller, optimiser, graphs=partial(_not_captured, report) if graphed else None)
    store = Store(workspace.folder)
    facts = run_facts(settings, export_fingerprint(manifest.hashes), fingerprint, text_fingerprint, kind(accelerator))
    key = key_of(facts)
    state = store.read(key, facts)
    loop = Loop(accelerator, passes, batches, settings, state or State(key, facts), store, trainable)
    if accelerator.is_main_process:
        workspace.hold()
        remove_temporaries(workspace.folder)
    accelerator.wait_for_everyone()
    if state is not None:
        loop.restore()
        report.message(f"resuming at step {state.step}")
    loop.run(report)
    accelerator.free_memory()
    return Learned(loop.best or {}, loop.state, batches)


def _teacher_fingerprint(path: Path, report: Reporter, settings: Healing) -> str:
    checkpoint = open_checkpoint(path, allow_pickle=settings.allow_pickle)
    report.stage("checking the teacher", len(checkpoint.shapes))
    return checkpoint.fingerprint(lambda done, _: report.advance(done))


def _load_models(settings: Healing, manifest: Manifest, teacher_path: Path, accelerator: Any) -> tuple[Any, Any]:
    """Load and check the student (float32, natural coordinates) and the teacher (float32 or bfloat16)."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    teacher = load_model(teacher_path, dtype=dtype, allow_pickle=settings.allow_pickle).to(accelerator.device).eval()
    student = load_student(
        Path(settings.student).expanduser(), format_named(manifest.format), changed=manifest.weights_changed
    )
    check_models(student, teacher, settings)
    return student, teacher


def _make_distiller(student: Any, teacher: Any, settings: Healing) -> Distiller:
    """Seed torch, choose the trainable parameters, and combine both models."""
    torch.manual_seed(settings.seed)
    student = choose_trainable(student, settings)
    if settings.checkpointing:
        # The second name is that of older transformers, and deprecated in newer ones.
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Distiller(
        student,
        teacher,
        kl=settings.kl,
        cross_entropy=settings.cross_entropy,
        hidden=settings.hidden,
        temperature=settings.temperature,
    )


def _compiles(settings: Healing, device: torch.device) -> bool:
    if settings.compile is not None:
        return settings.compile
    if settings.max_minutes is not None and settings.max_minutes < MINUTES_WORTH_COMPILING:
        return False
    return device.type == "cuda" and settings.max_tokens >= WORTH_COMPILING * settings.batch * settings.length


def _not_captured(report: Reporter, reason: str) -> None:
    report.message(f"steps run without a CUDA graph: {reason}")


def _tracker_config(settings: Healing) -> dict[str, Any]:
    """Return the settings as plain values: trackers accept no lists."""
    values = settings.model_dump(mode="json", exclude_none=True)
    return {name: ", ".join(v) if isinstance(v, list) else v for name, v in values.items()}


def _finish(
    settings: Healing,
    manifest: Manifest,
    learned: Learned,
    workspace: Workspace,
    device: torch.device,
    report: Reporter,
) -> None:
    """Write and verify the export in the workspace, then move it to the output folder."""
    report.stage("writing and verifying", 1)
    student, folder = Path(settings.student).expanduser(), workspace.folder / "export"
    form = format_named(manifest.format)
    model, changed = _load_healed(student, learned.best, settings, manifest)
    _measure_latents(model.to(device), learned.batches, form)
    tensors = natural.to_export(model, changed, form, getattr(torch, manifest.plan.dtype))
    del model
    shutil.rmtree(folder, ignore_errors=True)
    record = summary(learned.state, settings) | {"curve": learned.state.curve}
    write_export(folder, student, tensors, record, settings, str(device))
    if workspace.output.exists():
        workspace.output.rmdir()
    folder.replace(workspace.output)
    # The state goes last: a resumed run knows by it that the export is finished, and deletes the rest.
    remove_folder(workspace.folder, last=FILE)
    report.advance(1)


def _load_healed(
    student: Path, best: dict[str, Tensor], settings: Healing, manifest: Manifest
) -> tuple[Any, dict[str, Tensor]]:
    """Load the student with its ``best`` weights, in natural coordinates; return also its changed tensors by name."""
    model = load_student(student, format_named(manifest.format), changed=manifest.weights_changed)
    if settings.trainable == "lora":
        model = choose_trainable(model, settings)
    unknown = model.load_state_dict(best, strict=False).unexpected_keys
    assert not unknown, unknown
    if settings.trainable == "lora":
        model = model.merge_and_unload()
    everything = settings.trainable == "all"
    changed = {n: p.detach().cpu() for n, p in model.named_parameters() if everything or ATTENTION in n}
    return model, changed


@torch.no_grad()
def _measure_latents(model: Any, batches: Batches, form: Format) -> None:
    """Measure the latents' sizes on the held-out sequences and a few training batches."""
    natural.measure_latents(model, form, watching=True)
    for rows in (batches.held_out(), *(batches[step] for step in range(MEASURED))):
        for row in rows.to(model.device).split(1):
            model.model(row, use_cache=False)
    natural.measure_latents(model, form, watching=False)


def load_student(student: Path, form: Format, *, changed: bool = False) -> Any:
    """Load an export in float32 and natural coordinates, without dropout, because its teacher has none.

    Args:
        student: folder of the export.
        form: its format.
        changed: whether other software has changed its weights. They then may have natural coordinates already.
    """
    register()
    model = load_model(student, dtype=torch.float32)
    for module in model.modules():
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if not (changed and form.is_natural(model)):
        natural.to_natural(model, form)
    return model
