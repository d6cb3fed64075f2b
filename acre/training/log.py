"""The log of a run: one JSON line per step, and its picture.

Takes rows as they come; gives them back, cut to a checkpoint's place. One idea: a line
is appended in one write, so a kill tears at most the last one, and a checkpoint holds
the log's length, to which a resumed run cuts it back. Refuses a folder that another run
is writing to, and a log that is shorter than a checkpoint says.

    {"step", "loss": nats per token, "tokens": of this step, "seen": since the first,
     "examples", "lr", "norm": of the gradient before clipping, "evidence": share of
     attention mass on the evidence or null, "seconds", "tokens_per_s"}
    {"step", "held_out": nats per token of the held-out examples, after that step}
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from acre.files import write

Row = dict[str, Any]


class Log:
    """log.jsonl of a folder, held for writing by one run at a time."""

    def __init__(self, path: Path) -> None:
        """BlockingIOError where another run holds it; OSError."""
        self.path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise BlockingIOError(
                error.errno, "another training is writing here", str(path.parent)
            ) from None

    def add(self, row: Row) -> None:
        """Appends a row; it is out of this process when the call returns."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        write(self._file, line)

    def sync(self) -> int:
        """Length in bytes, all of it on the disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def cut(self, size: int) -> None:
        """Drops what came after `size` bytes. ValueError where the log is shorter."""
        found = os.fstat(self._file.fileno()).st_size
        if found < size:
            raise ValueError(
                f"{self.path}: has {found} bytes, the checkpoint was made at {size}"
            )
        self._file.truncate(size)

    def rows(self) -> list[Row]:
        """All rows. ValueError naming a line that is none."""
        out = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
            try:
                out.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}:{number}: {error}") from None
        return out

    def draw(self) -> None:
        """loss.png beside the log; nothing where matplotlib is missing or no row is."""
        rows = self.rows()
        if not any("loss" in row for row in rows):
            return
        with contextlib.suppress(ImportError):
            from matplotlib.figure import Figure

            from acre import plot

            figure = Figure(figsize=(6.4, 4), layout="constrained")
            plot.losses(rows, figure.add_subplot())
            part = self.path.with_name(".loss.png.part")
            figure.savefig(part, dpi=150, format="png")
            os.replace(part, self.path.with_name("loss.png"))

    def close(self) -> None:
        """Lets others write."""
        self._file.close()
