"""The CUDA backend as any machine runs it (cuda/host), for tests of what is above it.

Gives `plugin()`, its file where `make ctest` has built it, and arrays that say they lie
on a GPU: there, device memory is memory of this process.
"""

from __future__ import annotations

import ctypes
import pathlib
from typing import Any

import numpy as np

BUILD = pathlib.Path(__file__).resolve().parent.parent / "build" / "c"
CPU, CUDA = 1, 2


def plugin() -> str | None:
    """The file of the backend; None where it was not built."""
    path = BUILD / "cuda_host.so"
    return str(path) if path.is_file() else None


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


def capsule_of(managed: Managed) -> Any:
    """A versioned capsule over it, which must outlive the capsule."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(managed), b"dltensor_versioned", None)


def read_capsule(capsule: Any) -> DLTensor:
    """The tensor of a versioned capsule that nobody has consumed."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype = ctypes.c_void_p
    get.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return Managed.from_address(get(capsule, b"dltensor_versioned")).tensor


class Array:
    """A NumPy array that says it lies on a GPU, as a tensor of torch or CuPy does.

    streams: what its consumers gave; deleted: how many of its capsules are gone.
    """

    def __init__(
        self, array: np.ndarray, device: tuple[int, int] = (CUDA, 0), bf16: bool = False
    ) -> None:
        self.array, self.device, self.bf16 = array, device, bf16
        self.shape = array.shape
        self.dtype = "bfloat16" if bf16 else str(array.dtype)
        self.streams: list[int | None] = []
        self.deleted = 0
        self._kept: list[Any] = []

    def reshape(self, *shape: int) -> Array:
        return Array(self.array.reshape(*shape), self.device, self.bf16)

    def __getitem__(self, index: Any) -> Array:
        return Array(self.array[index], self.device, self.bf16)

    def float(self) -> Array:
        """float32 of bf16 bits, as torch's."""
        wide = (self.array.astype(np.uint32) << 16).view(np.float32)
        return Array(wide, self.device)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def _delete(self, _: int) -> None:
        self.deleted += 1

    def __dlpack__(self, *, stream=None, max_version=None) -> Any:
        self.streams.append(stream)
        array, size = self.array, self.array.itemsize
        numbers = ctypes.c_int64 * max(array.ndim, 1)
        shape = numbers(*array.shape)
        strides = numbers(*(step // size for step in array.strides))
        managed = Managed(1, 0, None, DELETER(self._delete), 0)
        tensor = managed.tensor
        tensor.data, tensor.ndim = array.ctypes.data, array.ndim
        tensor.device_type, tensor.device_id = self.device
        codes = {"i": 0, "u": 1, "f": 2, "b": 6}
        tensor.code = 4 if self.bf16 else codes[array.dtype.kind]
        tensor.bits, tensor.lanes = 8 * size, 1
        tensor.shape, tensor.strides = shape, strides
        self._kept += [managed, shape, strides]
        return capsule_of(managed)
