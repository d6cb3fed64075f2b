"""The token loop: from a prefilled session to text, piece by piece.

Takes a `_core.Session` that holds a prompt, the sampling options and a tokenizer; gives
pieces of text as they become certain, and at the end a `Generation`. One idea: a piece
is emitted only when later tokens cannot change it, so no half UTF-8 character and no
part of a stop string ever leaves. Refuses options outside their range before any work.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from acre._core import Session
    from acre.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 128
REPLACEMENT = "\ufffd"


def integer(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    """`value` as an int in [low, high]; TypeError or ValueError naming the argument."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    try:
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name}: got {kind} {value!r}, expected an integer") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: got {number}, expected {low} to {high}")
    return number


def _real(name: str, value: Any, good: Callable[[float], bool], wanted: str) -> float:
    """`value` as a finite float that satisfies `good`; else an error naming it."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {value!r}, expected a number {wanted}") from None
    if not math.isfinite(number) or not good(number):
        raise ValueError(f"{name}: got {value!r}, expected {wanted}")
    return number


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple; empty strings and other types are refused."""
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str):
            kind = type(string).__name__
            raise TypeError(f"stop: got {kind}, expected str or a list of str")
        if not string:
            raise ValueError("stop: got an empty string, which every text contains")
    return strings


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop; temperature 0 is greedy.

    max_new_tokens >= 1; temperature >= 0; 0 < top_p <= 1 (1 = off); top_k >= 0 (0 =
    off); repetition_penalty > 0 (1 = off); seed: same seed, same tokens; stop: stop
    strings.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "max_new_tokens", integer("max_new_tokens", self.max_new_tokens, 1))
        put(self, "top_k", integer("top_k", self.top_k, 0))
        put(self, "seed", integer("seed", self.seed, 0, 2**64 - 1))
        put(self, "stop", stop_strings(self.stop))
        for name, good, wanted in (
            ("temperature", lambda x: x >= 0, "at least 0"),
            ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("repetition_penalty", lambda x: x > 0, "above 0"),
        ):
            put(self, name, _real(name, getattr(self, name), good, wanted))

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `Session.next`."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }


