"""Tasks: prompts to the letter, questions, evidence, rows that cannot be used."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import random
from pathlib import Path

import pytest
from evaluations import joined, only
from hypothesis import given, settings
from hypothesis import strategies as st

from acre.eval.published import published
from acre.eval.records import Document
from acre.eval.tasks import TASKS, find
from acre.eval.tasks.infinitebench import mentions
from acre.eval.tasks.longbench import EVEN, METRICS, PLAIN, code_tail

DATA = os.environ.get("ACRE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="ACRE_DATA names no folder")
CODE = "import os\n\n" + "".join(f"def f{i}():\n    return {i}\n" for i in range(40))
ROW = {
    "context": "Passage 1:\nA {curly} place.\n\nPassage 2:\nAnother place.",
    "input": "Where is {it}?",
    "answers": ["there", "over there"],
    "length": 5000,
    "all_classes": None,
    "_id": "abc",
}


V2 = {
    "_id": "x1",
    "context": " the $Q$ text \n",
    "question": " what? ",
    "answer": "C",
    "difficulty": "hard",
    "length": "long",
    "domain": "Code",
} | {f"choice_{x}": f" choice $C_{x}$ {x}" for x in "ABCD"}
BUCKETS = {"difficulty": "hard", "length": "long", "domain": "Code"}


def lines(name: str) -> list[dict]:
    path = Path(DATA or "") / f"{name}.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    "name, key, digest",
    [
        ("longbench", "templates", "e7d865d712fe45e2"),
        ("longbench", "max_new_tokens", "39a79d9491ead3dc"),
        ("longbench_v2", "template", "81429046d0689711"),
        ("infinitebench", "templates", "ede60cb9c1c20f1d"),
        ("infinitebench", "max_new_tokens", "bd8b5388d28c59b7"),
        ("ultradomain", "template", "157c8c8844a49e4e"),
    ],
)
def test_words_are_the_authors(name, key, digest):
    """Digests of the same values, taken from the authors' own files."""
    value = json.dumps(published(name)[key], ensure_ascii=False, sort_keys=True)
    assert hashlib.sha256(value.encode()).hexdigest()[:16] == digest


def test_every_file_of_words_names_source_and_licence():
    import acre.eval

    files = list((Path(acre.eval.__file__).parent / "prompts").glob("*.json"))
    assert len(files) == 7
    for file in files:
        words = json.loads(file.read_text("utf-8"))
        assert words["source"] and words["licence"]


# ------------------------------------------------------------------------- LongBench


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_longbench_prompt_is_the_authors(name, even):
    if even and name not in EVEN:
        assert f"{name}_e" not in TASKS
        return
    row = ROW | ({"context": CODE} if name in ("lcc", "repobench-p") else {})
    if name == "lcc":
        row = row | {"input": ""}
    document = only(f"{name}_e" if even else name, row)
    assert joined(document) == published("longbench")["templates"][name].format(**row)
    [question] = document.questions
    assert question.answers == ("there", "over there")
    assert question.query in question.prompt and question.id == "abc"
    assert question.max_new_tokens == published("longbench")["max_new_tokens"][name]
    assert question.buckets == ({"length": "4-8k"} if even else {})
    assert document.chat == (name not in PLAIN)
    assert question.stop == (("\n",) if name == "samsum" else ())


def test_longbench_by_hand():
    document = only("hotpotqa", ROW)
    task = (
        "Answer the question based on the given passages. Only give me the answer and "
        "do not output any other words.\n\n"
    )
    assert document.instruction == f"{task}The following are given passages.\n"
    assert document.text == ROW["context"]
    [question] = document.questions
    assert question.prompt == f"\n\n{task}Question: Where is {{it}}?\nAnswer:"
    assert question.query == "Where is {it}?" and question.max_new_tokens == 32


