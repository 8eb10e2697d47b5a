"""Check the header of a GGUF file before the libraries that parse GGUF read it.

Those libraries loop over every count in the header. Here, counts are compared with the size of the file and with the
tensors that the file holds. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from transmla.errors import TransmlaError

# Type number of a value → its format for ``struct``.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
# Fewest bytes that a field and a tensor take in the header.
_SMALLEST_FIELD, _SMALLEST_TENSOR = 13, 24
# Ends of the names of fields that are bounded by the tensors' number, and by their largest dimension.
_COUNTS = (".block_count", ".expert_count", ".expert_used_count")
_WIDTHS = (
    *(".embedding_length", ".feed_forward_length", ".head_count", ".head_count_kv", ".key_length", ".value_length"),
    *(".dimension_count", ".vocab_size"),
)
# Ends of the names of fields that every model has.
_REQUIRED = (".block_count", ".embedding_length", ".feed_forward_length", ".attention.head_count")
# A field may exceed the largest dimension of all tensors by this factor.
_SLACK = 16


class _Header:
    """The fields and the tensors' dimensions of a GGUF file. An impossible count is an error."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        magic, version = file.read(4), self.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as a GGUF file of version 2 or 3")
        tensors, fields = self.count(_SMALLEST_TENSOR), self.count(_SMALLEST_FIELD)
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self.text()
            self.fields[name] = self.value(self.number("I"))
        self.shapes = [self.tensor() for _ in range(tensors)]

    def number(self, kind: str) -> Any:
        data = self.file.read(struct.calcsize(f"<{kind}"))
        return struct.unpack(f"<{kind}", data)[0]

    def count(self, smallest: int) -> int:
        """Return a count of things that take at least ``smallest`` bytes each."""
        value = int(self.number("Q"))
        if value * smallest > self.size - self.file.tell():
            raise ValueError(f"its header counts {value:,} values, more than the file can hold")
        return value

    def text(self) -> str:
        return self.file.read(self.count(1)).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < _MOST_DIMENSIONS:
            inner = self.number("I")
            length = self.count(struct.calcsize(f"<{_SCALARS[inner]}") if inner in _SCALARS else 8)
            if inner in _SCALARS:
                packed = struct.Struct(f"<{length}{_SCALARS[inner]}")
                return packed.unpack(self.file.read(packed.size))
            for _ in range(length):
                self.value(inner, depth + 1)
            return None
        if kind not in _SCALARS:
            raise ValueError(f"its header has a value of the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def tensor(self) -> tuple[int, ...]:
        self.text()
        dimensions = self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions:,} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        self.file.seek(12, 1)
        # The smallest type holds more than one value in a byte, but never more than 32.
        if math.prod(shape) > 32 * self.size:
            raise ValueError(f"a tensor of shape {list(shape)} is larger than the file")
        return shape


def check_header(path: Path) -> None:
    """Check the counts in the header of a GGUF file.

    Raises:
        TransmlaError: if a count exceeds what the file or its tensors can hold, or a number is not finite.
        ValueError, struct.error: if the header is damaged.
    """
    with path.open("rb") as file:
        header = _Header(file, path.stat().st_size)
    family = str(header.fields.get("general.architecture"))
    for name in (f"{family}{end}" for end in _REQUIRED):
        if name not in header.fields:  # transformers would take a default of billions of weights
            raise _wrong(path, f"its header has no field {name}")
    widest = max((size for shape in header.shapes for size in shape), default=0)
    for name, value in header.fields.items():
        limit = len(header.shapes) if name.endswith(_COUNTS) else _SLACK * widest if name.endswith(_WIDTHS) else None
        # A field may have one number for each layer.
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number) and not name.startswith("tokenizer."):
                raise _wrong(path, f"{name} is {number}")
            if limit is not None and isinstance(number, int | float) and number > limit:
                raise _wrong(path, f"{name} is {number:,}; its tensors can hold at most {limit:,}")


def read_gguf_card(path: Path) -> dict[str, Any]:
    """Return the licence that the header of a GGUF file names, as fields of a model card's metadata.

    Raises:
        ValueError, struct.error: if the header is damaged.
    """
    with path.open("rb") as file:
        fields = _Header(file, path.stat().st_size).fields
    names = {"license": "general.license", "license_name": "general.license.name"}
    names["license_link"] = "general.license.link"
    card = {field: fields.get(name) for field, name in names.items()}
    if not str(card["license_link"]).startswith(("https://", "http://")):
        del card["license_link"]
    return {field: value for field, value in card.items() if isinstance(value, str) and value}


def _wrong(path: Path, limit: str) -> TransmlaError:
    return TransmlaError(f"'{path.name}' cannot be read as GGUF", limit=limit, remedy="download it again")
