"""What probes hide: facts and the questions that only they answer.

Takes an `Order` (a random generator, how many questions, a background); gives
`Material`: the facts in their order in the text, the questions about them, the words
around. One idea: a fact knows which of its characters are evidence, so that wherever
it is put the evidence is known. Kinds: facts about invented names (needle), RULER's
needles and variable tracking (arXiv 2404.06654), InfiniteBench's pass keys, numbers and
key-value pairs (arXiv 2402.13718). Refuses more questions than there are names.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from acre.eval.published import around, published

NAMES = """
    Ashford Briar Caldwell Dunmore Elgin Farrow Glenrock Harlow Ibsen Jarrow Kelso
    Lorne Merrick Norwood Orwell Penrith Quarry Radley Selkirk Thorne Upton Varley
    Whitby Yarrow Zennor Alder Birch Cedar Dogwood Elder Fennel Ginger Hazel Indigo
    Juniper Kestrel Laurel Maple Nutmeg Olive Poplar Quince Rowan Sorrel Tansy Umber
    Violet Willow Xenia Yew
""".split()

# (the fact of a name and an answer, its question, answers)
KINDS = (
    ("The lighthouse at {0} was built by Mister {1}.",
     "Who built the lighthouse at {0}?", "Barlow Hutchins Pemberton Stokes Tilney"),
    ("The favourite fruit of Captain {0} was the {1}.",
     "What was the favourite fruit of Captain {0}?", "apricot cherry fig lemon mango"),
    ("Doctor {0} kept a tame {1} at home.",
     "Which animal did Doctor {0} keep at home?", "badger falcon otter raven wolf"),
    ("The school of {0} taught {1} every Monday.",
     "What did the school of {0} teach every Monday?",
     "astronomy chemistry dancing geometry Latin"),
    ("The good ship {0} carried a cargo of {1}.",
     "What was the cargo of the ship {0}?", "cinnamon coal copper salt timber"),
    ("The mayor of {0} played the {1} at night.",
     "Which instrument did the mayor of {0} play?", "cello flute harp organ trumpet"),
    ("The door of the {0} inn was painted {1}.",
     "What colour was the door of the {0} inn?", "crimson green orange purple yellow"),
    ("The {0} expedition set out for {1}.",
     "Where did the {0} expedition set out for?", "Brazil China Egypt Iceland Persia"),
    ("The secret word of the {0} club was {1}.",
     "What was the secret word of the {0} club?", "anchor candle hammer mirror saddle"),
    ("Every member of the {0} family worked as a {1}.",
     "What did the members of the {0} family work as?",
     "baker carpenter miner tailor weaver"),
)  # fmt: skip


# ---------------------------------------------------------------- facts and questions


@dataclass(frozen=True)
class Fact:
    """A sentence to be hidden, and the range of its characters that is evidence."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Ask:
    """A question about facts, by their numbers."""

    facts: tuple[int, ...]
    query: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """What a probe is made of: facts in their order in the text, questions, words.

    breaks: the ends of sentences or lines after which a fact may stand.
    """

    facts: list[Fact]
    asks: list[Ask]
    instruction: str
    background: str
    breaks: tuple[str, ...] = (". ", ".\n", "\n\n")


@dataclass(frozen=True)
class Order:
    """What is asked of a maker of material."""

    rng: random.Random
    questions: int
    tokens: int
    background: Callable[[], str]


def whole(sentence: str, gap: str) -> Fact:
    """A fact all of which is evidence, and what parts it from what follows."""
    return Fact(sentence + gap, 0, len(sentence))


def pairs(rng: random.Random, count: int) -> list[str]:
    """Different names of two words, as ashford-briar."""
    most = len(NAMES) * (len(NAMES) - 1)
    if count > most:
        raise ValueError(f"questions: {count} names are needed, there are {most}")
    drawn = rng.sample(range(most), count)
    split = (divmod(one, len(NAMES) - 1) for one in drawn)
    words = ((NAMES[i], NAMES[j + (j >= i)]) for i, j in split)
    return [f"{first}-{second}".lower() for first, second in words]


