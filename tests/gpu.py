"""What the tests on a device share: whether there is one, and models on both sides.

ACRE_TEST_PLUGIN and ACRE_TEST_LIBRARIES put another plug-in and its libraries in the
place of acre/_cuda.so, such as build/c/cuda_host.so, on which the small tests run, too.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import toy

import acre
from acre import _core, devices

PLUGIN = os.environ.get("ACRE_TEST_PLUGIN")
HOST = PLUGIN is not None and pathlib.Path(PLUGIN).name == "cuda_host.so"
# Qwen2.5's layers, few of them and with few words.
SHAPES: dict[str, dict[str, Any]] = {
    "3B": {"hidden": 2048, "heads": 16, "kv_heads": 2, "head_dim": 128, "ffn": 11008},
    "7B": {"hidden": 3584, "heads": 28, "kv_heads": 4, "head_dim": 128, "ffn": 18944},
}


def use_plugin(monkeypatch: Any) -> None:
    """Lets device="cuda" find the plug-in of the environment, where one is named."""
    if PLUGIN is not None:
        libraries = os.environ.get("ACRE_TEST_LIBRARIES", "")
        monkeypatch.setattr(devices, "cuda_plugin", lambda: PLUGIN)
        monkeypatch.setattr(devices, "cuda_libraries", lambda: libraries)


@functools.cache
def missing() -> str:
    """ "" where device 0 can be opened, else why not, as a user is told."""
    libraries = os.environ.get("ACRE_TEST_LIBRARIES") or devices.cuda_libraries()
    try:
        _core.Engine(
            device="cuda", plugin=PLUGIN or devices.cuda_plugin(), libraries=libraries
        )
    except (NotImplementedError, ValueError, MemoryError, acre.DeviceError) as error:
        return str(error)
    return ""


def pair(
    arrays: Mapping[str, np.ndarray] | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str = "f32",
    trained: bool = False,
    w_max: int | None = None,
) -> tuple[acre.Model, acre.Model]:
    """The same model on the CPU and on the device; the toy where none is given."""
    if arrays is None:
        arrays, config = toy.arrays("qwen2", trained=trained), toy.hf_config("qwen2")
    cpu, device = (
        acre.Model.from_arrays(
            config, arrays, toy.tokenizer(), dtype=dtype, device=name, w_max=w_max
        )
        for name in ("cpu", "cuda")
    )
    return cpu, device


def rms(x: np.ndarray) -> float:
    """Root of the mean square, in float64."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def off(x: np.ndarray, right: np.ndarray) -> float:
    """|x - right| / |right|; inf where x is not finite."""
    if not np.isfinite(x).all():
        return float("inf")
    return rms(x.astype(np.float64) - right) / rms(right)
