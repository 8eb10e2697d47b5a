"""All settings of one healing, typed. The command line makes its flags from these fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from transmla.recipe import Strict
from transmla.shares import Mixture

# Panels of --help. A field without a panel is an argument, or a flag that may be given several times.
TEXT: dict[str, Any] = {"panel": "Text"}
BUDGET: dict[str, Any] = {"panel": "How long"}
LEARNED: dict[str, Any] = {"panel": "What is trained"}
LOSS: dict[str, Any] = {"panel": "Loss"}
OPTIMISER: dict[str, Any] = {"panel": "Optimiser"}
SPEED: dict[str, Any] = {"panel": "Memory and speed"}
TRACKING: dict[str, Any] = {"panel": "Evaluation and saving"}


class Healing(Strict):
    """One distillation of an export from a teacher."""

    student: str = Field(description="export to heal")
    teacher: str = Field(description="the source, or a larger model with the same tokenizer")
    output: str = Field(description="folder to write")
    revision: str | None = Field(None, description="branch, tag or commit of a teacher on the Hub")

    allow_pickle: bool = Field(False, description="open pickled (.bin) weights of the teacher, which can run code")

    data: Mixture = Field(
        ("auto",),
        description="text to learn from; give it several times for a mixture, as NAME or NAME:WEIGHT. auto, self, "
        "pydoc, stdlib, packages, a file or a Hub dataset, as for `convert --calibration`",
    )
    self_tokens: PositiveInt = Field(
        2_000_000, json_schema_extra=TEXT, description="tokens to sample from the teacher for the text `self`"
    )
    split: str | None = Field(
        None, json_schema_extra=TEXT, description="split of datasets, or of pydoc, stdlib and packages (train or test)"
    )
    column: str | None = Field(None, json_schema_extra=TEXT, description="text column of a dataset")
    length: int = Field(512, ge=8, json_schema_extra=TEXT, description="tokens per sequence")
    held_out: PositiveInt = Field(
        16,
        json_schema_extra=TEXT,
        description="sequences of every text that are never trained on; the weights with the lowest KL on them are "
        "exported",
    )
    max_epochs: PositiveInt = Field(40, json_schema_extra=TEXT, description="passes over a text at most")

    max_tokens: PositiveInt = Field(10_000_000, json_schema_extra=BUDGET, description="tokens to train on")
    max_minutes: PositiveFloat | None = Field(
        None, json_schema_extra=BUDGET, description="minutes to train for; the learning rate falls to zero by then"
    )
    patience: PositiveInt | None = Field(
        None, json_schema_extra=BUDGET, description="stop after this many evaluations without a lower KL"
    )

    trainable: Literal["attention", "all", "lora"] = Field(
        "attention",
        json_schema_extra=LEARNED,
        description="weights to train; lora: low-rank updates of the attention's linear layers, merged at the end; "
        "all: every weight, in models without experts",
    )
    lora_rank: PositiveInt = Field(32, json_schema_extra=LEARNED, description="rank of the updates of --trainable lora")

    kl: float = Field(1.0, ge=0, json_schema_extra=LOSS, description="weight of KL(teacher || student)")
    cross_entropy: float = Field(
        0.0, ge=0, json_schema_extra=LOSS, description="weight of the cross-entropy on the text's next tokens"
    )
    hidden: float = Field(
        0.0, ge=0, json_schema_extra=LOSS, description="weight of the relative squared error of the hidden states"
    )
    temperature: PositiveFloat = Field(1.0, json_schema_extra=LOSS, description="temperature of both sides of the KL")

    learning_rate: PositiveFloat | None = Field(
        None,
        json_schema_extra=OPTIMISER,
        description="peak learning rate of attention weights, in units of each tensor's root mean square (default: "
        "chosen by the KL before healing)",
    )
    other_rate: PositiveFloat = Field(
        0.3, json_schema_extra=OPTIMISER, description="learning rate of other weights, as a share of that of attention"
    )
    warmup: float = Field(
        0.03,
        ge=0,
        lt=1,
        json_schema_extra=OPTIMISER,
        description="share of the steps in which the learning rate rises (at least ten steps); 0 for none",
    )
    clip: PositiveFloat = Field(1.0, json_schema_extra=OPTIMISER, description="largest norm of a gradient")
    batch: PositiveInt = Field(32, json_schema_extra=OPTIMISER, description="sequences per step, over all processes")
    seed: int = Field(0, ge=0, lt=2**31, json_schema_extra=OPTIMISER, description="seed of order and sampling")

    device: str = Field("auto", json_schema_extra=SPEED, description="device: auto, cpu, cuda, cuda:1, …")
    precision: Literal["auto", "bf16", "no"] = Field(
        "auto", json_schema_extra=SPEED, description="mixed precision; auto is bf16 on GPUs and no on CPUs"
    )
    accumulate: PositiveInt = Field(
        1, json_schema_extra=SPEED, description="parts that a step is computed in, to save memory"
    )
    checkpointing: bool = Field(False, json_schema_extra=SPEED, description="recompute activations, to save memory")
    compile: bool | None = Field(
        None,
        json_schema_extra=SPEED,
        description="compile both models' layers and the loss, and replay each pass from a CUDA graph "
        "(default: on GPUs, for a hundred steps or more)",
    )

    eval_every: PositiveInt = Field(
        50, json_schema_extra=TRACKING, description="steps between evaluations on the held-out sequences"
    )
    save_every: PositiveInt = Field(
        200, json_schema_extra=TRACKING, description="steps between states that --resume continues from"
    )
    track: tuple[str, ...] = Field((), description="experiment tracker of accelerate: tensorboard, wandb, …")
