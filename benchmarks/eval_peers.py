"""Others' ways of compressing a KV cache, on acre's weights, prompts and budgets.

    python benchmarks/eval_peers.py longbench_sample --data DIR --output DIR2
        --methods snapkv expected_attention [--window 1024 --stride 1024 --eta 1024]

Takes what `acre eval` takes, and names of presses (benchmarks/peer_presses.py;
"+question" behind one lets it see the question while it compresses); prints and leaves
the same report. One idea: a press is one more method of the evaluation. It needs a venv
of its own, benchmarks/requirements-peers.txt, with acre on PYTHONPATH.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench_cpu import smollm2
from peer_presses import TransformersMethod, kvpress

from acre.eval.methods import Settings
from acre.eval.run import evaluate
from acre.eval.work import ModelSpec

AWARE = "+question"


def methods_of(
    names: Sequence[str], reading: Settings, path: Path, dtype: str
) -> list[TransformersMethod]:
    """The methods of names such as "snapkv+question". ValueError."""
    return [
        TransformersMethod(
            name.removesuffix(AWARE), reading, path,
            question_aware=name.endswith(AWARE), dtype=dtype,
        )
        for name in names
    ]  # fmt: skip


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", nargs="+")
    parser.add_argument("--data")
    parser.add_argument("--output", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument(
        "--methods", nargs="+", default=["snapkv", "expected_attention"]
    )
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    for name in ("window", "stride", "eta"):
        default = getattr(Settings(), name)
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """Evaluates and prints the report."""
    given = options()
    import torch

    torch.set_num_threads(given.threads)
    path = given.model or smollm2()
    reading = Settings(window=given.window, stride=given.stride, eta=given.eta)
    methods = methods_of(given.methods, reading, path, given.dtype)
    if any(method.press for method in methods):
        kvpress()
    model = ModelSpec(str(path), {"threads": 1, "dtype": given.dtype})
    report = evaluate(
        given.task, model, given.data, methods, given.output, limit=given.limit
    )
    print(report.markdown())


if __name__ == "__main__":
    main()
