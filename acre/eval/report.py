"""What an evaluation came to: scores, counts and costs, as rows, Markdown and JSON.

Takes the samples of a folder and the facts of its run; gives a `Report`. One idea: one
row per task and method holds all that a reader needs to trust a score: how many samples
it is of, how many failed or were cut, how many entries the answers could attend to, and
what they cost. Refuses nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acre.eval.perplexity import METRIC as PERPLEXITY
from acre.eval.results import Sample, write_atomically

COLUMNS = {
    "task": "task", "method": "method", "score": "score", "stderr": "+-", "count": "n",
    "late": "of 2nd half", "recall": "recall", "entries": "entries",
    "build_s": "build s",
    "first_token_ms": "first token ms", "tokens_per_s": "tok/s",
    "peak_mb": "peak MB", "truncated": "cut", "skipped": "skipped",
    "errors": "errors",
}  # fmt: skip

ALWAYS = ("task", "method", "way", "score", "count")  # also where all are 0
LEGEND = (
    f"score: x100, mean over samples of the best reference ({PERPLEXITY}: exp of "
    "the mean nats), +- its standard error. recall: share of the known evidence "
    "that the answer could attend to token by token. entries: what a layer held "
    "besides the question, mean. build: once per document. first token: median, "
    "from the question, retrieval included. tok/s: decoding. peak: the engine's "
    "bytes, weights included. cut: samples whose text or question was cut."
)


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values there are; None of none."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    return sum(known) / len(known) if known else None


def median(values: Iterable[float]) -> float | None:
    """None of none."""
    known = list(values)
    return statistics.median(known) if known else None


def _score(good: Sequence[Sample]) -> float | None:
    """100 x the mean score; of perplexity, the perplexity."""
    value = mean(sample["score"] for sample in good)
    if value is None:
        return None
    if any("nats" in sample for sample in good):
        return math.exp(value)
    return 100 * value


def _error(good: Sequence[Sample]) -> float | None:
    """Standard error of 100 x the mean score; None of one sample, of perplexity."""
    if len(good) < 2 or any("nats" in sample for sample in good):
        return None
    scores = [sample["score"] for sample in good]
    return 100 * statistics.stdev(scores) / math.sqrt(len(scores))


def _rate(good: Sequence[Sample]) -> float | None:
    """Tokens per second of decoding, over all answers together."""
    tokens = sum(max(s["new_tokens"] - 1, 0) for s in good)
    seconds = sum(s["cost"]["decode_s"] for s in good)
    return tokens / seconds if tokens and seconds > 0 else None


def _build_s(good: Sequence[Sample]) -> float | None:
    """Mean over documents of what reading one took."""
    seconds = {s["document"]: s["cost"]["build_s"] for s in good}
    return mean(seconds.values())


def row_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of samples of one task and method."""
    good = [s for s in samples if "score" in s]
    first = [1e3 * s["cost"]["first_token_s"] for s in good]
    peak = max((s["cost"]["peak_bytes"] for s in good), default=None)
    nats = mean(s.get("nats") for s in good)
    late = mean(s.get("late_nats") for s in good)
    measured = {} if nats is None else {"nats": nats, "late": math.exp(late)}
    return measured | {
        "score": _score(good),
        "stderr": _error(good),
        "count": len(good),
        "recall": mean(s["recall"] for s in good),
        "entries": mean(s["entries"] for s in good),
        "context_tokens": mean(s["context_tokens"] for s in good),
        "build_s": _build_s(good),
        "first_token_ms": median(t for t in first if t > 0),
        "tokens_per_s": _rate(good),
        "peak_mb": None if peak is None else peak / 1e6,
        "truncated": sum(bool(s["truncated"]) for s in good),
        "skipped": sum("skipped" in s for s in samples),
        "errors": sum("error" in s for s in samples),
    }


