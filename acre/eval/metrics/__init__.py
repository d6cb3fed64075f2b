"""Scores of predictions, as each benchmark's own scorer computes them.

Takes a prediction, its references and the facts that a benchmark's scorer needs; gives
a share in [0, 1]. One idea: a table per benchmark, so that a task names its metric and
nothing else here knows tasks. Oddities of the authors' scorers are kept, since figures
are only comparable with them; where a scorer would crash on a prediction, that
prediction scores what its docstring says. What is refused: an unknown name, no
references, a reference that the benchmark cannot have, facts that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from acre.eval.metrics import infinitebench, leval, longbench, probes
from acre.eval.metrics.metric import Metric

__all__ = ["METRICS", "Metric", "score"]

METRICS: dict[str, Metric] = {
    **longbench.METRICS,
    **infinitebench.METRICS,
    **leval.METRICS,
    **probes.METRICS,
}


def score(
    metric: str,
    prediction: str,
    answers: Sequence[str],
    facts: Mapping[str, Any] | None = None,
) -> float:
    """The score of a prediction against its references, in [0, 1].

    metric: a name in METRICS. answers: the references, at least one. facts: those of
    the question; a metric reads only the keys that it names. A blank prediction scores
    0. Raises ValueError for arguments that cannot be scored, and ImportError where the
    package behind a metric is not installed.
    """
    if metric not in METRICS:
        names = ", ".join(sorted(METRICS))
        raise ValueError(f"metric: expected one of {names}; got {metric!r}")
    if isinstance(answers, str) or not all(isinstance(one, str) for one in answers):
        raise ValueError(f"answers: expected a list of strings, got {answers!r}")
    if not answers:
        raise ValueError("answers: expected at least one reference, got none")
    return METRICS[metric](prediction, answers, facts or {})
