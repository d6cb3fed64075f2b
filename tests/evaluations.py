"""Small evaluations on the tiny model: rows as LongBench publishes them, settings; and
what rows become as documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import toy

from acre.eval.records import Document
from acre.eval.tasks import TASKS as KNOWN

TASK = "multifieldqa_en"
SETTINGS: dict[str, Any] = {
    "interval": 8, "window": 128, "stride": 128, "eta": 64, "passage": 16,
}  # fmt: skip
W_MAX = 2048


def row(text: int, question: int) -> dict[str, Any]:
    """A row of LongBench; rows of the same `text` share it."""
    return {
        "input": f"who wrote the ledger {question}?",
        "context": toy.sentence(text, 100),
        "answers": ["a keeper", f"grey gull {question}"],
        "length": 400,
        "dataset": TASK,
        "language": "en",
        "all_classes": None,
        "_id": f"{text}.{question}",
    }


def rows(texts: int = 3, questions: int = 2) -> list[dict[str, Any]]:
    """The texts' questions, interleaved as files are not always sorted."""
    return [row(text, q) for q in range(questions) for text in range(texts)]


def folder(path: Path, texts: int = 3, questions: int = 2) -> Path:
    """A folder with the task's JSONL and, below it, the model; returns it."""
    path.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one) for one in rows(texts, questions)]
    (path / f"{TASK}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    toy.directory(path / "model")
    config = toy.hf_config(w_max=W_MAX)
    (path / "model" / "config.json").write_text(json.dumps(config))
    return path


def only(name: str, row: dict, line: int = 7) -> Document:
    [document] = KNOWN[name].parse(row, line)
    return document


def joined(document: Document, i: int = 0) -> str:
    return document.instruction + document.text + document.questions[i].prompt
