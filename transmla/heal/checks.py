"""Checks of settings, models and texts. They refuse an impossible healing before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from transmla.errors import TransmlaError, missing_package
from transmla.export.hashes import UNHASHED, check_hashes
from transmla.heal.distributed import uses_deepspeed
from transmla.heal.losses import Head, trunk
from transmla.heal.settings import Healing


class TooLittleText(TransmlaError):
    """A text does not suffice for a healing. The remedy names flags of ``transmla heal``."""


def check_settings(settings: Healing, accelerator: Any) -> None:
    """Check the settings against the launched processes and the installed packages.

    Raises:
        TransmlaError: if a batch does not divide among processes and micro-batches, all loss weights are 0, the
            sharding is not supported, or peft is missing for LoRA.
    """
    processes = accelerator.num_processes
    parts = processes * settings.accumulate
    if settings.batch % parts:
        launched = "there is 1 process" if processes == 1 else f"there are {processes} processes"
        raise TransmlaError(
            f"a batch of {settings.batch} sequences cannot be divided into {parts} equal parts",
            limit=f"{launched}, and each computes {settings.accumulate} part{'' if settings.accumulate == 1 else 's'}",
            remedy=f"--batch {math.ceil(settings.batch / parts) * parts}",
        )
    if not (settings.kl or settings.cross_entropy or settings.hidden):
        raise TransmlaError("nothing to learn", limit="all weights of the loss are 0", remedy="leave --kl at 1")
    _check_sharding(accelerator)
    if settings.trainable == "lora" and not find_spec("peft"):
        raise missing_package("--trainable lora needs peft", "peft")


def check_trackers(names: Sequence[str]) -> None:
    """Check that accelerate has the trackers ``names``, and that their packages are installed.

    accelerate would leave a tracker out whose package is missing.

    Raises:
        TransmlaError: if one is unknown or not installed.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known, installed = LoggerType.list(), {"all", *map(str, get_available_trackers())}
    for name in names:
        if name not in known:
            raise TransmlaError(
                f"unknown tracker '{name}'", limit=f"accelerate has {', '.join(known)}", remedy="correct --track"
            )
        if name not in installed:
            raise TransmlaError(
                f"--track {name} would log nothing",
                limit=f"{name} is not installed",
                remedy=f"pip install {name}, or leave --track out",
            )


def _check_sharding(accelerator: Any) -> None:
    unsupported = None
    if uses_deepspeed(accelerator):
        if accelerator.deepspeed_plugin.zero_stage not in (1, 2):
            unsupported = f"DeepSpeed's stage {accelerator.deepspeed_plugin.zero_stage}"
    elif "FSDP" in str(accelerator.distributed_type):
        if not accelerator.is_fsdp2:
            unsupported = "FSDP version 1"
        elif accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            unsupported = "FSDP with fsdp_cpu_ram_efficient_loading"
    if unsupported:
        raise TransmlaError(
            f"healing does not run under {unsupported}",
            limit="it runs under DDP, FSDP2 and DeepSpeed's stages 1 and 2",
            remedy="launch it with a configuration file from recipes/accelerate",
        )


