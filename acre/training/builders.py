"""Long samples made of short material, with known evidence.

Takes material (texts, or questions with their passage) and an `Order`: a random
generator, a number of tokens and a way to count them; gives a `Record`, or a text. One
idea: a builder is a function of its material and the generator alone, so the i-th
sample is made again from its number. Refuses material without what the builder needs,
and lengths that the sample does not fit in.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from acre.eval import probes
from acre.eval.planted import simple
from acre.training.forms import GAP, Item, Question, Record

NEEDLES = ("needle", "niah_single", "niah_multikey", "niah_multivalue",
           "niah_multiquery", "vt")  # fmt: skip
QUESTIONS = 16  # facts in a text, or sentences of it, that a sample asks for at most
ROOM = 256  # tokens of a text for each of these
HELD = 1 << 28  # characters of material that are held in memory
CHARS = 6  # characters per token that no text reaches on average
SENTENCE = re.compile(r"(?<![^\s\"'])[A-Z][^.!?\r\n]{60,300}[.!?]")
TRIES, MOST_WORDS = 20, 24
log = logging.getLogger("acre.training")


@dataclass(frozen=True)
class Order:
    """What is asked of a builder: about `tokens` tokens, as `count` counts them. most:
    the tokens of the longest sample that may be asked for; 0 = tokens."""

    rng: random.Random
    tokens: int
    count: Callable[[str], int]
    most: int = 0


@dataclass
class Material:
    """What samples are made of. sizes: tokens of the records' passages, as they become
    known."""

    texts: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def gathered(cls, items: Iterable[Item]) -> Material:
        """Texts and records, up to HELD characters of them."""
        out, held = cls(), 0
        for item in items:
            is_text = isinstance(item, str)
            held += len(item if is_text else item.context)
            if held > HELD and (out.texts or out.records):
                log.warning("of the material only %d characters are used", HELD)
                break
            (out.texts if is_text else out.records).append(item)
        return out

    def size(self, i: int, count: Callable[[str], int]) -> int:
        """Tokens of the i-th record's passage, with the gap after it."""
        if i not in self.sizes:
            self.sizes[i] = count(self.records[i].context.rstrip() + GAP)
        return self.sizes[i]


@dataclass(frozen=True)
class Builder:
    """make: a sample; of a text its first piece is one. needs: "texts", "records", or
    "" for nothing."""

    make: Callable[[Material, Order], Item]
    needs: str = ""


# ------------------------------------------------------------------------------ hidden


def hidden(material: Material, order: Order) -> Record:
    """Questions' own passages behind one another, as many as fit; asked are those whose
    answers no other passage says, which holds for the one drawn first."""
    rng, records = order.rng, material.records
    gold = rng.randrange(len(records))
    told = [q.answer.casefold() for q in records[gold].questions]
    room = order.tokens - material.size(gold, order.count)
    if room < 0:
        raise ValueError(f"the passage is longer than {order.tokens} tokens")
    chosen: list[int] = []
    for i in _shuffled(len(records), rng):
        folded = records[i].context.casefold()
        if i == gold or any(answer in folded for answer in told):
            continue
        room -= material.size(i, order.count)
        if room < 0:
            break
        chosen.append(i)
    chosen.insert(rng.randint(0, len(chosen)), gold)
    return _joined([records[i] for i in chosen])


def _shuffled(count: int, rng: random.Random) -> Iterable[int]:
    """All numbers below count in random order, drawn as they are asked for."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        at = rng.randint(0, last)
        yield moved.get(at, at)
        moved[at] = moved.pop(last, last)


def _joined(records: list[Record]) -> Record:
    """The passages behind one another, the evidence moved along with its own."""
    passages = [record.context.rstrip() for record in records]
    folded = [passage.casefold() for passage in passages]
    asked, shift = [], 0
    for i, record in enumerate(records):
        for q in record.questions:
            answer = q.answer.casefold()
            if any(answer in other for j, other in enumerate(folded) if j != i):
                continue
            asked.append(_moved(q, shift, len(passages[i])))
        shift += len(passages[i]) + len(GAP)
    return Record(GAP.join(passages), tuple(asked))


def _moved(q: Question, shift: int, end: int) -> Question:
    """A passage's question, the passage now `end` characters behind `shift` others."""
    ranges = ((a + shift, min(b, end) + shift) for a, b in q.evidence or ((0, end),))
    return Question(simple(q.text), q.answer, tuple(ranges), q.text)


