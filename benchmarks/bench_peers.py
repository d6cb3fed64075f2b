"""acre beside transformers and llama.cpp: same weights, same tokens, same threads.

    python benchmarks/bench_peers.py [--shapes smollm2 qwen2.5-0.5b] [--threads N]
        [--peers NAME ...] [--rounds 5] [--build-tokens 32768] [--skip-long]
        [--json FILE]

Takes SmolLM2-135M from its package and Qwen2.5-0.5B's shape with random weights; the
text is Python's language reference. A peer whose package (transformers, or
llama-cpp-python) is not installed is skipped. One idea: the engines alternate within
one process, so that what disturbs the machine disturbs all alike; short figures are
medians over rounds, ratios are taken within a round. Long reads are run once, acre's
before and after the peers'. Peers are yardsticks: each runs in its fastest settings
(`peer_engines`), which are printed. Refuses to print when the engines do not agree.
The second shape takes some 10 GB of memory and 2 GB of temporary files.

Columns: acre and torch-bf16 compute in bf16, acre-q8 with weights of 8 bits, torch-f32
on the same weights in float32, llama-bf16 and llama-q8_0 on GGUF files of those types.
The last columns say how many times as fast as the best peer acre in bf16 is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from bench_cpu import build_rows, commit, median_seconds, processor, reference_ids
from peer_engines import (
    NAMES,
    NEW,
    PROMPT,
    Engine,
    LlamaEngine,
    Peer,
    acre_peer,
    missing,
    open_peers,
)
from peer_models import SHAPES, Weights

import acre
from acre import _core

REFERENCE = "torch-f32"
GREEDY, LIMIT = 8, 0.03  # tokens compared; largest difference over largest logit
QUESTION, ETA = 24, 4096  # as bench_cpu asks
AFTER = 32  # tokens decoded after a long context
REST = 0.05  # seconds for the last engine's idle threads to stop spinning
PACKAGES = ("torch", "transformers", "llama_cpp_python")


@dataclass
class Row:
    """One workload: samples by engine, acre's first, in the order of the columns."""

    name: str
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    def add(self, engine: str, value: float, settings: str = "") -> None:
        self.samples.setdefault(engine, []).append(value)
        self.settings[engine] = settings

    def median(self, engine: str) -> float:
        return statistics.median(self.samples[engine])

    def ratios(self, peer: str) -> list[float]:
        """How many times as fast as the peer acre is: per round, or of the medians."""
        own, other = self.samples[next(iter(self.samples))], self.samples[peer]
        if len(own) != len(other):
            own, other = [statistics.median(own)], [statistics.median(other)]
        pairs = zip(own, other, strict=True)
        return [b / a if self.unit == "ms" else a / b for a, b in pairs]

    def peers(self) -> list[str]:
        """Other engines' columns; empty where acre's own is missing."""
        names = list(self.samples)
        own = bool(names) and names[0].startswith("acre")
        return [name for name in names if own and not name.startswith("acre")]


# ------------------------------------------------------------------------------- timing


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """(seconds, cores kept busy) of one run, after a moment's rest."""
    time.sleep(REST)
    before = time.process_time()
    seconds = median_seconds(run, 1)
    return seconds, (time.process_time() - before) / seconds


def decode_rate(engine: Engine, tokens: int) -> tuple[float, float]:
    """(tokens per second, busy cores) after a read; the first token is not timed."""
    engine.next()
    seconds, busy = timed(lambda: [engine.next() for _ in range(tokens)])
    return tokens / seconds, busy


def short_prefill(ids: np.ndarray, peer: Peer) -> tuple[float, float, str]:
    """(tok/s, busy cores, settings) of reading ids."""
    seconds, busy = timed(lambda: peer.prefill.read(ids))
    return len(ids) / seconds, busy, peer.prefill.settings


def short_decode(ids: np.ndarray, peer: Peer) -> tuple[float, float, str]:
    """(tok/s, busy cores, settings) of decoding NEW tokens after ids."""
    peer.decode.read(ids)
    return *decode_rate(peer.decode, NEW), peer.decode.settings


def short_rows(
    peers: list[Peer], ids: np.ndarray, lengths: list[int], rounds: int
) -> list[Row]:
    """Prefill and decoding, engines in turn within each round, after a warm-up."""
    jobs = {f"prefill {n}": partial(short_prefill, ids[:n]) for n in lengths}
    jobs[f"decode {NEW} after {PROMPT}"] = partial(short_decode, ids[:PROMPT])
    rows = [Row(name, "tok/s") for name in jobs]
    busy = [Row(f"cores busy, {name}", "cores") for name in jobs]
    for number in range(rounds + 1):
        for row, cores, run in zip(rows, busy, jobs.values(), strict=True):
            for peer in peers:
                rate, used, settings = run(peer)
                if number:
                    row.add(peer.name, rate, settings)
                    cores.add(peer.name, used, settings)
    return rows + busy