@pytest.mark.parametrize(
    "name, asked, query",
    [
        ("trec", "Question: Who ?\nType:", "Who ?"),
        ("triviaqa", "Passage:\nA b.\nQuestion:\nWho?\nAnswer:\n", "Who?"),
        ("samsum", "Dialogue: A: hi\r\nB: ho \nSummary: ", "A: hi\r\nB: ho"),
        ("lsht", "新闻内容：\n新闻\n类别：", "新闻"),
        ("trec", "no marks", "no marks"),
    ],
)
def test_few_shot_examples_are_text(name, asked, query):
    document = only(name, ROW | {"input": asked, "all_classes": ["x", "y"]})
    [question] = document.questions
    assert document.text == ROW["context"]
    assert question.prompt.strip("\n") == asked.strip("\n") and question.query == query
    assert question.facts == {"all_classes": ["x", "y"]}


@pytest.mark.parametrize("name", ["gov_report", "multi_news", "vcsum", "passage_count"])
def test_summaries_have_no_bare_question(name):
    assert only(name, ROW | {"input": ""}).questions[0].query == ""


@pytest.mark.parametrize(
    "length, bucket", [(3999, "0-4k"), (4000, "4-8k"), (8000, "8k+")]
)
def test_length_buckets(length, bucket):
    document = only("qasper_e", ROW | {"length": length})
    assert document.questions[0].buckets == {"length": bucket}


def test_code_before_the_cursor_is_asked():
    row = ROW | {"context": CODE, "input": "def last():\n    x = 1"}
    document = only("repobench-p", row)
    [question] = document.questions
    tail = question.prompt.removesuffix("Next line of code:\n")
    assert len(tail.splitlines()) == 20 and tail.endswith("def last():\n    x = 1")
    assert document.text.endswith("\n") and question.query == tail.strip()


def test_long_lines_before_the_cursor_are_fewer():
    code = ("x" * 399 + "\n") * 12
    assert code_tail(code) == len(code) - 3 * 400  # a fourth would pass 1,500
    assert code_tail("y" * 9000) == 9000 - 1500


