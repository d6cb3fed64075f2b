"""Peers of the evaluation: others' compressed caches on acre's weights and prompts.

The tiny model in float32, so that answers can be compared token by token. What needs
kvpress is skipped without it: benchmarks/requirements-peers.txt.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import toy

import acre
from acre.eval.records import Document, Question

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import eval_peers  # noqa: E402
import peer_presses  # noqa: E402
from peer_models import torch_from_file  # noqa: E402
from peer_presses import TransformersMethod  # noqa: E402

NEW = 12
RNG = 5  # weights whose answers vary with the question and with what is kept
AWARE = (False, True)
needs_kvpress = pytest.mark.skipif(
    importlib.util.find_spec("kvpress") is None,
    reason=f"needs kvpress: {peer_presses.REQUIREMENTS}",
)


def question(name: str, prompt: str = "who keeps the ledger?") -> Question:
    return Question(name, prompt, ("a keeper",), NEW)


def document(words: int = 60, **changes) -> Document:
    questions = (question("a"), question("b", "how many bridges?"))
    plain = Document("toy", toy.sentence(3, words), questions, "Read this.")
    return dataclasses.replace(plain, **changes)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return toy.directory(tmp_path_factory.mktemp("peers") / "m", rng=RNG)


@pytest.fixture(scope="module")
def model(path):
    return acre.Model.from_pretrained(path, dtype="f32", threads=1)


def method(path: Path, press: str = "full", budget: int = 0, **options):
    return TransformersMethod(press, budget, path, dtype="f32", **options)


def plain_answer(model, doc: Document, asked: Question) -> str:
    """acre's full attention over the very same ids."""
    frame = peer_presses.framed(model.tokenizer, doc)
    body = model.tokenizer.encode(doc.text)
    ids = [frame.prefix_ids, body, frame.question_ids(asked.prompt)[0]]
    made = model.generate_ids(np.concatenate(ids), max_new_tokens=NEW)
    return model.decode(made)


# ---------------------------------------------------------------------- without a press


def test_full_attention_answers_as_acre_does(path, model):
    """Through transformers, from one reading, in any order of questions."""
    doc = document()
    reading = method(path).open(model, doc)
    whole = [plain_answer(model, doc, asked) for asked in doc.questions]
    assert whole[0] != whole[1]
    for asked, expected in zip((*doc.questions,) * 2, whole * 2, strict=True):
        reply = reading.ask(asked)
        assert reply.text == expected
        assert reply.new_tokens == NEW and reply.first_token_s > 0
        assert reply.kept == [(0, len(doc.text))] and not reply.truncated
        assert reply.context_tokens == len(model.tokenizer.encode(doc.text))
        assert reply.entries == len(reading.prompt.ids)
        assert reply.peak_bytes > 1 << 20


def test_the_built_cache_answers_alike(path, model):
    """A cache built through one window is full attention too."""
    doc = document()
    asked = doc.questions[0]
    frame = peer_presses.framed(model.tokenizer, doc)
    cache = model.build(
        doc.text, window=1024, interval=8, eta=64, reserve=320, progress=False,
        frame=frame,
    )  # fmt: skip
    built = cache.ask(asked.prompt, max_new_tokens=NEW)
    assert method(path).open(model, doc).ask(asked).text == built.text


def test_a_stop_string_ends_the_answer(path, model):
    doc = document()
    reading = method(path).open(model, doc)
    whole = reading.ask(doc.questions[0]).text
    asked = dataclasses.replace(doc.questions[0], stop=(whole[2:4],))
    assert reading.ask(asked).text == whole[: whole.index(whole[2:4])]


@pytest.mark.parametrize("family", ("llama", "qwen2"))
def test_torch_and_acre_have_the_same_logits(tmp_path, family):
    """Both families: their weights reach transformers whole, in float32 as they are."""
    import torch

    path, ids = toy.directory(tmp_path / "m", family), np.arange(3, 40)
    model = acre.Model.from_pretrained(path, dtype="f32", threads=1)
    with torch.inference_mode():
        theirs = torch_from_file(path, "f32")(torch.from_numpy(ids)[None]).logits[0]
    np.testing.assert_allclose(model.logits(ids), theirs.numpy(), atol=2e-4)


def test_a_closed_reading_refuses(path, model):
    reading = method(path).open(model, document())
    reading.close()
    with pytest.raises(ValueError, match="closed"):
        reading.ask(question("c"))


def test_a_question_without_room_is_refused(path, model):
    reading = method(path).open(model, document())
    with pytest.raises(ValueError, match="positions"):
        reading.ask(dataclasses.replace(question("c"), max_new_tokens=1000))


# ------------------------------------------------------------------------------ prompts


