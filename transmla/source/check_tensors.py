"""Check that the tensors of a checkpoint agree with its config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transmla.errors import TransmlaError
from transmla.families.base import Family


def check_tensors(shapes: Mapping[str, tuple[int, ...]], config: Any, family: Family, model: Any) -> None:
    """Compare the names and shapes of a checkpoint's tensors with those of the model.

    transformers stacks the weights of all experts of a layer into one tensor. For experts, only the names are checked:
    every expert must have the same tensors.

    Args:
        shapes: shape of every tensor in the checkpoint, by name.
        config: the source's transformers config.
        family: the source's model family.
        model: the source's causal LM without weights.

    Raises:
        TransmlaError: if a tensor is missing, has another shape, or is not part of the model.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(family.tensors["head"], None)
    stacked = {name.partition(".experts.")[0] + "." for name in expected if ".experts." in name and name not in shapes}
    expected = {name: shape for name, shape in expected.items() if not name.startswith(tuple(stacked))}
    missing = [name for name in expected if name not in shapes] + _missing_experts(shapes, len(stacked))
    if missing:
        raise TransmlaError(
            f"{len(missing)} tensors are missing, the first is '{missing[0]}'",
            limit=f"config.json asks for {config.num_hidden_layers} layers of family {family.name}",
            remedy="download the checkpoint again, or correct its config.json",
        )
    blocks = tuple(block.rpartition(".mlp")[0] + "." for block in stacked)
    extra = [
        name
        for name in shapes
        if name not in expected
        and name != family.tensors["head"]
        and not (name.startswith(blocks) and ".self_attn." not in name)
    ]
    if extra:
        raise TransmlaError(
            f"tensor '{extra[0]}'" + (f" and {len(extra) - 1} more are" if extra[1:] else " is") + " not in the model",
            limit=f"family {family.name} with this config.json has no such weight, and nothing is dropped silently",
            remedy="use the config.json that belongs to these weights",
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise TransmlaError(
                f"tensor '{name}' has shape {list(shapes[name])}",
                limit=f"config.json asks for {list(shape)}",
                remedy="use the config.json that belongs to these weights",
            )


def _missing_experts(shapes: Mapping[str, tuple[int, ...]], blocks: int) -> list[str]:
    """Return the tensors that some experts in the checkpoint have and others lack.

    ``blocks`` is the expected number of layers with experts.
    """
    experts: dict[str, set[tuple[int, str]]] = {}
    for name in shapes:
        match = re.fullmatch(r"(.+)\.experts\.(\d+)\.(.+)", name)
        if match:
            experts.setdefault(match[1], set()).add((int(match[2]), match[3]))
    if blocks and len(experts) != blocks:
        return [f"experts of {blocks - len(experts)} layers"]
    numbers, parts = ({part[i] for parts in experts.values() for part in parts} for i in (0, 1))
    complete = {(number, part) for number in numbers for part in parts}
    return [
        f"{block}.experts.{number}.{part}"
        for block, present in sorted(experts.items())
        for number, part in sorted(complete - present)
    ]
