"""One answer as a page: its passages, lit up in the text that they come from.

Takes an `Answer`, and the question that it answers; gives one HTML file for a browser.
One idea: the page is data in a frame that can do nothing: the template escapes every
value, and a Content-Security-Policy lets run only the style and the script in it, so a
text may hold anything and nothing is ever fetched. Stretches that were not refilled are
folded, so megabytes open at once. Refuses what is no Answer.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from acre.report import Answer, Span, bytes_text, excerpt, merged, runs

LEVELS = 5
BEST = 12  # rows of the table that are open
EDGE = 280  # characters that stay beside a passage when a stretch is folded
EXCERPT = 120

# Controls but tab and newline; marks that turn the direction of what follows; halves
# of surrogate pairs, which UTF-8 cannot hold.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


# -------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Mark:
    """A refilled group: its colour, what is known of it, and its text; `gap` is the
    text between it and the group before."""

    level: int
    note: str
    text: str
    gap: str = ""


@dataclass(frozen=True)
class Passage:
    """Groups that touch. order: in the text, rank: by score, both from 1; score: the
    sum, level: of the best group; start and end: characters, or tokens where there is
    no text; lead: white space before the first word."""

    order: int
    rank: int
    level: int
    score: str
    start: int
    end: int
    place: str
    excerpt: str
    lead: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Stretch:
    """What lies between passages: its two ends, and the folded middle. recent: these
    tokens were seen whole."""

    start: int
    size: str
    head: str
    middle: str
    tail: str
    recent: bool = False


def _picture(found: re.Match[str]) -> str:
    """A character that cannot be seen, written out."""
    code = ord(found[0])
    return chr(0x2400 + code) if code < 32 else f"[U+{code:04X}]"


def one_newline(text: str) -> str:
    """Lines ended by newlines alone, every character at its place: a group may end
    between the two characters of an end of line."""
    return text.replace("\r\n", " \n").replace("\r", "\n")


def visible(text: str) -> str:
    """The text with unseen controls written out."""
    return UNSEEN.sub(_picture, one_newline(text))


def folded(text: str) -> tuple[str, str, str]:
    """(head, middle, tail), cut at white space; a short text is all head."""
    size = len(text)
    if size < 4 * EDGE:
        return text, "", ""
    first, last = text[:EDGE], text[size - EDGE :]
    left = re.search(r"\s\S*\Z", first)
    right = re.search(r"\s", last)
    start = left.start() + 1 if left else EDGE
    end = size - EDGE + (right.end() if right else 0)
    return text[:start], text[start:end], text[end:]


def number(value: float) -> str:
    """A score in three digits."""
    return f"{value:#.3g}".rstrip(".") if math.isfinite(value) else "no score"


class Scale:
    """Scores to levels 1 ... LEVELS in equal steps from the least refilled group to the
    best; 0 where there is no score."""

    def __init__(self, scores: Sequence[float]) -> None:
        known = [score for score in scores if math.isfinite(score)]
        self.low, self.high = (min(known), max(known)) if known else (0.0, 0.0)
        self.known = bool(known)

    def level(self, score: float) -> int:
        """The colour of a group."""
        if not math.isfinite(score):
            return 0
        if self.high <= self.low:
            return LEVELS
        part = (score - self.low) / (self.high - self.low)
        return min(int(part * LEVELS) + 1, LEVELS)

    def legend(self) -> list[tuple[int, str]]:
        """(level, the scores from which on it is used), the best last."""
        if not self.known:
            return [(0, "no score: chosen by hand")]
        if self.high <= self.low:
            return [(LEVELS, number(self.low))]
        edges = np.linspace(self.low, self.high, LEVELS + 1)[:-1]
        return [(level, f"{number(edge)}+") for level, edge in enumerate(edges, 1)]


# ----------------------------------------------------------------------------- the text


class View:
    """The pieces of an answer's text in order, in characters or in tokens."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.source = None if answer.source is None else one_newline(answer.source)
        self.unit = "tokens" if self.source is None else "characters"
        self.scale = Scale([span.score for span in answer.spans])
        self.runs = runs(answer.spans)
        self.layers = _layer_counts(answer.groups)
        key = "recent_token" if self.source is None else "recent_char"
        self.recent: int | None = answer.settings.get(key)

    @functools.cached_property
    def total(self) -> int:
        """Length of the text in its unit."""
        if self.source is not None:
            return max(len(self.source), 1)
        ends = [span.token_end for span in self.answer.spans]
        return max([self.answer.stats.tokens_reused, *ends, 1])

    def place(self, span: Span) -> tuple[int, int]:
        """Half-open range of a span in the unit."""
        if self.source is None or span.char_start is None or span.char_end is None:
            return span.token_start, span.token_end
        return span.char_start, span.char_end

    def pieces(self) -> list[Stretch | Passage]:
        """The whole text: passages, and the stretches between them."""
        out: list[Stretch | Passage] = []
        done, ranks = 0, self._ranks()
        for order, run in enumerate(self.runs, start=1):
            out.extend(self._stretches(done, self.place(run[0])[0]))
            passage = self._passage(order, ranks[order - 1], run, done)
            out.append(passage)
            done = passage.end
        out.extend(self._stretches(done, self.total))
        return out

    def _ranks(self) -> list[int]:
        """Rank of each run, from 1: that of `Answer.passages`."""
        wholes = [merged(run, "") for run in self.runs]
        ordered = sorted(
            range(len(wholes)), key=lambda i: -np.nan_to_num(wholes[i].score)
        )
        ranks = {index: rank for rank, index in enumerate(ordered, start=1)}
        return [ranks[index] for index in range(len(wholes))]

    def _passage(
        self, order: int, rank: int, run: Sequence[Span], done: int
    ) -> Passage:
        whole = merged(run, self.source)
        start, end = self.place(whole)
        start = max(start, done)
        first, *others = self._marks(run, start)
        words = first.text.lstrip()
        lead = first.text[: len(first.text) - len(words)]
        marks = [replace(first, text=words), *others]
        text = "".join(mark.gap + mark.text for mark in marks)
        return Passage(
            order,
            rank,
            max(mark.level for mark in marks),
            number(whole.score),
            start,
            max(end, start),
            f"{100 * start / self.total:.1f}%",
            excerpt(text, EXCERPT),
            lead,
            marks,
        )

    def _marks(self, run: Sequence[Span], done: int) -> Iterator[Mark]:
        """Groups of a passage. Where a character is split between two of them, both
        cover it: it is shown once."""
        for span in run:
            level, note = self.scale.level(span.score), self._note(span)
            if self.source is None:
                yield Mark(level, note, visible(span.text) or "(no text)")
                continue
            start, end = self.place(span)
            start, end = max(start, done), max(end, done)
            gap, text = self.source[done:start], self.source[start:end]
            yield Mark(level, note, visible(text), visible(gap))
            done = end

    def _note(self, span: Span) -> str:
        where = f"group {span.group}, tokens {span.token_start} to {span.token_end}"
        note = f"{where}, score {number(span.score)}"
        if self.layers is not None:
            count, layers = self.layers.get(span.group, 0), len(self.answer.groups)
            note += f", chosen by {count} of {layers} layers"
        return note

    def _stretches(self, start: int, end: int) -> Iterator[Stretch]:
        """One stretch, or two where the recent entries begin inside it."""
        if end <= start:
            return
        if self.recent is not None and start < self.recent < end:
            yield self._stretch(start, self.recent)
            start = self.recent
        yield self._stretch(start, end)

    def _stretch(self, start: int, end: int) -> Stretch:
        text = "" if self.source is None else visible(self.source[start:end])
        head, middle, tail = folded(text)
        size = f"{len(middle) or end - start:,} {self.unit}"
        recent = self.recent is not None and start >= self.recent
        return Stretch(start, size, head, middle, tail, recent)


