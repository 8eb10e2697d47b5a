"""What makes a healing impossible, said before anything is written."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from transmla.errors import TransmlaError
from transmla.export.hashes import CARD, MANIFEST, VERIFICATION, check_hashes
from transmla.heal.distributed import uses_deepspeed
from transmla.heal.losses import Head, trunk
from transmla.heal.settings import Healing


def check_settings(settings: Healing, accelerator: Any) -> None:
    """Batches must divide among processes, and something must be learned."""
    processes = accelerator.num_processes
    parts = processes * settings.accumulate
    if settings.batch % parts:
        raise TransmlaError(
            f"a batch of {settings.batch} sequences cannot be cut into {parts} equal parts",
            limit=f"it goes to {processes} processes, {settings.accumulate} parts each",
            remedy=f"--batch {math.ceil(settings.batch / parts) * parts}",
        )
    if not (settings.kl or settings.cross_entropy or settings.hidden):
        raise TransmlaError("nothing to learn", limit="all weights of the loss are 0", remedy="leave --kl at 1")
    _check_processes(accelerator)
    if settings.trainable == "lora" and not find_spec("peft"):
        raise TransmlaError(
            "--trainable lora needs peft", limit="it is not installed", remedy="pip install 'transmla[lora]'"
        )
    if "self" in settings.data:
        check_amount("self", settings.self_tokens, settings)


def _check_processes(accelerator: Any) -> None:
    """The ways to shard that healing is made for."""
    sharding = None
    if uses_deepspeed(accelerator):
        if accelerator.deepspeed_plugin.zero_stage not in (1, 2):
            sharding = f"DeepSpeed's stage {accelerator.deepspeed_plugin.zero_stage}"
    elif "FSDP" in str(accelerator.distributed_type):
        if not accelerator.is_fsdp2:
            sharding = "FSDP version 1"
        elif accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            sharding = "FSDP with fsdp_cpu_ram_efficient_loading"
    if sharding:
        raise TransmlaError(
            f"healing does not run under {sharding}",
            limit="it runs under DDP, FSDP2 and DeepSpeed's stages 1 and 2",
            remedy="launch it with a file of recipes/accelerate",
        )


def check_amount(name: str, tokens: int, settings: Healing) -> None:
    """A text must last for its share of what is learned from, in as many passes as are allowed."""
    share = -(-settings.max_tokens // len(settings.data))
    wanted = max(1, -(-share // (settings.max_epochs * settings.length)))
    missing = (wanted + settings.held_out + 1) * settings.length - tokens
    if missing > 0:
        raise TransmlaError(
            f"'{name}' has {tokens:,} tokens, {missing:,} too few",
            limit=f"its share is {share:,} tokens in at most {settings.max_epochs} passes, and {settings.held_out} "
            f"sequences of {settings.length} are kept aside",
            remedy="raise --self-tokens"
            if name == "self"
            else "give more text, add `--data self`, or lower --max-tokens",
        )


@torch.no_grad()
def _check_head(role: str, model: Any) -> None:
    """The head alone must give the model's own logits: some families do more to them than ``Head`` knows."""
    tokens = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    wanted = model(tokens, use_cache=False).logits.float()
    found = Head.of(model).logits(trunk(model)(tokens, use_cache=False).last_hidden_state)
    if (found - wanted).abs().max() > 0.05 * wanted.abs().max():
        raise TransmlaError(
            f"the {role}, '{model.config.model_type}', does more to its logits than its head",
            limit="healing computes them in pieces, and knows Granite's divisor and Gemma's caps",
            remedy="take the source, or a larger model of its family",
        )


def check_student(student: Path, hashes: dict[str, str]) -> None:
    """The export must be what its conversion wrote."""
    problems = check_hashes(student, hashes, free=(CARD, MANIFEST, VERIFICATION))
    if problems:
        raise TransmlaError(f"'{student}' is not what was converted", limit=problems[0], remedy="convert it again")


def check_tokenizers(ours: Any, theirs: Any) -> None:
    """Student and teacher must read the same tokens."""
    if ours.get_vocab() != theirs.get_vocab():
        raise TransmlaError(
            "student and teacher have different tokenizers",
            limit="they must mean the same by every token",
            remedy="take the source as the teacher, or a larger model of its family",
        )


def check_models(student: Any, teacher: Any, settings: Healing) -> None:
    """Their heads, vocabularies, widths and contexts must allow what is asked for."""
    for role, model in (("student", student), ("teacher", teacher)):
        if not hasattr(model.config, "vocab_size"):
            raise TransmlaError(
                f"the {role}, '{model.config.model_type}', is a model of text and more",
                limit="healing compares causal language models",
                remedy="save its language model by itself, and name that",
            )
        _check_head(role, model)
    if settings.trainable == "all" and any(".experts." in name for name, _ in student.named_parameters()):
        raise TransmlaError(
            "--trainable all does not reach experts",
            limit="transformers stacks them, and an export holds them as its source does",
            remedy="heal the attention, or pass --trainable lora",
        )
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
