"""What tests of training data share: rows, files, and examples as text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import toy

import acre
from acre.training.forms import Record

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
    arrays = (example.ids, example.tail, example.weights, example.evidence)
    shown = [None if a is None else (str(a.dtype), a.tolist()) for a in arrays]
    return (*shown, example.query, example.intervals, example.window)


def decoded(model, ids) -> str:
    return model.tokenizer.decode(ids, skip_special=False)


class Told(list):
    """What `skip` was told, reasons only."""

    def __call__(self, reason: str, detail: str) -> None:
        self.append(reason)


def no_skip(reason: str, detail: str) -> None:
    raise AssertionError(f"{reason}: {detail}")


RECORD = Record(
    PROSE,
    "Answer briefly. When did 91 boats come?",
    "In the year 1730",
    ((PROSE.index(" In the year 1730"), PROSE.index(" In the year 1731")),),
    "When did 91 boats come?",
)


def check_question(model, example, record: Record, whole: bool = True) -> None:
    """Every part of an example, by the text of its tokens."""
    frame = acre.Frame(model.tokenizer)
    n, p = len(example.ids), len(frame.prefix_ids)
    assert example.ids.dtype == example.tail.dtype == np.int32
    assert np.array_equal(example.ids[:p], frame.prefix_ids)
    own = decoded(model, example.ids[p:])
    assert own == record.context if whole else own.strip("\ufffd") in record.context
    assert example.weights.dtype == np.float32
    assert len(example.weights) == n + len(example.tail)
    assert set(example.weights.tolist()) == {0.0, 1.0}
    learned = np.flatnonzero(example.weights) - n
    assert learned[0] >= 0 and learned[-1] == len(example.tail) - 1
    assert len(learned) == learned[-1] - learned[0] + 1
    *answer, end = example.tail[learned]
    assert decoded(model, answer).strip() == record.answer and end in model.eos_ids
    asked, first, last = frame.question_ids(record.question, record.query or None)
    assert np.array_equal(example.tail[: learned[0]], asked)
    assert example.query == (first, last)
    scored = decoded(model, example.tail[first:last]).strip()
    assert scored == (record.query or record.question).strip()
    if not record.evidence:
        assert example.evidence is None
        return
    assert example.evidence.dtype == np.uint8 and len(example.evidence) == n
    marked = np.flatnonzero(example.evidence)
    parts = np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1)
    shown = [decoded(model, example.ids[part]).strip() for part in parts]
    assert shown == [record.context[a:b].strip() for a, b in record.evidence]
