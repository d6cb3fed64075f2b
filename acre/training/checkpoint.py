"""Checkpoints: all that a run needs to go on as if it had never stopped.

Takes a trainer and a run's state; gives them back. One idea: a checkpoint is a folder
that is written under a hidden name, synced, and renamed, so what is called
checkpoints/step-N is whole; the one before goes only when the next is there. Refuses
damaged files, and a checkpoint of another model, other settings or another start.

    adapter.safetensors              the parameters, float32: also an adapter as it is
    first, second.safetensors        AdamW's moments
    state.json                       step, log, data, settings, checksums
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from acre.errors import ModelFileError
from acre.eval.results import differences
from acre.files import check_space, hidden, new_directory, replacing, write
from acre.safetensors_file import SafetensorsFile, write_tensors

FORMAT = 1
PARTS = {"parameters": "adapter", "first": "first", "second": "second"}
STATE = "state.json"
SLACK = 1 << 20  # bytes for headers and the state
_NAME = re.compile(r"step-\d{8}")

Entries = Sequence[tuple[str, int, tuple[int, ...]]]


class Learner(Protocol):
    """What a checkpoint needs of a trainer; see `_core.Trainer`."""

    @property
    def size(self) -> int: ...
    @property
    def entries(self) -> Entries: ...
    def read(self, part: str) -> np.ndarray: ...
    def write(self, part: str, values: np.ndarray) -> None: ...


def write_vector(
    path: Path, entries: Entries, values: np.ndarray, metadata: Mapping[str, str]
) -> None:
    """A vector's pieces by name, F32, as a file that is whole or not there."""
    shapes = {name: ("F32", shape) for name, _, shape in entries}
    arrays = (values[at : at + int(np.prod(s))] for _, at, s in entries)
    with replacing(path) as file:
        write_tensors(file, shapes, arrays, metadata)


def read_vector(path: Path, entries: Entries, size: int) -> np.ndarray:
    """float32 [size]. FileNotFoundError; ModelFileError for other tensors."""
    file, out = SafetensorsFile(path), np.empty(size, dtype=np.float32)
    for name, at, shape in entries:
        entry = file.entries.get(name)
        if entry is None or entry.shape != tuple(shape) or entry.dtype != "F32":
            raise ModelFileError(f"{path}: {name} is no F32 {list(shape)} there")
        out[at : at + int(np.prod(shape))] = file.read(name)[0].reshape(-1)
    return out


class Checkpoints:
    """Those of one run; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Creates the folder, and clears what a killed save has left."""
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def all(self) -> list[Path]:
        """Oldest first."""
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name))

    def latest(self) -> Path | None:
        """The newest, None where there is none."""
        return next(reversed(self.all()), None)

    def save(
        self,
        step: int,
        trainer: Learner,
        state: dict[str, Any],
        metadata: dict[str, str],
    ) -> Path:
        """Writes step-N, then drops the oldest. OSError; what was there stays."""
        path = self.folder / f"step-{step:08d}"
        if path.exists():  # the same step of the same run: the same bytes
            return path
        check_space(self.folder, 4 * len(PARTS) * trainer.size + SLACK)
        with new_directory(path) as place:
            sums = {}
            for part, stem in PARTS.items():
                values = trainer.read(part)
                sums[part] = zlib.crc32(values)
                file = place / f"{stem}.safetensors"
                write_vector(file, trainer.entries, values, metadata)
            text = json.dumps({"format": FORMAT, "checksums": sums, **state}, indent=1)
            with replacing(place / STATE) as file:
                write(file, text.encode())
        for old in self.all()[: -self.keep]:
            self._remove(old)
        return path

    @staticmethod
    def _remove(path: Path) -> None:
        """A checkpoint, which is none any more from the first moment on."""
        gone = Path(hidden(path))
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def read_state(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """state.json of a checkpoint of these facts. ValueError naming what differs."""
    try:
        state = json.loads((path / STATE).read_text("utf-8"))
        found = state["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE}: damaged: {error!r}") from None
    if found != FORMAT:
        raise ValueError(f"{path / STATE}: format {found}, this acre reads {FORMAT}")
    check_facts(path, state["facts"], facts)
    return state


def check_facts(
    where: Path | str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """ValueError naming what differs between two runs' facts, one level down."""
    wrong = []
    for part in sorted(new):
        held, ours = old.get(part, {}), new[part]
        if isinstance(ours, Mapping) and isinstance(held, Mapping):
            wrong += differences(held, ours)
        elif held != ours:
            wrong.append(f"{part}: {held!r}, now {ours!r}")
    if wrong:
        raise ValueError(
            f"{where}: is of another run; name another folder. Different: "
            f"{'; '.join(wrong)}"
        )


def read_part(path: Path, part: str, trainer: Learner, state: Mapping) -> np.ndarray:
    """float32 [P] of a checkpoint. ModelFileError where it is damaged."""
    file = path / f"{PARTS[part]}.safetensors"
    values = read_vector(file, trainer.entries, trainer.size)
    if zlib.crc32(values) != state["checksums"][part]:
        raise ModelFileError(f"{file}: damaged: its checksum does not match")
    return values