def test_a_long_text_loses_its_middle(model):
    """Frame, text, longest question and answer take every position, and no more."""
    asked = (question("a"), question("b", "how many bridges did the keeper write?"))
    doc = document(1200, questions=asked)
    frame = peer_presses.framed(model.tokenizer, doc)
    read = peer_presses.prompt(model.tokenizer, frame, doc, 1024)
    lengths = [len(frame.question_ids(q.prompt)[0]) for q in asked]
    longest = max(lengths)
    assert min(lengths) < longest
    assert read.truncated and len(read.ids) + longest + NEW == 1024
    (zero, first), (last, size) = read.ranges
    assert zero == 0 and size == len(doc.text) and first < last
    body = read.ids[len(frame.prefix_ids) :]
    assert len(body) == read.tokens
    ids, offsets = model.tokenizer.encode_offsets(doc.text)
    tail = read.tokens // 2
    head = read.tokens - tail
    assert body.tolist() == [*ids[:head], *ids[-tail:]]
    assert first == offsets[head - 1, 1] and last == offsets[-tail, 0]


def test_a_prompt_without_room_is_refused(model):
    doc = document()
    frame = peer_presses.framed(model.tokenizer, doc)
    with pytest.raises(ValueError, match="positions"):
        peer_presses.prompt(model.tokenizer, frame, doc, 40)


def test_without_chat_nothing_is_added(model):
    """Instruction, text and question alone, encoded apart."""
    doc, encode = document(chat=False), model.tokenizer.encode
    frame = peer_presses.framed(model.tokenizer, doc)
    ids = frame.question_ids("how many?")[0]
    assert model.decode(frame.prefix_ids).strip() == "Read this."
    assert ids.tolist() == encode("how many?").tolist()


# ------------------------------------------------------------------------------ budgets


def test_the_ratio_keeps_the_budget_to_the_entry():
    """kvpress keeps int(n * (1 - ratio)); the plain ratio is one short at times."""
    plain = 0
    for n in range(2, 400):
        for keep in range(1, n):
            share = peer_presses.ratio(n, keep)
            assert 0 < share < 1 and int(n * (1 - share)) == keep
            plain += int(n * (1 - (1 - keep / n))) != keep
    assert plain > 0
    assert peer_presses.ratio(5, 5) == peer_presses.ratio(5, 9) == 0.0


@pytest.mark.parametrize(
    ("press", "budget", "aware", "message"),
    [
        ("other", 100, False, "press"),
        ("snapkv", 64, False, "at least 65"),
        ("full", 64, False, "budget"),
        ("full", 0, True, "question_aware"),
    ],
)
def test_bad_methods_are_refused(press, budget, aware, message):
    with pytest.raises(ValueError, match=message):
        TransformersMethod(press, budget, Path("m"), question_aware=aware)


# ------------------------------------------------------------------------- with kvpress


@needs_kvpress
@pytest.mark.parametrize("press", ("snapkv", "expected_attention"))
@pytest.mark.parametrize("aware", AWARE)
def test_a_budget_for_everything_changes_nothing(path, model, press, aware):
    """Ratio 0: the answers of plain transformers, which are acre's."""
    doc = document()
    reading = method(path, press, 4096, question_aware=aware).open(model, doc)
    for asked in doc.questions:
        reply = reading.ask(asked)
        assert reply.text == plain_answer(model, doc, asked)
        assert reply.entries == len(reading.prompt.ids)
        assert reply.kept == [(0, len(doc.text))]


@needs_kvpress
@pytest.mark.parametrize("press", ("snapkv", "expected_attention"))
@pytest.mark.parametrize("aware", AWARE)
def test_the_budget_is_kept(path, model, press, aware):
    """Entries as asked for, whatever the question; answers repeat, and are others."""
    doc = document(150)
    reading = method(path, press, 80, question_aware=aware).open(model, doc)
    asked = (*doc.questions, doc.questions[0])
    replies = [reading.ask(q) for q in asked]
    assert {reply.entries for reply in replies} == {80}
    assert all(reply.kept is None for reply in replies)
    assert replies[0].text == replies[2].text
    whole = [plain_answer(model, doc, q) for q in doc.questions]
    assert all(a.text != b for a, b in zip(replies[:2], whole, strict=True))
    assert (replies[0].build_s == 0) is aware


class Words:
    """A tokenizer that only decodes, as kvpress' pipeline calls it."""

    def __init__(self, model) -> None:
        self.model = model

    def decode(self, tokens, skip_special_tokens):
        return self.model.decode(tokens.numpy())


def piped(path: Path, model, press: str, keep: int, context, asked) -> list[str]:
    """The answers of kvpress' own pipeline to token ids."""
    import kvpress
    import torch

    pipeline = object.__new__(kvpress.KVPressTextGenerationPipeline)
    pipeline.model = torch_from_file(path, "f32")
    pipeline.model.generation_config.eos_token_id = list(model.eos_ids)
    pipeline.tokenizer = Words(model)
    spec = peer_presses.PRESSES[press]
    share = peer_presses.ratio(len(context), keep)
    pressing = getattr(kvpress, spec.kind)(compression_ratio=share, **spec.options)
    rows = [torch.from_numpy(row.astype(np.int64))[None] for row in (context, *asked)]
    with torch.inference_mode():
        inputs = {"context_ids": rows[0], "questions_ids": rows[1:]}
        return pipeline._forward(inputs, NEW, pressing)


