"""Which heads find the evidence? Recall of every layer and head, rotated and unrotated.

    ACRE_DATA=... python benchmarks/scoring_heads.py --out acre/scoring.json

Takes probes made of the *train* split; scores every question with each head alone;
chooses the set of heads (greedily, by mean recall over the probes) that `Model.scoring`
then uses. The dev split is left for measuring the choice.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
from bench_cpu import smollm2
from retrieval import Bench, build, make_probe, recall

import acre
from acre import _core


def head_scores(bench: Bench, rotated: bool) -> np.ndarray:
    """float32 [questions, L, h, m]: each head's softmax, summed over the question."""
    config = bench.model.config
    L, h = config["layers"], config["heads"]
    out = np.empty((len(bench.asked), L, h, bench.m), dtype=np.float32)
    for i, asked in enumerate(bench.asked):
        for head in range(h):
            mask = np.zeros((L, h), dtype=np.uint8)
            mask[:, head] = 1
            session = _core.Session(
                bench.model.core, bench.cache, capacity=len(asked.ids)
            )
            out[i, :, head] = session.score(
                asked.ids, asked.first, asked.last, select="per_layer", rotated=rotated,
                heads=mask,
            )  # fmt: skip
    return out


def choose(
    benches: list[Bench], scores: list[np.ndarray], eta: int, most: int
) -> list[tuple[list, float]]:
    """Greedy: adds the head that raises mean recall most; (heads, recall) per step."""
    L, h = scores[0].shape[1:3]

    def mean_recall(sums: list[np.ndarray]) -> float:
        rows = zip(benches, sums, strict=True)
        return float(np.mean([recall(bench, list(s), eta) for bench, s in rows]))

    single = np.array(
        [
            [mean_recall([s[:, i, j] for s in scores]) for j in range(h)]
            for i in range(L)
        ]
    )
    pool = [divmod(int(at), h) for at in np.argsort(-single, axis=None)[:32]]
    sums = [np.zeros_like(s[:, 0, 0]) for s in scores]
    chosen, steps = [], []
    while len(chosen) < most:
        rest = [head for head in pool if head not in chosen]
        tries = [
            mean_recall([a + s[:, i, j] for a, s in zip(sums, scores, strict=True)])
            for i, j in rest
        ]
        best = rest[int(np.argmax(tries))]
        sums = [a + s[:, best[0], best[1]] for a, s in zip(sums, scores, strict=True)]
        chosen.append(best)
        steps.append((list(chosen), max(tries)))
    return steps


def main() -> None:
    """Prints recall per choice and writes the best one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--eta", type=int, default=1024)
    parser.add_argument("--most", type=int, default=12)
    parser.add_argument("--proxy", default="pooled")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    model = acre.Model.from_pretrained(options.model or smollm2())
    benches = []
    for name in ("needle", "kv", "nq"):
        probe = make_probe(name, model, options.tokens, "train", seed=1)
        benches.append(build(model, probe, options.proxy))
    best: tuple = ([], -1.0, True)
    for rotated in (True, False):
        scores = [head_scores(bench, rotated) for bench in benches]
        layer = [recall(b, list(s[:, -1].sum(1)), options.eta) for b, s in
                 zip(benches, scores, strict=True)]  # fmt: skip
        every = [recall(b, list(s.sum((1, 2))), options.eta) for b, s in
                 zip(benches, scores, strict=True)]  # fmt: skip
        print(f"rotated={rotated}: last layer {layer}, all layers {every}", flush=True)
        for heads, value in choose(benches, scores, options.eta, options.most):
            each = [
                recall(b, list(sum(s[:, i, j] for i, j in heads)), options.eta)
                for b, s in zip(benches, scores, strict=True)
            ]
            print(
                f"  {len(heads)} heads: mean {value:.3f} {each} {heads[-1]}", flush=True
            )
            if value > best[1]:
                best = (heads, value, rotated)
    print("chosen:", best)
    if options.out:
        entry = {"heads": [list(head) for head in best[0]], "rotated": best[2]}
        table = json.loads(options.out.read_text()) if options.out.exists() else {}
        table[model.fingerprint] = entry
        options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
