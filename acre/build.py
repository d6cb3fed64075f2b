"""Reading: a text or token ids to a frozen core cache, window by window.

Takes a model, a text (or ids) and the build options; gives the frame and a `State`: the
core cache with the map from tokens to characters. One idea: a builder lives only inside
one function, so an interrupted build leaves nothing behind, and an extension becomes
visible only as a new State. Refuses empty texts, ids outside the vocabulary and texts
that cannot fit, before any work.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from acre import _core
from acre.chat import Frame
from acre.generate import integer
from acre.model import check_ids, check_text
from acre.report import Layout
from acre.scoring import PROXIES, Scorer

if TYPE_CHECKING:
    from acre.model import Ids, Model

Progress = bool | Callable[[int, int], None]


@dataclass(frozen=True)
class Figures:
    """Of the last build or extension: tokens and seconds; all zero after loading."""

    built: int = 0
    reused: int = 0
    recomputed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class State:
    """What a question needs, as one value: a thread that has it is safe from
    `extend`."""

    core: _core.Cache
    layout: Layout
    figures: Figures

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Scores against this core cache."""
        return Scorer(self.core)

    def prepared(self, model: Model) -> State:
        """Itself, with the prior that questions will divide by."""
        scoring = model.scoring[self.core.proxy]
        if scoring.calibrated and self.core.plan["m"]:
            self.scorer.prior(scoring, "shared")
        return self


def _freeze(
    make: Callable[[], _core.Builder], start: int, total: int, progress: Progress
) -> _core.Cache:
    """Steps a fresh builder to the frozen cache, showing tokens.

    Ctrl-C takes effect between windows. The builder is this frame's alone and dies here
    on every path, also where a traceback outlives the frame.
    """
    from tqdm import tqdm

    shown = None if progress is True else True
    report = progress if callable(progress) else None
    builder = make()
    try:
        with tqdm(
            total=total, initial=start, unit="tok", unit_scale=True, desc="reading",
            disable=shown,
        ) as bar:  # fmt: skip
            done = start
            while done < total:
                now, total = builder.step()
                bar.update(now - done)
                done = now
                if report is not None:
                    report(done, total)
        return builder.freeze()
    finally:
        del builder


