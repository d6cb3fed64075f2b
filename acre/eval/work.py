"""The unit of work: one document, the methods, and the questions still to be asked.

Takes a shelf and a `Work`; gives its samples one by one. One idea: all that touches one
text happens behind one another in one place, so its cache is built once; any engine
only decides where. A method that fails at a document or question gives samples that
say so, and the rest goes on. Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from acre.eval import perplexity
from acre.eval.excerpt import recall
from acre.eval.methods import Method, NotApplicableError, Reply
from acre.eval.metrics import score
from acre.eval.records import Document, Question
from acre.eval.results import Key, Sample
from acre.eval.shelf import Shelf
from acre.model import Model

RETRIES = 3  # workers that may die over one document


@dataclass(frozen=True)
class ModelSpec:
    """How a worker opens the model: the arguments of `Model.from_pretrained`."""

    path: str
    options: Mapping[str, Any]

    def open(self) -> Model:
        return Model.from_pretrained(self.path, **self.options)


@dataclass(frozen=True)
class Work:
    """A document and, per method (by index), the ids of the questions to ask. attempt:
    workers that have been lost over it."""

    document: Document
    pending: tuple[tuple[int, frozenset[str]], ...]
    attempt: int = 0

    def __len__(self) -> int:
        return sum(len(ids) for _, ids in self.pending)

    def without(self, labels: Sequence[str], done: set[Key]) -> Work:
        """What is left of it, one worker later."""
        task, left = self.document.task, []
        for index, ids in self.pending:
            rest = frozenset(i for i in ids if (task, labels[index], i) not in done)
            if rest:
                left.append((index, rest))
        return replace(self, pending=tuple(left), attempt=self.attempt + 1)


def works(
    documents: Sequence[Document], methods: Sequence[Method], done: set[Key]
) -> list[Work]:
    """What is still to be done. Methods that read alike come together."""
    out = []
    for document in documents:
        ids = [question.id for question in document.questions]
        pending = []
        for index, method in sorted(enumerate(methods), key=_reads):
            rest = [i for i in ids if (document.task, method.label, i) not in done]
            if rest:
                pending.append((index, frozenset(rest)))
        if pending:
            out.append(Work(document, tuple(pending)))
    return out


def _reads(numbered: tuple[int, Method]) -> tuple[str, int]:
    """Sorts methods that share a cache next to each other."""
    settings = dict(numbered[1].settings())
    shared = ("interval", "window", "stride", "carry", "proxy")
    name = settings.get("method", "")
    family = "acre" if name.endswith(("acre", "only", "refill")) else name
    return repr((family, [settings.get(k) for k in shared])), numbered[0]


def order(documents: Sequence[Document], methods: Sequence[Method]) -> list[Key]:
    """Every sample of an evaluation, in the order in which it is published."""
    return [
        (document.task, method.label, question.id)
        for method in methods
        for document in documents
        for question in document.questions
    ]


def _head(document: Document, method: Method, question: Question) -> Sample:
    return {
        "task": document.task,
        "method": method.label,
        "id": question.id,
        "document": document.id,
        "buckets": dict(question.buckets),
    }


def _sample(
    document: Document, method: Method, question: Question, reply: Reply
) -> Sample:
    """What is kept of a reply: its score, what it could attend to, its costs."""
    found = None
    if question.evidence and reply.kept is not None:
        found = round(recall(question.evidence, reply.kept), 4)
    value = reply.extra.get("score")
    if value is None:
        metric = question.facts["metric"]
        value = score(metric, reply.text, question.answers, question.facts)
    return {
        **_head(document, method, question),
        "prediction": reply.text,
        "answers": list(question.answers),
        "score": value,
        "recall": found,
        "context_tokens": reply.context_tokens,
        "entries": reply.entries,
        "truncated": reply.truncated,
        "new_tokens": reply.new_tokens,
        **{k: v for k, v in reply.extra.items() if k != "score"},
        "cost": {
            "build_s": round(reply.build_s, 4),
            "first_token_s": round(reply.first_token_s, 5),
            "decode_s": round(reply.decode_s, 4),
            "peak_bytes": reply.peak_bytes,
        },
    }


def failure(
    document: Document, method: Method, question: Question, error: BaseException
) -> Sample:
    """A sample that says why there is none; one that does not apply is no error."""
    what = "skipped" if isinstance(error, NotApplicableError) else "error"
    reason = f"{type(error).__name__}: {error}" if what == "error" else str(error)
    return {**_head(document, method, question), what: " ".join(reason.split())}


def samples(shelf: Shelf, methods: Sequence[Method], work: Work) -> Iterator[Sample]:
    """Does the work, sample by sample; the shelf is empty afterwards."""
    document = work.document
    try:
        for index, ids in work.pending:
            method = methods[index]
            asked = [q for q in document.questions if q.id in ids]
            yield from _of_method(shelf, method, document, asked)
    finally:
        shelf.clear()


def _of_method(
    shelf: Shelf, method: Method, document: Document, asked: Sequence[Question]
) -> Iterator[Sample]:
    reading = None
    for question in asked:
        try:
            if question.facts["metric"] == perplexity.METRIC:
                reply = perplexity.measure(shelf, method, document)
            else:
                reading = reading or method.open(shelf, document)
                reply = reading.ask(question)
            yield _sample(document, method, question, reply)
        except Exception as error:  # the next question may go well
            yield failure(document, method, question, error)


def lost(
    work: Work, methods: Sequence[Method], last: BaseException
) -> Iterator[Sample]:
    """Samples of a document over which too many workers died, `last` of the last."""
    error = RuntimeError(f"{work.attempt} workers were lost over this document: {last}")
    for index, ids in work.pending:
        for question in work.document.questions:
            if question.id in ids:
                yield failure(work.document, methods[index], question, error)
