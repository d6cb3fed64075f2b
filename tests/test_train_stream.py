"""Builders know their evidence; streams share, mix and resume to the bit."""

from __future__ import annotations

import json
import logging
import lzma
import os
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import toy
import training
from model_files import smollm2
from training import (
    PROSE,
    RECORD,
    SIZES,
    decoded,
    needs_data,
    nq,
    plain,
    texts,
    write,
)

import acre
from acre.training import builders, examples
from acre.training.builders import BUILDERS, Material, Order
from acre.training.forms import parse
from acre.training.stream import Stream

# ----------------------------------------------------------------------------- builders


def words(text: str) -> int:
    return len(re.findall(r"\w{1,4}|[^\w ]", text))


def materials() -> dict[str, Material]:
    asked = Material(records=[parse(nq(i))[0] for i in range(60)])
    meeting = Material(records=[RECORD])
    prose = Material(texts=[PROSE * 3, PROSE])
    return {
        "hidden": asked, "meeting": meeting, "needles": prose, "continuation": prose,
        "key_values": Material(),
    }  # fmt: skip


def test_excerpts_are_pieces_from_anywhere(tmp_path, wide):
    path, starts = write(tmp_path / "a.jsonl", [{"text": PROSE}, *texts(1, 60)]), []
    for one in islice(Stream(wide, f"excerpts:{path}", **SIZES), 20):
        text = decoded(wide, one.ids)
        assert one.questions == () and 150 <= len(one.ids) <= 260
        starts.append(PROSE.find(text))
    assert len(set(starts)) > 10
    assert (
        len({len(one.ids) for one in islice(Stream(wide, "excerpts", **SIZES), 9)}) > 5
    )


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"excerpts"}))
def test_builders_know_their_evidence(name):
    seen, counts = set(), set()
    for seed in range(12):
        order = Order(random.Random(seed), 1200, words)
        record = BUILDERS[name].make(materials()[name], order)
        again = BUILDERS[name].make(
            materials()[name], Order(random.Random(seed), 1200, words)
        )
        assert record == again
        seen.update((q.text, q.answer) for q in record.questions)
        for q in record.questions:
            told = " ".join(record.context[a:b] for a, b in q.evidence)
            parts = [q.answer] if name != "needles" else q.answer.split(", ")
            assert all(part in told for part in parts)
            assert q.query in q.text
        counts.add(len(record.questions))
        if name != "meeting":
            assert words(record.context) <= 1200 * 1.03
            assert words(record.context) >= 1200 * 0.9
    assert len(seen) > 8 or name == "meeting"
    assert max(counts) > 1 or name == "meeting"


def test_hidden_passages():
    """Each answer is in its own passage alone; no passage comes twice."""
    material, places = materials()["hidden"], set()
    for seed in range(30):
        order = Order(random.Random(seed), 900, words)
        record = builders.hidden(material, order)
        passages = record.context.split("\n\n")
        assert len(set(passages)) == len(passages) > 15
        for q in record.questions:
            [(start, end)] = q.evidence
            assert any(record.context[start:end] in one for one in passages)
            assert q.answer in record.context[start:end]
            told = [q.answer.casefold() in one.casefold() for one in passages]
            assert sum(told) == 1
            places.add(record.context[:start].count("\n\n"))
    assert len(places) > 15 and len(record.questions) > 5
    with pytest.raises(ValueError, match="longer than 5 tokens"):
        builders.hidden(material, Order(random.Random(0), 5, words))


def test_passages_that_say_the_answer_are_left_out():
    """For the passage drawn first; a later one's question is left out instead."""
    told = nq(5)["passage"]
    twin = parse(nq(5) | {"passage": told.upper() + " Again.", "title": ""})[0]
    material = Material(records=[parse(nq(i))[0] for i in (5, 20, 30)] + [twin])
    material.records.append(training.record("It is not said.", "who?", "nobody"))
    sizes = Counter()
    for seed in range(40):
        record = builders.hidden(material, Order(random.Random(seed), 900, words))
        passages = record.context.split("\n\n")
        assert len(set(passages)) == len(passages)
        for q in record.questions:
            sizes[q.answer, len(passages)] += 1
    answer = nq(5)["answers"][0]
    assert (answer, 4) in sizes and (answer, 5) not in sizes
    assert ("nobody", 5) in sizes and ("nobody", 6) not in sizes


