"""The GPU beside its targets: operations, PyTorch's attention, builds of a 7B shape.

    python benchmarks/bench_gpu.py [--program FILE] [--plugin FILE] [--libraries DIRS]
        [--seconds S] [--quick] [--small] [--json FILE] [--csv FILE]

Three parts, each of them left out, with a line that says why, where what it needs is
not there or no time is left:

    operations  build/c/bench_device: rates beside a product's and a copy's of that run
    torch       PyTorch's best attention on the same shapes, right after
    builds      a random model of Qwen2.5-7B's shape reads 32K to 1024K tokens: time,
                peak memory, a second question; full attention by transformers beside it

A row has a value, and where one is wanted a target and whether it was met. The targets
are an H200's. --json appends the rows, --csv writes the builds as a table and, where
matplotlib is there, a picture beside it. --small runs the same code on small sizes, the
builds on the CPU: its figures say nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
Row = dict[str, Any]
Keep = Callable[[Sequence[Row]], None]

# Case -> what of its row is compared, and the least that is wanted.
TARGETS: dict[str, tuple[str, float]] = {
    "window d=128, 16K on itself": ("value", 540),
    "window d=64, 16K on itself": ("value", 413),
    "window d=128, 16K on itself, beside torch": ("value", 0.9),
    "window d=64, 16K on itself, beside torch": ("value", 0.9),
    "decode attention d=128, 128K keys": ("share", 0.8),
    "decode attention d=64, 128K keys": ("share", 0.8),
    "decode gemv 3584->18944": ("share", 0.8),
    "decode gemv 18944->3584": ("share", 0.8),
    "decode gemv 3584->152064": ("share", 0.8),
    "decode swiglu 3584->18944": ("share", 0.8),
    "build 128K": ("share", 0.6),
}
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
SMALL: dict[str, Any] = QWEN_7B | {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 16384,
}
LENGTHS = (128, 32, 64, 256, 512, 1024)  # K tokens, the one with a target first


class Budget:
    """Seconds that are left, and a word for what did not get any."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    def left(self) -> float:
        return self.until - time.monotonic()

    def allows(self, what: str, seconds: float) -> bool:
        if seconds <= self.left():
            return True
        print(f"{what}: left out, it would take {seconds:.0f} s of {self.left():.0f}")
        return False


def judged(row: Row) -> Row:
    """The row with its target, where it has one."""
    if row["case"] not in TARGETS:
        return row
    part, least = TARGETS[row["case"]]
    of = f" of {row['of']}" if part == "share" else f" {row['unit']}"
    return row | {"target": f">= {least:g}{of}", "met": row[part] >= least}


# --------------------------------------------------------------------------- operations


def operation_rows(options: argparse.Namespace) -> list[Row]:
    """What bench_device prints; it ends badly where a result is wrong."""
    effort = ["0.02", "3" if options.quick else "7"]
    if options.small:
        effort = ["0.001", "2", "small"]
    command = [options.program, options.plugin, options.libraries, *effort]
    ended = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True
    )
    if ended.returncode != 0:
        sys.exit(f"bench_device ended with {ended.returncode}: {ended.stderr.strip()}")
    return [json.loads(line) for line in ended.stdout.splitlines()]


# -------------------------------------------------------------------------------- torch


