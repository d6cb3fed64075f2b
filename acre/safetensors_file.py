"""One safetensors file, mapped; and writing one, a tensor at a time.

Takes a path; gives the names, dtypes and shapes of its tensors and views of their bytes
in the mapping (bf16 as uint16 bits, which NumPy lacks a type for). One idea: the whole
header is checked before any tensor is read, so that a view can never leave the file.
Refuses headers that are cut or no JSON, unknown dtypes, ranges that overlap, leave
holes or do not fit shape and dtype. A file that shrinks while it is mapped cannot be
guarded against: it must not be written to while it is open.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from acre.errors import ModelFileError
from acre.fields import parse_json, short
from acre.files import CHUNK, write

HEADER_MAX = 100_000_000  # bytes; the format's own limit
READABLE = {"F32": ("f32", "<f4"), "F16": ("f16", "<f2"), "BF16": ("bf16", "<u2")}
SMALL = {**READABLE, "I8": ("i8", "<i1")}  # with what packed adapters hold
ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype by safetensors' name; bytes [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, read-only. FileNotFoundError; ModelFileError when empty."""
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ModelFileError(f"{path}: the file is empty") from None


class SafetensorsFile:
    """A mapped file; `entries` by tensor name, in the order of their bytes; `metadata`,
    strings by name, as the file has them."""

    def __init__(self, path: Path) -> None:
        """FileNotFoundError, ModelFileError."""
        self.path = path
        self._bytes = map_file(path)
        header, start = self._header()
        found = [
            (name, self._entry(name, value, start)) for name, value in header.items()
        ]
        found.sort(key=lambda item: (item[1].begin, item[1].end))
        self._check_layout(found, start)
        self.entries: dict[str, Entry] = dict(found)

    def _header(self) -> tuple[dict[str, Any], int]:
        """The parsed header without its metadata, which is kept apart, and where the
        tensors' bytes begin."""
        size = len(self._bytes)
        length = int.from_bytes(self._bytes[:8], "little")
        if size < 8 or length > min(size - 8, HEADER_MAX):
            raise ModelFileError(
                f"{self.path}: not a safetensors file, or cut: the header should have "
                f"{length} bytes, the file has {size}"
            )
        header = parse_json(self._bytes[8 : 8 + length], f"{self.path}: header")
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict) or not all(
            isinstance(value, str) for value in self.metadata.values()
        ):
            raise ModelFileError(f"{self.path}: header: __metadata__ holds no strings")
        return header, 8 + length

    def _entry(self, name: str, value: Any, start: int) -> Entry:
        """One header entry, checked by itself."""

        def fail(what: str) -> ModelFileError:
            return ModelFileError(f"{self.path}: tensor {short(name)}: {what}")

        def counts(key: str) -> list[int]:
            items = value.get(key)
            if not isinstance(items, list) or not all(
                type(item) is int and 0 <= item < 2**63 for item in items
            ):
                raise fail(f"{key} is {short(items)}, expected a list of counts")
            return items

        if not isinstance(value, dict):
            raise fail(f"the entry is {short(value)}, expected an object")
        bits = ITEM_BITS.get(str(value.get("dtype")))
        if bits is None:
            raise fail(f"unknown dtype {short(value.get('dtype'))}")
        shape, offsets = counts("shape"), counts("data_offsets")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise fail(f"data_offsets are {short(offsets)}, expected [begin, end]")
        need, odd = divmod(math.prod(shape) * bits, 8)
        if odd or offsets[1] - offsets[0] != need:
            raise fail(
                f"{value['dtype']} {short(shape)} takes {need} bytes, data_offsets "
                f"give {offsets[1] - offsets[0]}"
            )
        if start + offsets[1] > len(self._bytes):
            raise fail(
                f"ends at byte {start + offsets[1]}, the file has {len(self._bytes)} "
                "bytes (cut short?)"
            )
        return Entry(
            value["dtype"], tuple(shape), start + offsets[0], start + offsets[1]
        )

    def _check_layout(self, found: list[tuple[str, Entry]], start: int) -> None:
        """The tensors must tile the file from `start` to its end."""
        at = start
        for name, entry in found:
            if entry.begin != at:
                fault = (
                    "overlaps the one before" if entry.begin < at else "leaves a hole"
                )
                raise ModelFileError(
                    f"{self.path}: tensor {short(name)} begins at byte {entry.begin} "
                    f"and {fault}, expected {at}"
                )
            at = entry.end
        if at != len(self._bytes):
            raise ModelFileError(
                f"{self.path}: the tensors end at byte {at}, the file has "
                f"{len(self._bytes)} bytes"
            )

    def read(
        self, name: str, known: Mapping[str, tuple[str, str]] = READABLE
    ) -> tuple[np.ndarray, str]:
        """(array, "f32" | "f16" | "bf16"): a read-only view of the mapping, copied only
        where the file does not align it. ModelFileError for dtypes not `known`."""
        entry = self.entries[name]
        if entry.dtype not in known:
            raise ModelFileError(
                f"{self.path}: tensor {short(name)} is {entry.dtype}, expected one of "
                f"{', '.join(known)}"
            )
        kind, item = known[entry.dtype]
        count = math.prod(entry.shape)
        flat = np.frombuffer(self._bytes, item, count, entry.begin if count else 0)
        return np.require(flat.reshape(entry.shape), requirements=["A"]), kind


# ------------------------------------------------------------------------------ writing


def header(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """(the file's beginning, bytes of all tensors), the tensors in the order of
    `shapes`: name -> (dtype by safetensors' name, shape)."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in shapes.items():
        end = at + math.prod(shape) * ITEM_BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array's bytes in chunks."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]


def write_tensors(
    file: BinaryIO,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """The whole file: header, then the arrays as they come, in the order of `shapes`.

    ValueError for an array whose bytes are not those of its shape and dtype; OSError.
    """
    first, _ = header(shapes, metadata)
    write(file, first)
    for (name, (dtype, shape)), array in zip(shapes.items(), arrays, strict=True):
        if array.nbytes * 8 != math.prod(shape) * ITEM_BITS[dtype]:
            raise ValueError(f"{name}: {array.nbytes} bytes are not {dtype} {shape}")
        for piece in pieces(array):
            write(file, piece)
