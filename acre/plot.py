"""Pictures of scores, sweeps and costs, for a notebook or a paper.

Takes answers, arrays of scores, or rows (dicts) as sweeps and reports give them; gives
matplotlib Axes (a Figure where there are two). One idea: a function draws on the axes
that it is given, and changes nothing else: no global setting, no window. Colours differ
in lightness too, so that they hold for colour-blind eyes and in print. Refuses empty
rows, missing keys, values that are no numbers, and wrong shapes; None and nan are gaps.

matplotlib comes with `pip install "acre[plot]"`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from acre.optional import needs
from acre.report import Answer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from acre.cache import Cache

Row = Mapping[str, Any]
Rows = Iterable[Row]

# The palette of Okabe and Ito, without its yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dvx*"
DASHES = ("-", "--", "-.", ":")
QUIET, STRONG, LOUD = "#B9C2CC", "#B23A00", "#FF7F2A"
MAP = "cividis"
CLIP = 99.5  # percentile of scores at which a colour scale ends
BINS = 400
SIZE = (6.4, 3.8)

NAMES = {
    "count": "questions",
    "depth": "depth of the needle in the text (%)",
    "eta": "refill budget \u03b7 (tokens)",
    "interval": "interval l (tokens per group)",
    "length": "length of the text (tokens)",
    "peak_bytes": "peak memory (GB)",
    "recall": "recall of the evidence",
    "seconds": "time (s)",
    "tokens": "length of the text (tokens)",
}


# ------------------------------------------------------------------------------ drawing


def _pyplot() -> Any:
    return needs("matplotlib.pyplot", "plot")


def _axes(ax: Axes | None, size: tuple[float, float] = SIZE) -> Axes:
    """The axes given, or new ones."""
    plt = _pyplot()
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _tidy(ax: Axes, title: str, x: str, y: str) -> Axes:
    ax.set(xlabel=x, ylabel=y)
    ax.set_title(title, pad=10)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _legend_below(ax: Axes, **options: Any) -> None:
    """A legend that hides nothing."""
    ax.legend(
        frameon=False, fontsize="small", ncols=3, loc="upper center",
        bbox_to_anchor=(0.5, -0.17), **options,
    )  # fmt: skip


def _name(key: str) -> str:
    """A key as an axis says it, with its unit where that is known."""
    return NAMES.get(key, key.replace("_", " "))


def _word(key: str) -> str:
    """The same in a title, without the unit."""
    return _name(key).split(" (")[0]


def _category(value: Any) -> str:
    if not _is_number(value):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


# ----------------------------------------------------------------------------- checking


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _rows(rows: Rows, keys: Sequence[str]) -> list[Row]:
    """The rows as a list; ValueError when empty or a key is missing, naming the row."""
    if isinstance(rows, Mapping):
        raise TypeError("rows: got one dict, expected a list of them")
    out = list(rows)
    if not out:
        raise ValueError("rows: got none")
    for index, row in enumerate(out):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise TypeError(f"rows: row {index} is {kind}, expected a dict")
        missing = [key for key in keys if key not in row]
        if missing:
            raise ValueError(f"rows: row {index} has no {missing[0]!r}: {sorted(row)}")
    return out


def _number(
    row: Row, key: str, low: float = -math.inf, high: float = math.inf
) -> float:
    """A value of a row as float, None as nan. ValueError unless in [low, high]."""
    value = row[key]
    if value is None:
        return math.nan
    if not _is_number(value):
        raise ValueError(f"rows: {key} is {value!r}, expected a number")
    if math.isinf(value) or value < low or value > high:
        limits = "a finite number" if low == -math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"rows: {key} is {value!r}, expected {limits}")
    return float(value)


def _scores(scores: Any) -> np.ndarray:
    """float64 [m] or [L, m], finite."""
    array = np.asarray(scores)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"scores: got {array.dtype}, expected numbers")
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"scores: got shape {array.shape}, expected [m] or [L, m]")
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise ValueError(f"scores: {bad} of {array.size} are not finite")
    return array.astype(np.float64)


def _groups(groups: Any, m: int) -> np.ndarray:
    """int64 [k] or [L, k], each in [0, m)."""
    array = np.asarray(groups)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise ValueError(
            f"groups: got {array.dtype} of shape {array.shape}, expected integers [k] "
            "or [L, k]"
        )
    if array.min() < 0 or array.max() >= m:
        raise ValueError(
            f"groups: {array.min()} to {array.max()} do not lie in 0 to {m - 1}"
        )
    return array.astype(np.int64)


def _binned(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(maxima over at most `bins` runs of the last axis, the runs' edges)."""
    m = values.shape[-1]
    edges = np.linspace(0, m, min(bins, m) + 1).astype(np.int64)
    return np.maximum.reduceat(values, edges[:-1], axis=-1), edges