@given(st.text("ab \n\t", max_size=4000), st.integers(1, 60))
def test_code_tail_is_whole_lines(code, width):
    code = code * width
    at = code_tail(code)
    tail = code[at:]
    assert len(tail) <= 1500 and (not code.strip() or at > 0 or len(code) < 2)
    assert len(tail.splitlines()) <= 20 or at == len(code) - min(1500, len(code) // 2)


@pytest.mark.parametrize(
    "name, head, answer",
    [
        ("passage_retrieval_en", "Paragraph {}: ", "Paragraph 3"),
        ("passage_retrieval_zh", "段落{}：", "段落3"),
    ],
)
def test_evidence_of_passage_retrieval(name, head, answer):
    texts = [f"the text of {i}, see Paragraph 3: it" for i in range(1, 31)]
    context = "\n\n".join(head.format(i + 1) + text for i, text in enumerate(texts))
    document = only(name, ROW | {"context": context, "answers": [answer]})
    [(start, end)] = document.questions[0].evidence
    assert document.text[start:end] == texts[2]
    last = ROW | {"context": context, "answers": [answer.replace("3", "30")]}
    [(start, end)] = only(name, last).questions[0].evidence
    assert document.text[start:end] == texts[29]
    missing = ROW | {"context": context, "answers": [answer.replace("3", "31")]}
    assert only(name, missing).questions[0].evidence == ()


def test_longbench_v2_prompt_is_the_authors():
    document = only("longbench_v2", V2)
    [question] = document.questions
    assert joined(document) == (
        "Please read the following text and answer the question below.\n\n<text>\n"
        "the $Q$ text\n</text>\n\nWhat is the correct answer to this question: what?\n"
        "Choices:\n(A) choice $C_A$ A\n(B) choice $C_B$ B\n(C) choice $C_C$ C\n"
        "(D) choice $C_D$ D\n\nFormat your response as follows: "
        '"The correct answer is (insert answer here)".'
    )
    assert question.answers == ("C",) and question.query == "what?"
    assert question.buckets == {
        "difficulty": "hard",
        "length": "long",
        "domain": "Code",
    }
    with pytest.raises(ValueError, match="answer: expected A, B, C or D, got 'E'"):
        only("longbench_v2", V2 | {"answer": "E"})


# --------------------------------------------------------------------- InfiniteBench

OPTIONS = ["one", "two", "three", "four"]
KEY = "0b1f1159-5ad1-42a9-a8de-f2a118b33744"
BOOK = "A book, in which $$MASK$$ and {braces} stand."
INFINITE = {
    "passkey": {
        "context": "The grass is green.\nThe pass key is 71432. Remember it. 71432 is "
        "the pass key.\nThe sky, 714321, is blue.\n",
        "input": "What is the pass key?",
        "answer": "71432",
    },
    "number_string": {
        "context": "Noise.\nThe sequence of digits is 0011223345. Remember it.\n",
        "input": "What is the sequence of digits?",
        "answer": "0011223345",
    },
    "kv_retrieval": {
        "context": f'JSON data:\n{{"{KEY}": "5e6b7b90-710d", "a": "b"}}',
        "input": f'\nKey: "{KEY}"\nThe value associated with the specified key is: ',
        "answer": "5e6b7b90-710d",
    },
    "longbook_sum_eng": {"context": BOOK, "input": "", "answer": ["A summary."]},
    "longbook_choice_eng": {
        "context": BOOK,
        "input": "Which?",
        "answer": ["three"],
        "options": OPTIONS,
    },
    "longbook_qa_eng": {"context": BOOK, "input": "Who?", "answer": ["He", "Him"]},
    "longbook_qa_chn": {"context": BOOK, "input": "谁？", "answer": ["他"]},
    "math_find": {
        "context": "[1, 2, 88]",
        "input": "You should answer with only one number, no other words. The largest "
        "number of the list is: ",
        "answer": 88,
    },
    "math_calc": {"context": "1 + 3 - 2", "input": "", "answer": [1, 4, 2]},
    "code_run": {
        "context": "def func_1(x): return x",
        "input": "Please give me the exact number of the return value of func_1(-2).",
        "answer": -2,
    },
    "code_debug": {
        "context": "def f(): pass",
        "input": "",
        "answer": "two",
        "options": OPTIONS,
    },
    "longdialogue_qa_eng": {"context": BOOK, "input": "", "answer": ["ACE", "ACE R"]},
}
INFINITE_FIELDS = {
    "math_find": {"prefix": "What is the largest number in the following list?"},
    "code_run": {"func": "func_1", "func_call": "func_1(-2)"},
}


@pytest.mark.parametrize("name", INFINITE)
def test_infinitebench_prompt_is_the_authors(name):
    row = INFINITE[name]
    document = only(name, row | {"id": 3})
    [question] = document.questions
    fields = {f"OPTION_{x}": text for x, text in zip("ABCD", OPTIONS, strict=True)}
    fields |= {"context": row["context"], "input": row["input"]}
    fields |= {"question": row["input"], **INFINITE_FIELDS.get(name, {})}
    assert joined(document) == published("infinitebench")["templates"][name].format(
        **fields
    )
    assert question.query in question.prompt and question.id == "3"
    assert bool(question.query) == (bool(row["input"]))
    assert TASKS[name].metric == name


def test_infinitebench_answers():
    assert set(INFINITE) == set(published("infinitebench")["templates"])
    answers = {name: only(name, row).questions[0] for name, row in INFINITE.items()}
    assert answers["longbook_choice_eng"].answers == ("three",)
    assert answers["code_debug"].facts == {"options": OPTIONS}
    assert answers["math_calc"].answers == ("1", "4", "2")
    assert answers["code_run"].answers == ("-2",)
    assert answers["math_find"].answers == ("88",)
    assert answers["math_find"].facts == {}
    assert answers["passkey"].max_new_tokens == 6


def test_infinitebench_evidence_is_where_the_answer_stands():
    for name in ("passkey", "number_string", "kv_retrieval"):
        document = only(name, INFINITE[name])
        [(start, end)] = document.questions[0].evidence
        text = document.text[start:end]
        assert text.startswith(INFINITE[name]["answer"])
        assert text.endswith(INFINITE[name]["answer"]) and len(text) < 40
    assert (
        only("longbook_qa_eng", INFINITE["longbook_qa_eng"]).questions[0].evidence == ()
    )


def test_mentions_are_words_and_far_ones_apart():
    text = "12 " + "x" * 200 + " 12, 12; 123"
    assert mentions(text, "12") == ((0, 2), (204, 210))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("longbook_choice_eng", {"options": OPTIONS[:3]}, "expected 4, got 3"),
        ("code_debug", {"answer": "nine"}, "expected one of the options, got 'nine'"),
        ("code_run", {"input": "run it"}, "expected a call as func_1"),
        ("math_find", {"input": "the largest"}, "expected 'The ... of'"),
    ],
)
def test_infinitebench_refuses(name, change, message):
    with pytest.raises(ValueError, match=message):
        only(name, INFINITE[name] | change)


