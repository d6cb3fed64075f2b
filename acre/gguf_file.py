"""One GGUF file, mapped.

Takes a path; gives its metadata as plain Python values and its tensors' types, shapes
and bytes. One idea: every length is checked against the bytes that are left before it
is used, so that a damaged file is refused at once instead of being followed; this is
why the header is parsed here, and the `gguf` package only supplies block sizes and
dequantisation. Refuses other versions (2 and 3 are read), big-endian and split files,
nested arrays, ranges that overlap or leave the file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from acre.errors import ModelFileError
from acre.fields import short
from acre.safetensors_file import map_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {  # value type -> struct format
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9
VIEWED = {"F32": ("f32", "<f4"), "F16": ("f16", "<f2"), "BF16": ("bf16", "<u2")}
DEQUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
DIMS_MAX = 4
ALIGNMENTS = tuple(1 << i for i in range(21))


@dataclass(frozen=True)
class Entry:
    """One tensor: type by ggml's name; shape [rows, columns] as NumPy counts (the
    reverse of the file's order); bytes [begin, end) of the file."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufFile:
    """A mapped file: `fields` by metadata key, `entries` by tensor name."""

    def __init__(self, path: Path) -> None:
        """FileNotFoundError, ModelFileError."""
        self.path = path
        self._bytes = map_file(path)
        self._at = 0
        self.fields: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        tensors = self._head()
        self._infos(tensors)

    # ------------------------------------------------------------------ primitive reads

    def _fail(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}")

    def _take(self, size: int, what: str) -> int:
        """Moves on by `size` bytes; returns where they begin."""
        begin, left = self._at, len(self._bytes) - self._at
        if size > left:
            raise self._fail(
                f"{what} at byte {begin} takes {size} bytes, {left} are left "
                "(cut short?)"
            )
        self._at += size
        return begin

    def _scalar(self, form: str, what: str) -> Any:
        begin = self._take(struct.calcsize(form), what)
        return struct.unpack_from(form, self._bytes, begin)[0]

    def _string(self, what: str) -> str:
        size = self._scalar("<Q", what)
        begin = self._take(size, what)
        try:
            return self._bytes[begin : begin + size].decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"{what} at byte {begin} is not UTF-8") from None

    def _value(self, kind: int, what: str) -> Any:
        """A metadata value of any type; arrays become lists."""
        if kind == STRING:
            return self._string(what)
        if kind == ARRAY:
            return self._array(what)
        if kind not in SCALARS:
            raise self._fail(f"{what} has the unknown type {kind}")
        return self._scalar(SCALARS[kind], what)

    def _array(self, what: str) -> list[Any]:
        kind, count = self._scalar("<I", what), self._scalar("<Q", what)
        if kind == STRING:
            # A string takes at least the 8 bytes of its length.
            if count * 8 > len(self._bytes) - self._at:
                raise self._fail(f"{what}: {count} strings do not fit the file")
            return [self._string(what) for _ in range(count)]
        if kind not in SCALARS:
            raise self._fail(f"{what} is an array of the unknown type {kind}")
        item = np.dtype(SCALARS[kind]) if kind != 7 else np.dtype(np.uint8)
        begin = self._take(count * item.itemsize, what)
        values = np.frombuffer(self._bytes, item, count, begin if count else 0)
        return (values != 0 if kind == 7 else values).tolist()

    # --------------------------------------------------------------------------- header

    def _head(self) -> int:
        """Reads the metadata; returns the number of tensors."""
        if self._bytes[:4] != MAGIC:
            raise self._fail(f"not a GGUF file: begins with {self._bytes[:4]!r}")
        self._at = 4
        version = self._scalar("<I", "the version")
        if version not in VERSIONS:
            order = " (big-endian?)" if version & 0xFFFF == 0 else ""
            raise self._fail(f"GGUF version {version}{order}, expected 2 or 3")
        tensors = self._scalar("<Q", "the tensor count")
        for _ in range(self._scalar("<Q", "the metadata count")):
            key = self._string("a metadata key")
            if key in self.fields:
                raise self._fail(f"metadata key {short(key)} occurs twice")
            kind = self._scalar("<I", f"metadata {short(key)}")
            self.fields[key] = self._value(kind, f"metadata {short(key)}")
        if self.fields.get("split.count", 0) not in (0, 1):
            raise self._fail(
                f"one of {self.fields['split.count']} parts of a split model; merge "
                "them with llama-gguf-split --merge"
            )
        return tensors

    def _infos(self, tensors: int) -> None:
        """Reads and checks the tensors' entries."""
        infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self._string("a tensor's name")
            if name in infos:
                raise self._fail(f"tensor {short(name)} occurs twice")
            infos[name] = self._info(f"tensor {short(name)}")
        align = self.fields.get("general.alignment", 32)
        if type(align) is not int or align not in ALIGNMENTS:
            found = f"general.alignment is {short(align)}"
            raise self._fail(f"{found}, expected a power of 2 up to 2^20")
        start = -(-self._at // align) * align
        for name, (kind, shape, offset) in infos.items():
            self.entries[name] = self._entry(name, kind, shape, start + offset)
        self._check_overlap()

    def _info(self, what: str) -> tuple[str, tuple[int, ...], int]:
        """(type, shape, offset) of the next tensor."""
        dims = self._scalar("<I", what)
        if not 1 <= dims <= DIMS_MAX:
            raise self._fail(f"{what} has {dims} dimensions, expected 1 to {DIMS_MAX}")
        sizes = [self._scalar("<Q", what) for _ in range(dims)]
        number = self._scalar("<I", what)
        try:
            kind = GGMLQuantizationType(number).name
        except ValueError:
            raise self._fail(f"{what} has the unknown type {number}") from None
        return kind, tuple(reversed(sizes)), self._scalar("<Q", what)

    def _entry(self, name: str, kind: str, shape: tuple[int, ...], begin: int) -> Entry:
        """Checks that the tensor's bytes lie in the file."""
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if shape[-1] % block:
            raise self._fail(
                f"tensor {short(name)}: rows of {shape[-1]} are no whole {kind} blocks "
                f"of {block}"
            )
        end = begin + math.prod(shape) // block * size
        if end > len(self._bytes):
            raise self._fail(
                f"tensor {short(name)} ({kind} {short(list(shape))}) ends at byte "
                f"{end}, the file has {len(self._bytes)} (cut short?)"
            )
        return Entry(kind, shape, begin, end)

    def _check_overlap(self) -> None:
        at, before = 0, ""
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].begin):
            if entry.begin < at:
                raise self._fail(f"tensors {short(before)} and {short(name)} overlap")
            at, before = entry.end, name

    # -------------------------------------------------------------------------- tensors

    def check_kind(self, name: str) -> None:
        """ModelFileError unless `read` can read the tensor."""
        kind = self.entries[name].kind
        if kind not in VIEWED and kind not in DEQUANTISED:
            known = ", ".join((*VIEWED, *DEQUANTISED))
            raise self._fail(f"tensor {short(name)} is {kind}, expected one of {known}")

    def read(self, name: str) -> tuple[np.ndarray, str]:
        """(array, "f32" | "f16" | "bf16"): a read-only view for the types that the core
        takes (bf16 as uint16 bits), float32 for the quantised ones. ModelFileError."""
        self.check_kind(name)
        entry = self.entries[name]
        if entry.kind in VIEWED:
            kind, item = VIEWED[entry.kind]
            count = math.prod(entry.shape)
            flat = np.frombuffer(self._bytes, item, count, entry.begin)
            return np.require(flat.reshape(entry.shape), requirements=["A"]), kind
        blocks = np.frombuffer(
            self._bytes, np.uint8, entry.end - entry.begin, entry.begin
        ).reshape(*entry.shape[:-1], -1)
        with np.errstate(all="ignore"):  # damaged scales; not finite is refused later
            array = dequantize(blocks, GGMLQuantizationType[entry.kind])
        return array, "f32"
