"""LongBench, LongBench-E and LongBench v2.

Takes rows as published at THUDM/LongBench and THUDM/LongBench-v2; gives documents whose
instruction, text and prompt join to the authors' prompt. Few-shot tasks: the text is
the examples, the prompt the new case. Code: the last lines before the cursor belong to
the prompt, as they are what relevant code is looked for with. Source: Bai et al.,
LongBench (arXiv 2308.14508), LongBench v2 (arXiv 2412.15204).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from acre.eval.published import around, published
from acre.eval.records import Document, Question, Range
from acre.eval.tasks.task import Hub, Row, Task, identity, references, string, strings

METRICS = {
    "narrativeqa": "qa_f1",
    "qasper": "qa_f1",
    "multifieldqa_en": "qa_f1",
    "multifieldqa_zh": "qa_f1_zh",
    "hotpotqa": "qa_f1",
    "2wikimqa": "qa_f1",
    "musique": "qa_f1",
    "dureader": "rouge_zh",
    "gov_report": "rouge",
    "qmsum": "rouge",
    "multi_news": "rouge",
    "vcsum": "rouge_zh",
    "trec": "classification_first_line",
    "triviaqa": "qa_f1_first_line",
    "samsum": "rouge_first_line",
    "lsht": "classification_first_line",
    "passage_count": "count",
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval_zh",
    "lcc": "code_sim",
    "repobench-p": "code_sim",
}
# The tasks of LongBench-E.
EVEN = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news",
    "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc",
    "repobench-p",
)  # fmt: skip
CODE = ("lcc", "repobench-p")
# The authors use no chat template for these.
PLAIN = ("trec", "triviaqa", "samsum", "lsht", *CODE)
# The bare question inside the input of a few-shot task.
ASKED = {
    "trec": re.compile(r"Question: (.+)\nType:", re.DOTALL),
    "triviaqa": re.compile(r"\nQuestion:\n(.+)\nAnswer:", re.DOTALL),
    "samsum": re.compile(r"Dialogue: (.+?)\s*\nSummary:", re.DOTALL),
    "lsht": re.compile("新闻内容：\n(.+)\n类别：", re.DOTALL),
}
PARAGRAPHS = {
    "passage_retrieval_en": re.compile(r"^Paragraph (\d+): ", re.MULTILINE),
    "passage_retrieval_zh": re.compile(r"^段落(\d+)：", re.MULTILINE),
}
TAIL_LINES, TAIL_CHARS = 20, 1500


def code_tail(code: str) -> int:
    """Where the last whole lines begin: at most 20 of them and 1,500 characters, and
    never more than half of the lines."""
    lines = code.splitlines(keepends=True)
    at = len(code)
    for line in reversed(lines[(len(lines) + 1) // 2 :][-TAIL_LINES:]):
        if len(code) - at + len(line) > TAIL_CHARS:
            break
        at -= len(line)
    if code[at:].strip():
        return at
    return len(code) - min(TAIL_CHARS, len(code) // 2)  # one line is all there is


def paragraph(name: str, text: str, answers: tuple[str, ...]) -> tuple[Range, ...]:
    """The range of the paragraph that the answer names, empty where there is none."""
    number = re.search(r"\d+", answers[0])
    heads = list(PARAGRAPHS[name].finditer(text))
    for i, head in enumerate(heads):
        if number and head[1] == number[0]:
            stop = heads[i + 1].start() if i + 1 < len(heads) else len(text)
            return ((head.end(), len(text[:stop].rstrip())),)
    return ()


def bare(name: str, asked: str) -> str:
    """The question inside what a row asks."""
    found = ASKED[name].search(asked) if name in ASKED else None
    return (found[1] if found else asked).strip()


def document(
    name: str,
    template: str,
    context: str,
    asked: str,
    *,
    task: str = "",
    **of_question: Any,
) -> Document:
    """A document of one question: `template` around `context`, asking `asked`.

    name: the LongBench task. task: the name to report, `name` by default. of_question:
    id, answers, facts, buckets.
    """
    before, after = around(template, input="" if name in CODE else asked)
    query, evidence = bare(name, asked), ()
    if name in CODE:
        code = context + asked
        at = code_tail(code)
        context, after, query = code[:at], code[at:] + after, code[at:].strip()
    elif name in PARAGRAPHS:
        evidence = paragraph(name, context, of_question["answers"])
    question = Question(
        prompt=after,
        query=query if query in after else "",
        max_new_tokens=published("longbench")["max_new_tokens"][name],
        stop=("\n",) if name == "samsum" else (),
        evidence=evidence,
        **of_question,
    )
    chat = name not in PLAIN
    return Document(task or name, context, (question,), before, chat=chat)


def length_bucket(row: Row) -> dict[str, str]:
    """LongBench-E's groups of lengths, counted in words."""
    length = row["length"]
    if isinstance(length, bool) or not isinstance(length, (int, float)):
        raise TypeError(f"length: expected a number, got {type(length).__name__}")
    return {"length": "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"}


def classes(row: Row) -> dict[str, list[str]]:
    """The classes to choose among, where the row has any."""
    return (
        {"all_classes": strings(row, "all_classes")} if row.get("all_classes") else {}
    )


def parse(name: str, even: bool, row: Row, line: int) -> list[Document]:
    """A row of LongBench, or with `even` of LongBench-E."""
    made = document(
        name,
        published("longbench")["templates"][name],
        string(row, "context"),
        string(row, "input"),
        task=f"{name}_e" if even else name,
        id=identity(row, line),
        answers=references(row["answers"]),
        facts=classes(row),
        buckets=length_bucket(row) if even else {},
    )
    return [made]


def parse_v2(row: Row, line: int) -> list[Document]:
    """A row of LongBench v2: four choices, of which one letter is the answer."""
    names = {"$Q$": "question"} | {f"$C_{x}$": f"choice_{x}" for x in "ABCD"}
    fields = {mark: string(row, key).strip() for mark, key in names.items()}
    if row["answer"] not in ("A", "B", "C", "D"):
        raise ValueError(f"answer: expected A, B, C or D, got {row['answer']!r}")
    words = published("longbench_v2")
    before, after = words["template"].split("$DOC$")
    prompt = re.sub(r"\$(Q|C_[ABCD])\$", lambda mark: fields[mark[0]], after)
    question = Question(
        id=identity(row, line),
        prompt=prompt,
        query=fields["$Q$"],
        answers=(row["answer"],),
        max_new_tokens=words["max_new_tokens"],
        facts={"choices": [fields[f"$C_{x}$"] for x in "ABCD"]},
        buckets={key: string(row, key) for key in ("difficulty", "length", "domain")},
    )
    return [
        Document("longbench_v2", string(row, "context").strip(), (question,), before)
    ]


def _task(name: str, even: bool) -> Task:
    file = f"{name}_e" if even else name
    hub = Hub("THUDM/LongBench", "data.zip", f"data/{file}.jsonl")
    benchmark = "longbench_e" if even else "longbench"
    return Task(file, benchmark, METRICS[name], partial(parse, name, even), file, hub)


TASKS = [
    *(_task(name, False) for name in METRICS),
    *(_task(name, True) for name in EVEN),
    Task(
        "longbench_v2",
        "longbench_v2",
        "choice",
        parse_v2,
        "data",
        Hub("THUDM/LongBench-v2", "data.json"),
    ),
]
