"""Reads the header of a GGUF file, and holds every count, length and offset against the file.

MLX leaves that to a library that believes what the file says: a wrong number there would make it
read, or write, beyond what it has.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAIRS_MAX = 65_536
TENSORS_MAX = 100_000
NAME_MAX = 1024
"""Bytes of a key, or of the name of a tensor."""
DIMENSIONS_MAX = 4
SHAPE_MAX = 2**31 - 1
ALIGNMENT_MAX = 65_536

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_TENSORS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 10: (256, 84), 12: (256, 144),
    14: (256, 210), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2),
}  # fmt: skip
"""The types that MLX reads: how many numbers a block has, and how many bytes."""


class Malformed(Exception):
    """The file is no GGUF, or not whole; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class ArrayOf:
    """An array of the metadata, whose values are not kept."""

    kind: int
    count: int


@dataclass(frozen=True, slots=True)
class Header:
    metadata: dict[str, Any]
    """A number, a truth, a text or an `ArrayOf` for each key."""
    tensors: dict[str, tuple[int, ...]]
    """Shapes, by name."""


def read_header(path: Path) -> Header:
    """Raises `Malformed`, and `OSError`. Holds no more than the file's own keys and names."""
    if path.stat().st_size < 24:
        raise Malformed("it is too short")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data).header()


class _Reader:
    """A place in the file, which only moves forward, and never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> Header:
        if self._take(4) != b"GGUF":
            raise Malformed("it does not begin as one")
        if (version := self._number("<I")) not in {2, 3}:
            raise Malformed(f"its version is {version}; 2 and 3 are read")
        tensor_count, pair_count = self._number("<Q"), self._number("<Q")
        if tensor_count > TENSORS_MAX or pair_count > PAIRS_MAX:
            raise Malformed(f"it claims {tensor_count} tensors and {pair_count} keys")
        metadata = {self._name(): self._value() for _ in range(pair_count)}
        alignment: Any = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= ALIGNMENT_MAX:
            raise Malformed(f"general.alignment is {alignment}")
        infos = [self._tensor() for _ in range(tensor_count)]
        begin = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in infos:
            self._check_tensor(name, shape, kind, begin + offset)
            if offset % alignment:
                raise Malformed(f"the tensor {name!r} is not aligned")
        return Header(metadata, {name: shape for name, shape, _, _ in infos})

    def _take(self, count: int) -> bytes:
        begin = self._at
        self._skip(count)
        return self._data[begin : self._at]

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise Malformed(f"at byte {self._at} it claims {count} bytes that it does not have")
        self._at += count

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return value

    def _name(self) -> str:
        length = self._number("<Q")
        if not 1 <= length <= NAME_MAX:
            raise Malformed(f"at byte {self._at} a name of {length} bytes begins")
        return self._take(length).decode("utf-8", "replace")

    def _value(self) -> Any:
        kind = self._number("<I")
        if kind == _STRING:
            return self._take(self._number("<Q")).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array()
        return self._number(self._form(kind))

    def _array(self) -> ArrayOf:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            # Each takes eight bytes at least, so the file itself bounds the loop.
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:
            self._skip(count * struct.calcsize(self._form(kind)))
        return ArrayOf(kind, count)

    def _form(self, kind: int) -> str:
        if (form := _SCALARS.get(kind)) is None:
            raise Malformed(f"at byte {self._at} a value has the type {kind}")
        return form

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._name(), self._number("<I")
        if not 1 <= dimensions <= DIMENSIONS_MAX:
            raise Malformed(f"the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        return name, shape, self._number("<I"), self._number("<Q")

    def _check_tensor(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> None:
        if not all(1 <= length <= SHAPE_MAX for length in shape):
            raise Malformed(f"the tensor {name!r} has the shape {shape}")
        if kind not in _TENSORS:
            raise Malformed(f"the tensor {name!r} has the type {kind}, which is not converted")
        block, width = _TENSORS[kind]
        if shape[0] % block:
            raise Malformed(f"the tensor {name!r} has rows of {shape[0]}, in blocks of {block}")
        size = width
        for length in (shape[0] // block, *shape[1:]):
            size *= length
        if begin + size > len(self._data):
            raise Malformed(f"the tensor {name!r} reaches beyond the file")
