"""`acre.sweep`: what a score depends on: every combination of settings over tasks.

Takes axes (values per setting) and tasks; gives the report of their product, its rows
with the settings as columns, and plots. One idea: a combination is a method with a
label ("acre:interval=16,eta=1024"), so a sweep is an evaluation: it resumes, spreads
over Ray, and combinations that read alike share the cache. Refuses axes that are no
settings.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acre.eval.methods import Method, Settings, make
from acre.eval.perplexity import METRIC as PERPLEXITY
from acre.eval.pictures import draw
from acre.eval.report import COLUMNS, Report, table, with_settings
from acre.eval.results import write_atomically
from acre.eval.run import evaluate
from acre.eval.tasks import find

READING = ("interval", "window", "stride", "carry", "proxy")  # what a cache depends on
AXES = (*READING, "eta", "select", "budget")


def combinations(axes: Mapping[str, Sequence[Any]], method: str = "acre") -> list[str]:
    """Labels of the product of the axes, the last one varying fastest; those that make
    a cache vary slowest. The stride follows the window where only that is an axis."""
    for name, values in axes.items():
        if name not in AXES:
            raise ValueError(f"axis: got {name!r}, expected one of {', '.join(AXES)}")
        if not values:
            raise ValueError(f"{name}: no values")
    names = [name for name in AXES if name in axes]
    labels = []
    for values in itertools.product(*(axes[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        if "window" in chosen and "stride" not in chosen:
            chosen["stride"] = chosen["window"]
        said = ",".join(f"{name}={value}" for name, value in chosen.items())
        labels.append(f"{method}:{said}" if said else method)
    return labels


@dataclass(frozen=True)
class Sweep:
    """The report of a sweep and its axes."""

    report: Report
    axes: Mapping[str, Sequence[Any]]

    def rows(self) -> list[dict[str, Any]]:
        """One per task and combination: the report's figures and the settings."""
        return with_settings(self.report.table(), self.report.run)

    def buckets(self) -> list[dict[str, Any]]:
        """The same per bucket (length, depth, ...)."""
        return with_settings(self.report.buckets(), self.report.run)

    def markdown(self) -> str:
        """A table per task, the axes first."""
        parts = ["# Sweep", ""]
        rows = self.rows()
        for task in dict.fromkeys(row["task"] for row in rows):
            own = [row for row in rows if row["task"] == task]
            columns = {"way": "method"}
            columns |= {name: name for name in AXES if name in self.axes}
            columns |= {k: v for k, v in COLUMNS.items() if k not in ("task", "method")}
            parts += [f"## {task}", "", table(own, columns), ""]
        split = [row for row in self.buckets() if row["bucket"] == "length"]
        if len({row["value"] for row in split}) > 1:
            columns = {"task": "task", "method": "method", "value": "tokens",
                       "score": "score", "recall": "recall", "count": "n",
                       "build_s": "build s", "peak_mb": "peak MB"}  # fmt: skip
            parts += ["## By length", "", table(split, columns), ""]
        return "\n".join(parts)

    def save(self, folder: Path) -> list[Path]:
        """sweep.json, sweep.md and, where matplotlib is installed, PNG plots."""
        content = {"axes": {k: list(v) for k, v in self.axes.items()},
                   "rows": self.rows(), "buckets": self.buckets()}  # fmt: skip
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "sweep.json", text)
        write_atomically(folder / "sweep.md", self.markdown())
        return self.plot(folder)

    def plot(self, folder: Path) -> list[Path]:
        """A PNG per picture that axes, lengths and depths allow; none without
        matplotlib."""
        report, axes = self.report, self.axes
        return draw(folder, report.samples, self.rows(), self.buckets(), axes)


def sweep(
    tasks: str | Sequence[str],
    model: Any,
    axes: Mapping[str, Sequence[Any]],
    data: Any = None,
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "acre",
    beside: Sequence[str | Method] = (),
    **options: Any,
) -> Sweep:
    """Scores every combination of the axes on the tasks.

    axes: values per setting, as {"interval": [8, 16], "eta": [512, 1024]}. beside:
    methods without axes to compare with, as "full" or "bm25". options: those of
    `acre.evaluate`. Tasks of perplexity vary only with what a cache depends on.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    measured = [t.name for t in find(names) if t.metric == PERPLEXITY]
    asked = [t.name for t in find(names) if t.metric != PERPLEXITY]
    reading = {name: axes[name] for name in axes if name in READING}
    samples, run, bad = [], {}, []
    for some, over in ((asked, axes), (measured, reading)):
        if not some:
            continue
        labels = [*combinations(over, method), *beside]
        for label in labels:
            make(label, Settings())  # refuses before any work
        part = evaluate(some, model, data, labels, output, **options)
        samples += part.samples
        bad += part.bad
        run = part.run | {"methods": {**run.get("methods", {}), **part.run["methods"]}}
    done = Sweep(Report(samples, run, bad), dict(axes))
    if output is not None:
        done.save(Path(output))
    return done
