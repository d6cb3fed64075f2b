"""The pictures of an evaluation: what its axes, lengths and depths allow.

Takes samples, rows with settings, and the axes of a sweep; leaves PNG files. One idea:
a picture is made where its two variables vary, by `acre.plot`, without a display.
Nothing is drawn where matplotlib is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from acre.eval.results import Sample

Row = Mapping[str, Any]
Named = tuple[str, Callable[[Any], Any]]  # a file's stem, and what draws on its axes
LINES = ("window", "stride", "carry", "proxy", "eta", "select")


def _varying(axes: Mapping[str, Sequence[Any]]) -> list[str]:
    return [name for name, values in axes.items() if len(set(values)) > 1]


def _of_settings(
    task: str, rows: Sequence[Row], axes: Mapping[str, Sequence[Any]], plot: Any
) -> Iterator[Named]:
    """Score and recall over interval and eta, or over interval in lines."""
    varying = _varying(axes)
    perplexity = any("nats" in row for row in rows)
    for value in ("score", "recall"):
        known = [row for row in rows if row[value] is not None]
        if not known or "interval" not in varying:
            continue
        name = "perplexity" if perplexity else value
        said = [{**row, name: row[value], "reading": _line(row, axes)} for row in known]
        lines = [a for a in varying if a in LINES and (a != "eta" or not perplexity)]
        if lines == ["eta"]:
            yield (
                f"{task}.{name}",
                lambda ax, r=said, v=name: plot.surface(r, value=v, ax=ax),
            )
        else:
            yield (
                f"{task}.{name}",
                lambda ax, r=said, v=name: plot.lines(
                    r, "interval", v, "reading", ax=ax, log="x"
                ),
            )


def _line(row: Row, axes: Mapping[str, Sequence[Any]]) -> str:
    """What a row's line is called: the settings that vary besides the interval."""
    names = [name for name in _varying(axes) if name in LINES]
    return ", ".join(f"{name} {row[name]}" for name in names if name in row) or "acre"


def _of_lengths(task: str, buckets: Sequence[Row], plot: Any) -> Iterator[Named]:
    """Score or recall over the length, a line per method."""
    own = [r for r in buckets if r["task"] == task and r["bucket"] == "length"]
    if len({row["value"] for row in own}) < 2 or not all(
        row["value"].isdecimal() for row in own
    ):
        return
    rows = [{**row, "length": int(row["value"])} for row in own]
    for value in ("score", "recall"):
        known = [row for row in rows if row[value] is not None]
        if known:
            yield (
                f"{task}.length.{value}",
                lambda ax, r=known, v=value: plot.lines(
                    r, "length", v, "method", ax=ax, log="x"
                ),
            )


def _of_depths(samples: Sequence[Sample], plot: Any) -> Iterator[Named]:
    """Needle maps per task and method: the share answered, the share attended to."""
    maps: dict[tuple[str, str, str], list[Row]] = {}
    for sample in samples:
        buckets = sample["buckets"]
        for value in ("score", "recall"):
            if "depth" in buckets and sample.get(value) is not None:
                row = {"length": int(buckets["length"]),
                       "depth": float(buckets["depth"]),
                       "score": sample[value]}  # fmt: skip
                key = (sample["task"], sample["method"], value)
                maps.setdefault(key, []).append(row)
    for (task, method, value), rows in maps.items():
        stem = f"{task}.depth.{value}.{method.replace(':', '_').replace('/', '_')}"
        yield stem, lambda ax, r=rows: plot.needle_map(r, ax=ax)


def draw(
    folder: Path,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    buckets: Sequence[Row],
    axes: Mapping[str, Sequence[Any]],
) -> list[Path]:
    """The files made. rows, buckets: with settings (`acre.eval.sweep`)."""
    try:
        from matplotlib.figure import Figure

        from acre import plot
    except ImportError:
        return []
    tasks, named = list(dict.fromkeys(row["task"] for row in rows)), []
    for task in tasks:
        own = [row for row in rows if row["task"] == task and row["way"] == "acre"]
        named += _of_settings(task, own, axes, plot)
        named += _of_lengths(task, buckets, plot)
    named += _of_depths(samples, plot)
    made = []
    for stem, drawn in named:
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        ax = figure.add_subplot()
        drawn(ax)
        ax.set_title(stem.replace(".", ", "))
        made.append(folder / f"{stem}.png")
        figure.savefig(made[-1], dpi=150)
    return made
