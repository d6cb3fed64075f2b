"""The metrics of probes: does the prediction hold the answer?

Takes a prediction and its references; gives a share in [0, 1]. `string_match_*` are
those of RULER (github.com/NVIDIA/RULER), `exact` is our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from acre.eval.metrics.metric import Metric


def exact(prediction: str, answer: str) -> float:
    """1 if the answer occurs, case aside, and no letter or digit adjoins it."""
    if not answer.strip():
        return 0.0
    pattern = rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
    return float(re.search(pattern, prediction, re.IGNORECASE) is not None)


def contains(prediction: str, answer: str) -> float:
    """1 if the answer occurs, case aside, inside a word too."""
    return float(answer.lower() in prediction.lower())


def share(prediction: str, answers: Sequence[str]) -> float:
    """The share of the references that occur, case aside."""
    return sum(contains(prediction, answer) for answer in answers) / len(answers)


def printable(prediction: str) -> str:
    """RULER's clean-up: control characters end lines."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


METRICS = {
    "exact": Metric(exact),
    "string_match_all": Metric(share, over="all", prepare=printable),
    "string_match_part": Metric(contains, prepare=printable),
}
