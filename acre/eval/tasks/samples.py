"""The data files that lie at hand in the folder ACRE_DATA names.

Takes rows of those files; gives documents. Two are samples of benchmarks: their
documents carry the name of the benchmark's task, whose metric and lengths they follow.
`nq` hides each gold passage among others and `qmsum_evidence` names the turns an answer
stems from, so that both know their evidence; `books` is text without questions.
"""

from __future__ import annotations

import ast
import random
from dataclasses import replace
from typing import Any

from acre.eval.published import around, published
from acre.eval.records import Document, Question, Range
from acre.eval.tasks import leval, longbench
from acre.eval.tasks.task import Row, Task, identity, references, string, strings

# Where the new case of a few-shot prompt begins.
OPENINGS = {
    "trec": "Question: ",
    "triviaqa": "Passage:\n",
    "samsum": "Dialogue: ",
    "lsht": "新闻内容：\n",
}
PASSAGES = 300  # passages of a text of `nq`


# ------------------------------------------------------------------- full prompts


def unformat(name: str, template: str, prompt: str) -> tuple[str, str] | None:
    """Context and input of a prompt that `template` made, or None if it did not."""
    before, _, after = template.partition("{context}")
    middle, asks, tail = after.rpartition("{input}")
    if not prompt.startswith(before) or not prompt.endswith(tail):
        return None
    body = prompt[len(before) : len(prompt) - len(tail)]
    if not asks or name in longbench.CODE:
        return body, ""
    at = body.rfind(middle + OPENINGS.get(name, ""))
    return None if at < 0 else (body[:at], body[at + len(middle) :])


def literal(value: Any) -> Any:
    """A list or dict that was written as a Python string; else the value itself."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def answers_and_classes(value: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The references of a sample's row, and its classes where it has any."""
    value = literal(value)
    first = literal(value[0]) if isinstance(value, list) and len(value) == 1 else value
    if isinstance(first, dict):
        return references(first["answers"]), longbench.classes(first)
    return references(first if isinstance(first, list) else value), {}


def parse_longbench(row: Row, line: int) -> list[Document]:
    """A full LongBench prompt, taken apart with the template that made it."""
    name, prompt = string(row, "dataset"), string(row, "prompt")
    templates = published("longbench")["templates"]
    if name not in templates:
        raise ValueError(f"dataset: expected a task of LongBench, got {name!r}")
    answers, facts = answers_and_classes(row["answers"])
    variants = published("longbench_sample")["templates"].get(name, [])
    for template in [templates[name], *variants]:
        parts = unformat(name, template, prompt)
        if parts:
            key = f"{name}.{row.get('index', line)}"
            of_question = {"id": key, "answers": answers, "facts": facts}
            return [longbench.document(name, template, *parts, **of_question)]
    raise ValueError(f"prompt: no template of {name} made it: {prompt[:60]!r}...")


def parse_leval(row: Row, line: int) -> list[Document]:
    """A row of L-Eval that names its task."""
    name = string(row, "task")
    if name not in leval.FORMS:
        raise ValueError(f"task: expected a task of L-Eval, got {name!r}")
    return leval.parse(name, row, line)


# --------------------------------------------------------------------- known evidence


def parse_nq(row: Row, line: int) -> list[Document]:
    """A question of Natural Questions and its gold paragraph, the whole evidence."""
    words = published("longbench")
    before, after = around(
        words["templates"]["hotpotqa"], input=string(row, "question")
    )
    head = f"{string(row, 'title')}\n" if row.get("title") else ""
    passage = string(row, "passage")
    if not passage.strip():
        raise ValueError("passage: empty")
    question = Question(
        id=identity(row, line),
        prompt=after,
        query=row["question"],
        answers=references(row["answers"]),
        max_new_tokens=words["max_new_tokens"]["hotpotqa"],
        evidence=((len(head), len(head) + len(passage)),),
    )
    return [Document("nq", f"{head}{passage}\n\n", (question,), before)]


def hide(documents: list[Document]) -> list[Document]:
    """Passages behind one another, up to PASSAGES in a text, shuffled; the questions
    stay in the order of the file."""
    made = []
    for start in range(0, len(documents), PASSAGES):
        part = documents[start : start + PASSAGES]
        order = random.Random(start).sample(range(len(part)), len(part))
        at, shift = 0, {}
        for i in order:
            shift[i], at = at, at + len(part[i].text)
        questions = tuple(
            replace(
                q, evidence=tuple((a + shift[i], b + shift[i]) for a, b in q.evidence)
            )
            for i, document in enumerate(part)
            for q in document.questions
        )
        text = "".join(part[i].text for i in order)
        made.append(replace(part[0], text=text, questions=questions))
    return made


def _turns(query: Row, starts: list[int], turns: list[str]) -> tuple[Range, ...]:
    """The characters of the turns from a first to a last one, both in."""
    spans = []
    for pair in query.get("evidence_turns") or []:
        first, last = (int(str(one)) for one in pair)
        if not 0 <= first <= last < len(turns):
            raise ValueError(
                f"evidence_turns: expected turns of 0 to {len(turns) - 1}, got {pair}"
            )
        spans.append((starts[first], starts[last] + len(turns[last])))
    return tuple(spans)


def parse_qmsum(row: Row, line: int) -> list[Document]:
    """A meeting with its queries; those about all of it have no evidence."""
    words, turns, queries = (
        published("longbench"),
        strings(row, "turns"),
        row["queries"],
    )
    if not isinstance(queries, list) or not all(isinstance(q, dict) for q in queries):
        raise TypeError("queries: expected a list of objects")
    starts, at = [], 0
    for turn in turns:
        starts.append(at)
        at += len(turn) + 1
    questions = []
    for i, query in enumerate(queries):
        asked = string(query, "query")
        before, after = around(words["templates"]["qmsum"], input=asked)
        question = Question(
            id=f"{line}.{i + 1}",
            prompt=after,
            query=asked,
            answers=references(query["answer"], "answer"),
            max_new_tokens=words["max_new_tokens"]["qmsum"],
            evidence=_turns(query, starts, turns),
        )
        questions.append(question)
    if not questions:
        raise ValueError("queries: none")
    return [Document("qmsum_evidence", "\n".join(turns), tuple(questions), before)]


def parse_book(row: Row, line: int) -> list[Document]:
    """A book, of which nothing is asked."""
    return [Document("books", string(row, "text"), ())]


TASKS = [
    Task("longbench_sample", "data", "", parse_longbench, "longbench_sample"),
    Task("leval_sample", "data", "", parse_leval, "leval"),
    Task("nq", "data", "qa_f1", parse_nq, "nq_passages", merge=hide),
    Task("qmsum_evidence", "data", "rouge", parse_qmsum, "qmsum"),
    Task("books", "data", "perplexity", parse_book, "books"),
]
