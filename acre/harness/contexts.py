"""Prompts that come as one piece: each context read once, then continued many times.

Takes a model and token ids of contexts; gives sessions that stand before what follows a
context. One idea: every context is a cache. One that fits is a cache whose window never
closes, and attention over it is full; a longer one is read into a bi-layer cache, and
its end, the question, chooses what is refilled. Caches are values, so contexts with a
common beginning (few-shot examples, one text under many questions) share what was read
of it. Refuses texts and continuations that no cache can hold, before any work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from acre import _core
from acre.build import Figures, State, build_options, entry_options, proxy_of
from acre.cache import SELECTS
from acre.generate import integer
from acre.report import Layout

if TYPE_CHECKING:
    from acre.model import Model

SMALLEST_WINDOW = 1024
MOST_RESERVE = 4096  # the core's own bound: the smaller of it and w_max/8
SAME_SHAPE = "interval window stride carry eta reserve weight sink".split()


@dataclass(frozen=True)
class Reading:
    """How contexts are read; the options of `Model.build` and `Cache.ask` among them.

    full_below: the most tokens of a context that is read with full attention; None =
    all that fit the model's positions. question_tokens: the end of a longer context, at
    most so many tokens, that is its question.
    """

    full_below: int | None = None
    question_tokens: int = 256
    eta: int = 4096
    select: str = "shared"
    interval: int | str = "auto"
    window: int = 4096
    stride: int = 2048
    carry: int = 0
    proxy: str = "auto"
    weight: int | None = None
    sink: bool | None = None

    def __post_init__(self) -> None:
        if self.full_below is not None:
            integer("full_below", self.full_below, 0)
        integer("question_tokens", self.question_tokens, 1)
        if self.select not in SELECTS:
            raise ValueError(f"select: got {self.select!r}, expected one of {SELECTS}")
        self.options(None)

    def options(self, reserve: int | None) -> dict[str, Any]:
        """The core's build options; ValueError or TypeError naming one."""
        return build_options(
            self.proxy, self.interval, self.window, self.stride, self.carry, self.eta,
            reserve,
        )  # fmt: skip


@dataclass(frozen=True)
class Context:
    """A context that has been read, all but its end.

    state: what was read; None where the context is one token. rest: int32 [t], t >= 1,
    its end, the first to be prefilled. groups: what is refilled before that; None = all
    of the context is attended to. room: positions left after `rest`.
    """

    model: Model
    state: State | None
    rest: np.ndarray
    groups: np.ndarray | None
    room: int

    def session(self, new: int) -> _core.Session:
        """A session of its own that stands before `rest`, with `new` positions more."""
        core = None if self.state is None else self.state.core
        session = _core.Session(self.model.core, core, capacity=len(self.rest) + new)
        if self.groups is not None:
            session.refill(self.groups)
        return session

    def begin(self, session: _core.Session) -> None:
        """Takes a session over the same core cache to where `rest` ends."""
        if self.groups is not None:
            session.refill(self.groups)
        session.prefill(self.rest)

    def logits(self, ids: np.ndarray, chunk: int = 256) -> list[np.ndarray]:
        """What the model expects at each of `ids` [t] and after them: float32 [t + 1,
        vocab] in pieces of at most `chunk` rows."""
        session = self.session(len(ids))
        if len(self.rest) > 1:
            session.prefill(self.rest[:-1])
        rows = np.concatenate([self.rest[-1:], ids])
        return [
            session.prefill(rows[start : start + chunk], logits=True)
            for start in range(0, len(rows), chunk)
        ]


def last_lines(ids: np.ndarray, most: int, ends_line: Callable[[int], bool]) -> int:
    """Where the question of a context begins: the earliest line that begins within the
    last `most` tokens, or just the last `most` tokens where none does.

    ids: int [n], n >= 2. ends_line: of a token id, whether its text ends a line. At
    least one token stays on either side.
    """
    first = max(len(ids) - most, 1)
    for start in range(first, len(ids)):
        if ends_line(int(ids[start - 1])):
            return start
    return first


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if differ.size else size


