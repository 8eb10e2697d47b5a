"""Check the numbers in a model's config.json and generation_config.json before a class of transformers reads them.

transformers builds lists and modules as large as a config says. A config that asks for a billion layers would keep it
busy for hours, although the weights beside it have two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transmla.boundary import boundary, read_json, read_json_object
from transmla.errors import TransmlaError
from transmla.guard.folder import GENERATION, INDEX, weight_map
from transmla.guard.headers import read_headers, shards_of

# Names of config fields that count layers, that are widths of tensors, and that count anything else. Notes on the
# training and the length of the context are no parts of a model.
LAYERS = re.compile(r"(num|n)_(hidden_)?layers?|num_nextn_predict_layers")
WIDTHS = re.compile(
    r"(hidden|intermediate|vocab|moe_intermediate|shared_expert_intermediate)_size|(v_)?head_dim|n_(embd|inner|head)"
    r"|num_(attention|key_value)_heads|qk_\w+_head_dim|(kv|q)_lora_rank|d_model|d_ff"
)
COUNTS = re.compile(r"(num|n)_(?!ctx$|\w*(params|parameters|tokens|samples|steps)$)\w+")
# Classes that a config may name besides tensors.
FEWEST = 1000
# Largest count and width if the weights are not there yet, as for a model of the Hub. The largest models have less.
MOST_LAYERS, WIDEST = 10_000, 2**24
# A width may exceed the largest dimension of all tensors by this factor: some configs hold widths that nothing uses.
SLACK = 16
# Fields that may name code of the Hub, which transformers would download and run.
CODE = re.compile(r"_?(attn|experts)_implementation(_internal)?")
# Fields by which transformers builds another model than the other fields say, and how.
OTHER_MODEL = {
    "transformers_weights": "transformers would read the weights from another file than model.safetensors or its index",
    "fusion_config": "transformers would fuse modules, whose tensors have other names",
    "per_layer_config": "layers would differ from each other in more than windows and rotary embeddings",
}
# Values of ``layer_types`` in an export of the transmla format.
LAYER_TYPES = ("full_attention", "sliding_attention")


def check_config(folder: Path) -> None:
    """Check the config.json in ``folder``, if there is one, against the names and shapes of the tensors beside it.

    Raises:
        TransmlaError: if the file is no JSON object, a number is not finite or has more than 63 bits, a count or a
            width exceeds what the tensors can hold, a field names code of the Hub, one of OTHER_MODEL is set, or an
            export of the transmla format has a layer of unknown type. Also if generation_config.json has a number that
            is not finite.
    """
    _check_generation(folder)
    file = folder / "config.json"
    if not file.is_file():
        return
    config = read_json(file)
    if not isinstance(config, dict):
        raise _wrong(folder, "it holds no mapping of names to values")
    types = config.get("layer_types") if "source_model_type" in config else None
    for name in types if isinstance(types, list) else ():
        if name not in LAYER_TYPES:
            raise _wrong(folder, f"layer_types has {str(name)!r}; it may have {' and '.join(LAYER_TYPES)}")
    layers, widest = _limits(folder)
    limits = ((LAYERS, layers), (WIDTHS, SLACK * widest), (COUNTS, max(layers, widest, FEWEST)))
    with boundary(f"cannot read the config of '{folder}'", remedy="correct its config.json"):
        for name, value in _fields(config):
            if CODE.fullmatch(name) and "/" in str(value):
                raise TransmlaError(
                    f"the config of '{folder}' needs custom code ({name}: {value})",
                    limit="transmla runs no code from a checkpoint or the Hub",
                    remedy=f"remove {name} from its config.json",
                )
            if name in OTHER_MODEL and value:
                raise TransmlaError(
                    f"the config of '{folder}' sets {name}",
                    limit=OTHER_MODEL[name],
                    remedy=f"load the model with transformers, save it without {name}, and convert that",
                )
            if name in ("dtype", "torch_dtype") and not isinstance(value, str | dict | None):
                raise _wrong(folder, f"{name} is {value}; it must be a name such as bfloat16")
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value) or abs(value) >= 2**63:
                raise _wrong(
                    folder, f"{name} is {value:.3g}" if isinstance(value, float) else f"{name} has over 63 bits"
                )
            limit = next((limit for pattern, limit in limits if pattern.fullmatch(name)), None)
            if limit is not None and value > limit:
                raise _wrong(folder, f"{name} is {value:,}; the weights can hold at most {limit:,}")


def _check_generation(folder: Path) -> None:
    """Check that all numbers in the folder's generation_config.json are finite: the manifest holds them too."""
    values = read_json_object(folder / GENERATION) or {}
    with boundary(f"cannot read the {GENERATION} of '{folder}'", remedy=f"correct its {GENERATION}"):
        for name, value in _fields(values):
            if isinstance(value, float) and not math.isfinite(value):
                raise TransmlaError(
                    f"cannot read the {GENERATION} of '{folder}'",
                    limit=f"{name} is {value:.3g}; JSON holds finite numbers only",
                    remedy=f"remove {name} from it",
                )


def _wrong(folder: Path, limit: str) -> TransmlaError:
    return TransmlaError(
        f"cannot read the config of '{folder}'",
        limit=limit,
        remedy="use the config.json that belongs to these weights",
    )


def _limits(folder: Path) -> tuple[int, int]:
    """Return an upper bound of the layers, and the largest dimension of a tensor."""
    # Damaged weights are reported by whoever reads them.
    with suppress(TransmlaError):
        shards = shards_of(folder)
        if shards and all((folder / shard).is_file() for shard in shards):
            shapes = {name: stored.shape for name, stored in read_headers(folder, shards).items()}
            return len(shapes), max((size for shape in shapes.values() for size in shape), default=1)
        if (folder / INDEX).is_file():  # a model of the Hub whose weights are not downloaded yet
            return len(weight_map(folder / INDEX)), WIDEST
    return MOST_LAYERS, WIDEST


def _fields(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config and of the mappings and lists inside it, as name and value."""
    if depth > 20:
        raise ValueError("it is nested more than 20 levels deep")
    for name, value in config.items():
        yield name, value
        if isinstance(value, list):
            value = {f"{name}[{i}]": item for i, item in enumerate(value)}
        if isinstance(value, dict):
            yield from _fields(value, depth + 1)
