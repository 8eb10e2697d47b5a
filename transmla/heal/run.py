"""A healing from end to end: two models and some text in, an export out."""

from __future__ import annotations

import gc
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transmla.export.files import disk_errors
from transmla.export.hashes import export_fingerprint
from transmla.export.manifest import Manifest
from transmla.export.workspace import Workspace
from transmla.formats.base import Format, format_named
from transmla.heal import natural_coordinates as natural
from transmla.heal.batches import Batches, open_texts
from transmla.heal.checks import check_models, check_settings, check_student, check_tokenizers
from transmla.heal.distributed import configure, kind, make_accelerator
from transmla.heal.loop import Loop
from transmla.heal.losses import Distiller
from transmla.heal.optimiser import ATTENTION, choose_trainable, make_optimiser
from transmla.heal.resume import State, Store, run_key, summary
from transmla.heal.settings import Healing
from transmla.heal.write_export import write_export
from transmla.modeling.transformers_api import register
from transmla.reporter import Reporter, Silent
from transmla.source.checkpoint import open_checkpoint
from transmla.source.load import load_model, load_tokenizer
from transmla.source.locate import resolve_source

if TYPE_CHECKING:
    from accelerate import Accelerator

# Where modules of transformers and torch hold their rates of dropout.
DROPOUTS = ("attention_dropout", "residual_dropout", "dropout", "p")
# Batches on which latents are measured, beside what was kept aside.
MEASURED = 4
# A run of fewer steps or minutes ends before compiled code has paid for itself.
WORTH_COMPILING = 100
MINUTES_WORTH_COMPILING = 3


def heal(
    settings: Healing, *, resume: bool = False, reporter: Reporter | None = None, accelerator: Accelerator | None = None
) -> Path:
    """Heal the export ``settings.student`` into the new folder ``settings.output``; returns that folder.

    Every process that accelerate started calls this. ``accelerator`` replaces the one made here.

    Raises:
        TransmlaError: for bad input, before anything is written; for a loss that stays no number; for a full disk.
    """
    output, student = Path(settings.output).expanduser(), Path(settings.student).expanduser()
    manifest = Manifest.read(student)
    workspace = Workspace(output, shards=0)
    accelerator = accelerator or make_accelerator(settings, output)
    check_settings(settings, accelerator)
    configure(accelerator, settings)
    if accelerator.is_main_process:
        workspace.refuse_overwrite(resume=resume)
        Store(workspace.folder).refuse_foreign()
    report = (reporter or Silent()) if accelerator.is_main_process else Silent()
    check_student(student, manifest.hashes)
    if settings.track:
        accelerator.init_trackers("transmla", config=_plain(settings))
    with disk_errors(output):
        learned = _learn(settings, manifest, workspace, accelerator, report)
        gc.collect()
        torch.cuda.empty_cache()
        if accelerator.is_main_process:
            _finish(settings, manifest, learned, workspace, accelerator.device, report)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return output


@dataclass(frozen=True)
class Learned:
    """What is left of a run: its best weights in natural coordinates, where it stood, and what it read."""

    best: dict[str, Tensor]
    state: State
    batches: Batches


def _learn(settings: Healing, manifest: Manifest, workspace: Workspace, accelerator: Any, report: Reporter) -> Learned:
    """The run itself. Models and moments are gone when it returns, so that the export finds room."""
    student, path = Path(settings.student).expanduser(), resolve_source(settings.teacher, revision=settings.revision)
    tokenizer = load_tokenizer(path)
    check_tokenizers(load_tokenizer(student), tokenizer)
    checkpoint = open_checkpoint(path)
    report.stage("checking the teacher", len(checkpoint.shapes))
    fingerprint = checkpoint.fingerprint(lambda done, _: report.advance(done))
    half = accelerator.mixed_precision == "bf16"
    teacher = load_model(path, dtype=torch.bfloat16 if half else torch.float32).to(accelerator.device).eval()
    model = load_student(student, format_named(manifest.format))
    check_models(model, teacher, settings)
    with accelerator.main_process_first():
        batches = open_texts(settings, tokenizer, teacher, fingerprint, report)

    torch.manual_seed(settings.seed)
    model = choose_trainable(model, settings)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    distiller = Distiller(
        model,
        teacher,
        kl=settings.kl,
        cross_entropy=settings.cross_entropy,
        hidden=settings.hidden,
        temperature=settings.temperature,
    )
    compiles = _compiles(settings, accelerator.device)
    if compiles:
        distiller.compile_parts()
    # Rates come from whole tensors, before anything is sharded.
    trainable = {name for name, p in distiller.named_parameters() if p.requires_grad}
    fused = accelerator.device.type == "cuda"
    prepared, optimiser = accelerator.prepare(distiller, make_optimiser(distiller, settings, fused=fused))
    store = Store(workspace.folder)
    prints = export_fingerprint(manifest.hashes), fingerprint, batches.fingerprint()
    key = run_key(settings, *prints, kind(accelerator))
    state = store.read(key)
    loop = Loop(accelerator, prepared, optimiser, batches, settings, state or State(key), store, trainable)
    if accelerator.is_main_process:
        workspace.folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if state is not None:
        loop.restore()
    # Under DDP, torch would cut every layer in two to send gradients early; between layers is early enough.
    with torch._dynamo.config.patch(optimize_ddp=False) if compiles else nullcontext():
        loop.run(report)
    accelerator.free_memory()
    return Learned(loop.best or {}, loop.state, batches)


def _compiles(settings: Healing, device: torch.device) -> bool:
    if settings.compile is not None:
        return settings.compile
    if settings.max_minutes is not None and settings.max_minutes < MINUTES_WORTH_COMPILING:
        return False
    return device.type == "cuda" and settings.max_tokens >= WORTH_COMPILING * settings.batch * settings.length


def _plain(settings: Healing) -> dict[str, Any]:
    """Settings as trackers take them."""
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
    """Write the best weights as an export."""
    report.stage("writing and verifying", 1)
    student, folder = Path(settings.student).expanduser(), workspace.folder / "export"
    form = format_named(manifest.format)
    model, changed = _healed(student, learned.best, settings, form)
    _measure(model.to(device), learned.batches)
    tensors = natural.to_export(model, changed, form, getattr(torch, manifest.plan.dtype))
    del model
    shutil.rmtree(folder, ignore_errors=True)
    told = summary(learned.state, settings) | {"curve": learned.state.curve}
    write_export(folder, student, tensors, told, settings, str(device))
    if workspace.output.exists():
        workspace.output.rmdir()
    folder.replace(workspace.output)
    shutil.rmtree(workspace.folder)
    report.advance(1)


def _healed(student: Path, best: dict[str, Tensor], settings: Healing, form: Format) -> tuple[Any, dict[str, Tensor]]:
    """The student with its ``best`` weights, in natural coordinates, and those of its tensors that changed."""
    model = load_student(student, form)
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
def _measure(model: Any, batches: Batches) -> None:
    """Let latents remember their sizes on what was kept aside and on a few batches."""
    natural.measure_latents(model, watching=True)
    for rows in (batches.held_out(), *(batches[step] for step in range(MEASURED))):
        for row in rows.to(model.device).split(1):
            model.model(row, use_cache=False)
    natural.measure_latents(model, watching=False)


def load_student(student: Path, form: Format) -> Any:
    """An export in float32 and natural coordinates, without dropout: its teacher has none."""
    register()
    model = load_model(student, dtype=torch.float32)
    for module in model.modules():
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    natural.to_natural(model, form)
    return model
