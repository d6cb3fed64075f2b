"""The texts of the retrieval benchmarks: needles, key-value tables, hidden paragraphs.

Takes background text and a seed; gives a Document: one text and many questions, each
with the characters of its evidence. Everything is drawn from the seed, so a text is the
same on every machine; results/ was measured with these.
"""

from __future__ import annotations

import random

from acre.eval import planted
from acre.eval.probes import Count, cut_to_tokens, rows
from acre.eval.records import Document, Question


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


def _plain(
    i: int, query: str, answers: tuple[str, ...], start: int, end: int
) -> Question:
    """A question put as it is."""
    return Question(str(i + 1), query, answers, 32, query, evidence=((start, end),))


def needles(
    background: str, tokens: int, count: Count, facts: int = 50, seed: int = 0
) -> Document:
    """Facts of ten kinds about invented names, hidden in a book; the evidence is the
    answer's span."""
    rng = random.Random(seed)
    told = planted.tales(rng, facts)
    body = cut_to_tokens(background, tokens - facts * 14, count)
    text, starts = _insert(body, [sentence for sentence, _, _ in told], rng)
    questions = []
    for i, (sentence, query, answer) in enumerate(told):
        at = starts[i] + sentence.rindex(answer)
        questions.append(_plain(i, query, (answer,), at, at + len(answer)))
    return Document("probe_needle", text, tuple(questions))


def key_values(tokens: int, count: Count, facts: int = 50, seed: int = 0) -> Document:
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
    for n, i in enumerate(sorted(rng.sample(range(len(table)), facts))):
        key, value = table[i]
        query = f'What is the value of the key "{key}"?'
        questions.append(_plain(n, query, (value,), *spans[i]))
    return Document("probe_kv", "".join([*parts, "}\n"]), tuple(questions))


def passages(
    split: str = "dev", limit: int = 300, questions: int = 100, seed: int = 0
) -> Document:
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
            end = start + len(passage)
            asked.append(_plain(len(asked), row["question"], answers, start, end))
        parts.append(block)
        length += len(block)
    return Document("nq", "".join(parts), tuple(asked))
