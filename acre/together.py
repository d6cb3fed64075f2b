"""Several answers in step: a token of each in one pass through the weights.

Takes what is to be answered, each with its own cache or none, room and way to begin;
gives results in the same order. One idea: decoding is bound by reading the weights, so
answers made side by side cost little more than one, and on the CPU they are the same to
the bit. As many go together as memory has room for; those at their end leave. A
streamer sees answers one after the other, as without batches. Refuses batches below 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from acre import _core
from acre.generate import Generation, Streamer, Writer, integer

BATCH = 8  # answers in step, unless told otherwise


def batch_size(batch: Any) -> int:
    """The most answers in step; None = BATCH. TypeError, ValueError."""
    return BATCH if batch is None else integer("batch", batch, 1)


@dataclass(frozen=True)
class Task:
    """One answer to make.

    cache, capacity, k: its session, and how many groups that refills. begin: refills
    and prefills a session, and tells the streamer the prompt; what it returns comes
    back in `end`, with the Generation, which gives the result.
    """

    cache: _core.Cache | None
    capacity: int
    k: int
    begin: Callable[[_core.Session, Streamer], Any]
    writer: Callable[[Streamer], Writer]
    end: Callable[[Any, Generation], Any]


class Turn(Streamer):
    """A streamer's view of one answer of several: kept until the ones before it have
    ended, then passed on as it comes."""

    def __init__(self, target: Streamer) -> None:
        self._target = target
        self._kept: list[tuple[str, tuple[Any, ...]]] | None = []
        self._ended = False
        self._next: Turn | None = None

    def _tell(self, name: str, *values: Any) -> None:
        if self._kept is None:
            getattr(self._target, name)(*values)
        else:
            self._kept.append((name, values))

    def prompt(self, ids: np.ndarray) -> None:
        self._tell("prompt", ids)

    def token(self, token: int) -> None:
        self._tell("token", token)

    def text(self, piece: str) -> None:
        self._tell("text", piece)

    def end(self) -> None:
        self._ended = True
        self._tell("end")
        if self._kept is None and self._next is not None:
            self._next.come()

    def before(self, after: Turn) -> None:
        """`after` comes when this one has ended."""
        self._next = after

    def come(self) -> None:
        """It is this one's turn."""
        kept, self._kept = self._kept, None
        for name, values in kept or ():
            self._tell(name, *values)
        if self._ended and self._next is not None:
            self._next.come()

    def give_up(self) -> None:
        """No more tokens, by an error: the streamer hears of it in the middle of an
        answer only."""
        if self._kept is None and not self._ended:
            self._ended = True
            self._target.end()


def answers(
    model: _core.Model, tasks: Sequence[Task], batch: int, streamer: Streamer
) -> list[Any]:
    """The tasks' results, at most `batch` in step.

    MemoryError only where not even one fits. Ctrl-C takes effect between tokens.
    """
    results: list[Any] = []
    while len(results) < len(tasks):
        some = tasks[len(results) : len(results) + batch]
        results += _in_step(model, some, streamer)
    return results


def _opened(model: _core.Model, tasks: Sequence[Task]) -> list[_core.Session]:
    """Sessions of as many of the tasks, from the first on, as memory has room for."""
    fits = (
        _core.sessions_fit(model, task.cache, task.k, task.capacity, len(tasks))
        for task in tasks
    )
    count = min(fits)
    while True:
        caches = [task.cache for task in tasks[:count]]
        capacities = [task.capacity for task in tasks[:count]]
        try:
            return _core.sessions_open(model, caches, capacities)
        except MemoryError:
            if count == 1:
                raise
            count //= 2


def _in_step(
    model: _core.Model, tasks: Sequence[Task], streamer: Streamer
) -> list[Any]:
    """Results of the first of the tasks: of one at least."""
    begun: list[tuple[Any, _core.Session, Writer]] = []
    turns: list[Turn] = []
    sessions = _opened(model, tasks)
    try:
        for task, session in zip(tasks, sessions, strict=False):
            turn = Turn(streamer)
            if not turns:
                turn.come()
            try:
                made = task.begin(session, turn)
            except MemoryError:
                if not begun:
                    raise
                break  # the ones before go first, and make room
            if turns:
                turns[-1].before(turn)
            turns.append(turn)
            begun.append((made, session, task.writer(turn)))
        del sessions
        _decode([(session, writer) for _, session, writer in begun])
    except BaseException:
        for turn in turns:
            turn.give_up()
        raise
    return [
        task.end(made, writer.result())
        for task, (made, _, writer) in zip(tasks, begun, strict=False)
    ]


def _decode(active: list[tuple[_core.Session, Writer]]) -> None:
    """Takes steps until every writer is done."""
    while active:
        start = time.perf_counter()
        tokens = _core.sessions_next(
            [session for session, _ in active],
            [writer.options for _, writer in active],
        )
        for token, (_, writer) in zip(tokens, active, strict=True):
            writer.put(token, start)
            if writer.done:
                writer.rest()
                writer.streamer.end()
        active = [(session, writer) for session, writer in active if not writer.done]
