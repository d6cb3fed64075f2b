"""Trained L1 parameters in a file of their own, and how they meet their base model.

Takes the tensors and metadata of a safetensors file; gives the tensors of base and
adapter together, as `Model` binds them. One idea: a packed file holds the difference
from the base's own q, k and v rows in 8 bits, and is added to each of them as it
streams by, so that never more than one matrix is held. Refuses tensors that are no L1
parameters, packed files without their scales, and another base than was trained on.

Files of others, the authors' among them, name no base and are taken at their word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acre.errors import ModelFileError
from acre.fields import short
from acre.fingerprints import Prints, widened
from acre.hf import Tensor, is_acre_name
from acre.scoring import Scoring, from_record

if TYPE_CHECKING:
    from acre.loaders import Source

TensorItem = tuple[str, np.ndarray, str]
STORAGES = ("bf16", "f32", "int8")
SCALE = "_scale"  # after a packed tensor's name: float32 [rows]
LEVELS = 127


def base_name(name: str) -> str:
    """The base's tensor that an L1 projection starts from."""
    return name.replace(".acre_", ".")


def rescaled(base: np.ndarray, kind: str, packed: np.ndarray, scale: np.ndarray):
    """float32 of a packed tensor: base rows + scale * packed rows."""
    return widened(base, kind) + packed.astype(np.float32) * scale[:, None]


def trained_windows(said: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    """The first and the later windows that L1 parameters were trained with, where the
    settings of a checkpoint or an adapter say it. ModelFileError for what is none."""
    keys = ("acre_window", "acre_stride")
    if not all(key in said for key in keys):
        return None
    window, stride = (str(said[key]) for key in keys)
    if window.isdecimal() and stride.isdecimal() and int(window) and int(stride):
        return int(window), int(stride)
    raise ModelFileError(
        f"{path}: acre_window, acre_stride: got {short(window)}, {short(stride)}, "
        "expected tokens"
    )


class Adapter:
    """An opened file, checked in itself. Iterating gives (Hugging Face name, array,
    dtype), as `Source.tensors`; a packed one needs its base: `on`."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        packed: Mapping[str, tuple[Tensor, Tensor]],
        metadata: Mapping[str, str],
    ) -> None:
        """packed: name -> (int8 rows, their scales). ModelFileError."""
        for name in (*tensors, *packed):
            if not is_acre_name(name):
                where = tensors[name].where if name in tensors else path
                raise ModelFileError(
                    f"{where}: tensor {short(name)} is no L1 parameter; an adapter "
                    "holds acre_* tensors only"
                )
        if not tensors and not packed:
            raise ModelFileError(f"{path}: holds no tensors")
        self.path, self.metadata = path, dict(metadata)
        self._tensors, self._packed = tensors, packed

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [*self._tensors, *self._packed]

    def __iter__(self) -> Iterator[TensorItem]:
        if self._packed:
            raise ModelFileError(
                f"{self.path}: holds differences from its base model; open it with that"
            )
        return self._plain()

    def _plain(self) -> Iterator[TensorItem]:
        for name, tensor in self._tensors.items():
            yield (name, *tensor.read())

    def on(self, source: Source) -> Iterator[TensorItem]:
        """The base's tensors and the adapter's, which replace L1 parameters that the
        base may have. ModelFileError where a packed tensor does not fit the base."""
        own = set(self.names)
        left = {base_name(name): name for name in self._packed}
        for name, array, kind in source.tensors():
            if name not in own:
                yield name, array, kind
            if name in left:
                yield left[name], self._restored(left.pop(name), array, kind), "f32"
        if left:
            name = next(iter(left))
            raise ModelFileError(f"{self.path}: {short(name)} is not in {source.path}")
        yield from self._plain()

    def _restored(self, name: str, base: np.ndarray, kind: str) -> np.ndarray:
        """float32 of one packed tensor."""
        packed, scale = self._packed[name]
        if packed.shape != base.shape or scale.shape != base.shape[:1]:
            raise ModelFileError(
                f"{self.path}: tensor {name} is {list(packed.shape)} with "
                f"{list(scale.shape)} scales, its base is {list(base.shape)}"
            )
        return rescaled(base, kind, packed.read()[0], scale.read()[0])

    def scoring(self, layers: int, heads: int) -> Scoring | None:
        """How groups are best scored with these parameters, where the file says it.
        ModelFileError for what this model has not."""
        said = self.metadata.get("scoring")
        if said is None:
            return None
        try:
            return from_record(json.loads(said), layers, heads)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelFileError(
                f"{self.path}: scoring {short(said)}: {error}"
            ) from error

    def windows(self) -> tuple[int, int] | None:
        """As `trained_windows`."""
        return trained_windows(self.metadata, self.path)

    def check(self, prints: Prints) -> None:
        """ModelFileError unless the base is the one that was trained on.

        A model and its quantised copies share their norms, and whole parameters serve
        all of them; differences are from the one file that they were taken from.
        """
        wanted = self.metadata.get("base_fingerprint")
        if wanted is None or wanted == prints.model:
            return
        same = self.metadata.get("base_norms") == prints.norms
        if same and not self._packed:
            return
        name = self.metadata.get("base_name", "another model")
        why = "another precision of it; pack it anew from there" if same else "another"
        raise ModelFileError(
            f"{self.path}: was trained on {short(name)}, fingerprint "
            f"{short(wanted[:12])}; this model is {why}: {prints.model[:12]}"
        )