# ------------------------------------------------------------------- needles and tables


def _probe(name: str, order: Order, background: str) -> Record:
    """A probe of the evaluation: each question's fact leads the others astray."""
    most = max(1, min(QUESTIONS, order.tokens // ROOM))
    document = probes.generate(
        name,
        order.tokens,
        order.count,
        questions=order.rng.randint(1, most),
        seed=order.rng.getrandbits(32),
        background=background,
    )
    asked = (
        Question(q.prompt, ", ".join(q.answers), q.evidence, q.query)
        for q in document.questions
    )
    return Record(document.text, tuple(asked))


def needles(material: Material, order: Order) -> Record:
    """Facts hidden in a text: invented ones, RULER's keys and variables."""
    name = order.rng.choice(NEEDLES)
    return _probe(name, order, _excerpt(material, order, order.tokens))


def key_values(material: Material, order: Order) -> Record:
    """The values of keys in a table of random keys and values."""
    return _probe("kv", order, "")


# --------------------------------------------------------------------- parts of a text


def _excerpt(material: Material, order: Order, tokens: int) -> str:
    """Somewhere of some text, from a line's beginning where there is one near, more
    than `tokens` tokens unless the text is shorter."""
    text = order.rng.choice(material.texts)
    size = tokens * CHARS
    start = order.rng.randint(0, max(0, len(text) - size))
    line = text.find("\n", start, start + size // 8) + 1 if start else 0
    return text[line or start : start + size]


def excerpts(material: Material, order: Order) -> str:
    """A text from a random place on: stage I, shuffled."""
    return _excerpt(material, order, max(order.tokens, order.most))


def continuation(material: Material, order: Order) -> Record:
    """Second halves of sentences of the text, whose first halves are told."""
    excerpt = _excerpt(material, order, order.tokens)
    text = probes.cut_to_tokens(excerpt, order.tokens, order.count)
    found = list(SENTENCE.finditer(text))
    most = max(1, min(QUESTIONS, order.tokens // ROOM))
    asked: list[Question] = []
    for sentence in order.rng.sample(found, min(TRIES * most, len(found))):
        made = _continued(sentence, text)
        asked += [made] if made else []
        if len(asked) == most:
            break
    if not asked:
        raise ValueError("the text has no sentence that can be continued")
    return Record(text, tuple(asked))


def _continued(sentence: re.Match[str], text: str) -> Question | None:
    """A sentence's second half asked for; None where its first half occurs twice."""
    words = list(re.finditer(r"\S+", sentence[0]))
    half = len(words) // 2
    told = sentence[0][: words[half - 1].end()] if half else ""
    if half < 4 or text.count(told) != 1:
        return None
    start = words[half].start()
    end = words[min(len(words), half + MOST_WORDS) - 1].end()
    answer, at = sentence[0][start:end], sentence.start()
    question = f'Continue this sentence from the text: "{told}"'
    return Question(question, answer, ((at + start, at + end),))


def meeting(material: Material, order: Order) -> Record:
    """A context and its questions as its row has them, drawn at random."""
    return order.rng.choice(material.records)


BUILDERS = {
    "excerpts": Builder(excerpts, "texts"),
    "hidden": Builder(hidden, "records"),
    "needles": Builder(needles, "texts"),
    "key_values": Builder(key_values),
    "continuation": Builder(continuation, "texts"),
    "meeting": Builder(meeting, "records"),
}
