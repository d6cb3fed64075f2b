"""What an answer tells about itself: the text, the passages it was given, the figures.

Takes the refilled groups of a question, the text's character offsets and the timings;
gives `Answer`, `Span` and `Stats`. One idea: every group maps back to the text that was
given to `build`, so that a reader can check an answer against its passages. Refuses
nothing: all values come checked from the cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Span:
    """One refilled group, in the text given to `build`.

    token_start, token_end: half-open range of the text's own tokens (no frame tokens).
    char_start, char_end: half-open range of characters; None when token ids were given.
    score: the group's score, nan when the groups were chosen by the caller.
    text: the characters (decoded tokens when ids were given).
    group: index j of the group over the whole context, frame tokens included.
    """

    token_start: int
    token_end: int
    char_start: int | None
    char_end: int | None
    score: float
    text: str
    group: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Stats:
    """Where the tokens, the time and the bytes of an answer (or a build) went.

    tokens_built: context tokens processed by the last build or extension (0 if loaded).
    tokens_reused: context tokens taken from the cache as they lay there.
    tokens_recomputed: context tokens processed again although they had been before.
    build_s, build_tokens_per_s: of that build or extension.
    score_ms, refill_ms: first query pass with scoring; splicing the chosen groups.
    time_to_first_token_ms: from the call to the choice of the first token.
    decode_tokens_per_s: over the tokens after the first one (0 with fewer than two).
    prompt_tokens, new_tokens: question (with its frame), and answer.
    groups_refilled: groups spliced in; with per_layer selection, in each layer.
    peak_bytes: most that the engine held at once since the last build began.
    l1_bytes, l2_bytes, recent_bytes: of the frozen cache.
    l2: where its L2 entries lie: "device", or on the "host" beside it; splicing them
    then goes on while the question is read, behind what refill_ms counts.
    """

    tokens_built: int = 0
    tokens_reused: int = 0
    tokens_recomputed: int = 0
    build_s: float = 0.0
    build_tokens_per_s: float = 0.0
    score_ms: float = 0.0
    refill_ms: float = 0.0
    time_to_first_token_ms: float = 0.0
    decode_tokens_per_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    groups_refilled: int = 0
    peak_bytes: int = 0
    l1_bytes: int = 0
    l2_bytes: int = 0
    recent_bytes: int = 0
    l2: str = "device"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """An answer and what it rests on.

    text: the answer, cut before a stop string; "" when the model has no tokenizer.
    ids: int32 [new_tokens], an end-of-text token included.
    spans: the refilled passages in text order, one per group.
    stats: the figures.
    groups: int32 [k], or [L, k] with per_layer selection.
    scores: float32 [m] or [L, m]; None when nothing had to be scored.
    finish_reason: "eos", "stop" (a stop string) or "length".
    source: the text given to `build`; None when token ids were given.
    settings: how it was asked: model, dtype, proxy, select, eta (None: groups given),
    query (None: all of the question scored), the sampling, the frame tokens before the
    text (prefix), the plan's n, interval, window, stride, m, recent and reserve, and
    recent_token, recent_char: where in the text the recent entries begin, which every
    question sees whole; None where there are none, or no characters.
    """

    text: str
    ids: np.ndarray
    spans: list[Span]
    stats: Stats
    groups: np.ndarray = field(repr=False)
    scores: np.ndarray | None = field(repr=False, default=None)
    finish_reason: str = "length"
    source: str | None = field(repr=False, default=None)
    settings: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def __str__(self) -> str:
        return self.text

    def passages(self, limit: int | None = None) -> list[Span]:
        """Refilled passages: adjacent spans merged, best score first, at most
        `limit`."""
        return passages(self.spans, self.source, limit)

    def to_dict(self) -> dict[str, Any]:
        """All but scores and source, as plain values."""
        return {
            "text": self.text,
            "ids": self.ids.tolist(),
            "spans": [span.to_dict() for span in self.spans],
            "stats": self.stats.to_dict(),
            "groups": self.groups.tolist(),
            "finish_reason": self.finish_reason,
            "settings": dict(self.settings),
        }

    def to_html(self, question: str = "", title: str | None = None) -> str:
        """A page that shows the passages in their text (`acre.page`)."""
        from acre import page

        return page.answer_page(self, question, title)

    def save_html(
        self,
        path: str | os.PathLike[str],
        question: str = "",
        title: str | None = None,
    ) -> None:
        """Writes `to_html` to a file. OSError."""
        from acre import page

        page.save(path, self, question, title)


def bytes_text(count: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def excerpt(text: str, limit: int) -> str:
    """One line of at most about `limit` characters: both ends of a longer text."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    half = limit // 2
    return f"{line[:half]} ... {line[-half:]}"


