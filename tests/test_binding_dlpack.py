"""DLPack capsules made by hand: what no well-behaved producer sends must be refused.

In every case the capsule's deleter runs exactly once.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import tiny
from host_cuda import DELETER, Managed, capsule_of

from acre import _core


def bind_forged(**changes: Any) -> int:
    """Binds model.norm.weight from a capsule made by hand; how often it was deleted."""
    model = _core.Model(_core.Engine(threads=1), tiny.config())
    deleted: list[int] = []
    values = np.ones(32, np.float32)
    managed = Managed(1, 1, None, DELETER(deleted.append), 0)
    tensor = managed.tensor
    tensor.data, tensor.device_type, tensor.ndim = values.ctypes.data, 1, 1
    tensor.code, tensor.bits, tensor.lanes = 2, 32, 1
    shape = (ctypes.c_int64 * 8)(*changes.pop("shape", (32,)))
    tensor.shape = shape
    for key, value in changes.items():
        setattr(managed if hasattr(managed, key) else tensor, key, value)
    try:
        model.bind("model.norm.weight", capsule_of(managed))
    finally:
        assert len(deleted) == 1  # whatever comes of it
    return len(deleted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"major": 2}, "DLPack version 2.1"),
        ({"device_type": 2, "device_id": 3}, "cuda:3"),
        ({"device_type": -7}, "unknown device"),
        ({"ndim": 5, "shape": (1, 1, 1, 1, 32)}, "5 dimensions"),
        ({"ndim": -1}, "-1 dimensions"),
        ({"ndim": 2**31 - 1}, "2147483647 dimensions"),
        ({"shape": (-32,)}, "impossible shape"),
        ({"ndim": 2, "shape": (2**40, 2**40)}, "impossible shape"),
        ({"ndim": 2, "shape": (32, 0)}, "model.norm.weight"),
        ({"ndim": 0}, "model.norm.weight"),
        ({"data": None}, "impossible shape"),
        ({"byte_offset": 2}, "unaligned"),
        ({"lanes": 4}, "lanes 4"),
        ({"code": 3}, "code 3"),
        ({"code": 255}, "code 255"),
        ({"bits": 4}, "bits 4"),
        ({"bits": 0}, "bits 0"),
        ({"bits": 8}, "got dtype float8"),
        ({"code": 4, "bits": 32}, "got dtype bfloat32"),
    ],
)
def test_forged_capsules(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bind_forged(**changes)


def test_forged_capsule_that_is_right() -> None:
    assert bind_forged() == 1
    assert bind_forged(minor=99, flags=7) == 1
