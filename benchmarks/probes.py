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
    """Facts about named vaults hidden in a book; the evidence is the number's span."""
    rng = random.Random(seed)
    names = rng.sample(NAMES, facts)
    codes = [str(rng.randrange(100000, 999999)) for _ in names]
    sentences = [
        f"The access code of the {name} vault is {code}."
        for name, code in zip(names, codes, strict=True)
    ]
    body = cut_to_tokens(background, tokens - facts * 16, count)
    text, starts = _insert(body, sentences, rng)
    questions = []
    for name, code, sentence, start in zip(
        names, codes, sentences, starts, strict=True
    ):
        at = start + sentence.index(code)
        question = f"What is the access code of the {name} vault?"
        questions.append(Question(question, (code,), at, at + len(code)))
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
