"""Training examples: the right tokens carry loss, query and evidence."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import toy
from model_files import smollm2
from training import (
    PROSE,
    RECORD,
    SIZES,
    Told,
    check_questions,
    decoded,
    no_skip,
    record,
)

import acre
from acre.training import examples
from acre.training.examples import Maker, Shape
from acre.training.forms import Question, Record

# ------------------------------------------------------------------------ text examples


def test_texts_are_cut_into_pieces_that_cover_them(wide):
    maker, reasons = Maker(wide, Shape(**SIZES)), Told()
    text = toy.sentence(3, 400)
    ids = wide.tokenizer.encode(text)
    cut = list(maker.texts(text, random.Random(1), reasons))
    read = np.concatenate([one.ids for one in cut])
    assert np.array_equal(read, ids[: len(read)]) and len(cut) > 3
    assert all(150 <= len(one.ids) <= 260 for one in cut[:-1])
    assert len({len(one.ids) for one in cut}) > 2
    rest = len(ids) - len(read)
    assert reasons == [examples.REMAINDER] * bool(rest)
    assert rest <= SIZES["window"]
    for one in cut:
        assert one.ids.dtype == np.int32 and one.weights.dtype == np.float32
        assert one.questions == () and one.tokens == len(one.ids)
        assert one.weights.tolist() == [1.0] * len(one.ids)


def test_remainders_and_short_texts(wide):
    maker = Maker(wide, Shape(100, 64, 32))
    ids = wide.tokenizer.encode(toy.sentence(3, 400))

    def pieces(tokens: int) -> tuple[list[int], list[str]]:
        text, reasons = wide.tokenizer.decode(ids[:tokens]), Told()
        assert len(wide.tokenizer.encode(text)) == tokens
        made = maker.texts(text, random.Random(0), reasons)
        return [len(one.ids) for one in made], reasons

    assert pieces(165) == ([100, 65], [])
    assert pieces(164) == ([100], [examples.REMAINDER])
    assert pieces(64) == ([], [examples.SHORT])


def test_every_piece_begins_as_the_tokenizer_begins_texts():
    model = toy.model()
    model.tokenizer = acre.Tokenizer(
        toy.tokenizer_json(), eos_ids=[2], bos_id=0, adds_bos=True
    )
    made = list(
        Maker(model, Shape(100, 64, 32)).texts(
            toy.sentence(1, 200), random.Random(0), Told()
        )
    )
    assert len(made) > 1 and {one.ids[0] for one in made} == {0}
    assert {len(one.ids) for one in made[:-1]} == {100}


def test_intervals_are_drawn_per_window_from_the_set(wide):
    maker, seen = Maker(wide, Shape((150, 260), 64, 32)), Counter()
    for seed in range(20):
        for one in maker.texts(
            toy.sentence(seed, 150), random.Random(seed), no_skip_short
        ):
            later = -(-(len(one.ids) - 64) // 32)
            assert len(one.intervals) == 1 + later
            seen.update(one.intervals)
    assert set(seen) == {8, 16, 32, 64, 128}
    assert min(seen.values()) > sum(seen.values()) / 10


def no_skip_short(reason: str, detail: str) -> None:
    assert reason == examples.REMAINDER


def test_intervals_leave_room_for_the_positions():
    """256 tokens of window 64 in 100 positions: l = 8 fits nowhere in all windows."""
    maker = Maker(toy.model(w_max=256), Shape(600, 64, 64, intervals=(4, 64)))
    text = toy.sentence(3, 600)
    for one in islice(maker.texts(text, random.Random(2), no_skip), 3):
        entries = sum(64 // interval for interval in one.intervals)
        assert entries + 64 <= 256
    tight, reasons = (
        Maker(toy.model(w_max=128), Shape(600, 64, 64, intervals=(4,))),
        Told(),
    )
    list(tight.texts(text, random.Random(2), reasons))
    assert set(reasons) <= {examples.LONG, examples.REMAINDER}
    assert examples.LONG in reasons
    with pytest.raises(ValueError, match="window: 64 tokens take"):
        Maker(toy.model(w_max=64), Shape(600, 64, 64))


# -------------------------------------------------------------------- question examples


def test_question_examples(wide):
    maker = Maker(wide, Shape((150, 6000), 64, 32))
    example = maker.asked(RECORD, random.Random(1), no_skip)
    check_questions(wide, example, RECORD)
    simple = record(PROSE, "What came?", "ships\nand boats")
    check_questions(wide, maker.asked(simple, random.Random(1), no_skip), simple)
    keys = set(example.arguments())
    assert keys == {"weights", "questions", "intervals", "window", "stride", "carry"}
    assert example.tokens == len(example.ids) + len(example.questions[0].ids)


def asked_about_years(years) -> Record:
    """A question for each year of PROSE."""
    starts = [PROSE.index(f"In the year {1700 + i}") for i in range(60)] + [len(PROSE)]
    asked = [
        Question(f"What of {1700 + i}?", f"{i} ships", ((starts[i], starts[i + 1]),))
        for i in years
    ]
    return Record(PROSE, tuple(asked))


def test_a_context_is_asked_all_its_questions(wide):
    maker = Maker(wide, Shape((150, 6000), 64, 32))
    three = asked_about_years([3, 30, 55])
    check_questions(wide, maker.asked(three, random.Random(1), no_skip), three)
    mixed = Record(PROSE, (*three.questions, Question("Who?", "the keeper")))
    example = maker.asked(mixed, random.Random(1), no_skip)
    check_questions(wide, example, mixed)
    told = Told()
    partly = Record(PROSE, (Question("Who?", "nobody"), *mixed.questions), True)
    assert len(maker.asked(partly, random.Random(1), told).questions) == 4
    assert told == [examples.UNTOLD]


def test_a_context_may_count(wide):
    shape = Shape((150, 6000), 64, 32, context_weight=0.25)
    example = Maker(wide, shape).asked(RECORD, random.Random(1), no_skip)
    assert example.weights.tolist() == [0.25] * len(example.ids)
    assert set(example.questions[0].weights.tolist()) == {0.0, 1.0}


def test_of_many_questions_some_are_asked(wide):
    maker = Maker(wide, Shape((150, 6000), 64, 32, questions=5))
    many, drawn = asked_about_years(range(40)), set()
    for seed in range(4):
        example = maker.asked(many, random.Random(seed), no_skip)
        assert len(example.questions) == 5
        places = [int(np.flatnonzero(q.evidence)[0]) for q in example.questions]
        assert places == sorted(places)
        drawn.add(tuple(places))
    assert len(drawn) == 4


def test_a_part_is_asked_what_it_tells(wide):
    """A long context is cut around the evidence of one question; others whose evidence
    lies in the part come along, and those of unknown evidence do not."""
    maker, counts = Maker(wide, Shape((150, 400), 64, 32)), Counter()
    many = asked_about_years(range(60))
    unknown = Record(PROSE, (*many.questions, Question("Who?", "the keeper")))
    for seed in range(6):
        example = maker.asked(unknown, random.Random(seed), Told())
        own = decoded(wide, example.ids)
        asked = [q.ids[slice(*q.query)] for q in example.questions]
        told = {q.text for q in many.questions if f"year {q.text[8:12]} the" in own}
        assert {decoded(wide, ids).strip() for ids in asked} <= told
        assert len(told) - 2 <= len(asked) < 60
        counts[len(asked)] += 1
    assert max(counts) > 1


def test_what_is_trained_is_what_is_asked(wide):
    """The ids are those that `build` reads and `ask` sends to the model."""
    told = record(toy.sentence(1, 100), "Which gulls? Grey?", "grey gulls", (), "Grey?")
    maker = Maker(wide, Shape((150, 6000), 64, 32))
    example = maker.asked(told, random.Random(1), no_skip)
    cache = wide.build(told.context, **toy.BUILD)
    assert np.array_equal(example.ids, cache.ids)
    asked = []

    class Streamer:
        def put(self, ids):
            asked.append(np.asarray(ids))

        def end(self):
            pass

    [question] = told.questions
    cache.ask(
        question.text, query="Grey?", eta=8, max_new_tokens=1, streamer=Streamer()
    )
    sent = asked[0].reshape(-1)
    ids = example.questions[0].ids
    assert np.array_equal(ids[: len(sent)], sent)
    end = [*wide.tokenizer.encode("grey gulls"), wide.eos_ids[0]]
    assert ids[len(sent) :].tolist() == end


def test_answers_end_as_the_template_ends_a_turn():
    ends = acre.Tokenizer(
        toy.tokenizer_json(), eos_ids=[0, 2], chat_template=toy.TEMPLATE,
        special_names={"eos_token": "<|endoftext|>"},
    )  # fmt: skip
    assert acre.Frame(ends).answer_ids("the")[-1] == 2
    bare = acre.Frame(ends, template="")
    assert bare.answer_ids("the")[-1] == 0
    assert ends.decode(bare.answer_ids("the")[:-1]) == " the"
    silent = acre.Frame(acre.Tokenizer(toy.tokenizer_json()))
    assert ends.decode(silent.answer_ids("the")) == " the"
    with pytest.raises(ValueError, match="answer: got an empty"):
        bare.answer_ids(" ")


def test_answers_not_in_the_sample(wide):
    reasons = Told()
    shape = Shape((150, 6000), 64, 32)
    absent = record(PROSE, "who?", "Nobody else", extractive=True)
    assert Maker(wide, shape).asked(absent, random.Random(0), reasons) is None
    assert reasons == [examples.UNTOLD]
    free = Maker(wide, shape, require_answer=False)
    assert free.asked(absent, random.Random(0), no_skip)
    for changed in (
        record(PROSE, "who?", "Nobody else", ((0, 9),), extractive=True),
        record(PROSE, "who?", "Nobody else"),
        record(PROSE, "who?", "THE  year", extractive=True),
    ):
        assert Maker(wide, shape).asked(changed, random.Random(0), no_skip)


def test_long_contexts_are_cut_around_the_evidence(wide):
    maker, starts = Maker(wide, Shape((150, 400), 64, 32)), set()
    for seed in range(12):
        reasons = Told()
        example = maker.asked(RECORD, random.Random(seed), reasons)
        assert reasons == [examples.CUT] and len(example.ids) == 400
        check_questions(wide, example, RECORD, whole=False)
        starts.add(int(np.flatnonzero(example.questions[0].evidence)[0]))
    assert len(starts) > 6


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(PROSE, "q?", "the"), examples.LONG),
        (record(PROSE, "q?", "the", ((0, 5000),)), examples.LONG),
        (record("short", "q?", "short"), examples.SHORT),
    ],
)
def test_contexts_that_cannot_be_read(bad, reason):
    model, reasons = toy.model(w_max=4096), Told()
    # Without the template the prefix is shorter than a window.
    maker = Maker(
        model, Shape((150, 400), 64, 32), frame=acre.Frame(model.tokenizer, template="")
    )
    made = maker.asked(bad, random.Random(0), reasons)
    assert made is None and reasons == [reason]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"length": 64}, "length: got 64, expected 65"),
        ({"length": (200, 100)}, "length: got 100, expected 200"),
        ({"length": (1, 2, 3)}, "length: got"),
        ({"intervals": ()}, "intervals: got none"),
        ({"intervals": (0,)}, "intervals: got 0"),
        ({"window": 0}, "window: got 0"),
        ({"stride": 0}, "stride: got 0"),
        ({"carry": -1}, "carry: got -1"),
        ({"questions": 0}, "questions: got 0"),
        ({"context_weight": -1.0}, "context_weight: got -1"),
    ],
)
def test_shapes_refuse(changes, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        Shape(**{**SIZES, **changes})


def test_a_model_without_words_is_refused():
    with pytest.raises(ValueError, match="has no tokenizer"):
        Maker(toy.model(words=False), Shape(**SIZES))


@pytest.mark.slow
def test_question_examples_of_a_real_tokenizer():
    model = acre.Model.from_pretrained(smollm2())
    maker = Maker(model, Shape((600, 6000), 512, 256))
    check_questions(model, maker.asked(RECORD, random.Random(1), no_skip), RECORD)
    short = Maker(model, Shape((600, 700), 512, 256))
    example = short.asked(RECORD, random.Random(1), Told())
    check_questions(model, example, RECORD, whole=False)
    assert decoded(model, example.questions[0].ids).endswith("1730<|im_end|>")
