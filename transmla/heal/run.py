"""A healing from end to end: two models and some text in, an export out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transmla.checkpoint import load_model, open_checkpoint, resolve_source
from transmla.errors import TransmlaError
from transmla.export import CARD, MANIFEST, VERIFICATION, Workspace, disk_errors
from transmla.fingerprint import check_hashes, export_fingerprint, read_manifest
from transmla.heal import natural
from transmla.heal.finish import write_export
from transmla.heal.loop import Loop
from transmla.heal.losses import Distiller, trunk
from transmla.heal.optimiser import ATTENTION, choose_trainable, make_optimiser
from transmla.heal.settings import Healing
from transmla.heal.state import State, Store, run_key, summary
from transmla.heal.text import Reading, open_texts
from transmla.progress import Reporter, Silent
from transmla.source import load_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator

# Batches on which latents are measured, beside what was kept aside.
MEASURED = 4


def heal(
    settings: Healing, *, resume: bool = False, reporter: Reporter | None = None, accelerator: Accelerator | None = None
) -> Path:
    """Heal the export ``settings.student`` into the new folder ``settings.output``; returns that folder.

    Every process that accelerate started calls this. ``accelerator`` replaces the one made here.

    Raises:
        TransmlaError: for bad input, before anything is written; for a loss that stays no number; for a full disk.
    """
    report = reporter or Silent()
    output, student = Path(settings.output).expanduser(), Path(settings.student).expanduser()
    manifest = read_manifest(student / MANIFEST)
    workspace = Workspace(output, shards=0)
    accelerator = accelerator or make_accelerator(settings, output)
    _check_settings(settings, accelerator.num_processes)
    if accelerator.is_main_process:
        workspace.refuse_overwrite(resume=resume)
    report = report if accelerator.is_main_process else Silent()
    _check_hashes(student, manifest)
    teacher_path = resolve_source(settings.teacher, revision=settings.revision)
    tokenizer = load_tokenizer(teacher_path)
    _check_tokenizers(load_tokenizer(student), tokenizer)

    checkpoint = open_checkpoint(teacher_path)
    report.stage("checking the teacher", len(checkpoint.shapes))
    fingerprint = checkpoint.fingerprint(lambda done, _: report.advance(done))
    half = accelerator.mixed_precision == "bf16"
    teacher = load_model(teacher_path, dtype=torch.bfloat16 if half else torch.float32).to(accelerator.device).eval()
    model = _load_student(student)
    _check_models(model, teacher, settings)
    with accelerator.main_process_first():
        reading = open_texts(settings, tokenizer, teacher, fingerprint, report)

    torch.manual_seed(settings.seed)
    model = choose_trainable(model, settings)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        # Layer by layer: all are one piece of code, which is compiled once.
        for layer in (*trunk(model).layers, *trunk(teacher).layers):
            layer.compile()
    distiller = Distiller(
        model,
        teacher,
        kl=settings.kl,
        cross_entropy=settings.cross_entropy,
        hidden=settings.hidden,
        temperature=settings.temperature,
    )
    # Rates come from whole tensors, before anything is sharded.
    prepared, optimiser = accelerator.prepare(distiller, make_optimiser(distiller, settings))
    store = Store(workspace.folder)
    key = run_key(settings, export_fingerprint(manifest["hashes"]), fingerprint)
    state = store.read(key)
    loop = Loop(accelerator, prepared, optimiser, reading, settings, state or State(key), store)
    with disk_errors(output):
        if accelerator.is_main_process:
            workspace.folder.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        if state is not None:
            loop.restore()
        loop.run(report)
        _finish(accelerator, loop, reading, student, manifest, workspace, report)
        accelerator.end_training()
    return output


def make_accelerator(settings: Healing, output: Path) -> Accelerator:
    """Accelerate as it was launched, with the precision and trackers that ``settings`` ask for."""
    from accelerate import Accelerator

    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "no"
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=list(settings.track) or None,
        project_dir=str(output.with_name(output.name + ".logs")),
    )
    if settings.track:
        accelerator.init_trackers("transmla", config=_plain(settings))
    return accelerator


def _plain(settings: Healing) -> dict[str, Any]:
    """Settings as trackers take them."""
    values = settings.model_dump(mode="json", exclude_none=True)
    return {name: ", ".join(v) if isinstance(v, list) else v for name, v in values.items()}


def _check_settings(settings: Healing, processes: int) -> None:
    parts = processes * settings.accumulate
    if settings.batch % parts:
        raise TransmlaError(
            f"a batch of {settings.batch} sequences cannot be cut into {parts} equal parts",
            limit=f"it goes to {processes} processes, {settings.accumulate} parts each",
            remedy=f"--batch {math.ceil(settings.batch / parts) * parts}",
        )
    if not (settings.kl or settings.cross_entropy or settings.hidden):
        raise TransmlaError("nothing to learn", limit="all weights of the loss are 0", remedy="leave --kl at 1")


def _check_hashes(student: Path, manifest: dict[str, Any]) -> None:
    problems = check_hashes(student, manifest["hashes"], free=(CARD, MANIFEST, VERIFICATION))
    if problems:
        raise TransmlaError(f"'{student}' is not what was converted", limit=problems[0], remedy="convert it again")


def _check_tokenizers(ours: Any, theirs: Any) -> None:
    if ours.get_vocab() != theirs.get_vocab():
        raise TransmlaError(
            "student and teacher have different tokenizers",
            limit="they must mean the same by every token",
            remedy="take the source as the teacher, or a larger model of its family",
        )


def _check_models(student: Any, teacher: Any, settings: Healing) -> None:
    words = student.config.vocab_size, teacher.config.vocab_size
    if words[0] != words[1]:
        raise TransmlaError(
            f"the teacher's vocabulary has {words[1]} entries, the student's {words[0]}",
            remedy="take the source as the teacher, or a larger model of its family",
        )
    shapes = [(m.config.hidden_size, m.config.num_hidden_layers) for m in (student, teacher)]
    if settings.hidden and shapes[0] != shapes[1]:
        raise TransmlaError(
            f"the teacher has {shapes[1][1]} layers of {shapes[1][0]}, the student {shapes[0][1]} of {shapes[0][0]}",
            limit="hidden states are compared one by one",
            remedy="leave --hidden at 0",
        )
    longest = min(m.config.max_position_embeddings for m in (student, teacher))
    if settings.length > longest:
        raise TransmlaError(
            f"sequences of {settings.length} tokens are longer than the models' context",
            limit=f"at most {longest}",
            remedy="lower --length",
        )


def _finish(
    accelerator: Any,
    loop: Loop,
    reading: Reading,
    student: Path,
    manifest: dict[str, Any],
    workspace: Workspace,
    report: Reporter,
) -> None:
    """Write the best weights as an export, on the first process; the others wait."""
    if accelerator.is_main_process:
        report.stage("writing and verifying", 1)
        model, changed = _healed(student, loop.best or {}, loop.settings)
        _measure(model.to(accelerator.device), reading)
        tensors = natural.leave(model, changed, getattr(torch, manifest["plan"]["dtype"]))
        del model
        folder = workspace.folder / "export"
        shutil.rmtree(folder, ignore_errors=True)
        told = summary(loop.state, loop.settings) | {"curve": loop.state.curve}
        write_export(folder, student, tensors, told, loop.settings, str(accelerator.device))
        if workspace.output.exists():
            workspace.output.rmdir()
        folder.replace(workspace.output)
        shutil.rmtree(workspace.folder)
        report.advance(1)
    accelerator.wait_for_everyone()


def _healed(student: Path, best: dict[str, Tensor], settings: Healing) -> tuple[Any, dict[str, Tensor]]:
    """The student with its ``best`` weights, in natural coordinates, and those of its tensors that changed."""
    model = _load_student(student)
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
def _measure(model: Any, reading: Reading) -> None:
    """Let latents remember their sizes on what was kept aside and on a few batches."""
    natural.watch(model, watching=True)
    for rows in (reading.held_out(), *(reading[step] for step in range(MEASURED))):
        for row in rows.to(model.device).split(1):
            model.model(row, use_cache=False)
    natural.watch(model, watching=False)


def _load_student(student: Path) -> Any:
    """An export in float32 and natural coordinates."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    natural.enter(model)
    return model
