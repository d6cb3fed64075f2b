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
from acre.training.forms import GAP, Item, Record

NEEDLES = ("needle", "niah_single", "niah_multikey", "niah_multivalue",
           "niah_multiquery", "vt")  # fmt: skip
QUESTIONS = 8  # facts asked for in a text, of which a sample asks one
ROOM = 512  # tokens of a text for each of these
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
    """A question's own passage among other questions' passages, none of which says the
    answer; all as long as fits."""
    rng, records = order.rng, material.records
    gold = rng.randrange(len(records))
    answer = records[gold].answer.casefold()
    room = order.tokens - material.size(gold, order.count)
    if room < 0:
        raise ValueError(f"the passage is longer than {order.tokens} tokens")
    others: list[int] = []
    for i in _shuffled(len(records), rng):
        if i == gold or answer in records[i].context.casefold():
            continue
        room -= material.size(i, order.count)
        if room < 0:
            break
        others.append(i)
    others.insert(rng.randint(0, len(others)), gold)
    return _joined(records, others, gold)


def _shuffled(count: int, rng: random.Random) -> Iterable[int]:
    """All numbers below count in random order, drawn as they are asked for."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        at = rng.randint(0, last)
        yield moved.get(at, at)
        moved[at] = moved.pop(last, last)


def _joined(records: list[Record], chosen: list[int], gold: int) -> Record:
    """The passages behind one another, the gold one's evidence moved along."""
    passages = [records[i].context.rstrip() for i in chosen]
    before = passages[: chosen.index(gold)]
    shift = sum(len(passage) + len(GAP) for passage in before)
    asked = records[gold]
    end = len(asked.context.rstrip())
    evidence = asked.evidence or ((0, end),)
    moved = tuple((a + shift, min(b, end) + shift) for a, b in evidence)
    question = simple(asked.question)
    return Record(GAP.join(passages), question, asked.answer, moved, asked.question)


# ------------------------------------------------------------------- needles and tables


def _probe(name: str, order: Order, background: str) -> Record:
    """A question of a probe of the evaluation; the others' facts lead astray."""
    most = max(1, min(QUESTIONS, order.tokens // ROOM))
    document = probes.generate(
        name,
        order.tokens,
        order.count,
        questions=order.rng.randint(1, most),
        seed=order.rng.getrandbits(32),
        background=background,
    )
    q = order.rng.choice(document.questions)
    answer = ", ".join(q.answers)
    return Record(document.text, q.prompt, answer, q.evidence, q.query)


def needles(material: Material, order: Order) -> Record:
    """Facts hidden in a text: invented ones, RULER's keys and variables."""
    name = order.rng.choice(NEEDLES)
    return _probe(name, order, _excerpt(material, order, order.tokens))


def key_values(material: Material, order: Order) -> Record:
    """The value of a key in a table of random keys and values."""
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
    """The second half of a sentence of the text, whose first half is told."""
    excerpt = _excerpt(material, order, order.tokens)
    text = probes.cut_to_tokens(excerpt, order.tokens, order.count)
    found = list(SENTENCE.finditer(text))
    for sentence in order.rng.sample(found, min(TRIES, len(found))):
        words = list(re.finditer(r"\S+", sentence[0]))
        half = len(words) // 2
        told = sentence[0][: words[half - 1].end()] if half else ""
        if half < 4 or text.count(told) != 1:
            continue
        start = words[half].start()
        end = words[min(len(words), half + MOST_WORDS) - 1].end()
        answer, at = sentence[0][start:end], sentence.start()
        question = f'Continue this sentence from the text: "{told}"'
        return Record(text, question, answer, ((at + start, at + end),))
    raise ValueError("the text has no sentence that can be continued")


def meeting(material: Material, order: Order) -> Record:
    """A question as its row has it, drawn at random."""
    return order.rng.choice(material.records)


BUILDERS = {
    "excerpts": Builder(excerpts, "texts"),
    "hidden": Builder(hidden, "records"),
    "needles": Builder(needles, "texts"),
    "key_values": Builder(key_values),
    "continuation": Builder(continuation, "texts"),
    "meeting": Builder(meeting, "records"),
}
