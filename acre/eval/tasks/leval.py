"""L-Eval: long documents with many questions each.

Takes rows as published at L4NLP/LEval: one document (input) with its questions
(instructions) and references (outputs); gives one document per row. Open-ended prompts
state the length of the reference, as the authors' do. A row for human or model judges
is scored by its task's F1 or ROUGE. Science fiction: only the half of the question that
the document answers is asked; what is true of the real world is kept in the facts.
Source: An et al., arXiv 2307.11088.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from acre.eval.published import around, published
from acre.eval.records import Document, Question
from acre.eval.tasks.task import Hub, Row, Task, string, strings


@dataclass(frozen=True)
class Form:
    """How a task is put and judged: template, system prompt, metric."""

    template: str
    system: str
    metric: str


EXAMS = {
    "coursera": Form("exam", "coursera", "leval_coursera"),
    "quality": Form("exam", "exam", "leval_quality"),
    "tpo": Form("exam", "exam", "leval_tpo"),
    "sci_fi": Form("exam", "sci_fi", "leval_sci_fi"),
    "gsm100": Form("plain", "gsm100", "leval_gsm100"),
    "codeU": Form("plain", "codeU", "leval_codeU"),
    "topic_retrieval_longchat": Form(
        "plain", "topic_retrieval_longchat", "leval_topic_retrieval"
    ),
}
ANSWERING = (
    "financial_qa", "legal_contract_qa", "multidoc_qa", "narrative_qa",
    "natural_question", "scientific_qa",
)  # fmt: skip
WRITING = (
    "gov_report_summ", "meeting_summ", "news_summ", "paper_assistant", "patent_summ",
    "review_summ", "tv_show_summ",
)  # fmt: skip
FORMS = {
    **EXAMS,
    **{name: Form("open", "open", "leval_f1") for name in ANSWERING},
    **{name: Form("open", "open", "leval_rouge_l") for name in WRITING},
}


def _question(name: str, key: str, asked: str, answer: str, judge: str) -> Question:
    """One question; `judge` is what the row names for its evaluation."""
    words, form = published("leval"), FORMS[name]
    _, prompt = around(
        words["templates"][form.template],
        "{document}",
        inst=asked,
        words=str(len(answer.split())),
    )
    facts = {"evaluation": judge}
    real = re.fullmatch(r"(.+?)\s*\[fact:(.+)\]\s*", answer, re.DOTALL)
    if name == "sci_fi" and real:
        answer, facts["fact"] = real[1].strip(), real[2].strip()
    if not answer.strip():
        raise ValueError(f"outputs: no answer to {asked[:60]!r}")
    most = words["max_new_tokens"]
    return Question(key, prompt, (answer,), most, query=asked.strip(), facts=facts)


def parse(name: str, row: Row, line: int) -> list[Document]:
    """A row of the task `name`."""
    asked, answers = strings(row, "instructions"), strings(row, "outputs")
    if len(asked) != len(answers) or not asked:
        raise ValueError(
            f"instructions, outputs: expected as many of both, at least one, got "
            f"{len(asked)} and {len(answers)}"
        )
    judge = string(row, "evaluation") if "evaluation" in row else ""
    questions = tuple(
        _question(name, f"{line}.{i + 1}", *pair, judge)
        for i, pair in enumerate(zip(asked, answers, strict=True))
    )
    words, form = published("leval"), FORMS[name]
    before = words["templates"][form.template].partition("{document}")[0]
    instruction = words["systems"][form.system] + before
    return [Document(name, string(row, "input"), questions, instruction)]


def _task(name: str) -> Task:
    folder = "Exam" if name in EXAMS else "Generation"
    hub = Hub("L4NLP/LEval", f"LEval/{folder}/{name}.jsonl")
    return Task(name, "leval", FORMS[name].metric, partial(parse, name), name, hub)


TASKS = [_task(name) for name in FORMS]
