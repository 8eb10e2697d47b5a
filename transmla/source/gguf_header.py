"""Read the header of a GGUF file: its fields, and the names, shapes and places of its tensors.

The counts are checked before the libraries that parse GGUF read the file. Those libraries loop over every count. Here,
counts are compared with the size of the file and with the tensors that the file holds. The values of string arrays,
such as the vocabulary, are skipped: a header is read in a fraction of a second.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transmla.errors import TransmlaError

# Type number of a value → its format for ``struct``.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_MOST_DIMENSIONS = 4
# Bytes that tensors are aligned to if the header does not say, and at most.
_ALIGNMENT, _MOST_ALIGNMENT = 32, 2**16
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
# The vocabulary, and the other fields with an entry for each of its tokens.
TOKENS = "tokenizer.ggml.tokens"
_PER_TOKEN = (TOKENS, "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: name of the tensor in the file.
        shape: shape of the tensor in PyTorch's order.
        kind: number of the tensor's type, which says how its values are quantised.
        start: position of the tensor's first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        fields: values by name; None for an array of strings.
        lengths: number of the entries of every array, by name.
        places: first and last byte of every field in the file, by name.
        tensors: the tensors in the order of the file.
    """

    fields: dict[str, Any]
    lengths: dict[str, int]
    places: dict[str, tuple[int, int]]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        return str(self.fields.get("general.architecture"))


class _Reader:
    """Reads the values of a header in order. An impossible count is an error."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 0

    def header(self) -> GgufHeader:
        magic, version = self.take(4), self.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as a GGUF file of version 2 or 3")
        tensors, count = self.count(_SMALLEST_TENSOR), self.count(_SMALLEST_FIELD)
        fields: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            begin, name = self.at, self.text()
            kind = self.number("I")
            if kind == _ARRAY:
                lengths[name] = struct.unpack_from("<IQ", self.data, self.at)[1]
            fields[name] = self.value(kind)
            places[name] = begin, self.at
        infos = [self.tensor() for _ in range(tensors)]
        align = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(align, int) or not 1 <= align <= _MOST_ALIGNMENT:
            raise ValueError(f"its tensors are aligned to {align} bytes")
        data = -(-self.at // align) * align
        named = tuple(GgufTensor(name, shape, kind, data + offset) for name, shape, kind, offset in infos)
        return GgufHeader(fields, lengths, places, named)

    def take(self, length: int) -> bytes:
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self, kind: str) -> Any:
        value = struct.unpack_from(f"<{kind}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{kind}")
        return value

    def count(self, smallest: int) -> int:
        """Return a count of things that take at least ``smallest`` bytes each."""
        value = int(self.number("Q"))
        if value * smallest > self.size - self.at:
            raise ValueError(f"its header counts {value:,} values, more than the file can hold")
        return value

    def text(self) -> str:
        return self.take(self.count(1)).decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        """Skip the strings of an array: a vocabulary has hundreds of thousands."""
        unpack, at = struct.Struct("<Q").unpack_from, self.at
        for _ in range(count):
            (length,) = unpack(self.data, at)
            at += 8 + length
            if at > self.size:
                raise ValueError(f"its header has a text of {length:,} bytes, more than the file can hold")
        self.at = at

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < _MOST_DIMENSIONS:
            inner = self.number("I")
            length = self.count(struct.calcsize(f"<{_SCALARS[inner]}") if inner in _SCALARS else 8)
            if inner in _SCALARS:
                values = struct.unpack_from(f"<{length}{_SCALARS[inner]}", self.data, self.at)
                self.at += struct.calcsize(f"<{length}{_SCALARS[inner]}")
                return values
            if inner == _STRING:
                self.skip_texts(length)
            else:
                for _ in range(length):
                    self.value(inner, depth + 1)
            return None
        if kind not in _SCALARS:
            raise ValueError(f"its header has a value of the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return the name, shape and type of a tensor, and its place among the tensors' bytes."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions:,} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind, offset = self.number("I"), self.number("Q")
        # The smallest type holds more than one value in a byte, but never more than 32.
        if math.prod(shape) > 32 * self.size:
            raise ValueError(f"a tensor of shape {list(shape)} is larger than the file")
        return name, shape[::-1], kind, offset


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        ValueError, struct.error: if the header is damaged.
    """
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _read(path: Path, size: int, _changed: int) -> GgufHeader:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data, size).header()


def check_header(path: Path) -> None:
    """Check the counts in the header of a GGUF file.

    Raises:
        TransmlaError: if a count exceeds what the file or its tensors can hold, or a number is not finite.
        ValueError, struct.error: if the header is damaged.
    """
    header = read_header(path)
    for name in (f"{header.architecture}{end}" for end in _REQUIRED):
        if name not in header.fields:  # transformers would take a default of billions of weights
            raise _wrong(path, f"its header has no field {name}")
    widest = max((size for tensor in header.tensors for size in tensor.shape), default=0)
    for name, value in header.fields.items():
        if name.startswith("tokenizer."):
            continue
        limit = len(header.tensors) if name.endswith(_COUNTS) else _SLACK * widest if name.endswith(_WIDTHS) else None
        # A field may have one number for each layer.
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise _wrong(path, f"{name} is {number}")
            if limit is not None and isinstance(number, int | float) and number > limit:
                raise _wrong(path, f"{name} is {number:,}; its tensors can hold at most {limit:,}")


@contextmanager
def without_tensors(path: Path) -> Iterator[Path]:
    """Yield a small copy of a GGUF file for transformers' own reader of its config.

    transformers reads fields and the names of tensors for a config, but its reader takes seconds for the vocabulary.
    The copy has the same fields without the vocabulary, whose size becomes a field. Its tensors have one value each.

    Raises:
        ValueError, struct.error: if the header is damaged.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    header = read_header(path)
    size_field = f"{header.architecture}.vocab_size"
    families: dict[str, Any] = GGUF_TO_TRANSFORMERS_MAPPING["config"]  # type: ignore[assignment]
    # transformers counts the tokens if there is no such field, or if it does not know the field.
    counts_tokens = size_field not in header.fields and "vocab_size" not in families.get(header.architecture, {})
    left_out = () if counts_tokens else _PER_TOKEN
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        fields = [data[begin:end] for name, (begin, end) in header.places.items() if name not in left_out]
    if size_field not in header.fields and TOKENS in header.lengths and not counts_tokens:
        fields.append(_text(size_field) + struct.pack("<II", _UINT32, header.lengths[TOKENS]))
    # One dimension of 1, float32 at the first byte of the data.
    tensors = [_text(tensor.name) + struct.pack("<IQIQ", 1, 1, 0, 0) for tensor in header.tensors]
    content = b"".join([b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields)), *fields, *tensors])
    align = int(header.fields.get("general.alignment", _ALIGNMENT))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(content + bytes(-len(content) % align + align))
        yield copy


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def read_gguf_card(path: Path) -> dict[str, Any]:
    """Return the licence that the header of a GGUF file names, as fields of a model card's metadata.

    Raises:
        ValueError, struct.error: if the header is damaged.
    """
    fields = read_header(path).fields
    names = {"license": "general.license", "license_name": "general.license.name"}
    names["license_link"] = "general.license.link"
    card = {field: fields.get(name) for field, name in names.items()}
    if not str(card["license_link"]).startswith(("https://", "http://")):
        del card["license_link"]
    return {field: value for field, value in card.items() if isinstance(value, str) and value}


def _wrong(path: Path, limit: str) -> TransmlaError:
    return TransmlaError(f"'{path.name}' cannot be read as GGUF", limit=limit, remedy="download it again")