@dataclass(frozen=True)
class Layout:
    """How tokens of the context lie in the text given to `build`.

    prefix: frame tokens before the text's own. n: context tokens, prefix included.
    interval: l. text: the original characters, None when ids were given.
    offsets: [n - prefix, 2] character ranges per token, None with text None.
    """

    n: int
    prefix: int
    interval: int
    text: str | None
    offsets: np.ndarray | None

    def tokens(self, group: int) -> tuple[int, int]:
        """Half-open range of the text's tokens in a group; empty inside the frame."""
        start = group * self.interval - self.prefix
        return max(start, 0), max(start + self.interval, 0)

    def chars(self, start: int, end: int) -> tuple[int, int] | None:
        """Half-open range of characters of a non-empty range of the text's tokens."""
        if self.offsets is None:
            return None
        return int(self.offsets[start, 0]), int(self.offsets[end - 1, 1])


def spans_of(
    layout: Layout,
    ids: np.ndarray,
    groups: np.ndarray,
    scores: np.ndarray | None,
    decode: Any,
) -> list[Span]:
    """The spans of the refilled groups in text order.

    groups [k] or [L, k]: the union over layers counts. scores [m] or [L, m], summed
    over layers; None gives nan. `decode(ids) -> str` renders a span when there is no
    text. A group that lies wholly in the frame's prefix yields no span, a partial one
    is clipped.
    """
    total = scores.sum(axis=0) if scores is not None and scores.ndim == 2 else scores
    out = []
    for group in np.unique(groups).tolist():
        start, end = layout.tokens(group)
        if end <= start:
            continue
        chars = layout.chars(start, end)
        if chars is not None and layout.text is not None:
            text = layout.text[chars[0] : chars[1]]
        else:
            text = decode(ids[layout.prefix + start : layout.prefix + end])
        first, last = chars or (None, None)
        score = float("nan") if total is None else float(total[group])
        out.append(Span(start, end, first, last, score, text, group))
    return out


def runs(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans in text order, those that touch in one list."""
    out: list[list[Span]] = []
    for span in spans:
        if out and out[-1][-1].token_end == span.token_start:
            out[-1].append(span)
        else:
            out.append([span])
    return out


def merged(run: Sequence[Span], source: str | None) -> Span:
    """One span for a run of adjacent ones; the score is the sum."""
    first, last = run[0], run[-1]
    if source is not None and first.char_start is not None:
        text = source[first.char_start : last.char_end]
    else:
        text = "".join(span.text for span in run)
    return Span(
        first.token_start,
        last.token_end,
        first.char_start,
        last.char_end,
        float(sum(span.score for span in run)),
        text,
        first.group,
    )


def passages(
    spans: Sequence[Span], source: str | None = None, limit: int | None = None
) -> list[Span]:
    """Merges adjacent spans (given in text order); best score first, at most `limit`.

    The text of a merged span is cut from `source`, or joined when there is none.
    """
    found = [merged(run, source) for run in runs(spans)]
    found.sort(key=lambda span: (-np.nan_to_num(span.score), span.token_start))
    return found if limit is None else found[:limit]
