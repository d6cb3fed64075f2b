"""Adapters as files: written after training, packed small, merged into their base.

Takes the L1 parameters by their Hugging Face names; leaves a safetensors file, or a
model directory that holds them. One idea: the names and config keys are the authors',
so that their loader finds what it looks for, and what the file was trained on travels
in its metadata. Refuses another base than that one, and disks without the room.

storage "int8" keeps, of each projection, what it differs from the base's own by: 8 bits
a number and a scale a row, off by at most half a scale, 1/254 of the row's greatest
difference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from acre import _core
from acre.adapter import LEVELS, SCALE, STORAGES, Adapter, TensorItem, base_name
from acre.errors import ModelFileError
from acre.fields import read_json, short
from acre.files import check_space, copy, new_directory, replacing, write
from acre.fingerprints import Fingerprints, Prints, widened
from acre.hf import ACRE_KEYS
from acre.loaders import INDEX, SINGLE, Source, open_adapter, open_source
from acre.safetensors_file import SafetensorsFile, write_tensors
from acre.scoring import from_record

OWN_SHARD = "model-acre.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".gguf")
Piece = tuple[str, str, np.ndarray]  # name, dtype by safetensors' name, array


# ------------------------------------------------------------------------------ writing


def bf16(values: np.ndarray) -> np.ndarray:
    """uint16 bits of finite float32 values, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def packed(values: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [rows, columns], float32 scales [rows]) of values - base, float32 both."""
    difference = values - base
    scale = (np.abs(difference).max(axis=1) / LEVELS).astype(np.float32)
    steps = difference / np.where(scale > 0, scale, 1)[:, None]
    return np.rint(steps).clip(-LEVELS, LEVELS).astype(np.int8), scale


def _pieces(
    name: str, values: np.ndarray, storage: str, base: np.ndarray | None
) -> list[Piece]:
    """What a tensor becomes in the file. Vectors and the embedding stay float32 in a
    packed one: they are few."""
    if storage == "int8" and base is not None:
        rows, scale = packed(values, base)
        return [(name, "I8", rows), (name + SCALE, "F32", scale)]
    if storage == "bf16":
        return [(name, "BF16", bf16(values))]
    return [(name, "F32", np.ascontiguousarray(values, dtype=np.float32))]


def _write(path: Path, pieces: list[Piece], metadata: Mapping[str, str]) -> None:
    """The file, whole or not there. OSError."""
    shapes = {name: (dtype, array.shape) for name, dtype, array in pieces}
    size = sum(array.nbytes for _, _, array in pieces)
    with replacing(path) as file:
        check_space(path.resolve().parent, size)
        write_tensors(file, shapes, (array for _, _, array in pieces), metadata)


def write_adapter(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    storage: str = "bf16",
) -> None:
    """float32 tensors by Hugging Face name as an adapter, in "bf16" or "f32".

    ValueError for another storage; OSError naming the path, an old file then stays.
    """
    if storage not in ("bf16", "f32"):
        raise ValueError(f"storage: got {storage!r}, expected 'bf16' or 'f32'")
    pieces = [p for n, v in tensors.items() for p in _pieces(n, v, storage, None)]
    _write(Path(path), pieces, {**metadata, "storage": storage})


def describe(prints: Prints, name: str, **more: Any) -> dict[str, str]:
    """An adapter's metadata: its base, and what else is known (strings, or JSON)."""
    said = {k: v if isinstance(v, str) else json.dumps(v) for k, v in more.items()}
    return {
        "format": "pt",  # transformers asks for it: tensors lie as torch has them
        "acre_version": _core.__version__,
        "base_name": name,
        "base_fingerprint": prints.model,
        "base_norms": prints.norms,
        **said,
    }


def settings_of(window: int, stride: int, intervals: Iterable[int]) -> dict[str, Any]:
    """The keys that the authors' checkpoints add to config.json."""
    return {
        "acre_window": window,
        "acre_stride": stride,
        "l1_l2_ratio": list(intervals),
        "acre_param": ["q", "k", "v"],
        "acre_sink_size": 0,
    }


# ---------------------------------------------------------------------- with its base


def _with_base(
    source: Source, adapter: Adapter, wanted: Iterable[str] = ()
) -> tuple[dict[str, TensorItem], dict[str, np.ndarray]]:
    """(L1 tensors by name, the base's tensors of the `wanted` ones, as float32).

    Reads the base once; ModelFileError where it is another one.
    """
    prints, found, bases = Fingerprints(source.config), {}, {}
    needed = {base_name(name) for name in wanted}
    for name, array, kind in adapter.on(source):
        prints.add(name, array, kind)
        if "acre_" in name:
            found[name] = (name, array, kind)
        elif name in needed:
            bases[name] = widened(array, kind)
    adapter.check(prints.result())
    missing = [name for name in needed if name not in bases]
    if missing:
        raise ModelFileError(f"{source.path}: tensor {missing[0]} is missing")
    return found, bases


