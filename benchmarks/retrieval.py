"""Is the evidence among the refilled groups? Recall and exact match of known evidence.

    ACRE_DATA=... python benchmarks/retrieval.py needle kv nq [--lengths 8192 32768
        131072]

Takes probes (acre/eval/probes.py): one text with many questions whose evidence is
known. Gives, per proxy, eta and way of choosing groups (scores, random, BM25 over
passages of the same budget), the share of questions all of whose evidence groups were
refilled ("recall"), and with --answer the share answered exactly. One cache is built
per text and every question is asked of it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import probe_texts
from bench_cpu import commit, smollm2

import acre
from acre import _core
from acre.chat import Frame
from acre.eval import probes, retrieve
from acre.eval.records import Document
from acre.scoring import Scorer

NEW_TOKENS = 14


@dataclass
class Asked:
    """A question ready to be asked, its own tokens' range, its evidence groups."""

    ids: np.ndarray
    first: int
    last: int
    groups: np.ndarray
    answers: tuple[str, ...]
    text: str


@dataclass
class Bench:
    """A probe built into a cache."""

    model: acre.Model
    cache: _core.Cache
    asked: list[Asked]
    offsets: np.ndarray
    prefix: int
    text: str
    build_s: float
    passages: bool  # the evidence is a whole passage, found group by group

    @property
    def interval(self) -> int:
        return self.cache.plan["interval"]

    @property
    def m(self) -> int:
        return self.cache.plan["m"]