def test_continuations_are_told_once():
    """Sentences that come twice cannot be asked for."""
    text = PROSE + " " + PROSE[: len(PROSE) // 2]
    for seed in range(20):
        order = Order(random.Random(seed), 4000, words)
        record = builders.continuation(Material([text]), order)
        assert len(set(record.questions)) == len(record.questions) > 5
        for q in record.questions:
            told = q.text.split('"', 1)[1].removesuffix('"')
            [(start, end)] = q.evidence
            assert record.context.count(told) == 1
            assert record.context[:start].rstrip().endswith(told)
            assert record.context[start:end] == q.answer
    with pytest.raises(ValueError, match="no sentence"):
        builders.continuation(Material(["dots . " * 900]), order)


def test_material_is_held_up_to_a_size(monkeypatch, caplog):
    monkeypatch.setattr(builders, "HELD", 30)
    held = Material.gathered(["a" * 20, "b" * 20, "c"])
    assert held.texts == ["a" * 20] and "30 characters" in caplog.text


def test_builders_without_their_material(tmp_path, wide):
    with pytest.raises(ValueError, match="expected hidden:FILE"):
        Stream(wide, "hidden", **SIZES)
    path = write(tmp_path / "a.jsonl", texts(2))
    with pytest.raises(ValueError, match="holds no question"):
        Stream(wide, f"hidden:{path}", **SIZES)
    path = write(tmp_path / "b.jsonl", [nq(0) | {"passage": "It was quiet0."}])
    stream = Stream(wide, f"hidden:{path}", **{**SIZES, "window": 140})
    with pytest.raises(
        ValueError, match="100 samples in a row cannot be used .100 sho"
    ):
        next(stream)


# ------------------------------------------------------------------------------- stream


@pytest.fixture
def mix(tmp_path):
    """Texts with bad and short rows among them, questions, and two builders."""
    rows = [{"x": 1}, *texts(2), b"{", {"text": "too short"}, *texts(3, 95)]
    one = write(tmp_path / "one.jsonl.xz", rows, lzma.compress)
    two = write(tmp_path / "two.jsonl", texts(2, 60))
    long = {"context": toy.sentence(9, 120), "question": "q?", "answer": "gulls"}
    turns = [toy.sentence(i, 12).strip() for i in range(8)]
    asked = [{"query": f"q{i}?", "answer": f"a{i}", "evidence_turns": [[i, i + 1]]}
             for i in range(3)]  # fmt: skip
    rows = [long, {"turns": turns, "queries": asked}, long | {"answer": "absent"}]
    three = write(tmp_path / "three.jsonl", rows)
    four = write(tmp_path / "four.jsonl", [nq(i) for i in range(30)])
    return {f"{one},{two}": 3, str(three): 2, f"hidden:{four}": 1, "key_values": 0.5}


def shape_of(mix_length=(200, 420)):
    return {"length": mix_length, "window": 120, "stride": 50}


def test_resuming_anywhere_gives_the_same_sequence(mix, wide):
    files = {
        name: share for name, share in mix.items() if "/" in name and "hid" not in name
    }
    for sources, passes in ((files, 2), (mix, 1), (mix, None)):
        options = {**shape_of(), "passes": passes, "seed": 5}
        stream, made, states = Stream(wide, sources, **options), [], []
        states.append(json.dumps(stream.state()))
        for example in islice(stream, 40):
            made.append(plain(example))
            states.append(json.dumps(stream.state()))
        assert len(made) > 15
        assert len(made) < 40 or sources is mix
        for at in range(0, len(states), 3):
            other = Stream(wide, sources, **options)
            next(other)  # a stream that was in use
            other.restore(json.loads(states[at]))
            rest = [plain(one) for one in islice(other, len(made) - at)]
            assert rest == made[at:]
            assert other.skipped == stream.skipped


def test_an_ended_stream_stays_ended(mix, wide, caplog):
    one = next(iter(mix))
    stream = Stream(wide, one, **shape_of())
    with caplog.at_level(logging.WARNING, "acre.training"):
        made = list(stream)
    assert made and next(stream, None) is None
    assert "one.jsonl.xz:5: shorter than a window" in caplog.text
    other = Stream(wide, one, **shape_of())
    other.restore(stream.state())
    assert next(other, None) is None
    assert stream.skipped["unusable row"] == 2
    assert stream.skipped[examples.SHORT] == 1
    twice = list(Stream(wide, one, passes=2, **shape_of()))
    assert len(twice) > len(made)
    first, second = twice[: len(made)], twice[len(made) :]
    assert [plain(a) for a in first] == [plain(a) for a in made]
    assert [len(a.ids) for a in second] != [len(a.ids) for a in made]


def test_remainders_are_counted_without_a_warning(wide, tmp_path, caplog):
    path, text = write(tmp_path / "a.jsonl", texts(1)), texts(1)[0]["text"]
    length = len(wide.tokenizer.encode(text)) - 30
    stream = Stream(wide, str(path), length=length, window=64, stride=32)
    assert [len(one.ids) for one in stream] == [length]
    assert stream.skipped == {examples.REMAINDER: 1} and not caplog.records


def test_the_shares_of_a_mix(mix, wide):
    questions = sum(
        len(one.questions) > 0 for one in islice(Stream(wide, {"key_values": 9.0, **{
            k: 1 for k in list(mix)[:1]}}, passes=None, **shape_of()), 60)
    )  # fmt: skip
    assert 45 < questions < 60


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_are_disjoint_and_cover(mix, wide, world):
    files = list(mix)[:2]
    options = {**shape_of(), "seed": 1}
    every = [plain(one) for one in Stream(wide, files, **options)]
    for rank in range(world):
        part = Stream(wide, files, rank=rank, world=world, **options)
        assert [plain(one) for one in part] == every[rank::world]
    endless = {**options, "passes": None}
    whole = [plain(one) for one in islice(Stream(wide, mix, **endless), 6 * world)]
    for rank in range(world):
        part = Stream(wide, mix, rank=rank, world=world, **endless)
        assert [plain(one) for one in islice(part, 6)] == whole[rank::world]


def test_one_state_serves_all_ranks(mix, wide):
    """Saved by one of two processes, gone on with by three."""
    options = {**shape_of(), "passes": None}
    whole = [plain(one) for one in islice(Stream(wide, mix, **options), 16)]
    first = Stream(wide, mix, rank=0, world=2, **options)
    list(islice(first, 2))
    state = first.state()
    for rank in range(3):
        part = Stream(wide, mix, rank=rank, world=3, **options)
        part.restore(state)
        assert [plain(one) for one in islice(part, 4)] == whole[4 + rank :: 3]


def test_seeds_differ(wide, mix):
    one, two = (
        [
            plain(e)
            for e in islice(Stream(wide, mix, seed=s, passes=None, **shape_of()), 4)
        ]
        for s in (0, 1)
    )
    assert one != two


def test_states_of_other_settings_or_data_are_refused(mix, wide, tmp_path):
    state = Stream(wide, mix, **shape_of()).state()
    for key, changes in (
        ("seed", {"seed": 1}),
        ("shape", {"length": 300}),
        ("require_answer", {"require_answer": False}),
        ("frame", {"frame": acre.Frame(wide.tokenizer, instruction="Read.")}),
        ("sources", {"passes": 3}),
    ):
        other = Stream(wide, mix, **{**shape_of(), **changes})
        with pytest.raises(ValueError, match=f"state: its {key} is"):
            other.restore(state)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in tmp_path.glob("*.jsonl*"):
        (moved / file.name).write_bytes(file.read_bytes())
    there = {n.replace(str(tmp_path), str(moved)): share for n, share in mix.items()}
    Stream(wide, there, **shape_of()).restore(state)
    with (moved / "two.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match="state: its sources is"):
        Stream(wide, there, **shape_of()).restore(state)


@pytest.mark.parametrize("share", [0, -1, float("nan"), float("inf"), "1", True])
def test_shares_that_are_none(wide, share):
    with pytest.raises(ValueError, match="mix: key_values: got"):
        Stream(wide, {"key_values": share}, **SIZES)
    with pytest.raises(ValueError, match="mix: got no source"):
        Stream(wide, {}, **SIZES)


@needs_data
@pytest.mark.slow
def test_the_data_at_hand():
    """Every source gives examples of the real tokenizer, evidence known."""
    model = acre.Model.from_pretrained(smollm2())
    folder = Path(os.environ["ACRE_DATA"])
    books, meetings = folder / "books.dev.jsonl.xz", folder / "qmsum.dev.jsonl.xz"
    passages = folder / "nq_passages.dev.jsonl.xz"
    for source in (
        books, f"excerpts:{books}", f"needles:{books}", f"continuation:{books}",
        f"hidden:{passages}", f"meeting:{meetings}", meetings, "key_values",
        "needles",
    ):  # fmt: skip
        stream = Stream(
            model, str(source), length=(2000, 4000), window=1024, stride=512
        )
        for example in islice(stream, 6):
            assert len(example.ids) <= 4000
            assert (len(example.questions) == 0) == (
                str(source).startswith("excerpts") or source == books
            )
            for asked in example.questions:
                if asked.evidence is not None:
                    assert asked.evidence.any()
                else:
                    assert "meeting" in str(source) or source == meetings
