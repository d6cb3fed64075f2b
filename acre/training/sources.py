"""Where examples come from: files that are read in order, builders that never end.

Takes a name, "FILE", "builder" or "builder:FILE"; gives a `Source` of examples. One
idea: the generator of every draw is seeded by its place, which is a line of a file or a
number, so a place is all that a checkpoint holds. Refuses unknown builders, files that
give no example, and builders that fail many times in a row.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from acre.training.builders import BUILDERS, Builder, Material, Order
from acre.training.examples import ORDINARY, Example, Maker
from acre.training.files import Skipped, digest, find_files, items
from acre.training.forms import Item, Record

FAILURES = 100  # samples of a builder in a row that may fail
UNBUILT = "sample that could not be built"


class Source(Protocol):
    """Where examples come from. facts: JSON values that decide its sequence."""

    facts: dict[str, Any]

    def draw(self, keep: bool) -> Example | None:
        """The next example; where not `keep` it may be passed over, as None.
        StopIteration at the end."""

    def state(self) -> dict[str, int]:
        """The place in the sequence."""

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a place."""


# -------------------------------------------------------------------------------- files


class FileSource:
    """The rows of files in order, `passes` times (None: without end)."""

    def __init__(
        self,
        files: list[Path],
        maker: Maker,
        skipped: Skipped,
        seed: str,
        passes: int | None,
    ) -> None:
        """ValueError for a file without a usable row, now rather than late in a run."""
        for file in files:
            next(items(file, Skipped(quiet=True)))
        self.facts = {"files": digest(files), "passes": passes}
        self._files, self._maker, self._skipped = files, maker, skipped
        self._seed, self._passes = seed, passes
        self._at = {"pass": 0, "file": 0, "line": 0, "item": 0, "made": 0}
        self._given = False  # has this pass given an example?
        self._walk = self._examples()

    def draw(self, keep: bool) -> Example:
        """The next example of the rows."""
        return next(self._walk)

    def state(self) -> dict[str, int]:
        """Pass, file, the line, which of its items, and its examples so far."""
        return dict(self._at)

    def restore(self, state: Mapping[str, int]) -> None:
        """Makes the examples of the state's row again, up to the one it stands at."""
        goal = {key: int(state[key]) for key in self._at}
        self._at = {**goal, "made": 0}
        self._walk = self._examples()
        for _ in range(goal["made"]):
            next(self._walk, None)
        if self._at != goal:
            raise ValueError(f"state: {goal} is no place in {self._files[0]}, ...")

    def _examples(self) -> Iterator[Example]:
        """All examples from the place of `_at` on, which it moves along."""
        at = self._at
        while self._passes is None or at["pass"] < self._passes:
            for file in range(at["file"], len(self._files)):
                at["file"] = file
                yield from self._of_file(self._files[file])
                at.update(line=0, item=0, made=0)
            if not self._given:
                raise ValueError(
                    f"{self._files[0]}, ...: no row gives an example ({self._skipped})"
                )
            self._given = False
            at.update({"pass": at["pass"] + 1, "file": 0})

    def _of_file(self, path: Path) -> Iterator[Example]:
        """The examples of a file's rows from the place on."""
        at = self._at
        first, passed = at["line"], at["item"]
        for line, number, item in items(path, self._skipped, max(first, 1)):
            if line == first and number < passed:
                continue
            at.update(line=line, item=number, made=0)
            for example in self._of_item(item, f"{path}:{line}"):
                at["made"] += 1
                self._given = True
                yield example

    def _of_item(self, item: Item, where: str) -> Iterator[Example]:
        """The examples of a text or a question."""
        place = ":".join(str(self._at[key]) for key in ("pass", "file", "line", "item"))
        rng = random.Random(f"{self._seed}:{place}")
        return made(self._maker, item, rng, self._skipped, where)


