"""Check that the tensors of a checkpoint agree with its config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transmla.errors import TransmlaError
from transmla.families.base import Family


def check_tensors(shapes: Mapping[str, tuple[int, ...]], config: Any, family: Family, model: Any) -> None:
    """Compare every tensor that ``model`` needs with what the checkpoint holds.

    Of tensors that transformers stacks from several on disk (experts) only the names are compared, with each other.

    Raises:
        TransmlaError: naming the first tensors that are missing or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop(family.tensors["head"], None)
    stacked = {name.partition(".experts.")[0] + "." for name in wanted if ".experts." in name and name not in shapes}
    wanted = {name: shape for name, shape in wanted.items() if not name.startswith(tuple(stacked))}
    missing = [name for name in wanted if name not in shapes] + _missing_experts(shapes, len(stacked))
    if missing:
        raise TransmlaError(
            f"{len(missing)} tensors are missing, the first is '{missing[0]}'",
            limit=f"the config asks for {config.num_hidden_layers} layers of family {family.name}",
            remedy="download the checkpoint again, or correct its config.json",
        )
    blocks = tuple(block.rpartition(".mlp")[0] + "." for block in stacked)
    extra = [
        name
        for name in shapes
        if name not in wanted
        and name != family.tensors["head"]
        and not (name.startswith(blocks) and ".self_attn." not in name)
    ]
    if extra:
        raise TransmlaError(
            f"the model has no place for tensor '{extra[0]}'" + (f" and {len(extra) - 1} more" if extra[1:] else ""),
            limit=f"family {family.name} with this config.json has no such weight, and nothing is dropped silently",
            remedy="use the config.json that belongs to these weights",
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise TransmlaError(
                f"tensor '{name}' has shape {list(shapes[name])}",
                limit=f"config.json asks for {list(shape)}",
                remedy="use the config.json that belongs to these weights",
            )


def _missing_experts(shapes: Mapping[str, tuple[int, ...]], blocks: int) -> list[str]:
    """Tensors that some experts on disk have and others lack; there should be ``blocks`` layers of them."""
    found: dict[str, set[tuple[int, str]]] = {}
    for name in shapes:
        match = re.fullmatch(r"(.+)\.experts\.(\d+)\.(.+)", name)
        if match:
            found.setdefault(match[1], set()).add((int(match[2]), match[3]))
    if blocks and len(found) != blocks:
        return [f"experts of {blocks - len(found)} layers"]
    numbers, parts = ({part[i] for parts in found.values() for part in parts} for i in (0, 1))
    wanted = {(number, part) for number in numbers for part in parts}
    return [
        f"{block}.experts.{number}.{part}"
        for block, there in sorted(found.items())
        for number, part in sorted(wanted - there)
    ]
