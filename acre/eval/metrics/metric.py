"""The record of a metric, and the errors that metrics share.

Takes a function that scores one prediction; gives a callable that applies it to a list
of references. One idea: what differs between scorers besides their arithmetic is data:
which references, which facts, which part of the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """How a prediction is scored against its references.

    compute: (prediction, answer, *facts) -> share in [0, 1]; under "all" it takes the
    list of references in place of an answer. over: "best" = the highest score that any
    reference gives; "all" = the references make one answer together. prepare: what is
    done to the prediction first. facts: the keys whose values `compute` takes besides,
    each a list of strings.
    """

    compute: Callable[..., float]
    over: Literal["best", "all"] = "best"
    prepare: Callable[[str], str] = str
    facts: tuple[str, ...] = ()

    def __call__(
        self, prediction: str, answers: Sequence[str], facts: Mapping[str, Any]
    ) -> float:
        """The score in [0, 1]; 0 for a prediction that is blank once prepared."""
        values = [_strings(facts, key) for key in self.facts]
        prediction = self.prepare(prediction)
        if not prediction.strip():
            return 0.0
        if self.over == "all":
            return self.compute(prediction, answers, *values)
        return max(self.compute(prediction, answer, *values) for answer in answers)


def _strings(facts: Mapping[str, Any], key: str) -> Sequence[str]:
    found = facts.get(key)
    if (
        isinstance(found, list | tuple)
        and found
        and all(isinstance(one, str) for one in found)
    ):
        return found
    raise ValueError(f"facts[{key!r}]: expected a list of strings, got {found!r}")


def unusable(answer: str, expected: str) -> ValueError:
    """The error for a reference that its benchmark cannot have."""
    return ValueError(f"answers: expected {expected}, got {answer!r}")
