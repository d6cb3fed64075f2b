"""What a way of keeping numbers costs: perplexity of held-out books.

    ACRE_DATA=DIR python benchmarks/perplexity.py [--model PATH] [--tokens 1024]

Takes books.dev.jsonl.xz of ACRE_DATA and a model (SmolLM2-135M from its package by
default); reads a passage of each book with full attention, in float32, in bf16 and in
bf16 with q8 weights, and prints the perplexity of each and its distance from float32.
The text is the same to the token, so the differences are the arithmetic's.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from bench_cpu import smollm2

import acre

SKIPPED = 20_000  # characters of a book before the passage: titles, prefaces
WAYS = (("f32", "same"), ("bf16", "same"), ("bf16", "q8"))


def passages(model: acre.Model, tokens: int) -> Iterator[np.ndarray]:
    """One passage of each book, as ids [tokens]."""
    folder = os.environ.get("ACRE_DATA")
    if not folder:
        sys.exit("set ACRE_DATA to the folder of books.dev.jsonl.xz")
    path = pathlib.Path(folder) / "books.dev.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            body = json.loads(line)["text"][SKIPPED : SKIPPED + 8 * tokens]
            yield np.asarray(model.tokenizer.encode(body)[:tokens], dtype=np.int32)


def loss(model: acre.Model, ids: np.ndarray) -> float:
    """Sum of -log p of ids[1:], in nats."""
    logits = model.logits(ids)[:-1].astype(np.float64)
    top = logits.max(axis=1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float((total - logits[np.arange(len(ids) - 1), ids[1:]]).sum())


def main() -> None:
    """Prints one line per way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    path, first = options.model or smollm2(), 0.0
    for dtype, weights in WAYS:
        model = acre.Model.from_pretrained(path, dtype=dtype, weights=weights)
        texts = list(passages(model, options.tokens))
        count = sum(len(ids) - 1 for ids in texts)
        mean = sum(loss(model, ids) for ids in texts) / count
        first = first or mean
        print(
            f"{dtype:4s} weights {weights:4s} perplexity {math.exp(mean):8.4f} "
            f"({100 * math.expm1(mean - first):+.3f}%), {count} tokens of "
            f"{len(texts)} books, {model.core.engine.isa}"
        )


if __name__ == "__main__":
    main()
