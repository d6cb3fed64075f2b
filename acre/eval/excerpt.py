"""Parts of a text: what is left of it after truncation or retrieval.

Takes a text, the character ranges of its tokens and a number of tokens; gives an
`Excerpt`, whose text a model reads in place of the whole and which knows where every
character of it came from. One idea: all shortening is a list of character ranges, so
recall of evidence is counted in one way for every method. Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from acre.eval.records import Range


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The union of half-open ranges, in order, without empty ones."""
    out: list[Range] = []
    for start, end in sorted(r for r in ranges if r[1] > r[0]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def overlap(a: Sequence[Range], b: Sequence[Range]) -> int:
    """Characters that lie in both unions."""
    total = 0
    for start, end in merged(a):
        for first, last in merged(b):
            total += max(0, min(end, last) - max(start, first))
    return total


def recall(evidence: Sequence[Range], kept: Sequence[Range]) -> float:
    """Share of the evidence's characters that `kept` holds, in [0, 1]."""
    wanted = sum(end - start for start, end in merged(evidence))
    return overlap(evidence, kept) / wanted if wanted else float("nan")


@dataclass(frozen=True)
class Excerpt:
    """Ranges of a text in text order, written one behind the other.

    source: the whole text. ranges: half-open, ascending, not empty. joint: what stands
    between ranges that are not adjacent.
    """

    source: str
    ranges: tuple[Range, ...]
    joint: str = ""

    @classmethod
    def whole(cls, source: str) -> Excerpt:
        """All of it."""
        return cls(source, ((0, len(source)),))

    @property
    def text(self) -> str:
        """What a model reads."""
        return self.joint.join(self.source[a:b] for a, b in self.ranges)

    @property
    def complete(self) -> bool:
        """Nothing is left out."""
        return self.ranges == ((0, len(self.source)),)

    def original(self, ranges: Iterable[Range]) -> list[Range]:
        """Ranges of `text` as ranges of the source."""
        out, at = [], 0
        pieces = []
        for start, end in self.ranges:
            pieces.append((at, at + end - start, start - at))
            at += end - start + len(self.joint)
        for first, last in merged(ranges):
            for start, end, shift in pieces:
                a, b = max(first, start), min(last, end)
                if a < b:
                    out.append((a + shift, b + shift))
        return merged(out)


def ends(source: str, offsets: np.ndarray, first: int, last: int) -> Excerpt:
    """The first and the last tokens of a text; all of it where they meet.

    offsets: [n, 2] character ranges per token. The halves follow one another with
    nothing between, as LongBench cuts over-long prompts.
    """
    n = len(offsets)
    if first + last >= n:
        return Excerpt.whole(source)
    ranges = []
    if first:
        ranges.append((0, int(offsets[first - 1, 1])))
    if last:
        ranges.append((int(offsets[n - last, 0]), len(source)))
    return Excerpt(source, tuple(merged(ranges)))


def middle_cut(source: str, offsets: np.ndarray, tokens: int) -> Excerpt:
    """At most about `tokens` tokens: the middle is left out."""
    half = tokens // 2
    return ends(source, offsets, tokens - half, half)
