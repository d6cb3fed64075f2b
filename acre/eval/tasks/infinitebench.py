"""InfiniteBench: tasks beyond 100K tokens.

Takes rows as published at xinrongzhang2022/InfiniteBench (context, input, answer,
options); gives documents with the templates that the authors use for open models, which
end where the answer begins. Where the answer was planted in the text, its place is the
evidence. Source: Zhang et al., arXiv 2402.13718.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from acre.eval.published import around, published
from acre.eval.records import Document, Question, Range
from acre.eval.tasks.task import Hub, Row, Task, identity, references, string, strings

# The names of the tasks in the paper.
ALIASES = {
    "En.QA": "longbook_qa_eng",
    "En.MC": "longbook_choice_eng",
    "En.Sum": "longbook_sum_eng",
    "En.Dia": "longdialogue_qa_eng",
    "Zh.QA": "longbook_qa_chn",
    "PassKey": "passkey",
    "Number": "number_string",
    "KV": "kv_retrieval",
    "Code.Run": "code_run",
    "Code.Debug": "code_debug",
    "Math.Find": "math_find",
    "Math.Calc": "math_calc",
}
CHOICES = ("longbook_choice_eng", "code_debug")
PLANTED = ("passkey", "number_string", "kv_retrieval")
CALLED = "Please compute the exact value of {func_call}."
NEAR = 64  # characters between two mentions that are one piece of evidence


def right(name: str, row: Row) -> Any:
    """The answer; of choices, the text of the right option."""
    answer = row["answer"]
    if name not in CHOICES:
        return answer
    text = answer[0] if isinstance(answer, list) and answer else answer
    if text not in strings(row, "options")[:4]:
        raise ValueError(f"answer: expected one of the options, got {text!r}")
    return text


def fields(name: str, row: Row) -> dict[str, str]:
    """What the template of `name` needs besides the context."""
    asked = string(row, "input") if "input" in row else ""
    found = {"input": asked, "question": asked}
    if name in CHOICES:
        options = strings(row, "options")
        if len(options) != 4:
            raise ValueError(f"options: expected 4, got {len(options)}")
        found |= {f"OPTION_{x}": options[i] for i, x in enumerate("ABCD")}
    elif name == "code_run":
        call = re.search(r"func_[0-9]+\(-?[0-9]+\)", asked)
        if not call:
            raise ValueError(f"input: expected a call as func_1(2), got {asked[:80]!r}")
        found |= {"func": call[0].split("(")[0], "func_call": call[0]}
    elif name == "math_find":
        target = re.search(r"The (.+) of", asked)
        if not target:
            raise ValueError(f"input: expected 'The ... of', got {asked[:80]!r}")
        wanted = f"The {target[1]}".lower()
        found["prefix"] = f"What is {wanted} in the following list?"
    return found


def mentions(text: str, answer: str) -> tuple[Range, ...]:
    """Where `answer` stands in the text as a word; near ones are one range."""
    found: list[Range] = []
    for hit in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text):
        if found and hit.start() - found[-1][1] <= NEAR:
            found[-1] = (found[-1][0], hit.end())
        else:
            found.append(hit.span())
    return tuple(found)


def parse(name: str, row: Row, line: int) -> list[Document]:
    """A row of the task `name`."""
    words, filled, known = (
        published("infinitebench"),
        fields(name, row),
        right(name, row),
    )
    text = string(row, "context" if "context" in row else "content")
    before, after = around(words["templates"][name], **filled)
    answers = references(known, "answer")
    query = CALLED.format(**filled) if name == "code_run" else filled["input"].strip()
    question = Question(
        id=identity(row, line),
        prompt=after,
        query=query if query in after else "",
        answers=answers,
        max_new_tokens=words["max_new_tokens"][name],
        evidence=mentions(text, answers[0]) if name in PLANTED else (),
        facts={"options": strings(row, "options")} if name in CHOICES else {},
    )
    return [Document(name, text, (question,), before)]


def _task(name: str) -> Task:
    hub = Hub("xinrongzhang2022/InfiniteBench", f"{name}.jsonl")
    return Task(name, "infinitebench", name, partial(parse, name), name, hub)


TASKS = [_task(name) for name in published("infinitebench")["templates"]]
