"""What a model is known by: sha256 over its configuration and tensors.

Takes tensors one at a time, as they are read; gives `Prints`. One idea: evenly spaced
blocks stand for a large tensor, so loading stays as fast as binding, and any retrained
or requantised tensor differs in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Fetch = Callable[[Any], Any]  # of a GPU's array, one that NumPy takes

SAMPLE_BLOCKS, SAMPLE_ELEMENTS = 16, 2048


@dataclass(frozen=True)
class Prints:
    """sha256 in hexadecimal.

    model: configuration and base tensors as they are stored. adapter: the L1
    parameters, "none" without. norms: the gains of the base's norms, which files of
    every precision keep in full: what a model and its quantised copies share.
    """

    model: str
    adapter: str
    norms: str


def _elements(array: Any, start: int, stop: int, fetch: Fetch) -> np.ndarray:
    """Elements [start, stop) of a tensor in row-major order, as NumPy, without a copy
    of the whole. bf16 tensors that NumPy cannot hold are widened (exactly) to
    float32."""
    if isinstance(array, np.ndarray):
        if array.flags.c_contiguous:
            return array.reshape(-1)[start:stop]
        return array.flat[start:stop]
    part = array.reshape(-1)[start:stop]
    try:
        return np.from_dlpack(part)
    except (BufferError, RuntimeError, TypeError, ValueError):
        kept = str(part.dtype).removeprefix("torch.") in (
            "float16",
            "float32",
            "float64",
        )
        wide = not kept and hasattr(part, "float")
        return np.asarray(fetch(part.float() if wide else part))


def _tensor_digest(name: str, array: Any, dtype: str | None, fetch: Fetch) -> bytes:
    """sha256 over name, shape, dtype and evenly spaced blocks of the elements."""
    shape = tuple(int(size) for size in array.shape)
    count = int(np.prod(shape, dtype=np.int64))
    kind = str(dtype or array.dtype).removeprefix("torch.").replace("bfloat", "bf")
    kind = kind.replace("float", "f")  # one name whatever the source
    digest = hashlib.sha256(f"{name}|{shape}|{kind}|".encode())
    limit = SAMPLE_BLOCKS * SAMPLE_ELEMENTS
    if count <= limit:
        starts: Sequence[int] = range(0, max(count, 1), max(count, 1))
        size = count
    else:
        size = SAMPLE_ELEMENTS
        starts = np.linspace(0, count - size, SAMPLE_BLOCKS).astype(np.int64).tolist()
    for start in starts:
        digest.update(
            np.ascontiguousarray(_elements(array, start, start + size, fetch))
        )
    return digest.digest()


def widened(array: Any, kind: str) -> np.ndarray:
    """float32 of a tensor of kind "f32", "f16" or "bf16" (uint16 bits)."""
    if kind == "bf16" and array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, dtype=np.float32)


class Fingerprints:
    """Digests of the base tensors and of the L1 (acre_*) ones, whatever their order."""

    def __init__(self, config: Mapping[str, Any], fetch: Fetch = np.asarray) -> None:
        chosen = ("dtype", "w_max", "weights")
        facts = {k: v for k, v in config.items() if k not in chosen}
        self._config = json.dumps(facts, sort_keys=True, default=str).encode()
        self._fetch = fetch
        self._digests: dict[str, bytes] = {}
        self._norms: dict[str, bytes] = {}

    def add(self, name: str, array: Any, dtype: str | None) -> None:
        """Enters one tensor; a later one of the same name replaces it."""
        self._digests[name] = _tensor_digest(name, array, dtype, self._fetch)
        if name.endswith("norm.weight"):
            gains = _elements(array, 0, int(np.prod(array.shape)), self._fetch)
            values = widened(gains, dtype or "f32")
            self._norms[name] = hashlib.sha256(values.tobytes()).digest()

    def _sum(self, first: bytes, trained: bool) -> str:
        names = [name for name in sorted(self._digests) if ("acre_" in name) is trained]
        if trained and not names:
            return "none"
        return _total(first, [self._digests[name] for name in names])

    def result(self) -> Prints:
        """Of the tensors entered so far."""
        norms = [name.encode() + self._norms[name] for name in sorted(self._norms)]
        return Prints(
            self._sum(self._config, False),
            self._sum(b"adapter", True),
            _total(b"norms", norms),
        )


def _total(first: bytes, parts: Sequence[bytes]) -> str:
    total = hashlib.sha256(first)
    for part in parts:
        total.update(part)
    return total.hexdigest()
