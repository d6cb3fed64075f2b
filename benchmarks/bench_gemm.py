"""acre's matrix products beside oneDNN's, which PyTorch brings, on the same shapes.

    python benchmarks/bench_gemm.py BUILD [--rounds 5] [--json FILE]

Takes the folder of the compiled bench_kernels; runs it and PyTorch in turn, with all
usable threads, on SmolLM2-135M's layer shapes at 512 rows. oneDNN gets its weights
packed beforehand, as acre does. Prints GFLOP/s (medians over rounds) and how many times
as fast acre is (median of the rounds' ratios).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess

import torch
from bench_cpu import commit, median_seconds, processor

SHAPES = ((576, 960), (576, 576), (1536, 576))
ROWS, REPEATS = 512, 60
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
LINE = re.compile(r"^matmul (\S+ \S+) +(\d+) threads .* ms +([\d.]+) GFLOP/s")


def name(dtype: str, K: int, N: int) -> str:
    """As bench_kernels names the case."""
    return f"{dtype} {ROWS}x{K}->{N}"


def own(folder: pathlib.Path, threads: int) -> dict[str, float]:
    """Case -> GFLOP/s of acre."""
    command = [folder / "bench_kernels", "best", f"{ROWS}x"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = (LINE.match(line) for line in run.stdout.splitlines())
    return {row[1]: float(row[3]) for row in rows if row and int(row[2]) == threads}


def onednn(dtype: str, K: int, N: int) -> float:
    """GFLOP/s of oneDNN with packed weights."""
    x = torch.rand(ROWS, K).to(DTYPES[dtype])
    weights = torch.rand(N, K).to(DTYPES[dtype])
    with torch.inference_mode():
        packed = torch.ops.mkldnn._reorder_linear_weight(weights, ROWS)
        multiply = torch.ops.mkldnn._linear_pointwise

        def run() -> object:
            return multiply(x, packed, None, "none", [], "")

        right = (run().float() - (x @ weights.T).float()).abs().max()
        if right > 1:  # of sums around K / 4
            raise SystemExit("check failed: oneDNN's product is another")
        return 2e-9 * ROWS * K * N / median_seconds(run, REPEATS)


def main() -> None:
    """Prints a line per case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="append the rows to it")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    rounds = []
    for _ in range(options.rounds):
        theirs = {name(t, K, N): onednn(t, K, N) for t in DTYPES for K, N in SHAPES}
        rounds.append((own(options.build, threads), theirs))
    for case in rounds[0][1]:
        pairs = [(acre[case], peer[case]) for acre, peer in rounds]
        acre, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{case:24s} {acre:7.1f} oneDNN {peer:7.1f} GFLOP/s {ratio:5.2f}x")
        if options.json:
            facts = {"commit": commit(), "machine": processor(), "threads": threads}
            facts |= {"name": case, "acre": acre, "onednn": peer, "ratio": ratio}
            with options.json.open("a", encoding="utf-8") as out:
                out.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
