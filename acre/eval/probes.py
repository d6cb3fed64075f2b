"""Long texts with known evidence, of any length: what retrieval is measured with.

Takes a probe's name, a number of tokens and a callable that counts them; gives a
`Document`: one text and many questions, each with the characters of its evidence.
Everything is drawn from the seed, so a probe of the same background is the same on
every machine. One idea: facts (acre/eval/planted.py) are woven into a background at
chosen depths, and the background is cut until the text has its length. Refuses lengths
that the facts do not fit in.
"""

from __future__ import annotations

import json
import lzma
import os
import pathlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from acre.eval import planted
from acre.eval.planted import Fact, Material, Order
from acre.eval.records import Document, Question

Count = Callable[[str], int]
TOLERANCE, SLACK = 0.02, 32  # of a text's length: a share, or so many tokens


# ------------------------------------------------------------------------ backgrounds


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


def background_text() -> str:
    """The books at hand, or else Python's language reference, which is always there."""
    folder = data_dir()
    if folder is not None and (folder / "books.dev.jsonl.xz").is_file():
        return book_text()
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cut_to_tokens(text: str, tokens: int, count: Count) -> str:
    """The beginning of `text` that holds about `tokens` tokens, ending at a blank."""
    chars = min(len(text), int(tokens * 4.2))
    for _ in range(4):
        have = count(text[:chars])
        chars = min(len(text), max(1, int(chars * tokens / max(have, 1))))
    stop = text.rfind(" ", 0, chars)
    return text[: stop if stop > 0 else chars]


# ---------------------------------------------------------------------------- weaving


@dataclass(frozen=True)
class Probe:
    """A kind of probe: its maker, metric, length of an answer, and whether each
    question has one fact, which may be put at a chosen depth."""

    make: Callable[[Order], Material]
    metric: str
    max_new_tokens: int
    single: bool = True


PROBES = {
    "needle": Probe(planted.needle, "exact", 32),
    "niah_single": Probe(planted.niah_single, "string_match_all", 128),
    "niah_multikey": Probe(
        planted.niah_multikey, "string_match_all", 128, single=False
    ),
    "niah_multivalue": Probe(
        planted.niah_multivalue, "string_match_all", 128, single=False
    ),
    "niah_multiquery": Probe(
        planted.niah_multiquery, "string_match_all", 128, single=False
    ),
    "vt": Probe(planted.vt, "string_match_all", 30, single=False),
    "passkey": Probe(planted.passkey, "exact", 32),
    "number": Probe(planted.number, "exact", 32),
    "kv": Probe(planted.kv, "exact", 32),
}


def _snapped(body: str, at: int, goal: int, breaks: tuple[str, ...]) -> int:
    """The last break, or else blank, of body[at:goal]; `at` if there is none."""
    if goal >= len(body):
        return len(body)
    for marks in (breaks, (" ",)):
        found = [(body.rfind(mark, at, goal), len(mark)) for mark in marks]
        ends = [place + size for place, size in found if place >= 0]
        if ends:
            return max(ends)
    return at


def weave(
    background: str, facts: list[Fact], goals: Sequence[float], breaks: tuple[str, ...]
) -> tuple[str, list[int]]:
    """Facts put into the background at the last break before each goal, a share of the
    background; goals do not fall. The text, and where in it each fact starts."""
    pieces, starts, at, length = [], [], 0, 0
    for fact, goal in zip(facts, goals, strict=True):
        stop = _snapped(background, at, int(goal * len(background)), breaks)
        starts.append(length + stop - at)
        pieces += [background[at:stop], fact.text]
        length, at = starts[-1] + len(fact.text), stop
    return "".join([*pieces, background[at:]]), starts


