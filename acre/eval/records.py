"""What is evaluated: documents with their questions, and the samples that come of them.

Takes nothing; gives the records that readers, methods, metrics and reports share. One
idea: a document is read once, so the questions that share a text lie in one record.
Everything is plain values, so a record crosses processes and machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Range = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """One question about a text, as its benchmark words it.

    id: unique within the task. prompt: all that follows the text. query: the bare
    question inside `prompt`, which scores groups and searches passages; "" = the whole
    prompt. answers: the references. max_new_tokens: the benchmark's length of an
    answer. stop: strings that end it. evidence: half-open ranges of characters of the
    text in which the answer lies; empty = not known. facts: what the metric needs
    besides (classes, options), JSON values. buckets: names under which the score is
    also reported, as {"length": "0-4k"}.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    query: str = ""
    stop: tuple[str, ...] = ()
    evidence: tuple[Range, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    buckets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A text and the questions asked of it.

    instruction: what precedes the text in the benchmark's prompt. chat: False = the
    benchmark's authors use no chat template here (few-shot examples, code).
    """

    task: str
    text: str
    questions: tuple[Question, ...]
    instruction: str = ""
    chat: bool = True

    @property
    def id(self) -> str:
        """A digest of what is read: instruction, text and template."""
        parts = (self.instruction, self.text, str(self.chat))
        digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class BadRecord:
    """A line of a data file that cannot be used, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def grouped(documents: Iterable[Document]) -> list[Document]:
    """Documents of the same task and text as one, in the order of their first one."""
    merged: dict[tuple[str, str], list[Document]] = {}
    for document in documents:
        merged.setdefault((document.task, document.id), []).append(document)
    return [
        Document(
            same[0].task,
            same[0].text,
            tuple(question for one in same for question in one.questions),
            same[0].instruction,
            same[0].chat,
        )
        for same in merged.values()
    ]