# ------------------------------------------------------------- UltraDomain and L-Eval


@pytest.mark.parametrize("answers", ["One answer.", ["One answer."]])
def test_ultradomain(answers):
    row = {"context": BOOK, "input": "What {is} it?", "answers": answers, "_id": "u"}
    document = only("legal", row)
    assert joined(document) == (
        f"Read the text below and answer a question.\n\n{BOOK}\n\n"
        "Question: What {is} it?\n\nBe concise."
    )
    [question] = document.questions
    assert question.answers == ("One answer.",) and question.query == "What {is} it?"
    assert TASKS["legal"].metric == "qa_f1"


LEVAL = {
    "input": "A {long} document.",
    "instructions": ["Question 1. What?\nA. x\nB. y", "Question 2. Why?"],
    "outputs": ["AB", "because of that"],
    "evaluation": "exam",
}


def test_leval_exam():
    document = only("coursera", LEVAL)
    start = (
        "Now you are given a very long document. Please follow the instruction based"
    )
    assert document.instruction.startswith(start)
    assert document.instruction.endswith("when answering. Document is as follows. ")
    assert document.questions[0].prompt == (
        " \nQuestion: Question 1. What?\nA. x\nB. y.  Please directly give the answer "
        "without any additional output or explanation \nAnswer:"
    )
    assert [q.answers for q in document.questions] == [("AB",), ("because of that",)]
    assert [q.id for q in document.questions] == ["7.1", "7.2"]
    assert document.questions[0].max_new_tokens == 512


def test_leval_open_ended_states_the_length():
    document = only("narrative_qa", LEVAL | {"evaluation": "LLM"})
    assert document.questions[1].prompt == (
        " Instruction: Question 2. Why? \nAnswer this question with 3 words."
    )
    assert document.questions[1].facts == {"evaluation": "LLM"}
    assert TASKS["narrative_qa"].metric == "leval_f1"
    assert TASKS["gov_report_summ"].metric == "leval_rouge_l"


@pytest.mark.parametrize("name", ["gsm100", "codeU", "topic_retrieval_longchat"])
def test_leval_plain(name):
    document = only(name, LEVAL)
    system = published("leval")["systems"][name]
    assert joined(document, 1) == f"{system}{LEVAL['input']}\n\nQuestion 2. Why?"


def test_leval_science_fiction_asks_what_the_document_says():
    row = LEVAL | {"outputs": ["True [fact: False]", "False [fact: True]"]}
    first, second = only("sci_fi", row).questions
    assert first.answers == ("True",) and first.facts["fact"] == "False"
    assert second.answers == ("False",) and second.facts["fact"] == "True"