def _layer_counts(groups: np.ndarray) -> dict[int, int] | None:
    """By how many layers each group was chosen; None for a shared choice."""
    if groups.ndim != 2:
        return None
    names, counts = np.unique(groups, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


# -------------------------------------------------------------------------- the figures


def figures(answer: Answer) -> list[tuple[str, str]]:
    """What the answer cost, as (name, value)."""
    stats = answer.stats
    built = f"{stats.tokens_built:,} tokens"
    if stats.tokens_built:
        built += f" in {stats.build_s:.1f} s, {stats.build_tokens_per_s:,.0f} per s"
    tokens = sum(span.token_end - span.token_start for span in answer.spans)
    refilled = f"{tokens:,} tokens in {len(answer.spans):,} groups"
    outside = len(np.unique(answer.groups)) - len(answer.spans)
    if outside:
        refilled += f", and {outside:,} groups of the frame"
    if answer.groups.ndim == 2:
        refilled += f", {stats.groups_refilled:,} groups in each layer"
    kept = (
        ("L1", stats.l1_bytes),
        ("L2 on the host" if stats.l2 == "host" else "L2", stats.l2_bytes),
        ("recent", stats.recent_bytes),
    )
    return [
        ("Built", built),
        ("Reused", f"{stats.tokens_reused:,} tokens"),
        ("Recomputed", f"{stats.tokens_recomputed:,} tokens"),
        ("Refilled", refilled),
        ("Question", f"{stats.prompt_tokens:,} tokens with its frame"),
        ("Scoring", f"{stats.score_ms:.0f} ms"),
        ("Refilling", f"{stats.refill_ms:.0f} ms"),
        ("First token", f"{stats.time_to_first_token_ms:.0f} ms"),
        (
            "Answer",
            f"{stats.new_tokens:,} tokens, {stats.decode_tokens_per_s:.0f} per s",
        ),
        ("Cache", ", ".join(f"{name} {bytes_text(size)}" for name, size in kept)),
        ("Peak memory", bytes_text(stats.peak_bytes)),
    ]


def settings(answer: Answer) -> list[tuple[str, str]]:
    """How it was asked, as (name, value)."""
    given = {**answer.settings, "finish_reason": answer.finish_reason}
    return [
        (visible(str(name)).replace("_", " "), _setting(value))
        for name, value in given.items()
    ]


def _setting(value: Any) -> str:
    if value is None or value == () or value == []:
        return "none"
    return visible(f"{value:,}" if isinstance(value, int) else str(value))


# ----------------------------------------------------------------------------- the page


def _file(name: str) -> str:
    return resources.files("acre").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    """The source expression that lets run this text and no other."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@functools.cache
def _frame() -> tuple[jinja2.Template, dict[str, str]]:
    """The template, and what is the same for every page."""
    style, script = _file("page.css"), _file("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    template = environment.from_string(_file("page.html"))
    return template, {"style": style, "script": script, "policy": policy}


def answer_page(answer: Answer, question: str = "", title: str | None = None) -> str:
    """A whole HTML document, to be written as UTF-8.

    question: as it was asked, shown beside the answer. title: of the page; None = the
    question. Without the text (token ids were given to `build`) only the passages are
    shown. TypeError for other types.
    """
    if not isinstance(answer, Answer):
        raise TypeError(f"answer: got {type(answer).__name__}, expected acre.Answer")
    for name, value in (("question", question), ("title", title or "")):
        if not isinstance(value, str):
            raise TypeError(f"{name}: got {type(value).__name__}, expected str")
    view = View(answer)
    pieces = view.pieces()
    passages = [piece for piece in pieces if isinstance(piece, Passage)]
    best = sorted(passages, key=lambda passage: passage.rank)
    template, constant = _frame()
    return template.render(
        constant,
        title=visible(title or question or "What the answer rests on"),
        question=visible(question),
        answer=visible(answer.text) or " ".join(map(str, answer.ids.tolist())),
        cut=answer.finish_reason == "length",
        view=view,
        pieces=pieces,
        passages=passages,
        tables=[table for table in (best[:BEST], best[BEST:]) if table],
        figures=figures(answer),
        settings=settings(answer),
    )


def save(
    path: str | os.PathLike[str],
    answer: Answer,
    question: str = "",
    title: str | None = None,
) -> None:
    """Writes `answer_page` to a file. OSError."""
    page = answer_page(answer, question, title)
    Path(path).write_text(page, encoding="utf-8", newline="\n")