# ---------------------------------------------------------------------------- long text


def context_rows(
    peers: list[Peer], ids: np.ndarray
) -> tuple[list[Row], dict[str, int]]:
    """One full-attention read of ids and decoding after it, each in its best setting;
    and which setting read fastest."""
    read = Row(f"read {len(ids)}, full attention", "tok/s")
    decode = Row(f"  decode {AFTER} after it", "tok/s")
    fastest = {}
    for peer in peers:
        trials = []
        for make in peer.long:
            engine = make(len(ids) + NEW)
            seconds, _ = timed(lambda e=engine: e.read(ids))
            rate, _ = decode_rate(engine, AFTER)
            trials.append((len(ids) / seconds, rate, engine.settings))
        fastest[peer.name] = max(range(len(trials)), key=lambda i: trials[i][0])
        rate, _, settings = trials[fastest[peer.name]]
        read.add(peer.name, rate, settings)
        _, rate, settings = max(trials, key=lambda trial: trial[1])
        decode.add(peer.name, rate, settings)
    return [read, decode], fastest


def full_question(
    engine: LlamaEngine, ids: np.ndarray, question: np.ndarray
) -> Iterator[float]:
    """Reading ids with full attention: tok/s of it, ms to the first token of a
    question's answer, tok/s of the answer."""
    yield len(ids) / timed(lambda: engine.read(ids))[0]
    yield 1e3 * timed(lambda: (engine.more(question), engine.next()))[0]
    yield NEW / timed(lambda: [engine.next() for _ in range(NEW)])[0]


def acre_build(model: acre.Model, rows: list[Row], n: int, eta: int) -> None:
    """Enters what bench_cpu measures on a built cache, under both proxies."""
    for proxy in ("pooled", "trained"):
        _, found = build_rows(model, n, proxy, eta)
        figures = {name.strip().split(" ")[0]: value for name, value, *_ in found}
        for row, key in zip(
            rows, ("build", "first", "decode", "score,", "refill"), strict=True
        ):
            row.add(f"acre {proxy}", figures[key])
        gc.collect()


def build_table(
    model: acre.Model, peers: list[Peer], n: int, fastest: dict[str, int]
) -> list[Row]:
    """A long text read and questioned: acre's cache, llama.cpp's full attention."""
    rows = [
        Row(f"read {n}", "tok/s"),
        Row(f"  first token of a {QUESTION}-token question", "ms"),
        Row(f"  decode {NEW} on it", "tok/s"),
        Row("  of the first token: scoring", "ms"),
        Row(f"  of the first token: refilling {ETA}", "ms"),
    ]
    ids, question = reference_ids(model, n), reference_ids(model, QUESTION)
    acre_build(model, rows, n, ETA)
    for peer in peers:
        if peer.name in fastest and peer.name.startswith("llama"):
            room = len(ids) + len(question) + NEW
            engine: Any = peer.long[fastest[peer.name]](room)
            values = full_question(engine, ids, question)
            for row, value in zip(rows, values, strict=False):
                row.add(peer.name, value, engine.settings)
    acre_build(model, rows, n, ETA)
    return rows


# ------------------------------------------------------------------------------- checks


