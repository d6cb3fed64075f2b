"""Long texts with known evidence: the material of the retrieval benchmarks.

Takes background text and a seed; gives a `Probe`: one text and many questions, each
with the character span of its evidence and the accepted answers. Everything is drawn
from the seed, so a probe is the same on every machine.
"""

from __future__ import annotations

import json
import lzma
import os
import pathlib
import random
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and where the evidence lies in the text."""

    text: str
    answers: tuple[str, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Probe:
    """One text and its questions."""

    name: str
    text: str
    questions: list[Question]


def data_dir() -> pathlib.Path | None:
    """The folder that ACRE_DATA names, or None."""
    value = os.environ.get("ACRE_DATA")
    return pathlib.Path(value) if value else None


def rows(name: str) -> list[dict]:
    """Rows of ACRE_DATA/<name>.jsonl.xz."""
    folder = data_dir()
    if folder is None:
        raise FileNotFoundError(f"{name}: set ACRE_DATA to the folder that holds it")
    with lzma.open(folder / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def book_text(split: str = "dev", skip: int = 0) -> str:
    """The books of a split behind one another, from book `skip` on."""
    return "\n\n".join(row["text"] for row in rows(f"books.{split}")[skip:])


Count = Callable[[str], int]


def cut_to_tokens(text: str, tokens: int, count: Count) -> str:
    """The beginning of `text` that holds about `tokens` tokens, ending at a blank."""
    chars = min(len(text), int(tokens * 4.2))
    for _ in range(4):
        have = count(text[:chars])
        chars = min(len(text), max(1, int(chars * tokens / max(have, 1))))
    stop = text.rfind(" ", 0, chars)
    return text[: stop if stop > 0 else chars]


def _insert(
    background: str, facts: list[str], rng: random.Random
) -> tuple[str, list[int]]:
    """Facts at sentence ends, spread evenly with jitter; where each then starts."""
    pieces, starts, at, length = [], [], 0, 0
    step = len(background) / len(facts)
    for i, fact in enumerate(facts):
        goal = int(step * (i + 0.2 + 0.6 * rng.random()))
        stop = background.find(". ", max(goal, at))
        stop = len(background) if stop < 0 else stop + 2
        pieces += [background[at:stop], fact + " "]
        length += stop - at
        starts.append(length)
        length += len(fact) + 1
        at = stop
    return "".join([*pieces, background[at:]]), starts


def needles(
    background: str, tokens: int, count: Count, facts: int = 50, seed: int = 0
) -> Probe:
    """Facts of ten kinds about invented names, hidden in a book; the evidence is the
    answer's span."""
    rng = random.Random(seed)
    names = rng.sample(NAMES, facts)
    answers = [rng.sample(words.split(), len(words.split())) for _, _, words in KINDS]
    told = []
    for i, name in enumerate(names):
        sentence, question, _ = KINDS[i % len(KINDS)]
        choices = answers[i % len(KINDS)]
        answer = choices[i // len(KINDS) % len(choices)]
        told.append((sentence.format(name, answer), question.format(name), answer))
    rng.shuffle(told)
    body = cut_to_tokens(background, tokens - facts * 14, count)
    text, starts = _insert(body, [sentence for sentence, _, _ in told], rng)
    questions = []
    for (sentence, question, answer), start in zip(told, starts, strict=True):
        at = start + sentence.rindex(answer)
        questions.append(Question(question, (answer,), at, at + len(answer)))
    return Probe("needle", text, questions)


def key_values(tokens: int, count: Count, facts: int = 50, seed: int = 0) -> Probe:
    """A JSON-like table of random keys and values, as InfiniteBench's KV retrieval."""
    rng = random.Random(seed)

    def code() -> str:
        return f"{rng.getrandbits(32):08x}"

    per_row = max(1, count('"1a2b3c4d": "5e6f7a8b",\n' * 32) // 32)
    table = [(code(), code()) for _ in range(max(facts, tokens // per_row))]
    text, spans = "Extract the value of the key asked for.\n{\n", []
    parts, length = [text], len(text)
    for key, value in table:
        line = f'"{key}": "{value}",\n'
        at = length + line.index(value, len(key) + 4)
        spans.append((at, at + len(value)))
        parts.append(line)
        length += len(line)
    questions = []
    for i in sorted(rng.sample(range(len(table)), facts)):
        key, value = table[i]
        text = f'What is the value of the key "{key}"?'
        questions.append(Question(text, (value,), *spans[i]))
    return Probe("kv", "".join([*parts, "}\n"]), questions)


def passages(
    split: str = "dev", limit: int = 300, questions: int = 100, seed: int = 0
) -> Probe:
    """Natural Questions paragraphs in one text; the evidence is the gold paragraph."""
    rng = random.Random(seed)
    gold = rows(f"nq_passages.{split}")
    rng.shuffle(gold)
    pool = {row["passage"]: row for row in gold}
    if len(pool) < limit and split != "train":  # more paragraphs around the gold ones
        for row in rows("nq_passages.train"):
            if len(pool) >= limit:
                break
            pool.setdefault(row["passage"], {})
    order = list(pool.items())[:limit]
    rng.shuffle(order)
    parts, asked, length = [], [], 0
    for passage, row in order:
        head = f"{row.get('title', '')}\n" if row.get("title") else ""
        block = f"{head}{passage}\n\n"
        if row and len(asked) < questions:
            start = length + len(head)
            answers = tuple(row["answers"])
            asked.append(
                Question(row["question"], answers, start, start + len(passage))
            )
        parts.append(block)
        length += len(block)
    return Probe("nq", "".join(parts), asked)
