"""Opens models and adapters from local files.

Takes a Hugging Face directory (config.json and safetensors) or a GGUF file; gives a
`Source`: the core's configuration, the tokenizer, and the tensors by Hugging Face name,
one at a time, as views of the mapped files where the format allows. One idea: opening
checks every header, name and shape, so that reading cannot meet a surprise. Refuses,
with ModelFileError naming the file, what is corrupt, incomplete or not a Llama or Qwen2
model; pickled weights are never read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from acre.adapter import SCALE, Adapter
from acre.errors import ModelFileError
from acre.fields import Fields, read_json, short
from acre.hf import (
    Tensor,
    acre_settings,
    config_from_hf,
    has_qkv_bias,
    select,
)
from acre.safetensors_file import READABLE, SMALL, SafetensorsFile
from acre.tokenizer import Tokenizer

__all__ = ["Source", "config_from_hf", "open_adapter", "open_source"]

TensorItem = tuple[str, np.ndarray, str]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter.safetensors"


@dataclass
class Source:
    """A model on disk, checked and not yet read.

    config: the core's configuration without dtype (w_max may be overridden). acre: the
    settings of an ACRE checkpoint (acre_window, l1_l2_ratio, ...), {} in others.
    """

    path: Path
    name: str
    config: dict[str, Any]
    acre: dict[str, Any] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list, repr=False)
    _tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _load_tokenizer: Callable[[], Tokenizer | None] = field(
        default=lambda: None, repr=False
    )

    def tensors(self) -> Iterator[TensorItem]:
        """(Hugging Face name, array, "f32" | "f16" | "bf16"), in the order of the file.

        bf16 arrays are uint16 bits. Arrays are read-only views where possible; nothing
        holds on to them once the caller lets go.
        """
        for name in self._names:
            yield (name, *self._tensors[name].read())

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where the directory has no tokenizer.json."""
        return self._load_tokenizer()


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a Hugging Face directory, a GGUF file, or a directory with one GGUF file.

    FileNotFoundError; ModelFileError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix == ".gguf":
            return _open_gguf(path)
        raise ModelFileError(
            f"{path}: expected a .gguf file, or a directory with config.json and "
            "safetensors files"
        )
    if (path / "config.json").is_file():
        return _open_directory(path)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return _open_gguf(found[0])
    if found:
        names = ", ".join(file.name for file in found)
        raise ModelFileError(f"{path}: has several models, name one of {names}")
    raise FileNotFoundError(f"{path}: has neither config.json nor a .gguf file")


def _open_gguf(path: Path) -> Source:
    from acre import gguf_model  # the `gguf` package takes a while to import

    model = gguf_model.GgufModel(path)
    names = select(model.tensors, model.config, model.bias, str(path))
    load = partial(Tokenizer.from_gguf_metadata, model.fields, where=str(path))
    return Source(path, model.name, model.config, {}, names, model.tensors, load)


def _open_directory(path: Path) -> Source:
    file = path / "config.json"
    raw = read_json(file)
    config = config_from_hf(raw, str(file))
    if config["eos_id"] < 0 and (path / "generation_config.json").is_file():
        extra = path / "generation_config.json"
        ids = Fields(read_json(extra), str(extra)).token_ids("eos_token_id")
        config["eos_id"] = ids[0] if ids else -1
    tensors = _shard_tensors(path)
    if raw.get("tie_word_embeddings") is None:
        config["tied_head"] = "lm_head.weight" not in tensors
    names = select(tensors, config, has_qkv_bias(raw), str(path))
    return Source(
        path,
        path.resolve().name,
        config,
        acre_settings(raw),
        names,
        tensors,
        partial(_directory_tokenizer, path),
    )


def _directory_tokenizer(path: Path) -> Tokenizer | None:
    has_one = (path / "tokenizer.json").is_file()
    return Tokenizer.from_hf_dir(path) if has_one else None


def _shard_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the directory's safetensors files, by name."""
    index = path / INDEX
    if index.is_file():
        return _indexed(path, index)
    if (path / SINGLE).is_file():
        return _file_tensors(path / SINGLE)
    pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt*"))
    if pickled:
        raise ModelFileError(
            f"{path}: has {pickled[0].name} but no {SINGLE}; pickled weights are not "
            "read, convert them to safetensors"
        )
    raise FileNotFoundError(f"{path}: has neither {SINGLE} nor {INDEX}")


def _indexed(path: Path, index: Path) -> dict[str, Tensor]:
    """The tensors that an index lists, each from the shard it names."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelFileError(f"{index}: weight_map is {short(table)}, expected a table")
    shards: dict[str, dict[str, Tensor]] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise ModelFileError(
                f"{index}: {short(name)} lies in {short(shard)}, expected a file name"
            )
        if shard not in shards:
            if not (path / shard).is_file():
                raise FileNotFoundError(f"{path / shard}: no such file (see {index})")
            shards[shard] = _file_tensors(path / shard)
        if name not in shards[shard]:
            raise ModelFileError(
                f"{path / shard}: tensor {short(name)} is missing, which {index.name} "
                "places there"
            )
    return {
        name: tensor
        for shard, tensors in shards.items()
        for name, tensor in tensors.items()
        if table.get(name) == shard
    }


def _file_tensors(path: Path) -> dict[str, Tensor]:
    return _tensors_of(SafetensorsFile(path), READABLE)


def _tensors_of(
    file: SafetensorsFile, known: Mapping[str, tuple[str, str]] = SMALL
) -> dict[str, Tensor]:
    return {
        name: Tensor(str(file.path), entry.shape, partial(file.read, name, known))
        for name, entry in file.entries.items()
    }


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The trained L1 parameters of a safetensors file, or of a directory with one.

    All checks of the file are done before the call returns. FileNotFoundError;
    ModelFileError where the file is corrupt or holds anything but acre_* tensors.
    """
    path = Path(path)
    if path.is_dir():
        if (path / INDEX).is_file():
            return Adapter(path, _indexed(path, path / INDEX), {}, {})
        path = _adapter_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or directory")
    file = SafetensorsFile(path)
    tensors, packed = {}, {}
    for name, tensor in _tensors_of(file).items():
        whole = name.removesuffix(SCALE)
        if file.entries[name].dtype == "I8":
            packed[name] = (tensor, _scale_of(file, name))
        elif whole == name or whole not in file.entries:
            tensors[name] = tensor
    return Adapter(path, tensors, packed, file.metadata)


def _scale_of(file: SafetensorsFile, name: str) -> Tensor:
    """The scales of a packed tensor."""
    entry = file.entries.get(name + SCALE)
    if entry is None or entry.dtype != "F32":
        raise ModelFileError(f"{file.path}: tensor {short(name)} has no F32 scales")
    return Tensor(str(file.path), entry.shape, partial(file.read, name + SCALE))


def _adapter_file(path: Path) -> Path:
    """The one adapter of a directory."""
    if (path / ADAPTER).is_file():
        return path / ADAPTER
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(f"{path}: has no .safetensors file")
    names = ", ".join(file.name for file in found)
    raise ModelFileError(f"{path}: has several adapters, name one of {names}")