@needs_kvpress
@pytest.mark.parametrize("press", ("snapkv", "expected_attention"))
@pytest.mark.parametrize("aware", AWARE)
def test_as_the_pipeline_of_kvpress(path, model, press, aware):
    """The same ids through kvpress' own pipeline give the same answers; for the
    question-aware ones the question is part of its context, as in its evaluation."""
    doc = document(150)
    reading = method(path, press, 80, question_aware=aware).open(model, doc)
    ids, frame = reading.prompt.ids, peer_presses.framed(model.tokenizer, doc)
    asked = [frame.question_ids(q.prompt) for q in doc.questions]
    if aware:
        theirs = [
            piped(
                path, model, press, 80 + last, np.concatenate([ids, q[:last]]),
                [q[last:]],
            )[0]
            for q, _, last in asked
        ]  # fmt: skip
    else:
        theirs = piped(path, model, press, 80, ids, [q for q, _, _ in asked])
    assert [reading.ask(q).text for q in doc.questions] == theirs


# -------------------------------------------------------------------- the file of lines


class Echo:
    """A method that answers with the question's id; `calls` counts what was asked."""

    def __init__(self, name: str = "echo", budget: int = 1) -> None:
        self.name, self.budget = name, budget
        self.calls: list[str] = []

    def settings(self):
        return {"budget": self.budget}

    def open(self, model, document):
        if document.text == "broken":
            raise ValueError("text: is broken")
        return self

    def ask(self, asked):
        self.calls.append(asked.id)
        if asked.id == "bad":
            raise RuntimeError("no answer")
        return peer_presses.Reply(asked.id, 9, 4, None, False, 0.1, 0.2, 0.3, 5, 7)

    def close(self):
        self.calls.append("closed")


def answers(path: Path, model, documents, *methods) -> int:
    lines = eval_peers.Lines(path)
    try:
        return eval_peers.run(model, documents, methods, lines)
    finally:
        lines.close()


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_have_what_scoring_needs(tmp_path, model):
    out = tmp_path / "o.jsonl"
    asked = dataclasses.replace(question("\u00e9"), facts={"classes": ["x", "y"]})
    assert answers(out, model, [document(questions=(asked,))], Echo()) == 0
    (line,) = records(out)
    assert line["task"] == "toy" and line["id"] == line["prediction"] == "\u00e9"
    assert line["method"] == "echo" and line["answers"] == ["a keeper"]
    assert line["facts"] == {"classes": ["x", "y"]} and line["settings"]
    assert math.isclose(line["first_token_s"], 0.2) and line["context_tokens"] == 9
    assert line["entries"] == 4 and line["peak_bytes"] == 7


def test_a_run_goes_on_where_one_stopped(tmp_path, model):
    """What is answered is not asked again, what a killed run left of a line is cut
    off, and other settings are another answer."""
    out, doc = tmp_path / "o.jsonl", document()
    answers(out, model, [document(questions=doc.questions[:1])], Echo())
    whole = out.read_bytes()
    out.write_bytes(whole + whole[:30])
    again, other = Echo(), Echo(budget=2)
    assert answers(out, model, [doc], again, other) == 0
    assert again.calls == ["b", "closed"] and other.calls == ["a", "b", "closed"]
    assert [line["id"] for line in records(out)] == ["a", "b", "a", "b"]
    last = Echo()
    answers(out, model, [doc], last)
    assert last.calls == [] and len(records(out)) == 4


def test_failures_are_reported_and_tried_again(tmp_path, model, capsys):
    out, good = tmp_path / "o.jsonl", question("good")
    docs = [
        document(questions=(question("bad"), good)),
        document(text="broken"),
    ]
    assert answers(out, model, docs, Echo()) == 3
    assert [line["id"] for line in records(out)] == ["good"]
    said = capsys.readouterr().err
    assert "bad" in said and "no answer" in said and "text: is broken" in said
    again = Echo()
    answers(out, model, docs, again)
    assert again.calls == ["bad", "closed"]


def test_another_file_is_refused(tmp_path):
    out = tmp_path / "o.jsonl"
    out.write_text('{"task": 1}\n')
    with pytest.raises(ValueError, match="o.jsonl:1"):
        eval_peers.Lines(out)
    assert out.read_text() == '{"task": 1}\n'


def test_methods_by_name():
    names = "full,snapkv,snapkv+question,expected_attention"
    made = eval_peers.methods_of(names, 100, Path("m"), "bf16")
    assert [one.name for one in made] == [
        "transformers-full",
        "snapkv-100",
        "snapkv+question-100",
        "expected_attention-100",
    ]
    assert [one.question_aware for one in made] == [False, False, True, False]
    assert made[0].settings()["budget"] == 0
