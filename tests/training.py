"""What tests of training data share: rows, files, and examples as text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import toy

import acre
from acre.training.forms import Question, Record

SIZES = {"length": (150, 260), "window": 64, "stride": 32}
PROSE = " ".join(
    f"In the year {1700 + i} the keeper of the harbour wrote down {i} ships and "
    f"{3 * i + 1} boats that came in before the evening bell."
    for i in range(60)
)
needs_data = pytest.mark.skipif(
    not os.environ.get("ACRE_DATA"), reason="ACRE_DATA names no folder"
)


def write(path: Path, rows: list, pack=bytes) -> Path:
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(pack(b"".join(line + b"\n" for line in lines)))
    return path


def nq(i: int) -> dict:
    told = f"The {i}th lamp of the pier was lit by {toy.WORDS[i % 7]}{i} each night."
    return {
        "question": f"who lit lamp {i}?",
        "answers": [f"{toy.WORDS[i % 7]}{i}"],
        "title": f"Lamp {i}",
        "passage": told,
    }


def texts(count: int, words: int = 150) -> list[dict]:
    return [{"text": toy.sentence(i, words)} for i in range(count)]


def plain(example) -> tuple:
    """An example as values that compare."""
    arrays = [example.ids, example.weights]
    for q in example.questions:
        arrays += [q.ids, q.weights, q.evidence]
    shown = [None if a is None else (str(a.dtype), a.tolist()) for a in arrays]
    queries = [q.query for q in example.questions]
    return (*shown, queries, example.intervals, example.window)


def decoded(model, ids) -> str:
    return model.tokenizer.decode(ids, skip_special=False)


class Told(list):
    """What `skip` was told, reasons only."""

    def __call__(self, reason: str, detail: str) -> None:
        self.append(reason)


def no_skip(reason: str, detail: str) -> None:
    raise AssertionError(f"{reason}: {detail}")


ASKED = Question(
    "Answer briefly. When did 91 boats come?",
    "In the year 1730",
    ((PROSE.index(" In the year 1730"), PROSE.index(" In the year 1731")),),
    "When did 91 boats come?",
)
RECORD = Record(PROSE, (ASKED,))


def record(context: str, *question, extractive: bool = False) -> Record:
    """A record of one question."""
    return Record(context, (Question(*question),), extractive)


def check_questions(model, example, record: Record, whole: bool = True) -> None:
    """Every part of an example that asks all its record's questions, by the text of its
    tokens."""
    frame = acre.Frame(model.tokenizer)
    p = len(frame.prefix_ids)
    assert example.ids.dtype == np.int32
    assert np.array_equal(example.ids[:p], frame.prefix_ids)
    own = decoded(model, example.ids[p:])
    assert own == record.context if whole else own.strip("\ufffd") in record.context
    assert example.weights.dtype == np.float32
    assert example.weights.tolist() == [0.0] * len(example.ids)
    assert len(example.questions) == len(record.questions)
    for asked, question in zip(example.questions, record.questions, strict=True):
        check_asked(model, frame, asked, question)
        check_evidence(model, example.ids, asked, question, record.context)


def check_asked(model, frame, asked, question: Question) -> None:
    """A framed question: what is sent, what is learned, what scores."""
    assert asked.ids.dtype == np.int32 and asked.weights.dtype == np.float32
    assert set(asked.weights.tolist()) == {0.0, 1.0}
    learned = np.flatnonzero(asked.weights)
    assert len(asked.weights) == len(asked.ids) == learned[-1] + 1
    assert len(learned) == learned[-1] - learned[0] + 1
    *answer, end = asked.ids[learned]
    assert decoded(model, answer).strip() == question.answer and end in model.eos_ids
    sent, first, last = frame.question_ids(question.text, question.query or None)
    assert np.array_equal(asked.ids[: learned[0]], sent)
    assert asked.query == (first, last)
    scored = decoded(model, asked.ids[first:last]).strip()
    assert scored == (question.query or question.text).strip()


def check_evidence(model, ids, asked, question: Question, context: str) -> None:
    """The flags mark the words of the ranges, nothing else."""
    if not question.evidence:
        assert asked.evidence is None
        return
    assert asked.evidence.dtype == np.uint8 and len(asked.evidence) == len(ids)
    marked = np.flatnonzero(asked.evidence)
    parts = np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1)
    shown = [decoded(model, ids[part]).strip() for part in parts]
    assert shown == [context[a:b].strip() for a, b in question.evidence]