# ---------------------------------------------------------------- one question's scores


def _place(answer: Any, cache: Cache | None, m: int) -> tuple[int, int, int] | None:
    """(interval, frame tokens before the text, tokens of the text); None: not known."""
    if cache is not None:
        if cache.plan["m"] != m:
            raise ValueError(f"scores: {m} groups, but the cache has {cache.plan['m']}")
        prefix = cache.prefix_tokens
        return cache.interval, prefix, len(cache) - prefix
    known = answer.settings if isinstance(answer, Answer) else {}
    if not known:
        return None
    return known["interval"], known["prefix"], known["n"] - known["prefix"]


def _answered(answer: Any, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """(scores, groups) of an Answer, or as they are given."""
    if isinstance(answer, Answer):
        if answer.scores is None:
            raise ValueError(
                "answer: has no scores: its groups were given, or eta is 0"
            )
        groups = answer.groups if groups is None else groups
        answer = answer.scores
    scores = _scores(answer)
    return scores, _groups(() if groups is None else groups, scores.shape[-1])


def score_curve(
    answer_or_scores: Answer | Any,
    cache: Cache | None = None,
    ax: Axes | None = None,
    groups: Any = None,
    bins: int = BINS,
) -> Axes:
    """The scores of a question over the text, those of the refilled groups marked.

    answer_or_scores: an Answer, or scores [m] or [L, m] (summed over the layers) as
    `Cache.score` gives. cache: tells positions in tokens where an answer's settings do
    not; without both, x counts groups. groups: int [k] or [L, k] to be marked; None =
    the answer's. Where there are more than `bins` groups, each step shows the best of
    its run. ValueError, TypeError.
    """
    scores, chosen = _answered(answer_or_scores, groups)
    total = scores if scores.ndim == 1 else scores.sum(axis=0)
    m, ax = len(total), _axes(ax)
    place = _place(answer_or_scores, cache, m)
    taken = np.zeros(m, dtype=bool)
    taken[chosen.ravel()] = True
    steps, edges = _binned(total, bins)
    best, _ = _binned(np.where(taken, total, 0.0), bins)
    x, label = _positions(edges, place)
    ax.stairs(steps, x, fill=True, color=QUIET, label="not refilled")
    if chosen.size:
        count = f"refilled ({np.count_nonzero(taken):,} of {m:,} groups)"
        ax.stairs(best, x, fill=True, color=STRONG, label=count)
    if place is not None:
        _text_axes(ax, x[-1], place[2])
    ax.set_xlim(x[0], x[-1] if place is None else place[2])
    ax.set_ylim(bottom=min(0.0, float(total.min())))
    if chosen.size or place is not None:
        _legend_below(ax)
    score = "score" if scores.ndim == 1 else "score, summed over layers"
    if len(steps) < m:
        score += f"\n(best of every {math.ceil(m / len(steps))} groups)"
    return _tidy(ax, "Score of each group for the question", label, score)


def _positions(
    edges: np.ndarray, place: tuple[int, int, int] | None
) -> tuple[np.ndarray, str]:
    """Edges of groups on the x axis, and its label."""
    if place is None:
        return edges.astype(np.float64), "group"
    interval, prefix, _ = place
    tokens = np.maximum(edges * interval - prefix, 0)
    return tokens.astype(np.float64), "position in the text (tokens)"


def _text_axes(ax: Axes, read: float, tokens: int) -> None:
    """Percent above the axes; the recent entries, which have no scores, hatched."""
    from matplotlib.ticker import StrMethodFormatter

    def percent(x: Any) -> Any:
        return np.asarray(x) * 100 / tokens

    def back(x: Any) -> Any:
        return np.asarray(x) * tokens / 100

    ax.secondary_xaxis("top", functions=(percent, back)).set_xlabel("% of the text")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if tokens > read:
        ax.axvspan(
            read, tokens, facecolor="none", edgecolor=QUIET, hatch="///", linewidth=0,
            label="recent entries, seen whole",
        )  # fmt: skip


def layer_heatmap(
    scores: Any, groups: Any = None, ax: Axes | None = None, bins: int = BINS
) -> Axes:
    """Scores [L, m] of each layer (`Cache.score(question, select="per_layer")`).

    Shown as multiples of the layer's mean, on a logarithmic scale: layers differ in how
    far they look, and 1 everywhere is a layer that looks at nothing in particular.
    groups: int [L, k] marks each layer's choice in its row, [k] a choice for all
    layers. More than `bins` groups: the best of each run. ValueError, TypeError.
    """
    array = _scores(scores)
    if array.ndim != 2:
        raise ValueError(f"scores: got shape {array.shape}, expected [L, m]")
    L, m = array.shape
    chosen = _groups(() if groups is None else groups, m)
    if chosen.ndim == 2 and len(chosen) != L:
        raise ValueError(f"groups: {len(chosen)} layers, but the scores have {L}")
    ax = _axes(ax)
    mean = array.mean(axis=1, keepdims=True)
    steps, edges = _binned(array / np.where(mean > 0, mean, 1.0), bins)
    top = max(float(np.percentile(steps, CLIP)), 4.0)
    image = ax.imshow(
        np.maximum(steps, 1e-9), norm="log", clim=(0.25, top), cmap=MAP, aspect="auto",
        origin="lower", interpolation="nearest", extent=(0, m, -0.5, L - 0.5),
    )  # fmt: skip
    label = "score, as a multiple of the layer's mean"
    _log_ticks(ax.figure.colorbar(image, ax=ax, extend="both", label=label).ax.yaxis)
    _mark(ax, chosen, edges, L)
    return _tidy(ax, "What each layer looks at, for the question", "group", "layer")


def _mark(ax: Axes, chosen: np.ndarray, edges: np.ndarray, L: int) -> None:
    """A dot per choice of a layer, or a tick above the map per choice of all."""
    if not chosen.size:
        return
    middles = (edges[:-1] + edges[1:]) / 2
    runs = np.searchsorted(edges, chosen, side="right") - 1
    if chosen.ndim == 2:
        x, y = middles[runs].ravel(), np.repeat(np.arange(L), chosen.shape[1])
        ax.scatter(
            x, y - 0.35, s=2, marker="s", color=LOUD, linewidths=0, label="refilled"
        )
    else:
        ax.plot(
            middles[runs], np.full(chosen.size, 1.01), "|", color=STRONG, markersize=6,
            clip_on=False, transform=ax.get_xaxis_transform(), label="refilled",
        )  # fmt: skip
    _legend_below(ax, markerscale=3 if chosen.ndim == 2 else 1)


# ------------------------------------------------------------------------------- sweeps


def _sorted(values: Iterable[Any]) -> list[Any]:
    """Distinct categories: numbers in order, else as words."""
    distinct = list(dict.fromkeys(values))
    if all(_is_number(value) for value in distinct):
        return sorted(distinct)
    return sorted(distinct, key=str)


def _grid(
    rows: Sequence[Row], x: str, y: str, values: Sequence[float]
) -> tuple[list[Any], list[Any], np.ndarray, int]:
    """(xs, ys, mean [len(ys), len(xs)] with nan for gaps, most values in a cell)."""
    xs, ys = _sorted(row[x] for row in rows), _sorted(row[y] for row in rows)
    total = np.zeros((len(ys), len(xs)))
    count = np.zeros((len(ys), len(xs)), dtype=np.int64)
    for row, value in zip(rows, values, strict=True):
        if not math.isnan(value):
            cell = ys.index(row[y]), xs.index(row[x])
            total[cell] += value
            count[cell] += 1
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return xs, ys, mean, int(count.max())


def _cells(
    ax: Axes, grid: np.ndarray, xs: Sequence[Any], ys: Sequence[Any], **image: Any
) -> Any:
    """A heat map with its numbers; cells without one are hatched."""
    from matplotlib.patches import Rectangle

    drawn = ax.imshow(grid, cmap=MAP, aspect="auto", **image)
    places = {"fontsize": "small", "ha": "center", "va": "center"}
    for (row, column), value in np.ndenumerate(grid):
        if math.isnan(value):
            corner = (column - 0.5, row - 0.5)
            style = {"facecolor": "#F2F2F2", "edgecolor": QUIET, "hatch": "////"}
            ax.add_patch(Rectangle(corner, 1, 1, linewidth=0, **style))
            continue
        light = np.dot(drawn.cmap(drawn.norm(value))[:3], [0.2126, 0.7152, 0.0722])
        text = f"{value:.2f}" if np.nanmax(np.abs(grid)) <= 1 else f"{value:.3g}"
        ax.text(column, row, text, color="black" if light > 0.45 else "white", **places)
    ax.set_xticks(range(len(xs)), [_category(value) for value in xs])
    ax.set_yticks(range(len(ys)), [_category(value) for value in ys])
    ax.tick_params(length=0)
    return drawn


def _bar(ax: Axes, image: Any, value: str, most: int) -> None:
    mean = f", mean of up to {most} rows" if most > 1 else ""
    ax.figure.colorbar(image, ax=ax, label=_name(value) + mean)


def surface(
    rows: Rows,
    x: str = "interval",
    y: str = "eta",
    value: str = "score",
    ax: Axes | None = None,
) -> Axes:
    """A value over two settings, as a heat map with the numbers in its cells.

    rows: dicts with the three keys. Settings are categories in order, so that doubling
    steps lie evenly. Rows of the same cell are averaged, and the colour bar says so;
    cells without a number are hatched. ValueError, TypeError.
    """
    table = _rows(rows, (x, y, value))
    numbers = [_number(row, value) for row in table]
    if all(math.isnan(number) for number in numbers):
        raise ValueError(f"rows: no {value} is a number")
    xs, ys, grid, most = _grid(table, x, y, numbers)
    ax = _axes(ax)
    _bar(ax, _cells(ax, grid, xs, ys, origin="lower"), value, most)
    title = f"{_word(value)} by {_word(x)} and {_word(y)}"
    return _frame(_tidy(ax, title[0].upper() + title[1:], _name(x), _name(y)))


def needle_map(rows: Rows, ax: Axes | None = None) -> Axes:
    """How well a needle is found, by the text's length and the needle's depth.

    rows: {"length": tokens, "depth": 0 (start of the text) to 1 (its end), "score": 0
    to 1}; several rows of a cell are averaged. ValueError, TypeError.
    """
    table = _rows(rows, ("length", "depth", "score"))
    table = [{**row, "depth": 100 * _number(row, "depth", 0, 1)} for row in table]
    numbers = [_number(row, "score", 0, 1) for row in table]
    if all(math.isnan(number) for number in numbers):
        raise ValueError("rows: no score is a number")
    xs, ys, grid, most = _grid(table, "length", "depth", numbers)
    ax = _axes(ax)
    _bar(ax, _cells(ax, grid, xs, ys, origin="upper", vmin=0, vmax=1), "score", most)
    title = "Is the needle found? 1 = always, 0 = never"
    return _frame(_tidy(ax, title, _name("length"), _name("depth")))


def _frame(ax: Axes) -> Axes:
    """A heat map needs no spines."""
    ax.spines[:].set_visible(False)
    return ax


def _series(rows: Sequence[Row], by: str | None) -> list[tuple[str, list[Row]]]:
    """(label, its rows) per value of `by`."""
    if by is None:
        return [("", list(rows))]
    return [
        (_category(value), [row for row in rows if row[by] == value])
        for value in _sorted(row[by] for row in rows)
    ]


def _style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes, so that no two of 28 lines look alike."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def _means(rows: Sequence[Row], x: str, y: str) -> tuple[list[float], list[float], int]:
    """(x in order, mean y, most values of one x); gaps left out."""
    found: dict[float, list[float]] = {}
    for row in rows:
        at, value = _number(row, x), _number(row, y)
        if not math.isnan(at) and not math.isnan(value):
            found.setdefault(at, []).append(value)
    xs = sorted(found)
    most = max((len(values) for values in found.values()), default=0)
    return xs, [float(np.mean(found[at])) for at in xs], most


def _log_ticks(axis: Any, values: Sequence[float] | None = None) -> None:
    """Plain numbers on a logarithmic axis: at these values, or at 1, 2, 5, 10 ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if values is None:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    else:
        axis.set_ticks(values)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _category(value)))


def lines(
    rows: Rows,
    x: str,
    y: str,
    by: str | None = None,
    ax: Axes | None = None,
    log: str = "",
) -> Axes:
    """One line of y over x per value of `by`.

    log: the axes that are logarithmic, "", "x", "y" or "xy". Rows of the same x and
    line are averaged, and the y label says so; None and nan are left out.
    ValueError, TypeError.
    """
    if log not in ("", "x", "y", "xy"):
        raise ValueError(f"log: got {log!r}, expected '', 'x', 'y' or 'xy'")
    table = _rows(rows, [key for key in (x, y, by) if key is not None])
    ax, all_x, most = _axes(ax), set(), 0
    for index, (label, some) in enumerate(_series(table, by)):
        xs, ys, count = _means(some, x, y)
        _positive(log, x, xs, y, ys)
        ax.plot(xs, ys, label=label, **_style(index))
        all_x.update(xs)
        most = max(most, count)
    if not all_x:
        raise ValueError(f"rows: none has numbers for {x} and {y}")
    _scale(ax, log, sorted(all_x))
    if by is not None:
        ax.legend(title=_word(by), frameon=False, fontsize="small")
    mean = f", mean of up to {most} rows" if most > 1 else ""
    title = f"{_word(y)} against {_word(x)}"
    return _tidy(ax, title[0].upper() + title[1:], _name(x), _name(y) + mean)


def _positive(
    log: str, x: str, xs: Sequence[float], y: str, ys: Sequence[float]
) -> None:
    """A logarithm of nothing would be left out without a word."""
    for axis, key, values in (("x", x, xs), ("y", y, ys)):
        if axis in log and values and min(values) <= 0:
            raise ValueError(
                f"rows: {key} is {min(values):g}, no logarithmic axis can show it"
            )


def _scale(ax: Axes, log: str, xs: Sequence[float]) -> None:
    """Scales and a light grid; few x are ticked each."""
    if "y" in log:
        ax.set_yscale("log")
        _log_ticks(ax.yaxis)
    if "x" in log:
        ax.set_xscale("log", base=2)
        if len(xs) <= 8:
            _log_ticks(ax.xaxis, xs)
    ax.grid(color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)


def losses(rows: Rows, ax: Axes | None = None) -> Axes:
    """The loss of a training run over its steps, with its running mean.

    rows: {"step", "loss"} and {"step", "held_out"}, as the run's log has them, in
    order. ValueError where no row has a loss, TypeError.
    """
    table = _rows(rows, ("step",))
    steps = [row for row in table if row.get("loss") is not None]
    held = [row for row in table if row.get("held_out") is not None]
    if not steps:
        raise ValueError("rows: none has a loss")
    ax, xs = _axes(ax), [_number(row, "step") for row in steps]
    ys = np.array([_number(row, "loss") for row in steps])
    ax.plot(xs, ys, color=QUIET, linewidth=0.8, label="loss")
    span = max(len(ys) // 50, 1)
    total = np.cumsum(np.concatenate([[0.0], ys]))
    first = np.maximum(np.arange(len(ys)) + 1 - span, 0)
    means = (total[1:] - total[first]) / (np.arange(len(ys)) + 1 - first)
    ax.plot(xs, means, color=COLOURS[0], label=f"mean of {span} steps")
    if held:
        at = [_number(row, "step") for row in held]
        values = [_number(row, "held_out") for row in held]
        ax.plot(at, values, "o--", color=COLOURS[1], markersize=4, label="held out")
    ax.grid(color="#E6E6E6", linewidth=0.6)
    ax.legend(frameon=False, fontsize="small")
    return _tidy(ax, "Training loss", "step", "loss (nats per token)")


def efficiency(rows: Rows, axes: Sequence[Axes] | None = None) -> Figure:
    """Time and peak memory against the length of the text, a line per method.

    rows: {"method", "tokens", "seconds", "peak_bytes"}; seconds or peak_bytes None
    where not measured (not run, out of memory). axes: two, for time and memory. Both
    are logarithmic, so that a slope of 1 is linear growth. ValueError, TypeError.
    """
    table = _rows(rows, ("method", "tokens", "seconds", "peak_bytes"))
    if axes is None:
        size = (2 * SIZE[0] * 0.75, SIZE[1])
        axes = list(_pyplot().subplots(1, 2, figsize=size, layout="constrained")[1])
    if len(axes) != 2:
        raise ValueError(f"axes: got {len(axes)}, expected two")
    shown = [{**row, "peak_bytes": _gigabytes(row)} for row in table]
    for ax, y in zip(axes, ("seconds", "peak_bytes"), strict=True):
        if any(row[y] is not None for row in shown):
            lines(shown, "tokens", y, "method", ax, log="xy")
        else:
            _tidy(ax, f"{_word(y)}: not measured", _name("tokens"), _name(y))
    return axes[0].figure


def _gigabytes(row: Row) -> float | None:
    value = _number(row, "peak_bytes")
    return None if math.isnan(value) else value / 1e9
