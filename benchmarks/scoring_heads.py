"""Which heads find the evidence? Recall of sets of heads, rotated or not, calibrated.

    ACRE_DATA=... python benchmarks/scoring_heads.py --out acre/scoring.json
    ACRE_DATA=... python benchmarks/scoring_heads.py --adapter DIR --out scoring.json

Takes probes made of the *train* split; scores every question with each head alone;
chooses the set of heads (greedily, by mean recall over the probes) that `Model.scoring`
then uses for pooled entries or, for `acre adapter pack --scoring`, for those of an
adapter. The dev split is left for measuring the choice.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
import probe_texts
from bench_cpu import smollm2
from retrieval import Bench, build, make_probe, recall

import acre
from acre import _core
from acre.scoring import calibrate, own_question

Heads = list[tuple[int, int]]


class Judged:
    """A built probe with each head's own scores: `own` float32 [questions, L, h, m],
    and of the text's own question, `prior` [L, h, m]."""

    def __init__(self, bench: Bench, rotated: bool) -> None:
        self.bench, self.rotated = bench, rotated
        self.own = np.stack([self._heads(a.ids, a.first, a.last) for a in bench.asked])
        plan = bench.cache.plan
        closed = bench.cache.ids[: plan["m"] * plan["interval"]]
        ids = own_question(closed, plan["reserve"])
        self.prior = self._heads(ids, 0, len(ids))

    def _heads(self, ids: np.ndarray, first: int, last: int) -> np.ndarray:
        """float32 [L, h, m]: one pass per head index, every layer by itself."""
        config = self.bench.model.config
        shape = (config["layers"], config["heads"])
        out = np.empty((*shape, self.bench.m), dtype=np.float32)
        for head in range(shape[1]):
            mask = np.zeros(shape, dtype=np.uint8)
            mask[:, head] = 1
            session = _core.Session(
                self.bench.model.core, self.bench.cache, capacity=len(ids)
            )
            out[:, head] = session.score(
                ids, first, last, select="per_layer", rotated=self.rotated, heads=mask
            )
        return out

    def recall(self, heads: Heads, calibrated: bool, etas: list[int]) -> float:
        """Mean over the budgets."""
        layers, columns = zip(*heads, strict=True)
        scores = self.own[:, layers, columns].sum(1)
        if calibrated:
            scores = calibrate(scores, self.prior[layers, columns].sum(0))
        return float(np.mean([recall(self.bench, list(scores), eta) for eta in etas]))


def choose(
    judged: list[Judged], calibrated: bool, etas: list[int], most: int
) -> list[tuple[Heads, float]]:
    """Greedy: adds the head that raises mean recall most; (heads, recall) per step."""

    def value(heads: Heads) -> float:
        return float(np.mean([j.recall(heads, calibrated, etas) for j in judged]))

    layers, columns = judged[0].prior.shape[:2]
    every = [(i, j) for i in range(layers) for j in range(columns)]
    best = sorted(every, key=lambda head: -value([head]))[:40]
    steps: list[tuple[Heads, float]] = [([], 0.0)]
    while len(steps) <= most:
        heads = steps[-1][0]
        tries = [[*heads, head] for head in best if head not in heads]
        steps.append(max(((t, value(t)) for t in tries), key=lambda step: step[1]))
    return steps[1:]


def main() -> None:
    """Prints recall per choice and writes the best one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--interval", type=int, default=16)
    parser.add_argument("--eta", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--weight", type=int, help="of pooled entries; 0 = interval")
    parser.add_argument("--sink", type=int, choices=[0, 1])
    parser.add_argument("--adapter", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    path, adapter = options.model or smollm2(), options.adapter
    model = acre.Model.from_pretrained(path, adapter=adapter)
    texts = [
        make_probe("needle", model, options.tokens, "train", seed=1),
        make_probe("kv", model, options.tokens, "train", seed=1),
        probe_texts.passages("train", limit=150, questions=50, seed=1),
    ]
    given = {"weight": options.weight, "sink": options.sink}
    pooling = model.pooling | {k: v for k, v in given.items() if v is not None}
    form = {"interval": options.interval} | ({} if adapter else {"pooling": pooling})
    proxy = "trained" if adapter else "pooled"
    benches = [build(model, text, proxy, **form) for text in texts]
    best: tuple = ([], -1.0, {})
    for rotated in (True, False):
        judged = [Judged(bench, rotated) for bench in benches]
        for calibrated in (False, True):
            how = {"rotated": rotated, "calibrated": calibrated}
            for heads, value in choose(judged, calibrated, options.eta, options.most):
                each = [
                    round(j.recall(heads, calibrated, options.eta), 2) for j in judged
                ]
                print(
                    how, f"{len(heads)} heads: {value:.3f}", each, heads[-1], flush=True
                )
                if value > best[1] + 0.002 * (len(heads) - len(best[0])):
                    best = (heads, value, how)
    print("chosen:", best)
    if options.out:
        scoring = {"heads": [list(head) for head in best[0]], **best[2]}
        if adapter:
            options.out.write_text(json.dumps(scoring) + "\n")
            return
        entry = {"pooled": scoring, "pooling": pooling}
        table = json.loads(options.out.read_text()) if options.out.exists() else {}
        for key in (model.fingerprint, model.name):
            table[key] = entry
        lines = [f" {json.dumps(key)}: {json.dumps(table[key])}" for key in table]
        options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
