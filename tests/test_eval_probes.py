"""Probes: known evidence, length, depth, determinism."""

from __future__ import annotations

import re

import pytest

from acre.eval import probes
from acre.eval.planted import HOPS
from acre.eval.probes import PROBES, generate

TOPICS = "\n\n".join(
    f"Chapter {i}. "
    + " ".join(f"The {w} is {w}er than {i}." for w in "abc defg".split())
    for i in range(60)
)
SINGLE = [name for name, probe in PROBES.items() if probe.single]


def pieces(text: str) -> int:
    """A count much like a tokenizer's: words of four letters, every other mark."""
    return len(re.findall(r"\w{1,4}|[^\w ]", text))


def words(text: str) -> int:
    return len(text.split())


def make(name: str, tokens: int = 4000, count=pieces, **more):
    return generate(name, tokens, count, background=TOPICS, **more)


@pytest.mark.parametrize("name", PROBES)
def test_evidence_holds_the_answers(name):
    document = make(name)
    assert document.task == f"probe_{name}" and len(document.questions) == 10
    for question in document.questions:
        spans = [document.text[a:b] for a, b in question.evidence]
        assert len(spans) == len(question.answers)
        for answer, span in zip(question.answers, spans, strict=True):
            assert answer in span and len(span) < 140
            assert document.text.count(span) == 1 or name == "needle"
        assert question.query in question.prompt and question.query.strip()
        assert question.max_new_tokens > 0
        assert question.buckets == {"length": "4000"}
    assert len({q.id for q in document.questions}) == 10


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("count", [pieces, words, len])
@pytest.mark.parametrize("tokens", [3000, 20_000])
def test_length_within_two_percent(name, count, tokens):
    document = make(name, tokens, count, questions=2)
    assert abs(count(document.text) - tokens) <= 0.02 * tokens


@pytest.mark.parametrize("name", PROBES)
def test_the_same_everywhere(name):
    assert make(name) == make(name) == make(f"probe_{name}")
    other = make(name, seed=1)
    assert other.text != make(name).text
    answers = [q.answers for q in other.questions]
    assert answers != [q.answers for q in make(name).questions]


@pytest.mark.parametrize("name", SINGLE)
def test_a_needle_at_a_chosen_depth(name):
    for depth in (0, 0.25, 0.5, 1):
        document = make(name, 8000, depths=[depth])
        [question] = document.questions
        [(start, end)] = question.evidence
        assert abs(start / len(document.text) - depth) < 0.03
        assert question.answers[0] in document.text[start:end]
        assert question.buckets == {"length": "8000", "depth": f"{depth:g}"}


@pytest.mark.parametrize("name", SINGLE)
def test_several_depths_in_one_text(name):
    document = make(name, 8000, depths=[0.75, 0, 0.5, 0.25])
    assert {q.buckets["depth"] for q in document.questions} == {
        "0",
        "0.25",
        "0.5",
        "0.75",
    }
    for question in document.questions:
        place = question.evidence[0][0] / len(document.text)
        assert abs(place - float(question.buckets["depth"])) < 0.03
    one, two = (make(name, 8000, depths=[depth]) for depth in (0.25, 0.5))
    assert one.questions[0].answers == two.questions[0].answers
    assert one.questions[0].id != two.questions[0].id


def test_facts_are_spread_over_the_text():
    document = make("niah_single", 8000)
    places = sorted(q.evidence[0][0] / len(document.text) for q in document.questions)
    assert places[0] < 0.12 and places[-1] > 0.88
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) < 0.25


def test_kinds_of_needles():
    assert len(make("niah_multivalue").questions[0].answers) == 4
    assert len(make("niah_multiquery").questions[0].answers) == 4
    needles = r"One of the special magic numbers for [a-z]+-[a-z]+ is: \d{7}\."
    for name, told in (("niah_single", 10), ("niah_multikey", 40)):
        document = make(name)
        assert len(re.findall(needles, document.text)) == told
        assert all(len(q.answers) == 1 for q in document.questions)
    [question] = make("niah_multivalue", questions=1).questions
    key = re.search(r"for ([a-z]+-[a-z]+) mentioned", question.query)[1]
    text = make("niah_multivalue", questions=1).text
    assert sorted(question.answers) == sorted(re.findall(rf"{key} is: (\d+)", text))


def test_variables_can_be_tracked():
    """Following the assignments of the text from a value leads to the answers."""
    document = make("vt")
    links = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", document.text)
    assert len(links) == 10 * (HOPS + 1)
    for question in document.questions:
        known = [re.search(r"the value (\d+)", question.query)[1]]
        for name, told in links:  # in the order of the text
            if told in known:
                known.append(name)
        assert tuple(known[1:]) == question.answers and len(known) == HOPS + 2
        spans = [a for a, _ in question.evidence]
        assert spans == sorted(spans)


def test_one_pass_key_is_told_as_infinitebench_tells_it():
    document = make("passkey", questions=1)
    [question] = document.questions
    [(start, end)] = question.evidence
    key = question.answers[0]
    assert document.text[start:end] == (
        f"The pass key is {key}. Remember it. {key} is the pass key."
    )
    assert question.prompt == "\n\nWhat is the pass key?\n\nThe pass key is"
    several = make("passkey", questions=2).questions
    assert re.search(r"The pass key of [a-z]+-[a-z]+ is$", several[0].prompt)


def test_numbers_have_ten_digits():
    for question in make("number").questions:
        assert re.fullmatch(r"\d{10}", question.answers[0])


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("nidle", {}, "name: expected one of needle"),
        ("needle", {"questions": 0}, "at least 1 of each, got 4000, 0"),
        ("needle", {"tokens": 0}, "at least 1 of each, got 0, 10"),
        ("needle", {"questions": 51}, "at most 50, got 51"),
        ("needle", {"depths": []}, "at least 1 of each, got 4000, 0"),
        (
            "needle",
            {"depths": [1.5]},
            r"depths: expected numbers of 0 to 1, got \[1.5\]",
        ),
        ("vt", {"depths": [0.5]}, "depths: vt hides several facts a question"),
        ("niah_multikey", {"tokens": 100}, "tokens: 100 cannot be met, 40 facts make"),
    ],
)
def test_what_cannot_be_made_is_refused(name, more, message):
    with pytest.raises(ValueError, match=message):
        make(name, **more)


@pytest.mark.parametrize("background", ["", " \n"])
def test_an_empty_background_is_refused(background):
    with pytest.raises(ValueError, match="background: empty"):
        generate("needle", 4000, pieces, background=background)


def test_backgrounds(monkeypatch):
    monkeypatch.delenv("ACRE_DATA", raising=False)
    document = generate("needle", 3000, words, questions=3)
    assert "Python" in document.text or "object" in document.text
    with pytest.raises(FileNotFoundError, match="set ACRE_DATA"):
        probes.book_text()


def test_a_background_without_sentences_is_broken_at_blanks():
    text = "word " * 5000
    document = generate("niah_single", 3000, words, background=text, depths=[0.5])
    [(start, _)] = document.questions[0].evidence
    assert abs(start / len(document.text) - 0.5) < 0.02