def cuda_ms(torch: Any, call: Callable[[], object], rounds: int = 20) -> float:
    """Median milliseconds between two events around a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def attention_ms(torch: Any, heads: int, groups: int, dim: int, n: int) -> Row:
    """PyTorch's causal attention of n tokens on themselves, by the fastest of its
    backends: {"ms", "backend"}."""
    from torch.nn import attention, functional

    make = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(1, heads, n, dim, **make)
    key, value = (torch.randn(1, groups, n, dim, **make) for _ in range(2))
    best: Row = {"ms": math.inf, "backend": "none"}
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        backend = getattr(attention.SDPBackend, name, None)
        if backend is None:
            continue
        try:
            with attention.sdpa_kernel(backend):
                ms = cuda_ms(
                    torch,
                    lambda: functional.scaled_dot_product_attention(
                        query, key, value, is_causal=True, enable_gqa=True
                    ),
                )
        except RuntimeError:  # not made for this
            continue
        if ms < best["ms"]:
            best = {"ms": ms, "backend": name.lower()}
    return best


def torch_rows(rows: Sequence[Row]) -> list[Row]:
    """PyTorch's product, and its attention with how many times as fast acre is."""
    try:
        import torch
    except ImportError:
        print("torch: left out, it is not installed")
        return []
    if not torch.cuda.is_available():
        print("torch: left out, it sees no GPU")
        return []
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    ms = cuda_ms(torch, lambda: a @ b)
    value = 2 * 8192**3 / ms * 1e-9
    out = [{"case": "torch gemm", "value": value, "unit": "TFLOP/s", "ms": ms}]
    for dim in (128, 64):
        case = f"window d={dim}, 16K on itself"
        own = next(row for row in rows if row["case"] == case)
        peer = attention_ms(torch, 32, 8, dim, 16384)
        if math.isinf(peer["ms"]):
            print(f"torch d={dim}: left out, none of its backends takes it")
            continue
        out += beside(case, own, peer)
    return out


def beside(case: str, own: Row, peer: Row) -> list[Row]:
    """The peer's row, which did the same work, and the ratio of the rates."""
    rate = own["value"] * own["ms"] / peer["ms"]
    theirs = {"case": f"{case}, torch", "value": rate, "unit": own["unit"], **peer}
    ratio = peer["ms"] / own["ms"]
    return [theirs, {"case": f"{case}, beside torch", "value": ratio, "unit": "x"}]


# ------------------------------------------------------------------------------- builds


