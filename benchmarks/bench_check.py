"""Has anything become slower? Ratios, and instruction counts, against a baseline.

    python benchmarks/bench_check.py BUILD [--update]

Takes the folder of the compiled bench_kernels and count_kernels and compares with
baseline.json beside this file. Times are never compared: a case counts by its share
of what the machine could do in the same run, of the multiply-add peak or of the read
rate, whichever is more. Such a share drifts by a tenth between runs on a shared
machine, so it may fall to 0.8 of the baseline (0.7 where memory is the limit) before
it counts as slower. Instructions of the small kernels, counted under valgrind, may grow
by 2%. The baseline is kept per processor and instruction set, and per compiler for the
counts; where there is none yet, the figures are printed and nothing is judged.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

from bench_cpu import processor

BASELINE = pathlib.Path(__file__).with_name("baseline.json")
PEAK, READ, COUNT = 0.8, 0.7, 1.02  # of the baseline that are still no regression
ROW = re.compile(r"^(\S.*?) +(\d+) threads .* (\d+)% peak +(\d+)% read$")
HEAD = re.compile(r"^\d+ threads, (\w+): peak")


def shares(folder: pathlib.Path) -> tuple[str, dict[str, tuple[float, float]]]:
    """(instruction set, case -> shares of the peak and of the read rate)."""
    run = subprocess.run(
        [folder / "bench_kernels"], capture_output=True, text=True, check=True
    )
    isa, found = "", {}
    for line in run.stdout.splitlines():
        if head := HEAD.match(line):
            isa = head[1]
        if row := ROW.match(line):
            name = f"{row[1].strip()}, {row[2]} threads"
            found[name] = (int(row[3]) / 100, int(row[4]) / 100)
    return isa, found


def counts(folder: pathlib.Path) -> dict[str, int]:
    """Kernel -> instructions of a hundred calls; empty without valgrind."""
    program = folder / "count_kernels"
    if shutil.which("valgrind") is None:
        print("valgrind is not installed: no instruction counts")
        return {}
    names = subprocess.run([program], capture_output=True, text=True, check=True)
    found = {}
    for name in names.stdout.split():
        run = subprocess.run(
            ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null",
             "--toggle-collect=measured", program, name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        collected = re.search(r"Collected : (\d+)", run.stderr)
        found[name] = int(collected[1]) if collected else 0
    return found


def judge_shares(found: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Prints every case beside its baseline; returns those that became slower."""
    slower = []
    for name, (peak, read) in found.items():
        limit, now = max(("peak", peak), ("read", read), key=lambda pair: pair[1])
        line = f"  {name:50s} {100 * now:4.0f}% of {limit}"
        if name in before:
            then = before[name][limit == "read"]
            line += f", was {100 * then:.0f}%"
            if now < then * (PEAK if limit == "peak" else READ):
                slower.append(line)
                line += "  SLOWER"
        print(line)
    return slower


def judge_counts(found: dict[str, int], before: dict[str, int]) -> list[str]:
    """The same for instructions."""
    slower = []
    for name, now in found.items():
        line = f"  {name:50s} {now} instructions"
        if name in before:
            line += f", was {before[name]}"
            if now > before[name] * COUNT:
                slower.append(line)
                line += "  MORE"
        print(line)
    return slower


def compiler() -> str:
    """The C compiler's name and version."""
    run = subprocess.run(["cc", "--version"], capture_output=True, text=True)
    return run.stdout.splitlines()[0] if run.stdout else "unknown"


def main() -> None:
    """Measures, compares, and exits with 1 where something became slower."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--update", action="store_true", help="write the baseline")
    options = parser.parse_args()
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    isa, measured = shares(options.build)
    counted = counts(options.build)
    times, codes = f"{processor()}, {isa}", compiler()
    if options.update:
        baseline.setdefault("shares", {})[times] = measured
        if counted:
            baseline.setdefault("instructions", {})[codes] = counted
        BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")
    print(f"{times}: share of the limit")
    slower = judge_shares(measured, baseline.get("shares", {}).get(times, {}))
    print(f"{codes}: instructions of 100 calls, AVX2")
    slower += judge_counts(counted, baseline.get("instructions", {}).get(codes, {}))
    if slower:
        sys.exit("became slower:\n" + "\n".join(slower))


if __name__ == "__main__":
    main()