class Detokenizer:
    """Token ids to text, incrementally.

    Invariant: the pieces returned so far, joined, are a prefix of decode(all ids). A
    run of U+FFFD at the end may be the first bytes of a character and is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._anchor = 0  # decoding starts here: one settled token before `_settled`
        self._settled = 0  # ids before this one are out completely
        self._sent = 0  # characters that are out of decode(ids[anchor:])

    def put(self, token: int) -> str:
        """Takes one token; returns the characters that it made certain."""
        self._ids.append(token)
        text = self._decode(self._ids[self._anchor :])
        certain = text.rstrip(REPLACEMENT)
        piece = certain[self._sent :]
        if len(certain) == len(text) and piece:
            self._settle(len(self._ids))
        else:
            self._sent = max(self._sent, len(certain))
        return piece

    def _settle(self, count: int) -> None:
        """Moves the window: decoders look one word back, so one word stays in it."""
        self._anchor, self._settled = self._settled, count
        self._sent = len(self._decode(self._ids[self._anchor : count]))

    def end(self) -> str:
        """What was held back, now final."""
        text = self._decode(self._ids[self._anchor :])
        piece, self._sent = text[self._sent :], len(text)
        return piece


class StopFinder:
    """Lets text through up to the first stop string; holds back possible beginnings."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def put(self, piece: str) -> str:
        """Takes text; returns what cannot belong to a stop string. "" after a stop."""
        if self.found or not self._stops:
            return "" if self.found else piece
        text = self._held + piece
        places = [place for s in self._stops if (place := text.find(s)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0

    def end(self) -> str:
        """What was held back and turned out to be no stop string."""
        piece, self._held = self._held, ""
        return piece


class Streamer:
    """One face for both kinds: objects with put/end (transformers) and plain callables.

    put/end objects get int64 arrays of token ids, the prompt first as [1, t]; callables
    get pieces of text.
    """

    def __init__(self, target: Any) -> None:
        put, end = getattr(target, "put", None), getattr(target, "end", None)
        self._put = put if callable(put) and callable(end) else None
        self._end = end if self._put else None
        self._call = None
        if target is not None and self._put is None:
            if not callable(target):
                kind = type(target).__name__
                raise TypeError(
                    f"streamer: got {kind}, expected an object with put() and end() "
                    "or a callable"
                )
            self._call = target

    def prompt(self, ids: np.ndarray) -> None:
        """The prompt's ids, once, before any token."""
        if self._put:
            self._put(np.asarray(ids, dtype=np.int64)[None, :])

    def token(self, token: int) -> None:
        """One new token."""
        if self._put:
            self._put(np.array([token], dtype=np.int64))

    def text(self, piece: str) -> None:
        """One piece of text."""
        if self._call and piece:
            self._call(piece)

    def end(self) -> None:
        """No more tokens."""
        if self._end:
            self._end()


@dataclass
class Generation:
    """What the loop made: ids, text, why it ended, and its two timings in seconds."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    first_token_at: float = 0.0
    decode_s: float = 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Rate over the tokens after the first."""
        if len(self.ids) < 2 or self.decode_s <= 0:
            return 0.0
        return (len(self.ids) - 1) / self.decode_s


class Writer:
    """One answer as it comes: takes its tokens, gives pieces of text, knows its end."""

    def __init__(
        self,
        sampling: Sampling,
        limit: int,
        tokenizer: Tokenizer | None,
        eos_ids: Iterable[int],
        streamer: Streamer,
    ) -> None:
        """Of at most `limit` tokens; one of eos_ids ends it and counts among the ids,
        not in the text."""
        self.options = sampling.options()
        self.streamer = streamer
        self.done = False
        self._out, self._limit, self._ends = Generation(), limit, frozenset(eos_ids)
        self._words = Detokenizer(tokenizer.decode) if tokenizer is not None else None
        self._stops = StopFinder(sampling.stop)
        self._pieces: list[str] = []

    def put(self, token: int, start: float) -> str:
        """Takes a token that was asked for at `start` (perf_counter); returns the text
        that it made certain."""
        out, now = self._out, time.perf_counter()
        out.ids.append(token)
        if len(out.ids) == 1:
            out.first_token_at = now
        else:
            out.decode_s += now - start
        self.streamer.token(token)
        piece = ""
        if token in self._ends:
            out.finish_reason, self.done = "eos", True
        else:
            piece = self._stops.put(self._words.put(token)) if self._words else ""
            self.done = self._stops.found or len(out.ids) == self._limit
        self._give(piece)
        return piece

    def rest(self) -> str:
        """The text still held back when no token follows."""
        if self._words is None or self._stops.found:
            return ""
        piece = self._stops.put(self._words.end())
        if not self._stops.found:
            piece += self._stops.end()
        self._give(piece)
        return piece

    def _give(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self.streamer.text(piece)

    def result(self) -> Generation:
        """What was made."""
        if self._stops.found:
            self._out.finish_reason = "stop"
        self._out.text = "".join(self._pieces)
        return self._out


def run(session: Session, writer: Writer) -> Generator[str, None, Generation]:
    """Decodes from a prefilled session until the writer is done, yielding text pieces.

    Returns the Generation. Time spent by the consumer between pieces is not counted.
    """
    try:
        while not writer.done:
            start = time.perf_counter()
            piece = writer.put(int(session.next(**writer.options)), start)
            if piece:
                yield piece
        piece = writer.rest()
        if piece:
            yield piece
    finally:
        writer.streamer.end()
    return writer.result()


class Stream:
    """Iterator over the pieces of one answer; `.answer` is the result once
    exhausted."""

    def __init__(self, pieces: Generator[str, None, Any]) -> None:
        self._pieces = pieces
        self.answer: Any = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self.answer = end.value
            raise StopIteration(end.value) from None

    def finish(self) -> Any:
        """Consumes what is left; returns the result."""
        for _ in self:
            pass
        return self.answer

    def close(self) -> None:
        """Ends the answer early and frees its session."""
        self._pieces.close()
