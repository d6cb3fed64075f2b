"""What tests of adapters share: L1 parameters near a toy model's own, in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import toy

import acre
from acre.training.adapter import describe, settings_of, write_adapter

KEYS = settings_of(64, 32, (8, 16))


def shifted(base: dict[str, np.ndarray], rng: int = 7) -> dict[str, np.ndarray]:
    """L1 parameters near a base's own, as training leaves them."""
    rng = np.random.default_rng(rng)
    out = {"model.acre_embed_tokens.weight": base["model.embed_tokens.weight"][2:3]}
    for name, array in base.items():
        for part in "qkv":
            if f".{part}_proj." in name:
                out[name.replace(f".{part}_", f".acre_{part}_")] = array
    return {
        name: (array + 0.02 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in out.items()
    }


def made(path: Path, family: str) -> tuple[Path, dict[str, np.ndarray], acre.Model]:
    """A model directory with adapters beside it, their tensors, the model."""
    toy.directory(path / "model", family)
    own = shifted(toy.arrays(family))
    base = acre.Model.from_pretrained(path / "model", "f32", threads=1)
    said = describe(base.prints, "model", stage="stage1", steps="3", **KEYS)
    write_adapter(path / "f32.safetensors", own, said, "f32")
    write_adapter(path / "bf16.safetensors", own, said)
    return path, own, base


def opened(path: Path, adapter: Path | None, dtype: str = "f32") -> acre.Model:
    return acre.Model.from_pretrained(path, dtype, adapter=adapter, threads=1)
