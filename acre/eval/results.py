"""Where samples are kept: a journal that survives being killed, and its final form.

Takes finished samples one by one; gives back those of an earlier run. One idea: a
sample is one line, appended and flushed at once, so a killed run has lost only the
sample under way; a torn last line is dropped. Refuses a folder that another run is
writing to, and one whose model, methods or data are not those of this run.

    run.json           what decides the results: model, methods, data; versions
    samples.jsonl      the journal, in the order in which samples were finished
    predictions.jsonl  at the end: the samples in the order of the data, without costs
    report.json, .md   scores, counts, settings, costs
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from acre import _core

Sample = dict[str, Any]
Key = tuple[str, str, str]
PACKAGES = ("numpy", "tokenizers", "rouge", "rouge-score", "jieba", "rapidfuzz",
            "bm25s", "sentence-transformers", "ray")  # fmt: skip


def key_of(sample: Mapping[str, Any]) -> Key:
    """What a sample is of: (task, method, question)."""
    return sample["task"], sample["method"], sample["id"]


def finished(sample: Mapping[str, Any]) -> bool:
    """Whether it need not be tried again: it did not fail."""
    return "error" not in sample


def versions() -> dict[str, str]:
    """Of acre, Python, the machine and the packages that scores depend on."""
    found = {"acre": _core.__version__, "python": platform.python_version()}
    found["machine"] = f"{platform.machine()} {_core.Engine().isa}"
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, text: str) -> None:
    """The whole file, or the old one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """ "what: old, now new" for each thing that both name and that differs."""
    out = []
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            out.append(f"{name}: {old[name]!r}, now {new[name]!r}")
    return out


class Journal:
    """samples.jsonl of a folder, held for writing by one run at a time."""

    def __init__(self, folder: Path) -> None:
        """Creates the folder. BlockingIOError where another run holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "samples.jsonl"
        self._file = open(self.path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise BlockingIOError(
                error.errno, "another evaluation is writing here", str(folder)
            ) from None
        self.samples: dict[Key, Sample] = {}
        self._read()

    def _read(self) -> None:
        """What earlier runs left; cuts off a line that was not finished."""
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                sample = json.loads(line)
                self.samples[key_of(sample)] = sample
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}:{number}: no sample: {error}") from None
            good += len(line)
        self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)

    def add(self, sample: Sample) -> None:
        """Appends one sample; it is out of this process when the call returns."""
        line = json.dumps(sample, ensure_ascii=False)
        self._file.write(line.encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()
        self.samples[key_of(sample)] = sample

    def done(self) -> set[Key]:
        """Samples that need not be made again."""
        return {key for key, sample in self.samples.items() if finished(sample)}

    def settle(self, run: Mapping[str, Any]) -> None:
        """Holds this run's facts against those of the folder, and writes them down.

        ValueError naming what differs; tasks and methods may be added to a folder.
        """
        path = self.folder / "run.json"
        old = json.loads(path.read_text("utf-8")) if path.exists() else {}
        new = json.loads(json.dumps(run))
        wrong = differences(old.get("model", {}), new["model"])
        for part in ("methods", "tasks"):
            wrong += differences(old.get(part, {}), new[part])
        if wrong:
            raise ValueError(
                f"output: {self.folder} holds results of other settings; name another "
                f"folder. Different: {'; '.join(wrong)}"
            )
        for part in ("methods", "tasks"):
            new[part] = {**old.get(part, {}), **new[part]}
        write_atomically(path, json.dumps(new, indent=2, ensure_ascii=False) + "\n")

    def publish(self, order: Iterable[Key]) -> None:
        """predictions.jsonl: the samples of `order`, without what they cost. The same
        bytes for the same data, whoever computed them and in whatever order."""
        lines = []
        for key in order:
            sample = self.samples.get(key)
            if sample is not None:
                kept = {k: v for k, v in sample.items() if k != "cost"}
                lines.append(json.dumps(kept, ensure_ascii=False, sort_keys=True))
        text = "".join(f"{line}\n" for line in lines)
        write_atomically(self.folder / "predictions.jsonl", text)

    def close(self) -> None:
        """Lets others write."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