def test_leval_refuses_uneven_rows():
    with pytest.raises(ValueError, match="got 2 and 1"):
        only("coursera", LEVAL | {"outputs": ["A"]})


# ------------------------------------------------------------------------------ names


def test_find():
    names = [task.name for task in find(["longbench"])]
    assert names == list(METRICS)
    assert {task.name for task in find(["longbench_e"])} == {f"{n}_e" for n in EVEN}
    assert [t.name for t in find(["qasper", "En.MC", "KV", "qasper", "needle"])] == [
        "qasper",
        "longbook_choice_eng",
        "kv_retrieval",
        "probe_needle",
    ]
    assert len(find(["infinitebench"])) == 12 and len(find(["ultradomain"])) == 20
    assert (
        len(find(["leval"])) == 20 and find("passkey")[0].benchmark == "infinitebench"
    )
    assert {task.benchmark for task in find(["probe", "data"])} == {"probe", "data"}


def test_find_suggests():
    with pytest.raises(
        ValueError, match="unknown task 'hotpot_qa'; did you mean hotpotqa"
    ):
        find(["hotpot_qa"])
    with pytest.raises(
        ValueError, match="expected a task or one of data, infinitebench"
    ):
        find(["zzzzzz"])


def test_every_task_names_itself_and_its_data():
    for name, task in TASKS.items():
        assert task.name == name
        assert bool(task.file) == (task.benchmark != "probe")
        assert (task.hub is None) == (task.benchmark in ("probe", "data"))
        assert bool(task.metric) == (name not in ("longbench_sample", "leval_sample"))


# ---------------------------------------------------------------------- broken rows

SAMPLES = [
    {"dataset": "vcsum", "prompt": "下面", "answers": ["a"]},
    {"question": "q?", "answers": ["a"], "title": "t", "passage": "p"},
    {"turns": ["A: x", "B: y"], "queries": [{"query": "q", "answer": "a"}]},
    {"turns": ["x"], "queries": [{"query": "q", "answer": "a", "evidence_turns": [0]}]},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = sorted(
    {"context", "input", "answers", "answer", "options", "length", "all_classes"}
    | {"dataset", "prompt", "task", "instructions", "outputs", "evaluation", "question"}
    | {"queries", "turns", "passage", "title", "text", "index", "_id", "id"}
    | {f"choice_{x}" for x in "ABCD"} | {"difficulty", "domain"}
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_of_any_shape_are_refused_as_documented(data):
    """Rows of a known good shape with some fields replaced by anything."""
    good = [*INFINITE.values(), LEVAL | {"task": "coursera"}, ROW, V2, *SAMPLES]
    base = data.draw(st.sampled_from(good))
    changes = data.draw(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
    for task in TASKS.values():
        try:
            documents = task.parse(base | changes, 1)
        except (ValueError, KeyError, TypeError) as error:
            assert str(error)
        else:
            assert all(isinstance(one, Document) for one in documents)


def test_missing_and_mistyped_fields_are_named():
    with pytest.raises(KeyError, match="context"):
        only("qasper", {k: v for k, v in ROW.items() if k != "context"})
    with pytest.raises(TypeError, match="input: expected a string, got int"):
        only("qasper", ROW | {"input": 3})
    with pytest.raises(ValueError, match="answers: no answers"):
        only("qasper", ROW | {"answers": ["", " "]})
    with pytest.raises(
        TypeError, match=r"answers: expected strings, got list of \['dict'"
    ):
        only("qasper", ROW | {"answers": [{}]})
    with pytest.raises(TypeError, match="length: expected a number, got str"):
        only("qasper_e", ROW | {"length": "long"})


def test_documents_are_the_same_in_any_process():
    shuffled = dict(random.Random(0).sample(list(ROW.items()), len(ROW)))
    assert only("qasper", ROW) == only("qasper", shuffled)
    assert only("qasper", ROW).id == only("qasper", shuffled).id
