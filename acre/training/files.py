"""Training files: which they are, their rows in order, and what was left out.

Takes paths; gives the rows one by one from any place on, and a count of what could not
be used. One idea: a place in the data is (file, line), two numbers that a checkpoint
holds; rows before it are passed over unparsed. Refuses folders without data and files
without one usable row.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from acre.eval.readers import ENDINGS, Source, read_rows
from acre.training.forms import Item, parse

Paths = str | os.PathLike | Sequence[str | os.PathLike]
SHOWN = 10  # warnings per reason; later ones are only counted
log = logging.getLogger("acre.training")


class Skipped:
    """What was left out, or shortened, by reason; the first of each are warned of."""

    def __init__(self, quiet: bool = False) -> None:
        """quiet: count without warnings, as all processes but one do."""
        self.counts: Counter[str] = Counter()
        self._quiet = quiet

    def add(self, reason: str, where: str, detail: str = "") -> None:
        """One more; `where`: <file>:<line>, or the builder and its number."""
        self.counts[reason] += 1
        count = self.counts[reason]
        if self._quiet or count > SHOWN:
            return
        more = "; more of these are only counted" if count == SHOWN else ""
        told = f"{reason}: {detail}" if detail else reason
        log.warning("%s: %s%s", where, told, more)

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in self.counts.items())


def find_files(paths: Paths) -> list[Path]:
    """The files, in the order given; of a folder all JSON lines below it, by name.

    FileNotFoundError for a path that is not there or a folder that holds none.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(ENDINGS))
            if not inside:
                kinds = ", ".join(ENDINGS)
                raise FileNotFoundError(f"{path}: holds no file that ends in {kinds}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    if not found:
        raise ValueError("paths: got none")
    return found


def digest(files: Sequence[Path]) -> str:
    """16 hex digits of the files' names and sizes, wherever they lie."""
    facts = "\n".join(f"{file.name}|{file.stat().st_size}" for file in files)
    return hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def items(
    file: Path, skipped: Skipped, start: int = 1
) -> Iterator[tuple[int, int, Item]]:
    """(line, number in it from 0, item) of the usable rows from line `start` on.

    start: 1, or the line of a usable row. ValueError where a file that is read from its
    beginning has no usable row.
    """
    usable, first = start > 1, ""
    for line, row, wrong in read_rows(Source(file), start):
        found, wrong = ([], wrong) if wrong else _parsed(row, line)
        if wrong:
            where = f"{file}:{line}"
            first = first or f"; the first: {where}: {wrong}"
            skipped.add("unusable row", where, wrong)
        for number, item in enumerate(found):
            usable = True
            yield line, number, item
    if not usable:
        raise ValueError(f"{file}: no usable row{first}")


def _parsed(row: Any, line: int) -> tuple[list[Item], str]:
    """What a row holds, or why it cannot be used."""
    try:
        return parse(row, line), ""
    except KeyError as error:
        return [], f"no field {error}"
    except (TypeError, ValueError, RecursionError) as error:
        return [], str(error) or type(error).__name__