def shapes(c: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face name and shape of every tensor of a Qwen2 model."""
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    dim = hidden // c["num_attention_heads"]
    rows = {"q": hidden, "k": c["num_key_value_heads"] * dim}
    rows["v"] = rows["k"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    yield "lm_head.weight", (c["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        for letter, count in rows.items():
            yield f"{layer}self_attn.{letter}_proj.weight", (count, hidden)
            yield f"{layer}self_attn.{letter}_proj.bias", (count,)
        yield layer + "self_attn.o_proj.weight", (hidden, hidden)
        yield layer + "mlp.gate_proj.weight", (ffn, hidden)
        yield layer + "mlp.up_proj.weight", (ffn, hidden)
        yield layer + "mlp.down_proj.weight", (hidden, ffn)


def random_arrays(c: Mapping[str, Any], seed: int = 1) -> dict[str, Any]:
    """bf16 bits of every tensor. Layers share their arrays, and an array repeats a
    block of random numbers: no time depends on it, and 15 GB are soon there."""
    import numpy as np

    block = np.random.default_rng(seed).standard_normal(4_000_037).astype(np.float32)
    made: dict[tuple[Any, ...], Any] = {}

    def bits(name: str, shape: tuple[int, ...]) -> Any:
        values = block
        if "norm" in name:
            values = 1 + 0.1 * block
        elif "embed" not in name:
            values = block / np.float32(math.sqrt(shape[-1]))
        high = (values.view(np.uint32) >> 16).astype(np.uint16)
        return np.resize(high, shape)

    out = {}
    for name, shape in shapes(c):
        kind = name.split(".")[-2], shape
        if kind not in made:
            made[kind] = bits(name, shape)
        out[name] = made[kind]
    return out


def build_flops(c: Mapping[str, Any], plan: Mapping[str, Any]) -> float:
    """Operations that reading needs: the products of every token's layers, and 4 d for
    each head and key that a row sees. L1 entries are pooled, so no rows are theirs."""
    hidden, ffn, layers = (
        c["hidden_size"],
        c["intermediate_size"],
        c["num_hidden_layers"],
    )
    dim = hidden // c["num_attention_heads"]
    kv = c["num_key_value_heads"] * dim
    products = 2 * layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn)
    seen, start, window = 0.0, 0, plan["window"]
    while start < plan["n"]:
        rows = min(window, plan["n"] - start)
        seen += rows * (start // plan["interval"] + (rows + 1) / 2)
        start, window = start + rows, plan["stride"]
    return products * plan["n"] + 4 * layers * hidden * seen


def build_row(
    model: Any, c: Mapping[str, Any], n: int, gemm: float, l2: str = "auto"
) -> Row:
    """Reads n random tokens, then asks twice; the second answer's times count."""
    import numpy as np

    engine, rng = model.core.engine, np.random.default_rng(n)
    held = engine.bytes
    engine.reset_peak()
    ids = rng.integers(0, c["vocab_size"], n, dtype=np.int32)
    start = time.perf_counter()
    cache = model.build(ids, proxy="pooled", l2=l2, progress=False)
    seconds = time.perf_counter() - start
    peak = engine.peak_bytes - held
    question = rng.integers(0, c["vocab_size"], 32, dtype=np.int32)
    eta = min(4096, n // 4)
    first, second = (cache.ask(question, eta=eta, max_new_tokens=4) for _ in range(2))
    if first.ids.tolist() != second.ids.tolist():
        sys.exit(f"build {n}: the same question was answered otherwise")
    flops = build_flops(c, cache.plan)
    rate = flops / seconds * 1e-12
    told = f"{n // 1024}K" if n >= 1024 else f"{n}"
    return {
        "case": f"build {told}" + (", L2 on the host" if l2 == "host" else ""),
        "l2": cache.plan["l2"],
        "value": n / seconds,
        "unit": "tok/s",
        "n": n,
        "l": cache.plan["interval"],
        "seconds": seconds,
        "tflops": rate,
        "of": "gemm",
        "share": rate / gemm,
        "peak_bytes": peak,
        "cache_bytes": cache.nbytes,
        "first_token_ms": second.stats.time_to_first_token_ms,
    }


def question_row(build: Row) -> Row:
    """What the later question cost, as a figure of its own."""
    case = build["case"].replace("build", "second question on")
    return {"case": case, "value": build["first_token_ms"], "unit": "ms"}


def full_seconds(
    c: Mapping[str, Any], lengths: Sequence[int], budget: Budget
) -> dict[int, float]:
    """Tokens -> seconds of full attention by transformers on the same shape, on the
    GPU, as far as its memory and the time go."""
    import torch
    from transformers import Qwen2Config, Qwen2Model

    out: dict[int, float] = {}
    settings = {k: v for k, v in c.items() if k != "model_type"}
    settings["max_position_embeddings"] = max(lengths)
    config = Qwen2Config(**settings, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.inference_mode(), torch.device("cuda"):
        peer = Qwen2Model(config).eval()
        for n in sorted({2048, *lengths}):
            expected = 5 * max(out.values()) if len(out) > 1 else 5.0
            if not budget.allows(f"full attention, {n}", expected):
                break
            ids = torch.randint(0, c["vocab_size"], (1, n))
            torch.cuda.synchronize()
            start = time.perf_counter()
            try:
                peer(input_ids=ids, use_cache=False)
                torch.cuda.synchronize()
            except torch.cuda.OutOfMemoryError:
                print(f"full attention, {n}: left out, out of memory")
                break
            out[n] = time.perf_counter() - start
    out.pop(2048, None)  # it warmed up
    return out


def full_rows(c: Mapping[str, Any], builds: Sequence[Row], budget: Budget) -> list[Row]:
    """Rows of full attention; its seconds go to the build's row of that length, too."""
    lengths = [row["n"] for row in builds if row["n"] <= 131072]
    try:
        seconds = full_seconds(c, lengths, budget)
    except Exception as error:  # the peer's, not ours: it is told and left out
        print(f"full attention: left out, {type(error).__name__}: {error}")
        return []
    for row in builds:
        if row["n"] in seconds:
            row["full_seconds"] = seconds[row["n"]]
    return [
        {"case": f"full attention {n // 1024}K", "value": n / s, "unit": "tok/s"}
        for n, s in seconds.items()
    ]


def host_rows(
    model: Any, c: Mapping[str, Any], longest: Row, gemm: float, budget: Budget
) -> list[Row]:
    """The longest build again, its L2 entries in memory of the host."""
    n, what = longest["n"], f"build {longest['n']}, L2 on the host"
    if not budget.allows(what, 1.5 * longest["seconds"]):
        return []
    try:
        row = build_row(model, c, n, gemm, "host")
    except MemoryError as error:
        print(f"{what}: refused, {error}")
        return []
    return [row, question_row(row)]


def build_rows(
    options: argparse.Namespace, gemm: float, budget: Budget, keep: Keep
) -> list[Row]:
    """The builds' rows by length; each is also given to `keep` once it is there."""
    sys.path.insert(0, str(ROOT))
    try:
        import acre
    except ImportError as error:
        print(f"builds: left out, {error}")
        return []
    c = SMALL if options.small else QWEN_7B
    lengths = [1024 * k for k in LENGTHS[: 2 if options.quick else None]]
    if options.small:
        lengths = [6000, 9000]
    if not budget.allows("builds", 1 if options.small else 60):
        return []
    device = "cpu" if options.small else "cuda"
    model = acre.Model.from_arrays(c, random_arrays(c), device=device)
    rows: list[Row] = []
    for n in lengths:
        expected = 1.3 * n / rows[-1]["value"] if rows else 5.0
        if not budget.allows(f"build {n}", 0 if options.small else expected):
            continue
        try:
            rows.append(build_row(model, c, n, gemm))
        except MemoryError as error:
            print(f"build {n}: refused, {error}")
            continue
        keep([rows[-1], question_row(rows[-1])])
    if rows:
        keep(host_rows(model, c, max(rows, key=lambda row: row["n"]), gemm, budget))
    del model
    if rows and not options.small:
        keep(full_rows(c, rows, budget))
    return sorted(rows, key=lambda row: row["n"])


COLUMNS = ("n", "l", "seconds", "full_seconds", "peak_bytes", "cache_bytes", "share")


def write_table(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Builds as CSV, and their times over their lengths as a picture."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = Figure(figsize=(6, 4)).subplots()
    for name, label in (("seconds", "acre"), ("full_seconds", "full attention")):
        points = [(row["n"], row[name]) for row in rows if name in row]
        if points:
            axes.loglog(*zip(*points, strict=True), "o-", base=2, label=label)
    axes.set(xlabel="tokens", ylabel="seconds to read them")
    axes.legend()
    axes.figure.savefig(path.with_suffix(".png"), dpi=150)


# --------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = ROOT / "build" / "c" / "bench_device"
    parser.add_argument("--program", type=pathlib.Path, default=here)
    parser.add_argument(
        "--plugin", type=pathlib.Path, default=ROOT / "acre" / "_cuda.so"
    )
    parser.add_argument("--libraries", default="")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, help="append the rows to it")
    parser.add_argument("--csv", type=pathlib.Path, help="the builds, as a table")
    options = parser.parse_args(arguments)
    budget = Budget(options.seconds)

    def keep(rows: Sequence[Row]) -> None:
        for row in map(judged, rows):
            print(json.dumps(row), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")

    rows = operation_rows(options)
    keep(rows)
    if not options.small:
        keep(torch_rows(rows))
    gemm = next(row["value"] for row in rows if row["case"] == "gemm")
    builds = build_rows(options, gemm, budget, keep)
    if options.csv and builds:
        write_table(options.csv, builds)


if __name__ == "__main__":
    main()
