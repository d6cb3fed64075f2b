"""Words, their overlap, and ROUGE: what several benchmarks count with.

Takes two texts; gives words or a share in [0, 1]. One idea: one place for what the
benchmarks took from each other (SQuAD's normalisation, LongBench's Chinese one).
"""

from __future__ import annotations

import functools
import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from acre.optional import needs

_FULL_WIDTH = "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
_CHINESE = "！？｡。〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
_NO_ASCII_MARKS = str.maketrans("", "", string.punctuation)
_NO_MARKS = str.maketrans("", "", string.punctuation + _FULL_WIDTH + _CHINESE)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def plain(text: str) -> str:
    """The text without ASCII punctuation, the articles a, an, the and double spaces.

    The case is kept, so an article is one only in small letters.
    """
    return " ".join(_ARTICLE.sub(" ", text.translate(_NO_ASCII_MARKS)).split())


def words(text: str) -> list[str]:
    """The words that SQuAD compares: small letters, no punctuation, no articles."""
    return plain(text.lower()).split()


def characters(text: str) -> list[str]:
    """The characters that LongBench compares in Chinese: no punctuation, no space."""
    return list("".join(text.lower().translate(_NO_MARKS).split()))


def chinese_words(text: str) -> list[str]:
    """The words that jieba finds, less what `characters` leaves out."""
    found = ("".join(characters(word)) for word in segments(text))
    return [word for word in found if word]


def segments(text: str) -> list[str]:
    """The text cut by jieba; joined, they are the text."""
    return list(_jieba().cut(text, cut_all=False))


def f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of a bag of words; 0 without overlap.

    A word n times in the one and m times in the other is shared min(n, m) times.
    """
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answer: str) -> float:
    """F1 over `words`: LongBench, InfiniteBench, L-Eval, UltraDomain."""
    return f1(words(prediction), words(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F1 at summary level by the package `rouge`, as LongBench.

    Sentences end at full stops and words at spaces; each distinct word counts once, and
    a perfect match scores 1 - 5e-9. 0 for a text of full stops only, and for sentences
    so long (about 1,000 words of both together) that the package's recursion fails.
    """
    scorer = needs("rouge", "eval").Rouge(metrics=["rouge-l"])
    # A thread's stack starts empty: scores do not depend on how deep the caller is.
    with ThreadPoolExecutor(1) as pool:
        try:
            found = pool.submit(scorer.get_scores, prediction, answer).result()
        except (ValueError, RecursionError):
            return 0.0
    return float(found[0]["rouge-l"]["f"])


def rouge_score(kind: str, prediction: str, answer: str) -> float:
    """F1 of "rougeL" or "rougeLsum" by the package `rouge_score`, without stemming.

    Words are runs of a-z and 0-9, so other scripts score 0. rougeLsum takes lines for
    sentences.
    """
    return float(_rouge_scorer(kind).score(answer, prediction)[kind].fmeasure)


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    return needs("rouge_score.rouge_scorer", "eval").RougeScorer(
        [kind], use_stemmer=False
    )


@functools.cache
def _jieba() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports are deprecated
        jieba = needs("jieba", "eval")
    jieba.setLogLevel(logging.WARNING)  # it tells stderr that it loads its words
    return jieba
