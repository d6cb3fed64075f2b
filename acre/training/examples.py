"""From texts and questions to the arrays that a trainer takes.

Takes a model, a `Shape` (lengths and windows) and texts or `Record`s; gives `Example`s.
One idea: a question is framed by the very `Frame` that `Model.build` and `Cache.ask`
use, so what is learned is what will be asked. Refuses, with a reason that is counted,
texts shorter than a window, extractive answers that the context does not hold, and
contexts that fit neither the length nor the model's positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from acre.chat import Frame
from acre.generate import integer
from acre.model import Model, check_ids
from acre.training.forms import Question, Record

INTERVALS = (8, 16, 32, 64, 128)
Skip = Callable[[str, str], None]  # takes the reason and what was found

SHORT, REMAINDER = "shorter than a window", "remainder shorter than a window"
UNTOLD, LONG = "answer not in the text", "too long"
CUT = "cut around the evidence"
ORDINARY = (REMAINDER, CUT)  # happen in sound data: counted, not warned of


@dataclass(frozen=True)
class Shape:
    """How long examples are and how they are read.

    length: context tokens, or the (least, most) that a length is drawn from. window,
    stride, carry: as `Model.build` takes them. intervals: what l of a window is drawn
    from. questions: the most that are asked of one context. ValueError, TypeError
    naming the argument.
    """

    length: int | tuple[int, int]
    window: int = 4096
    stride: int = 2048
    carry: int = 0
    intervals: tuple[int, ...] = INTERVALS
    questions: int = 16

    def __post_init__(self) -> None:
        integer("window", self.window, 1)
        integer("stride", self.stride, 1)
        integer("carry", self.carry, 0)
        integer("questions", self.questions, 1)
        if not self.intervals:
            raise ValueError("intervals: got none")
        for interval in self.intervals:
            integer("intervals", interval, 1)
        if not isinstance(self.length, int) and len(self.length) != 2:
            raise ValueError(f"length: got {self.length}, expected one number or two")
        least, most = self.range
        integer("length", least, self.window + 1)
        integer("length", most, least)

    @property
    def range(self) -> tuple[int, int]:
        """The least and the most context tokens."""
        both = isinstance(self.length, int)
        least, most = (self.length, self.length) if both else self.length
        return least, most

    def windows(self, n: int) -> int:
        """Windows of n context tokens, a last partial one included."""
        return 1 + max(0, -(-(n - self.window) // self.stride))

    def positions(self, n: int, t: int, intervals: Sequence[int]) -> int:
        """At least the positions that any pass over n tokens and a question of t takes.
        """
        most = entries = start = last = 0
        for i, interval in enumerate(intervals):
            stop = min(n, start + (self.stride if i else self.window))
            own, last = stop // interval - start // interval, stop - start
            most = max(most, entries + min(self.carry, start) + last + own)
            entries, start = entries + own, stop
        # A question sees all L1 entries, the tokens behind the last of them and, where
        # the last window is partial, that window.
        return max(most, entries + max(intervals) + last + t)


class Asked(NamedTuple):
    """A question with its answer, as `Trainer.accumulate` takes it.

    ids: int32 [t]. weights: float32 [t], of each token's loss. query: [first, last) of
    ids, which scores. evidence: uint8 [n] or None.
    """

    ids: np.ndarray
    weights: np.ndarray
    query: tuple[int, int]
    evidence: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Example:
    """What `Trainer.accumulate` takes.

    ids: int32 [n]. weights: float32 [n], of each token's loss. intervals: l of each
    window.
    """

    ids: np.ndarray
    weights: np.ndarray
    questions: tuple[Asked, ...]
    intervals: list[int]
    window: int
    stride: int
    carry: int

    @property
    def tokens(self) -> int:
        """Of the context and of all questions."""
        return len(self.ids) + sum(len(asked.ids) for asked in self.questions)

    def arguments(self) -> dict[str, Any]:
        """All but ids, as the keywords of `Trainer.accumulate`."""
        return {key: value for key, value in vars(self).items() if key != "ids"}


class Maker:
    """Makes examples for one model. Every draw comes from the generator given."""

    def __init__(
        self,
        model: Model,
        shape: Shape,
        *,
        frame: Frame | None = None,
        require_answer: bool = True,
    ) -> None:
        """frame: None = the one that `Model.build` uses. require_answer: leave out
        questions of unknown evidence whose context lacks their extractive answer.
        ValueError for a model without a tokenizer or positions for a window."""
        if model.tokenizer is None:
            raise ValueError("model: has no tokenizer, which training data needs")
        room = model.config["w_max"]
        needed = shape.positions(shape.window, 0, [max(shape.intervals)])
        if needed > room:
            raise ValueError(
                f"window: {shape.window} tokens take {needed} positions, the model has "
                f"{room}"
            )
        self.model, self.shape = model, shape
        self.frame = Frame(model.tokenizer) if frame is None else frame
        self._require_answer = require_answer

    @property
    def facts(self) -> dict[str, Any]:
        """JSON values that decide what examples are made."""
        shape = self.shape
        return {
            "shape": [
                list(shape.range), shape.window, shape.stride, shape.carry,
                list(shape.intervals), shape.questions,
            ],
            "require_answer": self._require_answer,
            "frame": self.frame.fingerprint,
            "tokenizer": self.model.tokenizer.fingerprint,
            "positions": self.model.config["w_max"],
        }  # fmt: skip

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.model.tokenizer.encode(text))

    def draw_length(self, rng: random.Random) -> int:
        """Context tokens of one example."""
        return rng.randint(*self.shape.range)

    def texts(self, text: str, rng: random.Random, skip: Skip) -> Iterator[Example]:
        """Stage I: the text in pieces of drawn lengths, a weight of 1 for every token.

        Each piece begins as the tokenizer begins texts. The last one is as long as the
        text lasts, if that is more than a window.
        """
        tokenizer = self.model.tokenizer
        ids = self._checked(tokenizer.encode(text))
        begin = np.array([tokenizer.bos_id] * tokenizer.adds_bos, dtype=np.int32)
        at = 0
        while at < len(ids):
            size = self.draw_length(rng) - len(begin)
            piece = np.concatenate([begin, ids[at : at + size]])
            if len(piece) <= self.shape.window:
                skip(REMAINDER if at else SHORT, f"{len(piece)} tokens")
                return
            at += size
            intervals = self._intervals(len(piece), 0, rng, skip)
            if intervals is not None:
                weights = np.ones(len(piece), dtype=np.float32)
                yield self._example(piece, weights, (), intervals)

    def asked(self, record: Record, rng: random.Random, skip: Skip) -> Example | None:
        """Stage II: context and framed questions, a weight of 1 for the answers' tokens
        and their ends; None where `skip` was told why not."""
        told = [q for q in record.questions if self._told(q, record, skip)]
        if not told:
            return None
        own, offsets = self.model.tokenizer.encode_offsets(record.context)
        flags = [evidence_of(q, offsets) for q in told]
        part = self._cut(self._checked(own), flags, rng, skip)
        if part is None:
            return None
        prefix = np.asarray(self.frame.prefix_ids, dtype=np.int32)
        ids = np.concatenate([prefix, own[part]])
        if len(ids) <= self.shape.window:
            skip(SHORT, f"{len(ids)} tokens")
            return None
        kept = [i for i in range(len(told)) if whole(flags[i], part, len(own))]
        if len(kept) > self.shape.questions:
            kept = sorted(rng.sample(kept, self.shape.questions))
        asked = tuple(self._framed(told[i], flags[i], part) for i in kept)
        longest = max(len(one.ids) for one in asked)
        intervals = self._intervals(len(ids), longest, rng, skip)
        if intervals is None:
            return None
        weights = np.zeros(len(ids), dtype=np.float32)
        return self._example(ids, weights, asked, intervals)

    # ---------------------------------------------------------------------------- parts

    def _example(self, *parts: Any) -> Example:
        shape = self.shape
        return Example(*parts, shape.window, shape.stride, shape.carry)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        return check_ids("text", ids, self.model.config["vocab_size"])

    def _told(self, q: Question, record: Record, skip: Skip) -> bool:
        """Does the context hold the answer, if it has to?"""
        required = self._require_answer and record.extractive and not q.evidence
        if not required or _plain(q.answer) in _plain(record.context):
            return True
        skip(UNTOLD, repr(q.answer[:60]))
        return False

    def _framed(self, q: Question, flags: np.ndarray | None, part: slice) -> Asked:
        """A question as it is asked, with its answer; the context is `part` of it."""
        sent, *query = self.frame.question_ids(q.text, q.query or None)
        answer = self.frame.answer_ids(q.answer)
        ids = self._checked(np.concatenate([sent, answer]))
        weights = np.zeros(len(ids), dtype=np.float32)
        weights[len(sent) :] = 1
        if flags is not None:
            before = np.zeros(len(self.frame.prefix_ids), np.uint8)
            flags = np.concatenate([before, flags[part]])
        return Asked(ids, weights, (query[0], query[1]), flags)

    def _cut(
        self,
        ids: np.ndarray,
        flags: list[np.ndarray | None],
        rng: random.Random,
        skip: Skip,
    ) -> slice | None:
        """The part of the context that is read: all, or where it is too long as much
        as fits around one question's evidence, which lies anywhere in it."""
        room = self.shape.range[1] - len(self.frame.prefix_ids)
        if len(ids) <= room:
            return slice(0, len(ids))
        known = [np.flatnonzero(f) for f in flags if f is not None and f.any()]
        if not known:
            skip(LONG, f"{len(ids)} tokens exceed {room}, the evidence is not known")
            return None
        held = rng.choice(known)
        first, last = int(held[0]), int(held[-1])
        if last - first >= room:
            skip(LONG, f"the evidence spans {last - first + 1} tokens of {room}")
            return None
        start = rng.randint(max(0, last + 1 - room), min(first, len(ids) - room))
        skip(CUT, f"{len(ids)} tokens exceed {room}")
        return slice(start, start + room)

    def _intervals(
        self, n: int, t: int, rng: random.Random, skip: Skip
    ) -> list[int] | None:
        """l of each window, drawn; the smallest are left out until the example fits
        the model's positions."""
        shape, room = self.shape, self.model.config["w_max"]
        choices = sorted(shape.intervals)
        for least in range(len(choices)):
            allowed = choices[least:]
            drawn = [rng.choice(allowed) for _ in range(shape.windows(n))]
            if shape.positions(n, t, drawn) <= room:
                return drawn
        skip(LONG, f"{n} + {t} tokens do not fit {room} positions")
        return None


def evidence_of(q: Question, offsets: np.ndarray) -> np.ndarray | None:
    """uint8 [n], the tokens that hold a question's evidence, or None."""
    if not q.evidence:
        return None
    flags = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in q.evidence:
        flags[(offsets[:, 1] > start) & (offsets[:, 0] < end)] = 1
    return flags


def whole(flags: np.ndarray | None, part: slice, n: int) -> bool:
    """Can a question be asked of `part` of n tokens: is all its evidence there?"""
    if flags is None:
        return part == slice(0, n)
    return int(flags[part].sum()) == int(flags.sum())


def _plain(text: str) -> str:
    """A text without the differences of case and white space."""
    return " ".join(text.split()).casefold()