def made(
    maker: Maker, item: Item, rng: random.Random, skipped: Skipped, where: str
) -> Iterator[Example]:
    """Examples of an item; what is wrong with it is counted and said."""

    def skip(reason: str, detail: str) -> None:
        if reason in ORDINARY:
            skipped.counts[reason] += 1
        else:
            skipped.add(reason, where, detail)

    try:
        if isinstance(item, Record):
            example = maker.asked(item, rng, skip)
            if example is not None:
                yield example
        else:
            yield from maker.texts(item, rng, skip)
    except ValueError as error:  # ids or questions that the model cannot take
        skip("unusable row", str(error))


# ----------------------------------------------------------------------------- builders


class BuilderSource:
    """Samples of a builder, without end; the i-th is known by its number."""

    def __init__(
        self,
        name: str,
        files: list[Path],
        maker: Maker,
        skipped: Skipped,
        seed: str,
    ) -> None:
        self._name, self._builder = name, BUILDERS[name]
        self._material = gather(name, self._builder, files, skipped)
        held = digest(files) if files else _of_texts(self._material.texts)
        self.facts = {"builder": name, "files": held}
        self._maker, self._skipped, self._seed = maker, skipped, seed
        self._index = 0

    def draw(self, keep: bool) -> Example | None:
        """The next sample; another is tried where one cannot be built."""
        index, self._index = self._index, self._index + 1
        if not keep:
            return None
        for attempt in range(FAILURES):
            rng = random.Random(f"{self._seed}:{index}:{attempt}")
            where = f"{self._name}[{index}]"
            example = self._build(rng, where)
            if example is not None:
                return example
        told = f"{FAILURES} samples in a row cannot be used"
        raise ValueError(f"{self._name}: {told} ({self._skipped})")

    def state(self) -> dict[str, int]:
        """How many samples were drawn."""
        return {"index": self._index}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a number."""
        self._index = int(state["index"])

    def _build(self, rng: random.Random, where: str) -> Example | None:
        """One sample, or None where it was counted as unusable."""
        prefix = len(self._maker.frame.prefix_ids)
        tokens = max(1, self._maker.draw_length(rng) - prefix)
        most = self._maker.shape.range[1]
        order = Order(rng, tokens, self._maker.count, most)
        try:
            item = self._builder.make(self._material, order)
        except ValueError as error:
            self._skipped.add(UNBUILT, where, str(error))
            return None
        return next(made(self._maker, item, rng, self._skipped, where), None)


def gather(
    name: str, builder: Builder, files: Sequence[Path], skipped: Skipped
) -> Material:
    """The files' rows as a builder's material; without files what is at hand."""
    if not files:
        if builder.needs == "records":
            raise ValueError(f"{name}: expected {name}:FILE, with questions in it")
        return Material([reference_text()] if builder.needs else [])
    rows = (item for file in files for _, _, item in items(file, skipped))
    material = Material.gathered(rows)
    if builder.needs and not getattr(material, builder.needs):
        wanted = "text" if builder.needs == "texts" else "question"
        raise ValueError(f"{name}: {files[0]}, ...: holds no {wanted}")
    return material


def reference_text() -> str:
    """Python's language reference, a real text that is always there."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _of_texts(texts: list[str]) -> str:
    """16 hex digits of texts that come from no file."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------- names


def opened(
    name: str, maker: Maker, skipped: Skipped, seed: str, passes: int | None
) -> Source:
    """The source of a name in a mix."""
    builder, _, paths = name.partition(":")
    known = builder in BUILDERS and not Path(name).exists()
    given = [path for path in (paths if known else name).split(",") if path]
    if known:
        files = find_files(given) if given else []
        return BuilderSource(builder, files, maker, skipped, seed)
    try:
        files = find_files(given)
    except FileNotFoundError as error:
        names = ", ".join(BUILDERS)
        raise FileNotFoundError(f"{error}; builders are {names}") from None
    return FileSource(files, maker, skipped, seed, passes)