def greedy(engine: Engine, prompt: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """(logits after the prompt, the next GREEDY tokens)."""
    engine.read(prompt)
    logits = np.array(engine.logits(), dtype=np.float32)
    return logits, [engine.next() for _ in range(GREEDY)]


def check(weights: Weights, peers: list[Peer], prompt: np.ndarray) -> None:
    """Prints how far the engines agree with transformers in float32; exits when acre's
    next token is another, for random weights when any logits differ too much."""
    found = {peer.name: greedy(peer.decode, prompt) for peer in peers}
    if REFERENCE not in found:
        print(f"not checked: agreement is judged by {REFERENCE}")
        return
    logits, tokens = found[REFERENCE]
    for name, (own, new) in found.items():
        apart = float(np.abs(own - logits).max() / np.abs(logits).max())
        same = sum(a == b for a, b in zip(new, tokens, strict=True))
        print(
            f"  {name:12s} next {new[0]:6d}, {same}/{GREEDY} tokens as {REFERENCE}, "
            f"logits within {100 * apart:.2f}%"
        )
        strict = name == "acre" if weights.trained else apart > LIMIT
        if strict and new[0] != tokens[0]:
            sys.exit(f"check failed: {name} disagrees with {REFERENCE}")


# ------------------------------------------------------------------------------- output


def print_rows(rows: list[Row]) -> None:
    """A table: workloads by engines, then acre against the best peer."""
    columns = list(dict.fromkeys(name for row in rows for name in row.samples))
    print(f"{'':38s}" + "".join(f"{name:>13s}" for name in columns))
    for row in rows:
        cells = [
            f"{row.median(name):13.1f}" if name in row.samples else f"{'-':>13s}"
            for name in columns
        ]
        line = f"{row.name:38s}" + "".join(cells) + f" {row.unit:5s}" + verdict(row)
        print(line.rstrip(), flush=True)


def verdict(row: Row) -> str:
    """acre against the best peer: median ratio, least and largest of the rounds."""
    if not row.peers() or row.unit == "cores":
        return ""
    better = min if row.unit == "ms" else max
    best = better(row.peers(), key=row.median)
    ratios = row.ratios(best)
    spread = f" [{min(ratios):.2f}-{max(ratios):.2f}]" if len(ratios) > 1 else ""
    return f" {statistics.median(ratios):5.2f}x{spread} {best}"


def print_settings(rows: list[Row]) -> None:
    """The settings that the engines ran in, and for which rows."""
    told: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, how in row.settings.items():
            if how and row.unit != "cores":
                told.setdefault((name, how), []).append(row.name.strip())
    for (name, how), where in sorted(told.items()):
        print(f"  {name}, {how}: {'; '.join(where)}")


def version(package: str) -> str:
    """A package's version, "none" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def records(row: Row) -> Iterator[dict[str, Any]]:
    """What the JSON file says of a row: each engine's figure, each ratio."""
    for name, samples in row.samples.items():
        yield {
            "engine": name,
            "name": row.name.strip(),
            "value": row.median(name),
            "unit": row.unit,
            "settings": row.settings[name],
            "samples": samples,
        }
    for peer in row.peers() if row.unit != "cores" else []:
        ratios = row.ratios(peer)
        yield {
            "engine": f"acre / {peer}",
            "name": row.name.strip(),
            "value": statistics.median(ratios),
            "unit": "times as fast",
            "samples": ratios,
        }


# --------------------------------------------------------------------------------- main


def run_shape(shape: str, names: list[str], options: argparse.Namespace) -> list[Row]:
    """Opens, checks and measures one shape; prints its tables."""
    weights: Weights = SHAPES[shape]()
    model = weights.open_acre(options.threads)
    most = max(*options.prefill, options.context, PROMPT)
    ids = reference_ids(model, most)
    engine = model.core.engine
    print(f"\n{shape}: {engine.threads} threads, acre {engine.isa}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tuning = ids[: max(options.prefill)]
        eight = weights.open_acre(options.threads, "q8")
        peers = [acre_peer("acre", model), acre_peer("acre-q8", eight)]
        peers += open_peers(weights, names, options.threads, tuning, Path(folder))
        check(weights, peers, ids[:PROMPT])
        rows = short_rows(peers, ids, options.prefill, options.rounds)
        print_rows(rows)
        fastest: dict[str, int] = {}
        if not options.skip_long:
            long, fastest = context_rows(peers, ids[: options.context])
            print_rows(long)
            rows += long
        built = build_table(model, peers, options.build_tokens, fastest)
        print_rows(built)
    print_settings(rows + built)
    return rows + built


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--peers", nargs="*", choices=NAMES, default=list(NAMES[:4]))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--context", type=int, default=8128, help="of the long decode")
    parser.add_argument("--build-tokens", type=int, default=32768)
    parser.add_argument(
        "--skip-long", action="store_true", help="no long reads by full attention"
    )
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    return parser.parse_args()


def main() -> None:
    """Measures and prints the tables, one shape after the other."""
    options = arguments()
    names = []
    for name in options.peers:
        lacking = missing(name)
        if lacking:
            print(f"{name} skipped: {lacking} is not installed")
        else:
            names.append(name)
    versions = {package: version(package) for package in PACKAGES}
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    for shape in options.shapes:
        rows = run_shape(shape, names, options)
        gc.collect()
        if options.json:
            facts = {"commit": commit(), "machine": processor(), "model": shape}
            facts |= {"isa": _core.Engine(threads=1).isa}
            facts |= {"threads": options.threads, **versions}
            with options.json.open("a", encoding="utf-8") as out:
                for row in rows:
                    for record in records(row):
                        out.write(json.dumps({**facts, **record}) + "\n")


if __name__ == "__main__":
    main()
