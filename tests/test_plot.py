"""Pictures show the numbers that they are given, and touch nothing else."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from acre import plot

matplotlib = pytest.importorskip("matplotlib")
QUESTION = "who wrote the ledger?"


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """Draws without a screen; afterwards every setting is as it was."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("plt.show"))
    plt.switch_backend("agg")
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    plt.close("all")


@pytest.fixture
def ax():
    return matplotlib.figure.Figure().subplots()


@pytest.fixture(scope="module")
def answer(cache):
    return cache.ask(QUESTION, eta=96, max_new_tokens=1)


def steps(ax) -> list[tuple[np.ndarray, np.ndarray]]:
    """(values, edges) of the step curves."""
    return [patch.get_data()[:2] for patch in ax.patches if hasattr(patch, "get_data")]


def cells(ax) -> dict[tuple[int, int], str]:
    """(column, row) -> the number written there."""
    return {tuple(map(int, t.get_position())): t.get_text() for t in ax.texts}


def labels(axis) -> list[str]:
    return [tick.get_text() for tick in axis.get_ticklabels()]


def drawn(ax) -> None:
    """Raises what matplotlib only finds while drawing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(ax.figure).draw()


# --------------------------------------------------------------- one question's scores


def test_score_curve_of_an_answer(cache, answer, ax):
    assert plot.score_curve(answer, ax=ax) is ax
    (every, edges), (refilled, _) = steps(ax)
    assert np.allclose(every, answer.scores)
    taken = np.flatnonzero(refilled)
    assert taken.tolist() == answer.groups.tolist()
    assert np.allclose(refilled[taken], answer.scores[taken])
    prefix, tokens = cache.prefix_tokens, len(cache) - cache.prefix_tokens
    m, interval = cache.plan["m"], cache.interval
    assert edges.tolist() == [max(j * interval - prefix, 0) for j in range(m + 1)]
    assert ax.get_xlim() == (0, tokens)
    assert ax.get_xlabel() == "position in the text (tokens)"
    top = ax.child_axes[0]
    drawn(ax)
    assert top.get_xlim() == pytest.approx((0, 100)) and "%" in top.get_xlabel()


def test_score_curve_of_scores(cache, ax):
    scores = cache.score(QUESTION, select="per_layer")
    plot.score_curve(scores, cache, ax, groups=[1, 5])
    every, refilled = (values for values, _ in steps(ax))
    assert np.allclose(every, scores.sum(axis=0))
    assert np.flatnonzero(refilled).tolist() == [1, 5]
    other = matplotlib.figure.Figure().subplots()
    plot.score_curve(scores[0], ax=other)
    assert other.get_xlabel() == "group" and len(steps(other)) == 1
    assert "summed" in ax.get_ylabel() and "summed" not in other.get_ylabel()


def test_many_groups_keep_their_peaks(ax):
    scores = np.random.default_rng(0).random(100_003)
    scores[77_777] = 9
    plot.score_curve(scores, ax=ax, groups=[77_777, 12], bins=300)
    (every, edges), (refilled, _) = steps(ax)
    assert len(every) == 300 and every.max() == 9 and "best of every" in ax.get_ylabel()
    for start, end, value in zip(edges[:-1], edges[1:], every, strict=True):
        assert value == scores[int(start) : int(end)].max()
    where = np.flatnonzero(refilled)
    assert len(where) == 2 and edges[where[1]] <= 77_777 < edges[where[1] + 1]


def test_layer_heatmap(ax):
    scores = np.random.default_rng(0).random((3, 10)) * [[1], [10], [0]]
    groups = np.array([[0, 4], [1, 9], [2, 3]])
    plot.layer_heatmap(scores, groups, ax)
    shown = ax.images[0].get_array()
    assert np.allclose(shown[:2].mean(axis=1), 1) and np.argmax(shown[1]) == np.argmax(
        scores[1]
    )
    dots = ax.collections[0].get_offsets()
    assert dots[:, 0].tolist() == [0.5, 4.5, 1.5, 9.5, 2.5, 3.5]
    assert np.round(dots[:, 1] + 0.35).tolist() == [0, 0, 1, 1, 2, 2]
    drawn(ax)


def test_layer_heatmap_of_a_shared_choice_and_many_groups(ax):
    scores = np.ones((2, 5000))
    scores[1, 4321] = 50
    plot.layer_heatmap(scores, [4321], ax, bins=100)
    shown = ax.images[0].get_array()
    assert shown.shape == (2, 100) and np.argmax(shown[1]) == 86
    assert ax.lines[0].get_xdata().tolist() == [4325]


def test_real_answers_of_either_kind(cache, answer):
    per_layer = cache.ask(QUESTION, eta=64, select="per_layer", max_new_tokens=1)
    drawn(plot.score_curve(per_layer))
    drawn(plot.layer_heatmap(per_layer.scores, per_layer.groups))
    drawn(plot.layer_heatmap(per_layer.scores, answer.groups))


# ------------------------------------------------------------------------------- sweeps


def sweep() -> list[dict]:
    return [
        {"interval": interval, "eta": eta, "score": interval / eta}
        for interval in (64, 8, 16)
        for eta in (512, 4096)
        if (interval, eta) != (8, 4096)
    ]


def test_surface(ax):
    rows = [*sweep(), {"interval": 64, "eta": 512, "score": 0.375}]
    rows.append({"interval": 8, "eta": 4096, "score": None})
    rows.append({"interval": 16, "eta": 512, "score": math.nan})
    plot.surface(rows, ax=ax)
    assert labels(ax.xaxis) == ["8", "16", "64"] and labels(ax.yaxis) == [
        "512",
        "4,096",
    ]
    assert cells(ax) == {
        (0, 0): "0.02", (1, 0): "0.03", (2, 0): "0.25", (1, 1): "0.00", (2, 1): "0.02",
    }  # fmt: skip
    gap = next(patch for patch in ax.patches if patch.get_hatch())
    assert gap.get_xy() == (-0.5, 0.5)
    assert "mean of up to 2 rows" in ax.figure.axes[1].get_ylabel()
    assert ax.get_title() == "Score by interval l and refill budget \u03b7"
    drawn(ax)


def test_surface_of_words_and_large_numbers(ax):
    rows = [{"task": t, "method": m, "ppl": 12.345} for t in "ba" for m in ("x", "y")]
    plot.surface(rows, "task", "method", "ppl", ax)
    assert labels(ax.xaxis) == ["a", "b"] and set(cells(ax).values()) == {"12.3"}
    assert ax.figure.axes[1].get_ylabel() == "ppl"


def test_needle_map(ax):
    rows = [
        {"length": n, "depth": depth, "score": score}
        for n, depth, score in [(8000, 0, 0.9), (2000, 1.0, 0.5), (2000, 0.25, 0.1)]
    ]
    plot.needle_map(rows, ax)
    assert labels(ax.yaxis) == ["0", "25", "100"]
    assert cells(ax) == {(1, 0): "0.90", (0, 1): "0.10", (0, 2): "0.50"}
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the text's start must be on top"
    assert ax.images[0].get_clim() == (0, 1)
    drawn(ax)


def test_numbers_can_be_read_on_their_cells(ax):
    rows = [{"length": i, "depth": 0.5, "score": i / 20} for i in range(21)]
    plot.needle_map(rows, ax)
    image = ax.images[0]
    for text in ax.texts:
        column = int(text.get_position()[0])
        back = np.array(image.cmap(image.norm(column / 20))[:3])
        front = np.array(matplotlib.colors.to_rgb(text.get_color()))
        light = [
            np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
            @ [0.2126, 0.7152, 0.0722]
            + 0.05
            for c in (back, front)
        ]
        assert max(light) / min(light) >= 4, column


def test_lines(ax):
    rows = [
        {"l": interval, "recall": recall, "by": by}
        for by, interval, recall in [
            (2, 16, 0.5),
            (2, 8, 0.7),
            (10, 8, 0.9),
            (10, 8, 0.8),
        ]
    ]
    rows += [{"l": 16, "recall": math.nan, "by": 10}, {"l": 32, "recall": 0, "by": 2}]
    plot.lines(rows, "l", "recall", "by", ax, log="x")
    found = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert found["2"] == [[8, 0.7], [16, 0.5], [32, 0]]
    assert np.allclose(found["10"], [[8, 0.85]])
    assert ax.get_xscale() == "log" and ax.get_yscale() == "linear"
    drawn(ax)
    assert labels(ax.xaxis) == ["8", "16", "32"]
    assert "mean of up to 2 rows" in ax.get_ylabel()
    styles = {(line.get_color(), line.get_marker()) for line in ax.lines}
    assert len(styles) == 2


def test_many_lines_differ(ax):
    rows = [{"x": 1, "y": i, "by": i} for i in range(28)]
    plot.lines(rows, "x", "y", "by", ax)
    styles = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(styles) == 28


def test_efficiency():
    rows = [
        {
            "method": m,
            "tokens": n,
            "seconds": s * n,
            "peak_bytes": None if m == "b" else n,
        }
        for m, s in (("a", 1e-3), ("b", 2e-3))
        for n in (32768, 1024)
    ]
    figure = plot.efficiency(rows)
    time, memory = figure.axes
    assert [line.get_label() for line in time.lines] == ["a", "b"]
    assert time.lines[1].get_ydata().tolist() == pytest.approx([2.048, 65.536])
    assert memory.lines[0].get_ydata() == pytest.approx([1.024e-6, 3.2768e-5])
    assert len(memory.lines[1].get_xdata()) == 0
    for ax in figure.axes:
        assert ax.get_xscale() == ax.get_yscale() == "log"
    assert time.get_ylabel() == "time (s)" and "GB" in memory.get_ylabel()
    drawn(time)
    nothing = [{**row, "peak_bytes": None} for row in rows]
    assert "not measured" in plot.efficiency(nothing).axes[1].get_title()


def test_new_axes_where_none_are_given():
    import matplotlib.pyplot as plt

    first = plot.surface(sweep())
    second = plot.lines(sweep(), "eta", "score", "interval")
    assert first.figure is not second.figure and len(plt.get_fignums()) == 2
    plot.surface(sweep(), ax=matplotlib.figure.Figure().subplots())
    assert len(plt.get_fignums()) == 2


# ---------------------------------------------------------------------------- bad input


ROW = {"length": 1, "depth": 0.5, "score": 1.0}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot.surface([]), ValueError, "rows: got none"),
        (lambda: plot.surface({}), TypeError, "got one dict"),
        (lambda: plot.surface([1]), TypeError, "row 0 is int"),
        (lambda: plot.surface([{"eta": 1, "score": 2}]), ValueError, "no 'interval'"),
        (
            lambda: plot.surface([{"eta": 1, "interval": 2, "score": None}]),
            ValueError,
            "no score is a number",
        ),
        (lambda: plot.needle_map([ROW, {}]), ValueError, "row 1 has no 'length'"),
        (lambda: plot.needle_map([ROW | {"score": 50}]), ValueError, "score is 50"),
        (lambda: plot.needle_map([ROW | {"depth": 50}]), ValueError, "0 to 1"),
        (lambda: plot.needle_map([ROW | {"score": "1"}]), ValueError, "'1', expected"),
        (lambda: plot.needle_map([ROW | {"score": True}]), ValueError, "True"),
        (
            lambda: plot.lines([{"x": math.inf, "y": 1}], "x", "y"),
            ValueError,
            "x is inf, expected a finite",
        ),
        (
            lambda: plot.lines([{"x": 1, "y": None}], "x", "y"),
            ValueError,
            "none has numbers",
        ),
        (
            lambda: plot.lines([{"x": 0, "y": 1}], "x", "y", log="x"),
            ValueError,
            "x is 0, no logarithmic",
        ),
        (lambda: plot.lines([ROW], "depth", "score", log="z"), ValueError, "log: got"),
        (
            lambda: plot.efficiency(
                [{"method": "a", "tokens": 1, "seconds": 1, "peak_bytes": 1}], [None]
            ),
            ValueError,
            "axes: got 1",
        ),
        (lambda: plot.score_curve([]), ValueError, r"shape \(0,\)"),
        (lambda: plot.score_curve("abc"), TypeError, "scores: got"),
        (lambda: plot.score_curve([1, math.nan]), ValueError, "1 of 2 are not finite"),
        (lambda: plot.score_curve(np.ones((1, 1, 1))), ValueError, "shape"),
        (lambda: plot.score_curve([1.0, 2.0], groups=[2]), ValueError, "0 to 1"),
        (lambda: plot.score_curve([1.0], groups=[0.5]), ValueError, "float64"),
        (lambda: plot.layer_heatmap([1.0]), ValueError, r"expected \[L, m\]"),
        (
            lambda: plot.layer_heatmap(np.ones((2, 4)), [[0], [1], [2]]),
            ValueError,
            "3 layers",
        ),
    ],
)
def test_bad_input(call, error, message):
    import matplotlib.pyplot as plt

    with pytest.raises(error, match=message):
        call()
    assert len(plt.get_fignums()) <= 1


def test_scores_of_another_text_or_of_none(cache):
    with pytest.raises(ValueError, match=r"4 groups, but the cache has 48"):
        plot.score_curve(np.ones(4), cache)
    given = cache.ask(QUESTION, groups=[3], max_new_tokens=1)
    with pytest.raises(ValueError, match="has no scores"):
        plot.score_curve(given)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "acre\[plot\]"'):
        plot.surface(sweep())