def _encode_text(model: Model, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A text's own ids int32 [n] and character offsets [n, 2], as compact as they
    fit."""
    if model.tokenizer is None:
        raise ValueError("text: got a string, but the model has no tokenizer")
    ids, offsets = model.tokenizer.encode_offsets(check_text("text", text))
    ids = check_ids("text", ids, model.config["vocab_size"])
    compact = np.int32 if len(text) < 2**31 else np.int64
    return ids, np.ascontiguousarray(offsets, dtype=compact)


def _choose_frame(
    model: Model, frame: Frame | bool | None, is_text: bool
) -> Frame | None:
    """The frame in force: the given one, none, or the tokenizer's for a text."""
    if isinstance(frame, Frame):
        return frame
    if frame is False:
        return None
    if frame is not None and frame is not True:
        kind = type(frame).__name__
        raise TypeError(f"frame: got {kind}, expected acre.Frame, False or None")
    if model.tokenizer is None or (frame is None and not is_text):
        return None
    return Frame(model.tokenizer)


def _prefix(frame: Frame | None) -> np.ndarray:
    """The frame's ids before the text, int32 [p]."""
    if frame is None:
        return np.zeros(0, dtype=np.int32)
    return np.asarray(frame.prefix_ids, dtype=np.int32)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if differ.size else size


def build_options(
    proxy: str,
    interval: int | str,
    window: int,
    stride: int,
    carry: int,
    eta: int,
    reserve: int | None,
    l2: str = "auto",
) -> dict[str, Any]:
    """The options as the core takes them; ValueError or TypeError naming one."""
    if isinstance(interval, str) and interval != "auto":
        raise ValueError(f"interval: got {interval!r}, expected 'auto' or an integer")
    return {
        "proxy": proxy,
        "interval": 0 if interval == "auto" else integer("interval", interval, 1),
        "window": integer("window", window, 1),
        "stride": integer("stride", stride, 1),
        "carry": integer("carry", carry, 0),
        "eta": integer("eta", eta, 0),
        "reserve": 0 if reserve is None else integer("reserve", reserve, 1),
        "l2": l2,
    }


def proxy_of(model: Model, proxy: str) -> str:
    """The proxy in force: "auto" is "trained" where the model has L1 parameters.
    TypeError, ValueError."""
    if not isinstance(proxy, str):
        raise TypeError(f"proxy: got {type(proxy).__name__}, expected str")
    if proxy == "auto":
        return "trained" if model.core.has_l1 else "pooled"
    if proxy not in PROXIES:
        raise ValueError(f"proxy: got {proxy!r}, expected 'auto' or one of {PROXIES}")
    return proxy


def entry_options(
    model: Model, proxy: str, carry: int, weight: int | None, sink: bool | None
) -> dict[str, int]:
    """How L1 entries are kept. Trained ones stand for the sink only in what they were
    trained for, windows that begin behind them; the core refuses them a weight."""
    chosen = model.pooling
    if proxy == "trained":
        chosen = {"weight": 0, "sink": int(carry > 0)}
    if sink is not None and not isinstance(sink, (bool, np.bool_)):
        raise TypeError(f"sink: got {type(sink).__name__}, expected bool or None")
    return {
        "weight": chosen["weight"] if weight is None else integer("weight", weight, 1),
        "sink": chosen["sink"] if sink is None else int(sink),
    }


def read(
    model: Model,
    text_or_ids: str | Ids,
    options: dict[str, Any],
    progress: Progress,
    frame: Frame | bool | None,
) -> tuple[State, Frame | None]:
    """Reads a text into a frozen cache; returns it with the frame in force."""
    if isinstance(text_or_ids, (bytes, bytearray)):
        raise TypeError("text_or_ids: got bytes; decode them, e.g. as UTF-8")
    text = text_or_ids if isinstance(text_or_ids, str) else None
    chosen, offsets = _choose_frame(model, frame, text is not None), None
    if text is not None:
        own, offsets = _encode_text(model, text)
    else:
        own = check_ids(
            "ids", text_or_ids, model.config["vocab_size"], model.core.engine
        )
    prefix = _prefix(chosen)
    ids = np.concatenate([prefix, own])
    model.core.plan(len(ids), **options)  # refuses before any work
    model.core.engine.reset_peak()
    begin = time.perf_counter()
    core = _freeze(
        lambda: _core.Builder(model.core, ids, **options), 0, len(ids), progress
    )
    figures = Figures(len(ids), 0, 0, time.perf_counter() - begin)
    layout = Layout(len(ids), len(prefix), core.plan["interval"], text, offsets)
    return State(core, layout, figures).prepared(model), chosen


def extended(
    model: Model, old: State, text_or_ids: str | Ids, progress: Progress
) -> State:
    """The state of the longer text; `old` is not changed. See `Cache.extend`."""
    if isinstance(text_or_ids, str) and old.layout.text is not None:
        ids, keep, layout = _longer_text(model, old, text_or_ids)
    elif old.layout.text is not None:
        raise TypeError("extend: the cache holds a text, expected str")
    else:
        more = model.encode("extend", text_or_ids)
        ids, keep = np.concatenate([old.core.ids, more]), old.layout.n
        layout = replace(old.layout, n=len(ids))
    if len(ids) == keep == old.layout.n:  # the addition made no token
        return replace(old, layout=layout)
    model.core.engine.reset_peak()
    begin = time.perf_counter()
    core = _freeze(
        lambda: _core.Builder(model.core, ids[keep:], base=old.core, keep=keep),
        keep,
        len(ids),
        progress,
    )
    seconds = time.perf_counter() - begin
    figures = Figures(len(ids) - keep, keep, old.layout.n - keep, seconds)
    return State(core, layout, figures).prepared(model)


def _longer_text(model: Model, old: State, more: str) -> tuple[np.ndarray, int, Layout]:
    """(ids of the longer text, how many of the old ones stay, its layout)."""
    layout, core = old.layout, old.core
    text = layout.text + check_text("extend", more)
    own, offsets = _encode_text(model, text)
    ids = np.concatenate([core.ids[: layout.prefix], own])
    keep = _common(core.ids, ids)
    if keep < core.closed_tokens or (keep == len(ids) and keep < layout.n):
        tail, places = _encode_text(model, more)
        shift = np.asarray(places, dtype=offsets.dtype) + len(layout.text)
        ids, keep = np.concatenate([core.ids, tail]), layout.n
        offsets = np.concatenate([layout.offsets.astype(offsets.dtype), shift])
    return ids, keep, replace(layout, n=len(ids), text=text, offsets=offsets)