def check_amount(name: str, tokens: int, part: float, settings: Healing) -> None:
    """Check that the text ``name`` has enough tokens.

    The text must supply its share of the training tokens within ``max_epochs`` epochs, and the held-out sequences. If
    minutes alone limit the healing, one sequence to train on is enough.

    Args:
        name: the text.
        tokens: number of its tokens.
        part: its share of the training tokens, between 0 and 1.
        settings: the amounts.

    Raises:
        TooLittleText: if ``tokens`` are too few.
    """
    by_minutes = settings.max_minutes is not None and "max_tokens" not in settings.model_fields_set
    share = 0 if by_minutes else math.ceil(part * settings.max_tokens)
    sequences = max(1, -(-share // (settings.max_epochs * settings.length)))
    missing = (sequences + settings.held_out + 1) * settings.length - tokens
    if missing > 0:
        # The fewest tokens to train on are one sequence.
        fits = (1 + settings.held_out + 1) * settings.length <= tokens
        raise TooLittleText(
            f"'{name}' has {tokens:,} tokens, {missing:,} too few",
            limit=(f"its share is {share:,} tokens in at most {settings.max_epochs} epochs, and " if share else "")
            + f"{settings.held_out} sequences of {settings.length} are held out",
            remedy="raise --self-tokens"
            if name == "self"
            else f"give more text, add `--data self`, or lower {'--max-tokens' if fits else '--held-out or --length'}",
        )


def check_same_texts(fingerprint: str) -> None:
    """Check that all processes read the same texts. Every process asks the Hub and reads files for itself.

    Args:
        fingerprint: hash of the tokens of this process.

    Raises:
        TransmlaError: if another process has other tokens.
    """
    from accelerate.utils import gather_object

    if len(set(gather_object([fingerprint]))) > 1:
        raise TransmlaError(
            "the processes have different texts",
            limit="every process must train on the same mixture",
            remedy="name texts with --data that every machine has, instead of auto",
        )


@torch.no_grad()
def _check_head(role: str, model: Any) -> None:
    """Check that ``Head`` reproduces the model's logits: some families apply operations that ``Head`` lacks."""
    tokens = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    expected = model(tokens, use_cache=False).logits.float()
    logits = Head.of(model).logits(trunk(model)(tokens, use_cache=False).last_hidden_state)
    if (logits - expected).abs().max() > 0.05 * expected.abs().max():
        raise TransmlaError(
            f"the {role}, '{model.config.model_type}', changes its logits after the head in an unsupported way",
            limit="healing computes logits in chunks, and supports only Granite's divisor and Gemma's cap",
            remedy="use the source as the teacher, or a larger model of its family",
        )


def check_student(student: Path, hashes: dict[str, str]) -> None:
    """Check that the files of the export ``student`` have the ``hashes`` of its manifest.

    Raises:
        TransmlaError: if a file is missing, changed or not listed.
    """
    problems = check_hashes(student, hashes, free=UNHASHED)
    if problems:
        raise TransmlaError(
            f"'{student}' has changed since it was written", limit=problems[0], remedy="convert it again"
        )


def check_tokenizers(ours: Any, theirs: Any) -> None:
    """Check that the student's tokenizer ``ours`` and the teacher's tokenizer ``theirs`` have the same vocabulary.

    Raises:
        TransmlaError: if they differ.
    """
    if ours.get_vocab() != theirs.get_vocab():
        raise TransmlaError(
            "student and teacher have different tokenizers",
            limit="every token must mean the same to both",
            remedy="use the source as the teacher, or a larger model of its family",
        )


def check_models(student: Any, teacher: Any, settings: Healing) -> None:
    """Check that the two models can be compared under ``settings``.

    Raises:
        TransmlaError: if a model is not a causal LM or has an unsupported head, experts would be trained, the
            vocabularies differ, hidden states of different shapes would be compared, or a context is too short.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if not hasattr(model.config, "vocab_size"):
            raise TransmlaError(
                f"the {role}, '{model.config.model_type}', is a multimodal model",
                limit="healing compares causal language models",
                remedy="save its language model alone, and pass that model",
            )
        _check_head(role, model)
    if settings.trainable == "all" and any(".experts." in name for name, _ in student.named_parameters()):
        raise TransmlaError(
            "--trainable all does not support experts",
            limit="transformers stacks the weights of experts, but an export stores them as its source does",
            remedy="train the attention only, or pass --trainable lora",
        )
    vocabularies = student.config.vocab_size, teacher.config.vocab_size
    if vocabularies[0] != vocabularies[1]:
        raise TransmlaError(
            f"the teacher's vocabulary has {vocabularies[1]} entries, the student's {vocabularies[0]}",
            remedy="use the source as the teacher, or a larger model of its family",
        )
    shapes = [(m.config.hidden_size, m.config.num_hidden_layers) for m in (student, teacher)]
    if settings.hidden and shapes[0] != shapes[1]:
        raise TransmlaError(
            f"the teacher has {shapes[1][1]} layers of width {shapes[1][0]}, the student {shapes[0][1]} of width "
            f"{shapes[0][0]}",
            limit="--hidden compares the hidden states layer by layer",
            remedy="leave --hidden at 0",
        )
    longest = min(m.config.max_position_embeddings for m in (student, teacher))
    if settings.length > longest:
        raise TransmlaError(
            f"sequences of {settings.length} tokens are longer than the models' context",
            limit=f"at most {longest}",
            remedy="lower --length",
        )
