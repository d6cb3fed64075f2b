"""The forms that a row of training data may have.

Takes a row, one JSON object; gives what it holds: texts, and `Record`s, contexts with
questions. One idea: a form is known by its fields, so files of any form may be mixed
without being named. Forms: text, conversations (as the authors' and other public
training data have them), questions with a context or passages, and meetings with
queries. Refuses rows of no known form, rows without words, and evidence that does not
lie in the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acre.eval.records import Document, Range
from acre.eval.tasks.samples import parse_nq, parse_qmsum
from acre.tokenizer import check_text

Row = Mapping[str, Any]
GAP = "\n\n"  # between passages, and between turns of a conversation
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class Question:
    """A question about a context, and its answer.

    evidence: half-open ranges of characters of the context; empty = not known. query:
    the bare question inside `text`, which scores groups; "" = all of it.
    """

    text: str
    answer: str
    evidence: tuple[Range, ...] = ()
    query: str = ""


@dataclass(frozen=True)
class Record:
    """A context and what is asked about it. extractive: the answers are to stand in the
    context word for word."""

    context: str
    questions: tuple[Question, ...]
    extractive: bool = False


Item = str | Record


def parse(row: Any, line: int = 1) -> list[Item]:
    """What a row holds: a text, or a context with its questions; never nothing.

    ValueError, TypeError: what keeps the row from being used.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"expected an object, got {type(row).__name__}")
    for fields, form in FORMS:
        if all(field in row for field in fields):
            items = form(row, line)
            break
    else:
        names = ", ".join(map(str, list(row)[:6])) or "none"
        raise ValueError(f"no form of row has these fields: {names}")
    for item in items:
        _check(item)
    return items


def _check(item: Item) -> None:
    """ValueError for what has no words; TypeError or ValueError for no Unicode text."""
    if isinstance(item, str):
        parts = [("text", item)]
    else:
        parts = [("context", item.context)]
        for q in item.questions:
            parts += [("question", q.text), ("answer", q.answer)]
    for name, part in parts:
        if not isinstance(part, str):
            raise TypeError(f"{name}: expected text, got {type(part).__name__}")
        if not check_text(part).strip():
            raise ValueError(f"{name}: empty")


# ------------------------------------------------------------------------ conversations


def _turn(turn: Any) -> tuple[str, str]:
    """(role, words) of a turn under any of the names in use."""
    if not isinstance(turn, Mapping):
        raise TypeError(f"conversations: expected turns, got {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    words = turn.get("content", turn.get("value"))
    if role not in ROLES:
        raise ValueError(f"conversations: role is {role!r}, expected one of {ROLES}")
    if not isinstance(words, str):
        kind = type(words).__name__
        raise TypeError(f"conversations: content is {kind}, expected text")
    return ROLES[role], words


def _split(turn: str) -> tuple[str, str]:
    """(text, question) of a turn that holds both: parted at its last blank line, or
    else line."""
    for mark in (GAP, "\n"):
        before, found, after = turn.strip().rpartition(mark)
        if found and before.strip():
            return before, after
    raise ValueError("conversations: one line, expected a text before the question")


def _conversation(row: Row, line: int) -> list[Item]:
    """The last answer, asked of all that was said before its question."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        kind = type(turns).__name__
        raise TypeError(f"conversations: expected a list, got {kind}")
    said = [turn for turn in map(_turn, turns) if turn[0] != "system"]
    while said and said[-1][0] != "assistant":
        said.pop()
    if len(said) < 2 or said[-2][0] != "user":
        raise ValueError("conversations: expected an answer after a user's turn")
    *earlier, (_, question), (_, answer) = said
    if [role for role, _ in earlier] == ["user", "assistant"]:
        earlier.pop()  # it acknowledges the text, as the frame does by itself
    if earlier:
        context = GAP.join(words for _, words in earlier)
    else:
        context, question = _split(question)
    return [Record(context, (Question(question, answer),))]


# ---------------------------------------------------------------------------- questions


def _answers(row: Row) -> list[str]:
    """The answers, one or more."""
    value = row["answers"] if "answers" in row else row.get("answer")
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise TypeError("answers: expected text or a list of texts")
    if not answers:
        raise ValueError("answers: none")
    return answers


def _first_told(answers: list[str], context: str) -> str:
    """The first answer that stands in the context, or else the first."""
    return next((answer for answer in answers if answer in context), answers[0])


def _passages(row: Row) -> str:
    """The passages behind one another, under their titles where they have any."""
    passages = row["passages"]
    if not isinstance(passages, list) or not passages:
        raise TypeError("passages: expected a list of passages")
    texts = []
    for one in passages:
        if isinstance(one, Mapping):
            parts = [one.get("title"), one.get("text", one.get("passage"))]
            one = "\n".join(part for part in parts if part)
        if not isinstance(one, str):
            raise TypeError(f"passages: expected texts, got {type(one).__name__}")
        texts.append(one)
    return GAP.join(texts)


def _range(part: Any, context: str) -> Range:
    """A range of the context's characters, given as such or as the words in it."""
    if isinstance(part, str):
        start = context.find(part) if part.strip() else -1
        if start < 0:
            raise ValueError(f"evidence: {part[:60]!r} does not occur in the text")
        return start, start + len(part)
    if isinstance(part, list) and [type(one) for one in part] == [int, int]:
        start, end = part
        if 0 <= start < end <= len(context):
            return start, end
    raise ValueError(
        f"evidence: got {part!r}, expected [start, end) within {len(context)} "
        "characters, or words of the text"
    )


def _question(row: Row, line: int) -> list[Item]:
    """A question with a context or passages."""
    context = row["context"] if "context" in row else _passages(row)
    if not isinstance(context, str):
        raise TypeError(f"context: expected text, got {type(context).__name__}")
    given = row.get("evidence") or []
    if not isinstance(given, list):
        raise TypeError("evidence: expected a list of ranges or texts")
    evidence = tuple(_range(part, context) for part in given)
    answer = _first_told(_answers(row), context)
    extractive = bool(row.get("extractive", True))
    return [Record(context, (Question(row["question"], answer, evidence),), extractive)]


def _of_document(document: Document, extractive: bool) -> list[Item]:
    """The questions of a document of the evaluation, bare of its benchmark's words."""
    context = document.text
    asked = tuple(
        Question(q.query, _first_told(list(q.answers), context), q.evidence)
        for q in document.questions
    )
    return [Record(context, asked, extractive)]


def _gold(row: Row, line: int) -> list[Item]:
    """A question with its gold passage, all of which is evidence."""
    document = parse_nq({"answers": _answers(row), **row}, line)[0]
    return _of_document(document, extractive=True)


def _meeting(row: Row, line: int) -> list[Item]:
    """A meeting's queries; the evidence is the turns named."""
    return _of_document(parse_qmsum(row, line)[0], extractive=False)


def _text(row: Row, line: int) -> list[Item]:
    """A text, whatever else the row says of it."""
    text = row["text"]
    if not isinstance(text, str):
        raise TypeError(f"text: expected text, got {type(text).__name__}")
    return [text]


# The first form whose fields a row has is its form.
FORMS = (
    (("conversations",), _conversation),
    (("turns", "queries"), _meeting),
    (("question", "context"), _question),
    (("question", "passages"), _question),
    (("question", "passage"), _gold),
    (("text",), _text),
)
