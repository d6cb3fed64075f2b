"""The samples at hand as documents: prompts, evidence, and answers that score."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import pytest
from evaluations import joined, only

from acre.eval import metrics
from acre.eval.published import published
from acre.eval.readers import load
from acre.eval.tasks import TASKS
from acre.eval.tasks.longbench import METRICS
from acre.eval.tasks.samples import PASSAGES, hide, literal

DATA = os.environ.get("ACRE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="ACRE_DATA names no folder")


def lines(name: str) -> list[dict]:
    path = Path(DATA or "") / f"{name}.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --------------------------------------------------------------------------- samples


@needs_data
def test_every_row_of_the_longbench_sample():
    rows, seen = lines("longbench_sample.dev"), set()
    assert len(rows) == 124
    for i, row in enumerate(rows):
        document = only("longbench_sample", row, i + 1)
        [question] = document.questions
        assert joined(document) == row["prompt"]
        assert document.task == row["dataset"] and document.text.strip()
        assert question.answers and all(isinstance(a, str) for a in question.answers)
        assert question.max_new_tokens > 0 and question.query in question.prompt
        assert len(question.prompt) < 5500  # the text is not in the prompt
        if document.task.startswith("passage_retrieval"):
            assert len(question.evidence) == 1
        if document.task in ("trec", "lsht"):
            assert question.answers[0] in question.facts["all_classes"]
        seen.add((document.task, question.id))
    assert len(seen) == 124 and {task for task, _ in seen} == set(METRICS)


@needs_data
def test_every_row_of_the_leval_sample():
    rows = lines("leval.dev")
    made = [only("leval_sample", row, i + 1) for i, row in enumerate(rows)]
    assert len(made) == 38 and sum(len(d.questions) for d in made) == 330
    for row, document in zip(rows, made, strict=True):
        assert document.task == row["task"] and document.text == row["input"]
        assert [q.query for q in document.questions] == [
            asked.strip() for asked in row["instructions"]
        ]


@needs_data
def test_every_meeting_and_its_evidence():
    spans = 0
    for i, row in enumerate(lines("qmsum.dev")):
        document = only("qmsum_evidence", row, i + 1)
        for query, question in zip(row["queries"], document.questions, strict=True):
            for pair, (start, end) in zip(
                query.get("evidence_turns", []), question.evidence, strict=True
            ):
                first, last = map(int, pair)
                turns = row["turns"][first : last + 1]
                assert document.text[start:end] == "\n".join(turns)
                spans += 1
    assert spans == 248


def test_sample_prompt_of_another_template():
    template = published("longbench_sample")["templates"]["qasper"][0]
    row = {"dataset": "qasper", "answers": ["a"], "index": 4}
    row["prompt"] = template.format(context="Some text.", input="What is it?")
    document = only("longbench_sample", row)
    assert document.text == "Some text." and document.questions[0].id == "qasper.4"
    assert document.questions[0].query == "What is it?"
    with pytest.raises(ValueError, match="no template of qasper made it"):
        only("longbench_sample", row | {"prompt": "Something else"})
    with pytest.raises(ValueError, match="expected a task of LongBench, got 'x'"):
        only("longbench_sample", row | {"dataset": "x"})


@pytest.mark.parametrize(
    "answers, expected, classes",
    [
        ("['a', 'b']", ("a", "b"), {}),
        ("plain", ("plain",), {}),
        ("[not a list", ("[not a list",), {}),
        ([{"answers": ["a"], "all_classes": ["a", "b"]}], ("a",), ["a", "b"]),
        ("[{'answers': ['a'], 'all_classes': ['a', 'b']}]", ("a",), ["a", "b"]),
        (["{'answers': ['a'], 'all_classes': ['a', 'b']}"], ("a",), ["a", "b"]),
    ],
)
def test_answers_of_a_sample(answers, expected, classes):
    prompt = published("longbench")["templates"]["trec"].format(
        context="Question: A\nType: x", input="Question: B\nType:"
    )
    row = {"dataset": "trec", "prompt": prompt, "answers": answers}
    [question] = only("longbench_sample", row).questions
    assert question.answers == expected
    assert question.facts == ({"all_classes": classes} if classes else {})


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[__import__('os')]", "{1: [}", "[1,\0"]
)
def test_answers_are_never_run(text):
    assert literal(text) == text


def test_passages_are_hidden_among_others():
    rows = [
        {
            "question": f"q{i}?",
            "answers": ["a"],
            "title": f"t{i}",
            "passage": f"p{i}. a",
        }
        for i in range(PASSAGES + 5)
    ]
    documents = hide([only("nq", row, i + 1) for i, row in enumerate(rows)])
    assert [len(d.questions) for d in documents] == [PASSAGES, 5]
    first = documents[0]
    assert [q.query for q in first.questions] == [f"q{i}?" for i in range(PASSAGES)]
    for i, question in enumerate(first.questions):
        [(start, end)] = question.evidence
        assert first.text[start:end] == f"p{i}. a"
    starts = [q.evidence[0][0] for q in first.questions]
    assert starts != sorted(starts) and hide(documents[1:])[0].text != first.text


def test_books_are_read_and_not_asked():
    document = only("books", {"text": "Once.", "title": "x"})
    assert document.text == "Once." and document.questions == ()


# ------------------------------------------------------------------------- judged as


def test_every_task_names_a_metric_that_there_is():
    for task in TASKS.values():
        collection = task.name in ("longbench_sample", "leval_sample")
        assert (
            task.metric in metrics.METRICS or task.metric == "perplexity" or collection
        )


@pytest.mark.parametrize("name", ["longbench_sample", "leval_sample"])
def test_the_samples_own_answers_score_full_marks(name):
    if not os.environ.get("ACRE_DATA"):
        pytest.skip("needs ACRE_DATA")
    wrong = []
    for document in load(TASKS[name]).documents:
        for question in document.questions:
            metric = TASKS[document.task].metric
            said = max(
                metrics.score(metric, answer, question.answers, question.facts)
                for answer in question.answers
            )
            if said < 0.999:
                wrong.append((document.task, question.id, said))
    # Repeated summaries aside: ROUGE adds 1e-8, long texts exceed its recursion.
    assert len(wrong) <= 0.03 * 454, wrong