def shown(value: Any) -> str:
    """A figure as people read it: three significant digits or whole numbers."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:.0f}"
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"
    return str(value).replace("|", "\\|")


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table, its columns aligned for reading as plain text; columns with
    nothing in them are left out."""
    keys = [
        key
        for key in columns
        if key in ALWAYS or any(row.get(key) not in (None, 0) for row in rows)
    ]
    cells = [[columns[k] for k in keys]]
    cells += [[shown(row.get(k)) for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    right = [not isinstance(rows[0].get(k), str) if rows else False for k in keys]

    def line(parts: Sequence[str]) -> str:
        padded = (
            part.rjust(width) if to_right else part.ljust(width)
            for part, width, to_right in zip(parts, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w
            for w, r in zip(widths, right, strict=True)]  # fmt: skip
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def with_settings(
    rows: Sequence[Mapping[str, Any]], run: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of a report, each with its method's settings and, as `way`, its name."""
    out = []
    for row in rows:
        settings = dict(run["methods"][row["method"]])
        way = settings.pop("method", row["method"])
        out.append({**row, **settings, "way": way})
    return out


@dataclass(frozen=True)
class Report:
    """Scores of an evaluation. `run` are the facts of run.json; `bad` the records of
    the data that could not be used, as text."""

    samples: Sequence[Sample]
    run: Mapping[str, Any]
    bad: Sequence[str] = ()

    def table(self) -> list[dict[str, Any]]:
        """One row per task and method: task, method, score (x100; perplexity as it
        is), stderr, count, recall, entries, costs, truncated, skipped, errors."""
        groups: dict[tuple[str, str], list[Sample]] = {}
        tasks = list(dict.fromkeys(sample["task"] for sample in self.samples))
        for sample in sorted(self.samples, key=lambda s: tasks.index(s["task"])):
            groups.setdefault((sample["task"], sample["method"]), []).append(sample)
        return [{"task": t, "method": m, **row_of(s)} for (t, m), s in groups.items()]

    def averages(self) -> list[dict[str, Any]]:
        """Per method, the mean of its tasks' scores (each task counts the same) and all
        its samples' costs; where there are several tasks."""
        rows, out = self.table(), []
        if len({row["task"] for row in rows}) < 2:
            return []
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [s for s in self.samples if s["method"] == method and "nats" not in s]
            scores = [r["score"] for r in rows if r["method"] == method
                      and r["score"] is not None and own]  # fmt: skip
            if own:
                row = row_of(own) | {"score": mean(scores), "stderr": None}
                out.append({"task": "mean of tasks", "method": method, **row})
        return out

    def buckets(self) -> list[dict[str, Any]]:
        """One row per task, method and bucket (length, depth, difficulty, ...)."""
        groups: dict[tuple[str, str, str, str], list[Sample]] = {}
        for sample in self.samples:
            for kind, name in sample["buckets"].items():
                key = (sample["task"], sample["method"], kind, name)
                groups.setdefault(key, []).append(sample)
        names = ("task", "method", "bucket", "value")
        return [dict(zip(names, key, strict=True)) | row_of(samples)
                for key, samples in groups.items()]  # fmt: skip

    def markdown(self) -> str:
        """The report for people."""
        parts = ["# Evaluation", "", self._facts(), ""]
        rows = self.table() + self.averages()
        parts += [table(rows, COLUMNS), "", LEGEND]
        split = self.buckets()
        if split:
            columns = {"task": "task", "method": "method", "bucket": "bucket",
                       "value": "value", "score": "score", "count": "n",
                       "recall": "recall"}  # fmt: skip
            parts += ["", "## By bucket", "", table(split, columns)]
        wrong = [s for s in self.samples if "error" in s]
        if wrong:
            parts += ["", "## Errors", ""]
            parts += [f"* {s['task']} {s['method']} {s['id']}: {s['error']}"
                      for s in wrong[:20]]  # fmt: skip
        if self.bad:
            parts += ["", f"## Records left out: {len(self.bad)}", ""]
            parts += [f"* {reason}" for reason in self.bad[:20]]
        return "\n".join(parts) + "\n"

    def _facts(self) -> str:
        model, about = self.run["model"], self.run["versions"]
        lines = [
            f"Model {model['name']} ({model['dtype']}, w_max {model['w_max']}, "
            f"fingerprint {model['fingerprints']['model'][:12]}).",
            ", ".join(f"{name} {version}" for name, version in about.items()) + ".",
            "",
        ]
        for label, settings in self.run["methods"].items():
            said = ", ".join(f"{k}={v}" for k, v in settings.items() if k != "method")
            lines.append(f"* {label}: {said}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: run, rows, averages, buckets, records left out."""
        return {
            "run": dict(self.run),
            "rows": self.table(),
            "averages": self.averages(),
            "buckets": self.buckets(),
            "bad": list(self.bad),
        }

    def save(self, folder: Path) -> None:
        """report.json and report.md."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "report.json", text)
        write_atomically(folder / "report.md", self.markdown())