class Contexts:
    """Opens contexts, keeping what the last one of either kind has read.

    Contexts in the order of their ids share the most. caches_read, caches_extended:
    how many were read from their beginning, and from where another one ended;
    tokens_read, tokens_shared: tokens that were computed, and that were not. One owner.
    """

    def __init__(self, model: Model, reading: Reading) -> None:
        reading = replace(reading, proxy=proxy_of(model, reading.proxy))
        self.model = model
        self.reading = reading
        self.caches_read = self.caches_extended = 0
        self.tokens_read = self.tokens_shared = 0
        self._kept: dict[bool, State] = {}
        self._entries = entry_options(
            model, reading.proxy, reading.carry, reading.weight, reading.sink
        )
        model.core.plan(1, **reading.options(None) | self._entries)  # names bad options
        if reading.proxy == "trained" and not model.core.has_l1:
            raise ValueError("proxy: 'trained' needs acre_* parameters, there are none")

    @property
    def w_max(self) -> int:
        """The model's positions."""
        return self.model.config["w_max"]

    @property
    def answer_room(self) -> int:
        """Positions that are kept for any answer, whatever the context."""
        return max(min(MOST_RESERVE, self.w_max // 8), 1)

    def is_full(self, n: int, room: int) -> bool:
        """Whether a context of n tokens with `room` more is read with full attention:
        a matter of these numbers only."""
        bound = self.reading.full_below
        return (bound is None or n <= bound) and n + room <= self.w_max

    def check(self, ids: np.ndarray, room: int) -> None:
        """Refuses what `open` would, in integers only: TooLongError, ValueError."""
        if not self.is_full(len(ids), room):
            text, options = self._parts(ids, room)
            interval = self.model.core.plan(len(text), **options)["interval"]
            if 0 < self.reading.eta < interval:
                raise ValueError(
                    f"eta: got {self.reading.eta}, expected 0 or at least a group of "
                    f"{interval}"
                )

    def open(self, ids: np.ndarray, room: int) -> Context:
        """Reads a context, int32 [n], n >= 1, that at least `room` positions follow.

        TooLongError (names an interval that would fit), MemoryError.
        """
        if self.is_full(len(ids), room):
            return self.whole(ids)
        text, options = self._parts(ids, room)
        state, question = self._read(False, text, options), ids[len(text) :]
        groups = self._choose(state, question)
        left = state.core.plan["reserve"] - len(question)
        return Context(self.model, state, question, groups, left)

    def at_hand(self, ids: np.ndarray, room: int) -> State | None:
        """What `open` would take a long context from without reading anything; None
        where it would read."""
        old = self._kept.get(False)
        text, options = self._parts(ids, room)
        if old is None or len(text) != old.layout.n:
            return None
        plan = self.model.core.plan(len(text), **options)
        return old if self._shared(old, text, plan) == len(text) else None

    def whole(self, ids: np.ndarray) -> Context:
        """Reads a context with full attention, whatever full_below says."""
        text, rest = ids[:-1], ids[-1:]  # the logits of its last token are wanted
        state = None
        if len(text):
            state = self._read(True, text, self._full_options(len(text)))
        return Context(self.model, state, rest, None, self.w_max - len(ids))

    # -------------------------------------------------------------------------- reading

    def _parts(self, ids: np.ndarray, room: int) -> tuple[np.ndarray, dict[str, Any]]:
        """(the text of a long context, the options it is read with)."""
        if len(ids) < 2:
            raise _core.TooLongError(
                f"context: {len(ids)} tokens and {room} more exceed full_below or the "
                f"model's {self.w_max} positions, and leave no text for a cache"
            )
        most = self.reading.question_tokens
        text = ids[: last_lines(ids, most, self._ends_line)]
        reserve = max(self.answer_room, most + room)
        return text, self.reading.options(reserve) | self._entries

    def _full_options(self, n: int) -> dict[str, Any]:
        """Of a cache whose window does not close: a power of two above n, so that
        contexts of like length can share. The rest of the plan is not used."""
        window = max(SMALLEST_WINDOW, 1 << n.bit_length())
        window = max(min(window, self.w_max), n + 1)
        return {"interval": 8, "window": window, "stride": window, "eta": 0,
                "reserve": 1}  # fmt: skip

    def _read(self, full: bool, text: np.ndarray, options: dict[str, Any]) -> State:
        """The state of a text: the one at hand, one that goes on from it, or a new
        one. What is at hand is let go before a new one is read."""
        plan = self.model.core.plan(len(text), **options)
        old = self._kept.pop(full, None)
        keep = 0 if old is None else self._shared(old, text, plan)
        if old is not None and keep == len(text) == old.layout.n:
            state = old
        else:
            if not keep:
                old = None
            state = self._built(old, keep, text, options)
        self.tokens_read += len(text) - keep
        self.tokens_shared += keep
        self._kept[full] = state
        return state

    @staticmethod
    def _shared(old: State, text: np.ndarray, plan: dict[str, int]) -> int:
        """How many tokens of what was read stand for the text's too; 0 where the two
        are not of one shape or differ inside a closed window."""
        before = old.core.plan
        if any(before[key] != plan[key] for key in SAME_SHAPE):
            return 0
        keep = _common(old.core.ids, text)
        if keep == len(text) < old.layout.n:
            keep -= 1  # an extension has a token at least
        return keep if keep >= old.core.closed_tokens else 0

    def _built(
        self, old: State | None, keep: int, text: np.ndarray, options: dict[str, Any]
    ) -> State:
        """Reads text[keep:], Ctrl-C taking effect between windows."""
        core = self.model.core
        if old is None:
            builder = _core.Builder(core, text, **options)
            self.caches_read += 1
        else:
            builder = _core.Builder(core, text[keep:], base=old.core, keep=keep)
            self.caches_extended += 1
        done, total = 0, 1
        while done < total:
            done, total = builder.step()
        cache = builder.freeze()
        layout = Layout(len(text), 0, cache.plan["interval"], None, None)
        return State(cache, layout, Figures())

    def _choose(self, state: State, question: np.ndarray) -> np.ndarray:
        """The groups that a question refills: int32 [k], or [L, k] per layer."""
        k = state.core.refill_count(self.reading.eta)
        if k == 0:
            return np.zeros(0, dtype=np.int32)
        session = _core.Session(self.model.core, state.core, capacity=len(question))
        scores = state.scorer.scores(
            session,
            (question, 0, len(question)),
            self.model.scoring[self.reading.proxy],
            self.reading.select,
        )
        if scores.ndim == 1:
            return _core.select_groups(scores, k)
        return np.stack([_core.select_groups(row, k) for row in scores])

    @functools.cached_property
    def _ends_line(self) -> Callable[[int], bool]:
        """Of a token id, whether its text ends with a line break; remembered."""
        return functools.cache(lambda i: self.model.decode([i]).endswith("\n"))