def pack_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    storage: str = "int8",
    scoring: Mapping[str, Any] | None = None,
) -> None:
    """The same adapter in another storage: "int8", "bf16" or "f32".

    model: path of the base, which "int8" needs, on either side. Opening it again needs
    the very same base. scoring: how groups are scored, in place of what the adapter
    says: a `Scoring.record`, as benchmarks/scoring_heads.py chooses it.
    FileNotFoundError, ModelFileError, ValueError, OSError.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage: got {storage!r}, expected one of {STORAGES}")
    opened = open_adapter(adapter)
    matrices = [name for name in opened.names if "_proj.weight" in name]
    if model is not None:
        own, bases = _with_base(open_source(model), opened, matrices)
    elif storage == "int8":
        raise ValueError("model: 'int8' holds differences from the base; name it")
    else:
        own, bases = {item[0]: item for item in opened}, {}
    pieces = []
    for name, (_, array, kind) in own.items():
        values = widened(array, kind)
        pieces += _pieces(name, values, storage, bases.get(base_name(name)))
    said = {**opened.metadata, "storage": storage}
    if scoring is not None:
        said["scoring"] = json.dumps(_checked(scoring, model))
    _write(Path(out), pieces, said)


def _checked(
    scoring: Mapping[str, Any], model: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """A scoring record that fits the model; ValueError."""
    if model is None:
        raise ValueError("model: a scoring is of a model's heads; name it")
    config = open_source(model).config
    try:
        return from_record(scoring, config["layers"], config["heads"]).record()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"scoring: got {short(str(scoring))}: {error}") from error


# ------------------------------------------------------------------------------ merging


def merge_adapter(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    storage: str = "bf16",
) -> None:
    """A model directory that holds the base's tensors, as they are, and the L1 ones.

    model: a Hugging Face directory. out: must not exist; appears when it is complete.
    config.json gets the authors' keys, as far as the adapter's metadata has them.
    FileNotFoundError, FileExistsError, ModelFileError, ValueError; OSError, ENOSPC
    before anything is written where the disk lacks the room.
    """
    if storage not in ("bf16", "f32"):
        raise ValueError(f"storage: got {storage!r}, expected 'bf16' or 'f32'")
    base, target, opened = Path(model), Path(out), open_adapter(adapter)
    source = open_source(base)
    if not (base / "config.json").is_file():
        raise ModelFileError(f"{base}: expected a Hugging Face directory to merge into")
    own, _ = _with_base(source, opened)
    pieces = [
        piece
        for name, array, kind in own.values()
        for piece in _pieces(name, widened(array, kind), storage, None)
    ]
    shards = _shards(base)
    others = [
        path
        for path in sorted(base.iterdir())
        if path.is_file() and path.name not in ("config.json", INDEX)
        and path.suffix not in (*PICKLED, ".safetensors")
    ]  # fmt: skip
    copied = [*others, *(base / old for old in shards)]
    size = sum(path.stat().st_size for path in copied)
    check_space(target.resolve().parent, size + sum(a.nbytes for *_, a in pieces))
    with new_directory(target) as place:
        for path in others:
            copy(path, place / path.name)
        for old, new in shards.items():
            copy(base / old, place / new)
        _write(place / OWN_SHARD, pieces, {"format": "pt"})
        _write_json(place / "config.json", _merged_config(base, opened))
        _write_json(place / INDEX, _merged_index(base, shards, pieces))


def _shards(base: Path) -> dict[str, str]:
    """Shard -> its name in the merged directory. Loaders prefer model.safetensors to an
    index, so a single file gets a shard's name."""
    if (base / INDEX).is_file():
        return {name: name for name in read_json(base / INDEX)["weight_map"].values()}
    return {SINGLE: "model-00001-of-00001.safetensors"}


def _merged_index(
    base: Path, shards: Mapping[str, str], pieces: list[Piece]
) -> dict[str, Any]:
    """model.safetensors.index.json of the merged directory."""
    if (base / INDEX).is_file():
        old = read_json(base / INDEX)["weight_map"]
    else:
        old = dict.fromkeys(SafetensorsFile(base / SINGLE).entries, SINGLE)
    table = {name: shards[shard] for name, shard in old.items()}
    table |= {name: OWN_SHARD for name, _, _ in pieces}
    entries = {old: SafetensorsFile(base / old).entries for old in shards}
    size = sum(
        entries[shard][name].end - entries[shard][name].begin
        for name, shard in old.items()
        if table[name] != OWN_SHARD
    )
    size += sum(array.nbytes for _, _, array in pieces)
    return {"metadata": {"total_size": size}, "weight_map": table}


def _merged_config(base: Path, adapter: Adapter) -> dict[str, Any]:
    """config.json with the authors' keys. ModelFileError for metadata that is no
    JSON."""
    config = read_json(base / "config.json")
    for key in ACRE_KEYS:
        if key in adapter.metadata:
            try:
                config[key] = json.loads(adapter.metadata[key])
            except ValueError as error:
                raise ModelFileError(f"{adapter.path}: {key}: {error}") from None
    return config


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as file:
        write(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
