"""From names of tasks to documents that can be asked.

Takes tasks, data, and, for what is generated or cut to a length, a way to count tokens;
gives documents whose questions say how they are judged. One idea: everything that
decides what is asked is settled here, in the driver, so that workers need neither data
nor tables. Refuses what the readers and generators refuse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from acre.eval import perplexity, probes, readers
from acre.eval.records import BadRecord, Document, Question
from acre.eval.tasks import TASKS, Task, find

PREFACE = 20_000  # characters of a book before the text that is measured
Count = Callable[[str], int]


@dataclass(frozen=True)
class Ask:
    """What of the tasks is asked.

    limit: questions per task, None = all. lengths: tokens of generated texts and of
    texts whose perplexity is measured. questions: of a generated text. depths: places
    of a single needle, as shares of the text. texts: generated texts per length.
    """

    limit: int | None = None
    lengths: tuple[int, ...] = (8192,)
    questions: int = 10
    depths: tuple[float, ...] | None = None
    texts: int = 1
    seed: int = 0


@dataclass
class Prepared:
    """Documents, what could not be used, and what the results depend on, by task."""

    documents: list[Document] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def prepare(
    names: Iterable[str], data: readers.Data, ask: Ask, count: Count
) -> Prepared:
    """The documents of all tasks, in order."""
    out = Prepared()
    for task in find(names):
        if task.benchmark == "probe":
            made = _generated(task, ask, count)
            out.documents += made
            out.facts[task.name] = _facts(ask, made)
            continue
        loaded = readers.load(task, data, ask.limit)
        measured = task.metric == perplexity.METRIC
        made = loaded.documents
        if measured:
            made = [d for book in made for d in _cut(book, ask.lengths, count)]
        out.documents += [_judged(document, task) for document in made]
        out.bad += loaded.bad
        lengths = list(ask.lengths) if measured else None
        out.facts[task.name] = {
            "digest": loaded.digest, "limit": ask.limit, "lengths": lengths,
        }  # fmt: skip
    _check_ids(out.documents)
    return out


def _facts(ask: Ask, made: Sequence[Document]) -> dict[str, Any]:
    """What generated documents depend on, and a digest of what came of it."""
    texts = "".join(document.id for document in made).encode()
    return {
        "digest": hashlib.sha256(texts).hexdigest(),
        "lengths": list(ask.lengths), "questions": ask.questions,
        "depths": None if ask.depths is None else list(ask.depths),
        "texts": ask.texts, "seed": ask.seed,
    }  # fmt: skip


def _judged(document: Document, task: Task) -> Document:
    """The document, its questions naming their metric. A collection's documents are
    judged as the task that they name."""
    metric = task.metric or TASKS[document.task].metric
    questions = tuple(
        replace(q, facts={"metric": metric, **q.facts}) for q in document.questions
    )
    return replace(document, questions=questions)


def _generated(task: Task, ask: Ask, count: Count) -> list[Document]:
    """A probe's texts at every length."""
    name, out = task.name.removeprefix("probe_"), []
    for length in ask.lengths:
        for text in range(ask.texts):
            made = probes.generate(
                name, length, count, questions=ask.questions, seed=ask.seed + text,
                depths=ask.depths,
            )  # fmt: skip
            questions = tuple(
                replace(
                    q,
                    id=f"{length}.{ask.seed + text}.{i}",
                    buckets={"length": str(length), **q.buckets},
                )
                for i, q in enumerate(made.questions)
            )
            named = replace(made, task=task.name, questions=questions)
            out.append(_judged(named, task))
    return out


def _cut(book: Document, lengths: Sequence[int], count: Count) -> list[Document]:
    """The book's text from behind its preface, at every length that it has."""
    body, out = book.text[PREFACE:], []
    for length in lengths:
        text = probes.cut_to_tokens(body, length, count)
        if count(text) < 0.98 * length:
            continue
        question = Question(
            f"{book.id}.{length}", "", (), 0, buckets={"length": str(length)}
        )
        out.append(replace(book, text=text, questions=(question,)))
    return out


def _check_ids(documents: Sequence[Document]) -> None:
    """Two questions of one name would overwrite each other's results."""
    seen: set[tuple[str, str]] = set()
    for document in documents:
        for question in document.questions:
            key = (document.task, question.id)
            if key in seen:
                raise ValueError(f"question id: {key} occurs twice")
            seen.add(key)
