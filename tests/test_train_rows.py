"""Rows of training data: every form, every kind of bad line."""

from __future__ import annotations

import gzip
import logging
import lzma
import re

import pytest
from training import (
    SIZES,
    nq,
    record,
    texts,
    write,
)

from acre.training.files import SHOWN, Skipped, find_files, items
from acre.training.forms import parse
from acre.training.stream import Stream

# -------------------------------------------------------------------------------- forms


def test_text_rows():
    assert parse({"text": "words"}) == ["words"]
    assert parse({"author": "A", "title": "T", "text": "a book"}) == ["a book"]


@pytest.mark.parametrize(
    ("role", "words", "user", "other"),
    [("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")],
)
def test_conversations(role, words, user, other):
    def talk(*said):
        names = [user, other] * 3
        turns = [{role: n, words: w} for n, w in zip(names, said, strict=False)]
        return parse({"conversations": [{role: "system", words: "be good"}, *turns]})

    assert talk("text", "I read it", "q?", "a") == [record("text", "q?", "a")]
    assert talk("long\n\ntext\n\nq?", "a") == [record("long\n\ntext", "q?", "a")]
    assert talk("text\nq?", "a") == [record("text", "q?", "a")]
    assert talk("t", "x", "q1", "a1", "q2", "a2") == [
        record("t\n\nx\n\nq1\n\na1", "q2", "a2")
    ]
    assert talk("text", "I read it", "q?", "a", "thanks")[0].questions[0].answer == "a"


def test_question_rows():
    row = {"context": "The cat is red.", "question": "q?", "answer": "red"}
    assert parse(row) == [record("The cat is red.", "q?", "red", extractive=True)]
    made = parse(row | {"evidence": [[4, 7], "is red"], "extractive": False})[0]
    assert made.questions[0].evidence == ((4, 7), (8, 14)) and not made.extractive
    row = {"passages": ["one", {"title": "T", "text": "two"}], "question": "q?"}
    made = parse(row | {"answers": ["three", "two"]})[0]
    assert made.context == "one\n\nT\ntwo" and made.questions[0].answer == "two"


def test_gold_passages_and_meetings():
    made = parse(nq(3))[0]
    [(start, end)] = made.questions[0].evidence
    assert made.context[start:end] == nq(3)["passage"] and made.extractive
    turns = ["A: one", "B: two", "C: three"]
    asked = [
        {"query": "q1", "answer": "a1", "evidence_turns": [["1", "2"]]},
        {"query": "q2", "answer": "a2", "evidence_turns": []},
    ]
    [made] = parse({"turns": turns, "queries": asked})
    first, second = made.questions
    assert [made.context[a:b] for a, b in first.evidence] == ["B: two\nC: three"]
    assert (second.text, second.answer, second.evidence) == ("q2", "a2", ())


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([1], "expected an object"),
        ({"words": "x"}, "these fields: words"),
        ({"text": " "}, "text: empty"),
        ({"text": 3}, "text: expected text, got int"),
        ({"text": "\ud800"}, "surrogate"),
        ({"conversations": "x"}, "expected a list"),
        ({"conversations": [{"role": "cook", "content": "x"}]}, "role is 'cook'"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "expected an answer"),
        ({"question": "q", "context": "c"}, "answers: expected"),
        ({"question": "q", "context": "c", "answers": []}, "answers: none"),
        ({"question": None, "context": "c", "answer": "c"}, "question: expected text"),
        (
            {"question": "q", "context": "c", "answer": "c", "evidence": [[0, 2]]},
            "within 1 characters",
        ),
        (
            {"question": "q", "context": "c", "answer": "c", "evidence": ["d"]},
            "'d' does not occur",
        ),
        (
            {"question": "q", "context": "c", "answer": "c", "evidence": 1},
            "evidence: expected a list",
        ),
    ],
)
def test_rows_that_cannot_be_used(row, told):
    with pytest.raises((ValueError, TypeError), match=re.escape(told)):
        parse(row)


# -------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("end", "pack"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)]
)
def test_broken_lines_are_named_skipped_and_counted(tmp_path, caplog, end, pack):
    rows = [{"text": "one"}, b'{"text": "tw', {"x": 1}, b"", {"text": "two"}]
    path = write(tmp_path / f"a.jsonl{end}", rows, pack)
    skipped = Skipped()
    with caplog.at_level(logging.WARNING, "acre.training"):
        found = list(items(path, skipped))
    assert found == [(1, 0, "one"), (5, 0, "two")]
    assert skipped.counts == {"unusable row": 2}
    assert f"{path}:2: unusable row: not JSON" in caplog.text
    assert f"{path}:3: unusable row: no form" in caplog.text
    assert list(items(path, Skipped(), 5)) == found[1:]


def test_a_truncated_archive_gives_what_it_has(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", texts(50), gzip.compress)
    path.write_bytes(path.read_bytes()[:-100])
    skipped = Skipped(quiet=True)
    assert 0 < len(list(items(path, skipped))) < 50
    assert skipped.counts == {"unusable row": 1}


def test_warnings_end_and_counts_go_on(caplog):
    skipped = Skipped()
    for i in range(3 * SHOWN):
        skipped.add("bad", f"f:{i}")
    assert skipped.counts["bad"] == 3 * SHOWN and len(caplog.records) == SHOWN
    assert "only counted" in caplog.records[-1].message


def test_folders_and_lists_of_files(tmp_path, wide):
    (tmp_path / "d").mkdir()
    b = write(tmp_path / "d" / "b.jsonl", texts(1))
    a = write(tmp_path / "d" / "a.jsonl.xz", texts(1), lzma.compress)
    (tmp_path / "d" / "notes.md").write_text("no data")
    assert find_files(tmp_path) == [a, b] and find_files([b, a]) == [b, a]
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        find_files(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no file"):
        find_files(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="builders are excerpts"):
        Stream(wide, "hiden:x.jsonl", **SIZES)


def test_a_file_without_a_usable_row_is_an_error(tmp_path, wide):
    good = write(tmp_path / "a.jsonl", texts(1))
    bad = write(tmp_path / "b.jsonl", [{"x": 1}])
    told = re.escape(f"{bad}: no usable row; the first: {bad}:1: no form")
    with pytest.raises(ValueError, match=told):
        Stream(wide, f"{good},{bad}", **SIZES)
    short = write(tmp_path / "c.jsonl", [{"text": "a few words"}])
    with pytest.raises(ValueError, match="no row gives an example .1 shorter"):
        next(Stream(wide, str(short), passes=None, **SIZES))