def _cut(background: str, size: int, end: str) -> str:
    """`size` characters of the background, repeated as often as needed, up to `end`."""
    body = (background * (size // len(background) + 1))[:size]
    return body[: body.rfind(end) + 1]


def _fitted(
    material: Material, goals: Sequence[float], tokens: int, count: Count
) -> tuple[str, list[int]]:
    """The woven text whose length comes nearest to `tokens`."""
    breaks = material.breaks
    end = "\n" if breaks == ("\n",) else " "
    size, best = tokens * 4, (-1, "", [0])
    for _ in range(16):
        body = _cut(material.background, size, end)
        text, starts = weave(body, material.facts, goals, breaks)
        have = count(text)
        if best[0] < 0 or abs(have - tokens) < abs(best[0] - tokens):
            best = (have, text, starts)
        if abs(have - tokens) <= 0.005 * tokens:
            break
        size = max(0, size + (tokens - have) * len(text) // max(have, 1))
    if abs(best[0] - tokens) > max(TOLERANCE * tokens, SLACK):
        raise ValueError(
            f"tokens: {tokens} cannot be met, {len(material.facts)} facts make "
            f"{best[0]}; ask fewer questions or a longer text"
        )
    return best[1], best[2]


def _turned(background: str, breaks: tuple[str, ...], rng: random.Random) -> str:
    """The background from some sentence on, so that seeds read different parts."""
    if not background.strip():
        raise ValueError("background: empty")
    at = _snapped(background, 0, rng.randrange(len(background)), breaks)
    return background[at:] + "\n\n" * (breaks != ("\n",)) + background[:at]


def generate(
    name: str,
    tokens: int,
    count: Count,
    questions: int = 10,
    seed: int = 0,
    background: str | None = None,
    depths: Sequence[float] | None = None,
) -> Document:
    """The probe `name` (of PROBES, or its task's name), a text of `tokens` tokens.

    count: tokens of a text; the text keeps within 2 % (or 32 tokens) of `tokens`.
    background: the text to hide facts in; None = the books at hand, or Python's
    language reference; kv, passkey and number bring their own. depths: one fact at each
    of these shares of the text, instead of `questions` facts spread evenly; each then
    reports its depth. The same seed hides the same facts at any depths. Raises
    ValueError for what cannot be made.
    """
    short = name.removeprefix("probe_")
    asked = questions if depths is None else len(depths)
    probe = _checked(short, tokens, asked, depths)
    rng = random.Random(f"{short}:{tokens}:{seed}")
    given = background_text if background is None else lambda: background
    order = Order(rng, asked, tokens, given)
    material = probe.make(order)
    turned = _turned(material.background, material.breaks, rng)
    material = replace(material, background=turned)
    goals = sorted(depths) if depths is not None else _spread(len(material.facts), rng)
    text, starts = _fitted(material, goals, tokens, count)
    made = []
    for i, ask in enumerate(material.asks):
        buckets = {"length": str(tokens)}
        if depths is not None:
            buckets["depth"] = f"{goals[ask.facts[0]]:g}"
        spots = [(starts[f], material.facts[f]) for f in ask.facts]
        question = Question(
            id=".".join([short, *buckets.values(), str(seed), str(i + 1)]),
            prompt=ask.prompt,
            query=ask.query,
            answers=ask.answers,
            max_new_tokens=probe.max_new_tokens,
            evidence=tuple((at + fact.start, at + fact.end) for at, fact in spots),
            buckets=buckets,
        )
        made.append(question)
    return Document(f"probe_{short}", text, tuple(made), material.instruction)


def _spread(facts: int, rng: random.Random) -> list[float]:
    """Goals spread evenly, with jitter."""
    return [(i + 0.2 + 0.6 * rng.random()) / facts for i in range(facts)]


def _checked(
    name: str, tokens: int, asked: int, depths: Sequence[float] | None
) -> Probe:
    """The probe, if it can be made so."""
    if name not in PROBES:
        raise ValueError(f"name: expected one of {', '.join(PROBES)}, got {name!r}")
    if tokens < 1 or asked < 1:
        raise ValueError(
            f"tokens, questions: expected at least 1 of each, got {tokens}, {asked}"
        )
    if depths is not None and not PROBES[name].single:
        single = ", ".join(key for key, one in PROBES.items() if one.single)
        raise ValueError(f"depths: {name} hides several facts a question; use {single}")
    if not all(0 <= depth <= 1 for depth in depths or []):
        raise ValueError(f"depths: expected numbers of 0 to 1, got {list(depths)}")
    return PROBES[name]
