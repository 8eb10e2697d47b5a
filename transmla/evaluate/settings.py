"""Settings of ``transmla eval`` for tasks and retrieval, typed. The command line makes its flags from these fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from transmla.recipe import Strict

# Panels of --help.
TASKS: dict[str, Any] = {"panel": "Tasks of lm-evaluation-harness"}
RETRIEVAL: dict[str, Any] = {"panel": "Retrieval"}

# Shortest retrieval prompt, in tokens: the pairs and the question of one prompt need about 100.
SHORTEST = 256


class TaskSettings(Strict):
    """The tasks of lm-evaluation-harness that an evaluation runs."""

    tasks: tuple[str, ...] = Field(
        (),
        json_schema_extra=TASKS,
        description="task, group or tag of lm-evaluation-harness; give it several times for several tasks",
    )
    tasks_path: str | None = Field(
        None, json_schema_extra=TASKS, description="folder with the YAML files of further tasks"
    )
    limit: PositiveInt | None = Field(
        None, json_schema_extra=TASKS, description="documents per task at most (default: all)"
    )
    num_fewshot: int | None = Field(
        None, ge=0, json_schema_extra=TASKS, description="examples in each prompt (default: the task's number)"
    )
    batch_size: PositiveInt = Field(8, json_schema_extra=TASKS, description="prompts of a task in one batch")


class RetrievalSettings(Strict):
    """The grid of prompts that hide pass keys in filler text."""

    retrieval: bool = Field(
        False,
        json_schema_extra=RETRIEVAL,
        description="measure how often the model finds a pass key in a long text, by length and depth",
    )
    retrieval_length: tuple[Annotated[int, Field(ge=SHORTEST)], ...] = Field(
        (),
        json_schema_extra=RETRIEVAL,
        description="tokens of prompt and answer; give it several times for several lengths (default: 1024, 2048 and "
        "4096, where the model's context allows)",
    )
    retrieval_depths: PositiveInt = Field(
        5, json_schema_extra=RETRIEVAL, description="depths of the pass key, from the beginning to the end of the text"
    )
    retrieval_samples: PositiveInt = Field(
        5, json_schema_extra=RETRIEVAL, description="prompts per kind, length and depth"
    )
    retrieval_seed: int = Field(0, ge=0, json_schema_extra=RETRIEVAL, description="seed of the prompts")
    retrieval_plot: Path | None = Field(
        None, json_schema_extra=RETRIEVAL, description="also draw a heat map, length by depth, into this .png file"
    )