def tales(rng: random.Random, facts: int) -> list[tuple[str, str, str]]:
    """(sentence, question, answer) of ten kinds about invented names, shuffled."""
    if facts > len(NAMES):
        raise ValueError(f"questions: expected at most {len(NAMES)}, got {facts}")
    names = rng.sample(NAMES, facts)
    answers = [rng.sample(words.split(), len(words.split())) for _, _, words in KINDS]
    told = []
    for i, name in enumerate(names):
        sentence, question, _ = KINDS[i % len(KINDS)]
        choices = answers[i % len(KINDS)]
        answer = choices[i // len(KINDS) % len(choices)]
        told.append((sentence.format(name, answer), question.format(name), answer))
    rng.shuffle(told)
    return told


def simple(query: str) -> str:
    """The prompt of a question of the project's own probes."""
    return f"\n\nAnswer with a few words from the text.\n\nQuestion: {query}\nAnswer:"


def needle(order: Order) -> Material:
    """Facts of ten kinds; the evidence is the answer's own characters."""
    told = tales(order.rng, order.questions)
    facts, asks = [], []
    for i, (sentence, question, answer) in enumerate(told):
        at = sentence.rindex(answer)
        facts.append(Fact(sentence + " ", at, at + len(answer)))
        asks.append(Ask((i,), question, simple(question), (answer,)))
    words = "Read the following text; questions about it follow.\n\n"
    return Material(facts, asks, words, order.background())


# ------------------------------------------------------------------------------ RULER


def _niah(order: Order, keys: int, values: int, together: int) -> Material:
    """RULER's needles: per question `keys` keys of `values` values each, of which it
    asks `together` keys."""
    rng, words = order.rng, published("ruler")
    names = pairs(rng, order.questions * keys)
    told = [
        (name, str(number))
        for name in names
        for number in rng.sample(range(1_000_000, 10_000_000), values)
    ]
    rng.shuffle(told)
    kind = "number" if values * together == 1 else "numbers"
    template = words["templates"]["niah_one" if kind == "number" else "niah"]
    needle_of = words["needle"].format
    facts = [
        whole(needle_of(type_needle_v="numbers", key=key, value=value), " ")
        for key, value in told
    ]
    asks = []
    for first in range(0, len(names), keys):
        asked = names[first : first + together]
        hits = [i for name in asked for i, (key, _) in enumerate(told) if key == name]
        listed = ", ".join(asked[:-1]) + ", and " + asked[-1] if asked[1:] else asked[0]
        instruction, prompt = around(template, type_needle_v=kind, query=listed)
        query = prompt.strip().split("?")[0] + "?"
        asks.append(Ask(tuple(hits), query, prompt, tuple(told[i][1] for i in hits)))
    return Material(facts, asks, instruction, order.background())


def niah_single(order: Order) -> Material:
    """A key of one value per question."""
    return _niah(order, keys=1, values=1, together=1)


def niah_multikey(order: Order) -> Material:
    """Three keys that nobody asks for beside each one asked for."""
    return _niah(order, keys=4, values=1, together=1)


def niah_multivalue(order: Order) -> Material:
    """Four values of one key, told at four places."""
    return _niah(order, keys=1, values=4, together=1)


def niah_multiquery(order: Order) -> Material:
    """Four keys asked for at once."""
    return _niah(order, keys=4, values=1, together=4)


HOPS = 4


def vt(order: Order) -> Material:
    """RULER's variable tracking: a chain of assignments per question; the evidence is
    every link. The links of all chains are mixed, those of one stay in order."""
    rng, chains = order.rng, order.questions
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < chains * (HOPS + 1):
        name = "".join(rng.choices(letters, k=5))
        if name not in names:
            names.append(name)
    values = [str(value) for value in rng.sample(range(10_000, 100_000), chains)]
    slots = [chain for chain in range(chains) for _ in range(HOPS + 1)]
    rng.shuffle(slots)
    facts, links = [], [[] for _ in range(chains)]
    for i, chain in enumerate(slots):
        variables = names[chain * (HOPS + 1) :]
        hop = len(links[chain])
        told = f"VAR {variables[hop - 1]}" if hop else values[chain]
        facts.append(whole(f"VAR {variables[hop]} = {told}.", " "))
        links[chain].append(i)
    asks = []
    for chain, value in enumerate(values):
        template, total = published("ruler")["templates"]["vt"], str(HOPS + 1)
        instruction, prompt = around(template, query=value, num_v=total)
        query = prompt.split("Question: ")[1].split(" Answer:")[0]
        answers = tuple(names[chain * (HOPS + 1) : (chain + 1) * (HOPS + 1)])
        asks.append(Ask(tuple(links[chain]), query, prompt, answers))
    return Material(facts, asks, instruction, order.background())


# ---------------------------------------------------------------------- InfiniteBench

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again.\n"
)


def _planted(order: Order, name: str, thing: str, draw: Callable[[], str]) -> Material:
    """Codes in noise. One alone is told as InfiniteBench tells it; several have
    owners, or no question could say which it means."""
    owners = pairs(order.rng, order.questions) if order.questions > 1 else [""]
    facts, asks = [], []
    for i, owner in enumerate(owners):
        what, code = f"{thing} of {owner}" if owner else thing, draw()
        told = f"The {what} is {code}. Remember it. {code} is the {what}."
        facts.append(whole(told, "\n"))
        query = f"What is the {what}?"
        template = published("infinitebench")["templates"][name]
        instruction, prompt = around(template, input=query)
        asks.append(
            Ask((i,), query, prompt.replace(thing + " is", what + " is"), (code,))
        )
    return Material(facts, asks, instruction, NOISE, ("\n",))


def passkey(order: Order) -> Material:
    """Pass keys of five digits."""
    draw = order.rng.randrange
    return _planted(order, "passkey", "pass key", lambda: f"{draw(100_000):05d}")


def number(order: Order) -> Material:
    """Sequences of ten digits, half of which repeat the one before."""
    rng = order.rng

    def draw() -> str:
        digits = [str(rng.randrange(10)) for _ in range(5)]
        for i in range(5):
            at = rng.randrange(5 + i)
            digits.insert(at, digits[at])
        return "".join(digits)

    return _planted(order, "number_string", "sequence of digits", draw)


def kv(order: Order) -> Material:
    """Rows of a table of random keys and values; the evidence is the value."""
    rng = order.rng

    def row() -> tuple[str, str]:
        return f"{rng.getrandbits(32):08x}", f"{rng.getrandbits(32):08x}"

    facts, asks = [], []
    for i in range(order.questions):
        key, value = row()
        line = f'"{key}": "{value}",\n'
        facts.append(Fact(line, 13, 21))
        query = f'What is the value of the key "{key}"?'
        asks.append(Ask((i,), query, simple(query), (value,)))
    table = (row() for _ in range(order.tokens // 8 + 64))
    background = "".join(f'"{key}": "{value}",\n' for key, value in table)
    words = "Extract the value of the key asked for.\n\n"
    return Material(facts, asks, words, background, ("\n",))
