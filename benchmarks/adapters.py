"""What trained L1 parameters change: perplexity, recall of evidence, answers.

    ACRE_DATA=DIR python benchmarks/adapters.py --out DIR [--rows FILE]
        [--what perplexity recall ablations] [--lengths 8192 32768] NAME=ADAPTER ...

Takes adapters by name (folders of `acre train` or files) and a model (SmolLM2-135M from
its package by default); prints one table per measurement: each adapter's L1 entries at
every interval beside untrained and pooled ones, and what the same model does without
any: full attention, a sink and a sliding window of as many keys, BM25, random groups
(--beside names those that are wanted; full attention is left out beyond the model's
own window).
The ablations take the last adapter and leave out or change one thing at a time.
Finished samples stay in --out, so an interrupted run goes on. --rows appends what is in
the tables, one line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_cpu import commit, smollm2

import acre
from acre.eval.report import table

INTERVALS = (8, 16, 32, 64, 128)
READING = {"window": 1024, "stride": 1024}
RECALL = {
    "task": "task", "length": "tokens", "entries": "way", "count": "n",
    "recall": "recall", "score": "score", "stderr": "+-", "attended": "entries",
}  # fmt: skip
FACTS = ("needle", "probe_kv", "nq")
BESIDE = {
    "untrained": "acre:proxy=trained", "pooled": "acre:proxy=pooled",
    "window": "stream", "random groups": "random-refill", "bm25": "bm25",
    "full attention": "full",
}  # fmt: skip


def variants(
    arguments: argparse.Namespace, others: Sequence[str], length: int
) -> Iterator[tuple[str, acre.Model, dict[str, str]]]:
    """(folder, model, name of each method) of the base, with those `others` that are
    wanted, and of each adapter; one model in memory at once."""
    path = arguments.model or str(smollm2())
    model = acre.Model.from_pretrained(path)
    fits = length < model.config["w_max"]
    methods = {
        BESIDE[name]: name
        for name in others
        if name in arguments.beside and (fits or name != "full attention")
    }
    if methods:
        yield "base", model, methods
    for named in arguments.adapters:
        name, _, adapter = named.partition("=")
        model = acre.Model.from_pretrained(path, adapter=adapter)
        yield name, model, {"acre:proxy=trained": name}


def run(
    model: acre.Model, tasks: Sequence[str], methods: list[str], out: Path, **more: Any
) -> list[dict[str, Any]]:
    """Rows of an evaluation; questions that do not apply have no score."""
    report = acre.evaluate(
        tasks, model, os.environ["ACRE_DATA"], methods, out, **READING, **more
    )
    return report.table()


def perplexity(arguments: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """A row per kind of entries: perplexity at every interval."""
    rows: list[dict[str, Any]] = []
    others = ("pooled", "untrained", "window", "full attention")
    for folder, model, methods in variants(arguments, others, length):
        columns = {}  # (name, column) of each method
        for method, name in methods.items():
            if method == "full":
                columns[method] = (name, "full")
                continue
            way, _, options = method.partition(":")
            for n in arguments.intervals:
                at = ",".join(filter(None, (f"interval={n}", options)))
                columns[f"{way}:{at}"] = (name, f"l={n}")
        out = arguments.out / f"perplexity-{length}-{folder}"
        found = run(
            model, ["books"], [*columns], out, lengths=(length,), eta=512,
            limit=arguments.texts, carry=arguments.carry,
        )  # fmt: skip
        for row in found:
            name, column = columns[row["method"]]
            if not rows or rows[-1]["entries"] != name:
                said = {"length": length, "carry": arguments.carry, "n": row["count"]}
                rows.append({"entries": name, **said})
            rows[-1][column] = row["score"]
    return rows


def recall(arguments: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """A row per task and kind of entries, at eta = 2048."""
    rows = []
    others = ("pooled", "untrained", "random groups", "bm25", "full attention")
    for folder, model, methods in variants(arguments, others, length):
        out = arguments.out / f"recall-{length}-{folder}"
        for row in run(
            model, arguments.tasks, [*methods], out, lengths=(length,), eta=2048,
            texts=arguments.texts, questions=arguments.questions,
            limit=arguments.questions * arguments.texts,
        ):  # fmt: skip
            shown = {"entries": methods[row["method"]], "attended": row.get("entries")}
            rows.append({**row, **shown, "length": length})
    return sorted(rows, key=lambda row: row["task"])


def ablations(arguments: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """A row per task and change, of the last adapter: no refilling, another choice of
    groups, other l and eta."""
    *_, (name, model, _) = variants(arguments, (), length)
    labels = {"acre": name, "l1-only": "no refilling"}
    labels |= {"acre:select=per_layer": "per_layer", "random-refill": "random groups"}
    labels |= {f"acre:interval={n}": f"l={n}" for n in INTERVALS}
    labels |= {f"acre:eta={n}": f"eta={n}" for n in (256, 512, 1024, 4096)}
    rows = run(
        model, arguments.tasks, [*labels], arguments.out / f"ablations-{length}",
        lengths=(length,), eta=2048, texts=arguments.texts,
        questions=arguments.questions, limit=arguments.questions * arguments.texts,
    )  # fmt: skip
    for row in rows:
        row |= {"entries": labels[row["method"]], "attended": row.get("entries")}
        row["length"] = length
    return sorted(rows, key=lambda row: row["task"])


def keep(
    path: Path, what: str, rows: list[dict[str, Any]], shown: dict[str, str]
) -> None:
    """Appends a table's rows, with the commit that they were measured at."""
    with path.open("a", encoding="utf-8") as out:
        for row in rows:
            said = {name: row[key] for key, name in shown.items() if key in row}
            out.write(json.dumps({"commit": commit(), "what": what, **said}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapters", nargs="*", metavar="NAME=ADAPTER")
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--what", nargs="+", default=["perplexity", "recall"],
                        choices=("perplexity", "recall", "ablations"))  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--carry", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=FACTS, choices=FACTS)
    parser.add_argument("--intervals", type=int, nargs="+", default=INTERVALS)
    parser.add_argument("--beside", nargs="*", default=[*BESIDE], choices=BESIDE)
    parser.add_argument("--rows", type=Path)
    arguments = parser.parse_args()
    if not os.environ.get("ACRE_DATA"):
        sys.exit("set ACRE_DATA to the folder of books.dev, nq_passages.dev")
    columns = {"entries": "L1 entries", "length": "tokens", "carry": "carry", "n": "n"}
    columns |= {"full": "full"} | {f"l={n}": f"l={n}" for n in arguments.intervals}
    measured = {
        "perplexity": (perplexity, columns),
        "recall": (recall, RECALL),
        "ablations": (ablations, RECALL),
    }
    for length in arguments.lengths:
        for what in arguments.what:
            measure, shown = measured[what]
            rows = measure(arguments, length)
            print("\n" + table(rows, shown), flush=True)
            if arguments.rows:
                keep(arguments.rows, what, rows, shown)


if __name__ == "__main__":
    main()
