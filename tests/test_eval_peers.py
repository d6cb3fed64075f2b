"""Peers of the evaluation: others' compressed caches on acre's weights and prompts.

The tiny model in float32, so that answers can be compared token by token. What needs
kvpress is skipped without it: benchmarks/requirements-peers.txt.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import evaluations
import numpy as np
import pytest
import toy

import acre
from acre.eval.methods import Settings, entries
from acre.eval.records import Document, Question
from acre.eval.shelf import Shelf
from acre.eval.work import ModelSpec

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import eval_peers  # noqa: E402
import peer_presses  # noqa: E402
from peer_models import torch_from_file  # noqa: E402
from peer_presses import TransformersMethod  # noqa: E402

NEW = 12
SETTINGS = Settings(interval=8, window=64, stride=64, eta=64)
ROOMY = Settings(budget=4096)
RNG = 0  # weights whose answers vary with the question and with what is kept
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


@pytest.fixture
def shelf(model):
    return Shelf(model)


def method(path: Path, press: str = "full", reading: Settings = SETTINGS, **options):
    return TransformersMethod(press, reading, path, dtype="f32", **options)


def plain_answer(model, doc: Document, asked: Question) -> str:
    """acre's full attention over the very same ids."""
    frame = Shelf(model).frame(doc)
    body = model.tokenizer.encode(doc.text)
    ids = [frame.prefix_ids, body, frame.question_ids(asked.prompt)[0]]
    made = model.generate_ids(np.concatenate(ids), max_new_tokens=NEW)
    return model.decode(made)


# ---------------------------------------------------------------------- without a press


def test_full_attention_answers_as_acre_does(path, model, shelf):
    """Through transformers, from one reading, in any order of questions."""
    doc = document()
    reading = method(path).open(shelf, doc)
    whole = [plain_answer(model, doc, asked) for asked in doc.questions]
    assert whole[0] != whole[1]
    for asked, expected in zip((*doc.questions,) * 2, whole * 2, strict=True):
        reply = reading.ask(asked)
        assert reply.text == expected
        assert reply.new_tokens == NEW and reply.first_token_s > 0
        assert reply.kept == [(0, len(doc.text))] and not reply.truncated
        assert reply.context_tokens == len(model.tokenizer.encode(doc.text))
        assert reply.entries == len(reading.ids)
        assert reply.peak_bytes > 1 << 20


def test_the_built_cache_answers_alike(path, model, shelf):
    """A cache built through one window is full attention too."""
    doc = document()
    asked = doc.questions[0]
    frame = shelf.frame(doc)
    cache = model.build(
        doc.text, window=1024, interval=8, eta=64, reserve=320, progress=False,
        frame=frame,
    )  # fmt: skip
    built = cache.ask(asked.prompt, max_new_tokens=NEW)
    assert method(path).open(shelf, doc).ask(asked).text == built.text


def test_a_stop_string_ends_the_answer(path, shelf):
    doc = document()
    reading = method(path).open(shelf, doc)
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


def test_a_long_text_loses_its_middle(path, model, shelf):
    doc = document(1200)
    reading = method(path).open(shelf, doc)
    reply = reading.ask(doc.questions[0])
    assert reply.truncated and len(reply.kept) == 2
    room = model.config["w_max"] - len(reading.ids)
    assert 0 <= room - shelf.room(doc) <= 16


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
    ("press", "aware", "message"),
    [("other", False, "press"), ("full", True, "question_aware")],
)
def test_bad_methods_are_refused(press, aware, message):
    with pytest.raises(ValueError, match=message):
        TransformersMethod(press, SETTINGS, Path("m"), question_aware=aware)


def test_a_budget_below_what_a_press_keeps_is_refused(path, shelf):
    small = Settings(budget=8)
    with pytest.raises(ValueError, match="65 or more"):
        method(path, "snapkv", small).open(shelf, document())


# ------------------------------------------------------------------------- with kvpress


@needs_kvpress
@pytest.mark.parametrize("press", ("snapkv", "expected_attention"))
@pytest.mark.parametrize("aware", AWARE)
def test_a_budget_for_everything_changes_nothing(path, model, shelf, press, aware):
    """Ratio 0: the answers of plain transformers, which are acre's."""
    doc = document()
    reading = method(path, press, ROOMY, question_aware=aware).open(shelf, doc)
    for asked in doc.questions:
        reply = reading.ask(asked)
        assert reply.text == plain_answer(model, doc, asked)
        assert reply.entries == len(reading.ids)
        assert reply.kept == [(0, len(doc.text))]


@needs_kvpress
@pytest.mark.parametrize("press", ("snapkv", "expected_attention"))
@pytest.mark.parametrize("aware", AWARE)
def test_the_budget_is_kept(path, model, shelf, press, aware):
    """Entries as asked for, whatever the question; answers repeat, and are others."""
    doc = document(150)
    reading = method(path, press, question_aware=aware).open(shelf, doc)
    asked = (*doc.questions, doc.questions[0])
    replies = [reading.ask(q) for q in asked]
    prefix = len(shelf.frame(doc).prefix_ids)
    budget = entries(shelf, doc, SETTINGS) + prefix
    assert {reply.entries for reply in replies} == {budget}
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
def test_as_the_pipeline_of_kvpress(path, model, shelf, press, aware):
    """The same ids through kvpress' own pipeline give the same answers; for the
    question-aware ones the question is part of its context, as in its evaluation."""
    doc = document(150)
    reading = method(path, press, question_aware=aware).open(shelf, doc)
    ids, frame = reading.ids, shelf.frame(doc)
    keep = reading.ask(doc.questions[0]).entries
    asked = [frame.question_ids(q.prompt) for q in doc.questions]
    if aware:
        theirs = [
            piped(
                path, model, press, keep + last, np.concatenate([ids, q[:last]]),
                [q[last:]],
            )[0]
            for q, _, last in asked
        ]  # fmt: skip
    else:
        theirs = piped(path, model, press, keep, ids, [q for q, _, _ in asked])
    assert [reading.ask(q).text for q in doc.questions] == theirs


# ------------------------------------------------------------------- in an evaluation


def test_methods_by_name():
    names = ["full", "snapkv", "snapkv+question", "expected_attention"]
    made = eval_peers.methods_of(names, SETTINGS, Path("m"), "bf16")
    labels = ["transformers-full", *names[1:]]
    assert [one.label for one in made] == labels
    assert [one.question_aware for one in made] == [False, False, True, False]
    assert made[0].settings()["press"] == "none" and "eta" not in made[0].settings()


def test_full_attention_scores_as_acres_own(tmp_path):
    place = evaluations.folder(tmp_path, 2, 1)
    path = place / "model"
    spec = ModelSpec(str(path), {"dtype": "f32", "threads": 1})
    peer = TransformersMethod("full", SETTINGS, path, dtype="f32")
    report = acre.evaluate(
        evaluations.TASK, spec, place, [peer, "full"], progress=False,
        **evaluations.SETTINGS,
    )  # fmt: skip
    said = {
        method: [s["prediction"] for s in report.samples if s["method"] == method]
        for method in ("transformers-full", "full")
    }
    assert said["transformers-full"] == said["full"] and len(said["full"]) == 2
