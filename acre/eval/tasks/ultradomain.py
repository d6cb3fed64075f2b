"""UltraDomain: questions over long textbooks, contracts and financial reports.

Takes rows as published at TommyChien/UltraDomain (input, context, answers; the answers
a string or a list); gives documents. Many rows share a context. Source: Qian et al.,
MemoRAG, arXiv 2409.05591.
"""

from __future__ import annotations

from functools import partial

from acre.eval.published import around, published
from acre.eval.records import Document, Question
from acre.eval.tasks.task import Hub, Row, Task, identity, references, string

NAMES = (
    "fin", "legal", "mix", "agriculture", "art", "biography", "biology", "cooking",
    "cs", "fiction", "health", "history", "literature", "mathematics", "music",
    "philosophy", "physics", "politics", "psychology", "technology",
)  # fmt: skip


def parse(name: str, row: Row, line: int) -> list[Document]:
    """A row of the domain `name`."""
    words, asked = published("ultradomain"), string(row, "input")
    before, after = around(words["template"], input=asked)
    question = Question(
        id=identity(row, line),
        prompt=after,
        query=asked,
        answers=references(row["answers"] if "answers" in row else row["answer"]),
        max_new_tokens=words["max_new_tokens"],
    )
    return [Document(name, string(row, "context"), (question,), before)]


def _task(name: str) -> Task:
    hub = Hub("TommyChien/UltraDomain", f"{name}.jsonl")
    return Task(name, "ultradomain", "qa_f1", partial(parse, name), name, hub)


TASKS = [_task(name) for name in NAMES]