def groups_of(
    offsets: np.ndarray, prefix: int, interval: int, start: int, end: int
) -> np.ndarray:
    """Groups whose tokens overlap the characters [start, end)."""
    tokens = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end)) + prefix
    return np.unique(tokens // interval)


def build(
    model: acre.Model,
    probe: Document,
    proxy: str,
    *,
    interval: int = 0,
    window: int | None = None,
    pooling: dict[str, int] | None = None,
) -> Bench:
    """Reads the probe's text. Questions whose evidence is among the recent entries,
    which every question sees anyway, are left out of the count.
    """
    frame = Frame(model.tokenizer)
    body, offsets = model.tokenizer.encode_offsets(probe.text)
    prefix = np.asarray(frame.prefix_ids, dtype=np.int32)
    first, later = model.windows[proxy]
    start = time.perf_counter()
    builder = _core.Builder(
        model.core,
        np.concatenate([prefix, body]),
        proxy=proxy,
        interval=interval,
        window=first if window is None else window,
        stride=later if window is None else window // 2,
        eta=2048,
        **(pooling or (model.pooling if proxy == "pooled" else {})),
    )
    done, total = 0, 1
    while done < total:
        done, total = builder.step()
    cache = builder.freeze()
    seconds = time.perf_counter() - start
    interval, m, asked = cache.plan["interval"], cache.plan["m"], []
    for question in probe.questions:
        ids, first, last = frame.question_ids(question.query)
        groups = groups_of(offsets, len(prefix), interval, *question.evidence[0])
        if len(groups) and groups[-1] < m:
            asked.append(
                Asked(ids, first, last, groups, question.answers, question.query)
            )
    whole = probe.task == "nq"
    return Bench(model, cache, asked, offsets, len(prefix), probe.text, seconds, whole)


# ------------------------------------------------------------------- ways of choosing


def by_scores(bench: Bench, scoring: acre.Scoring) -> list[np.ndarray]:
    """Scores [m] of every question."""
    scorer, out = Scorer(bench.cache), []
    for asked in bench.asked:
        session = _core.Session(bench.model.core, bench.cache, capacity=len(asked.ids))
        query = (asked.ids, asked.first, asked.last)
        out.append(scorer.scores(session, query, scoring, "shared"))
    return out


def choices(bench: Bench) -> dict[str, acre.Scoring]:
    """The model's own scoring, and the plain ones that it was chosen over."""
    proxy, config = bench.cache.proxy, bench.model.config
    out = {proxy: bench.model.scoring[proxy]}
    if proxy == "pooled":
        every = np.ones((config["layers"], config["heads"]), dtype=np.uint8)
        for layers, heads in (("last layer", None), ("all layers", every)):
            for rotated in (True, False):
                for calibrated in (False, True):
                    name = f"{layers}, {'rotated' if rotated else 'unrotated'}"
                    name += ", calibrated" * calibrated
                    out[name] = acre.Scoring(heads, rotated, calibrated)
    return out


def at_random(bench: Bench, seed: int = 0) -> list[np.ndarray]:
    """Random scores: groups drawn without replacement."""
    rng = np.random.default_rng(seed)
    return [rng.random(bench.m).astype(np.float32) for _ in bench.asked]


def by_bm25(bench: Bench, passage_groups: int = 8) -> list[np.ndarray]:
    """BM25 over passages of `passage_groups` groups; each group has its passage's."""
    size = bench.interval * passage_groups
    corpus = []
    for start in range(0, bench.m * bench.interval, size):
        tokens = np.clip(
            np.array([start, start + size]) - bench.prefix, 0, len(bench.offsets)
        )
        part = bench.offsets[tokens[0] : tokens[1]]
        corpus.append(bench.text[part[0, 0] : part[-1, 1]] if len(part) else "")
    rank = retrieve.bm25(corpus)
    return [
        np.repeat(rank(asked.text), passage_groups)[: bench.m].astype(np.float32)
        for asked in bench.asked
    ]


# ------------------------------------------------------------------------- measuring


def recall(bench: Bench, scores: list[np.ndarray], eta: int) -> float:
    """Mean share of the evidence found among the k best groups: all or nothing for a
    fact, group by group for a passage.
    """
    k = bench.cache.refill_count(eta)
    found = [
        np.isin(asked.groups, _core.select_groups(row, k))
        for asked, row in zip(bench.asked, scores, strict=True)
    ]
    if not found:
        return float("nan")
    return float(np.mean([f.mean() if bench.passages else f.all() for f in found]))


def right(session: _core.Session, model: acre.Model, asked: Asked) -> bool:
    """Whether the greedy answer contains an accepted one."""
    session.prefill(asked.ids)
    ids: list[int] = []
    while len(ids) < NEW_TOKENS and not (ids and ids[-1] in model.eos_ids):
        ids.append(session.next())
    answer = model.tokenizer.decode(ids).lower()
    return any(accepted.lower() in answer for accepted in asked.answers)


def exact_match(bench: Bench, scores: list[np.ndarray], eta: int, limit: int) -> float:
    """Share of the first `limit` questions answered right."""
    k, hits = bench.cache.refill_count(eta), 0
    pairs = list(zip(bench.asked, scores, strict=True))[:limit]
    for asked, row in pairs:
        capacity = len(asked.ids) + NEW_TOKENS
        session = _core.Session(bench.model.core, bench.cache, capacity=capacity)
        session.refill(_core.select_groups(row, k))
        hits += right(session, bench.model, asked)
    return hits / max(len(pairs), 1)


def full_attention(bench: Bench, limit: int) -> float | None:
    """The same share with full attention, where the text fits the model."""
    ids, hits = bench.cache.ids, 0
    asked = bench.asked[:limit]
    longest = max(len(a.ids) for a in asked) + NEW_TOKENS
    if len(ids) + longest > bench.model.config["w_max"]:
        return None
    for one in asked:
        session = _core.Session(bench.model.core, None, capacity=len(ids) + longest)
        session.prefill(ids)
        hits += right(session, bench.model, one)
    return hits / max(len(asked), 1)


def make_probe(
    name: str, model: acre.Model, tokens: int, split: str, seed: int, facts: int = 50
) -> Document:
    """A probe by name."""

    def count(text: str) -> int:
        return len(model.tokenizer.encode(text))

    if name == "needle":
        return probe_texts.needles(probes.book_text(split), tokens, count, facts, seed)
    if name == "kv":
        return probe_texts.key_values(tokens, count, facts, seed)
    return probe_texts.passages(split, seed=seed)


def measure(bench: Bench, name: str, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of one built probe."""
    proxy, plan = bench.cache.proxy, bench.cache.plan
    text = {"probe": name, "seed": options.seed, "tokens": plan["n"]}
    text |= {"window": plan["window"], "interval": plan["interval"]}
    ways = {way: by_scores(bench, how) for way, how in choices(bench).items()}
    if proxy == "pooled":
        ways["random"] = at_random(bench)
        if name == "nq":
            ways["bm25"] = by_bm25(bench)
    for way, scores in ways.items():
        for eta in options.eta:
            row = {
                **text,
                "way": way,
                "eta": eta,
                "questions": len(bench.asked),
                "recall": round(recall(bench, scores, eta), 3),
            }
            if options.answer and name != "nq" and "layer" not in way:
                row["answered"] = min(options.answer, len(bench.asked))
                row["exact"] = round(exact_match(bench, scores, eta, options.answer), 3)
            yield row
    full = full_attention(bench, min(options.answer, 10)) if options.answer else None
    if full is not None and proxy == "pooled":
        yield {
            **text,
            "way": "full attention",
            "answered": min(options.answer, 10),
            "exact": full,
        }


def main() -> None:
    """Builds every probe with every proxy and prints a row per way and eta."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("probes", nargs="+", choices=["needle", "kv", "nq"])
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--lengths", type=int, nargs="*", default=[7680, 32768, 131072])
    parser.add_argument("--proxies", nargs="*", default=["pooled", "trained"])
    parser.add_argument("--eta", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--facts", type=int, default=50, help="facts per text")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--split", default="dev", choices=["dev", "train"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--answer", type=int, default=0, help="questions per text to answer as well"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, help="append the rows to this file"
    )
    options = parser.parse_args()
    if probes.data_dir() is None:
        sys.exit("set ACRE_DATA to the folder with books.dev.jsonl.xz and the others")
    model = acre.Model.from_pretrained(options.model or smollm2())
    texts = [("nq", 0)] if "nq" in options.probes else []
    texts += [(p, n) for n in options.lengths for p in options.probes if p != "nq"]
    for name, tokens in texts:
        probe = make_probe(
            name, model, tokens, options.split, options.seed, options.facts
        )
        for proxy in options.proxies:
            bench = build(model, probe, proxy, window=options.window)
            for row in measure(bench, name, options):
                print(json.dumps(row), flush=True)
                if options.json:
                    with options.json.open("a", encoding="utf-8") as out:
                        out.write(json.dumps({"commit": commit(), **row}) + "\n")


if __name__ == "__main__":
    main()
