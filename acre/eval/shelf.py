"""What an evaluation has read of the document at hand.

Takes a model; gives frames, token ranges, prompts that fit, and caches. One idea: the
methods come to one document one after the other, and those that read it in the same way
find the cache that the first of them built. At most one cache is held. Refuses
documents whose question leaves no room for a text.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from acre.cache import Cache
from acre.chat import Frame
from acre.eval.excerpt import Excerpt, middle_cut
from acre.eval.records import Document, Question
from acre.model import Model

PROMPT_SHARE = 4  # a question may take up to 1/PROMPT_SHARE of the positions


def default_reserve(w_max: int) -> int:
    """The core's own reserve for question and answer."""
    return min(4096, w_max // 8)


@dataclass(frozen=True)
class Asked:
    """A question as it is asked: framed length in tokens, cut where it was too long."""

    question: Question
    prompt: str
    query: str | None
    tokens: int
    cut: bool


@dataclass
class Held:
    """A cache on the shelf, what made it, and what making it cost."""

    key: tuple[Any, ...]
    cache: Cache
    build_s: float
    peak_bytes: int


class Shelf:
    """One model's view of one document after the other. One owner."""

    def __init__(self, model: Model) -> None:
        if model.tokenizer is None:
            raise ValueError("model: has no tokenizer, evaluation needs one")
        self.model = model
        self._held: Held | None = None
        self._encoded: tuple[str, np.ndarray] | None = None

    @property
    def w_max(self) -> int:
        return self.model.config["w_max"]

    def frame(self, document: Document) -> Frame:
        """The benchmark's prompt to the letter: in the model's chat turns, or plain."""
        return _frame(self.model.tokenizer, document.instruction, document.chat)

    def offsets(self, document: Document) -> np.ndarray:
        """Character range of each token of the document's text, [n, 2]."""
        if self._encoded is None or self._encoded[0] != document.id:
            offsets = self.model.tokenizer.encode_offsets(document.text)[1]
            self._encoded = (document.id, offsets)
        return self._encoded[1]

    def asked(self, document: Document, question: Question) -> Asked:
        """The question within its share of the positions; a longer one loses its
        middle, as LongBench does with prompts."""
        frame, prompt = self.frame(document), question.prompt
        limit = self.w_max // PROMPT_SHARE
        count = len(frame.question_ids(prompt)[0])
        cut = count > limit
        if cut:
            offsets = self.model.tokenizer.encode_offsets(prompt)[1]
            keep = max(1, len(offsets) - (count - limit) - 8)
            prompt = middle_cut(prompt, offsets, keep).text
            count = len(frame.question_ids(prompt)[0])
        query = question.query if question.query and question.query in prompt else None
        return Asked(question, prompt, query, count, cut)

    def room(self, document: Document) -> int:
        """Positions that the longest question with its answer takes."""
        return max(
            (
                self.asked(document, question).tokens + question.max_new_tokens
                for question in document.questions
                if question.prompt  # none where only perplexity is measured
            ),
            default=default_reserve(self.w_max),
        )

    def read(self, document: Document, excerpt: Excerpt, **options: Any) -> Held:
        """The cache of an excerpt, built now or found on the shelf."""
        key = (document.id, excerpt.ranges, excerpt.joint, *sorted(options.items()))
        if self._held is not None and self._held.key == key:
            return self._held
        self.clear()
        start = time.perf_counter()
        cache = self.model.build(
            excerpt.text, frame=self.frame(document), progress=False, **options
        )
        seconds = time.perf_counter() - start
        peak = self.model.core.engine.peak_bytes
        self._held = Held(key, cache, seconds, peak)
        return self._held

    def full(self, document: Document, excerpt: Excerpt, room: int) -> Held:
        """An excerpt read with full attention: all of it is one open window."""
        return self.read(
            document, excerpt, window=self.w_max + 1, stride=self.w_max, interval=1,
            eta=0, reserve=room, proxy="pooled",
        )  # fmt: skip

    def clear(self) -> None:
        """Lets go of the cache."""
        self._held = None


@functools.lru_cache(maxsize=64)
def _frame(tokenizer: Any, instruction: str, chat: bool) -> Frame:
    if chat and tokenizer.chat_template:
        return Frame(tokenizer, instruction=instruction, joint="")
    return Frame(tokenizer, template="", plain=(instruction, "", ""))
