"""Everything a healing can be told, typed; the command line makes its options of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from transmla.recipe import Strict


class Healing(Strict):
    """One distillation of an export from a teacher."""

    student: str = Field(description="export to heal")
    teacher: str = Field(description="the source, or a larger model with the same tokenizer")
    output: str = Field(description="folder to write")
    revision: str | None = Field(None, description="branch, tag or commit of a teacher on the Hub")

    data: tuple[str, ...] = Field(("self",), min_length=1, description="texts, taken in equal shares")
    split: str | None = Field(None, description="split of a dataset, or of pydoc (train, test)")
    column: str | None = Field(None, description="text column of a dataset")
    self_tokens: PositiveInt = Field(2_000_000, description="tokens sampled from the teacher for `self`")
    length: int = Field(512, ge=8, description="tokens per sequence")
    held_out: PositiveInt = Field(
        16, description="sequences of every text kept aside; what has the least KL to the teacher on them is exported"
    )
    max_epochs: PositiveInt = Field(40, description="passes over a text at most")

    max_tokens: PositiveInt = Field(10_000_000, description="tokens to learn from")
    max_minutes: PositiveFloat | None = Field(None, description="time to learn in; what is left sets the rate")
    batch: PositiveInt = Field(32, description="sequences per step, over all processes")
    accumulate: PositiveInt = Field(1, description="parts that a step is computed in, to save memory")

    trainable: Literal["attention", "all", "lora"] = Field(
        "attention",
        description="what may change; lora: low-rank updates of the attention's linear layers, merged at the end; all: "
        "everything, where there are no experts",
    )
    lora_rank: PositiveInt = Field(32, description="rank of those updates")
    learning_rate: PositiveFloat | None = Field(
        None, description="of attention factors, in units of a tensor's size (default: by the KL before healing)"
    )
    other_rate: PositiveFloat = Field(0.3, description="the others' share of it, with --trainable all")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of steps in which the rate rises, ten at least; 0: none")
    clip: PositiveFloat = Field(1.0, description="largest norm of a gradient")

    kl: float = Field(1.0, ge=0, description="weight of KL(teacher || student)")
    cross_entropy: float = Field(0.0, ge=0, description="weight of the text's own next tokens, to learn the text too")
    hidden: float = Field(0.0, ge=0, description="weight of the hidden states' relative squared error")
    temperature: PositiveFloat = Field(1.0, description="of both sides of the KL")

    precision: Literal["auto", "bf16", "no"] = Field("auto", description="auto: bf16 on GPUs, no on CPUs")
    checkpointing: bool = Field(False, description="recompute activations, to save memory")
    compile: bool | None = Field(
        None, description="compile both models' layers and the loss (default: on GPUs, for a hundred steps or more)"
    )
    eval_every: PositiveInt = Field(50, description="steps between looks at the sequences kept aside")
    patience: PositiveInt | None = Field(None, description="looks without less KL to the teacher before it stops")
    save_every: PositiveInt = Field(200, description="steps between states to resume from")
    track: tuple[str, ...] = Field((), description="experiment trackers of accelerate: tensorboard, wandb, …")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of order and sampling")
