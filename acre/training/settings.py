"""What decides a training run's parameters, as one value.

Takes the arguments of `acre.train`; gives `Settings`, which checkpoints keep. One idea:
two runs of equal settings, model and data are the same run, so a checkpoint of others
is refused by name. Refuses values out of their range, naming the argument.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from acre.generate import integer

STAGES = ("stage1", "stage2")
RATES = {"stage1": 5e-5, "stage2": 1e-5}
PASSES = {"stage1": 1, "stage2": 2}  # over the data, as the paper trains


@dataclass(frozen=True)
class Settings:
    """Of one run.

    steps: updates in all. batch_tokens: an update follows as soon as the examples since
    the last one have so many tokens, those of all processes together. lr: peak rate;
    warmup: steps up to it. clip: greatest norm of a gradient, 0 = any. evidence_weight:
    the evidence term counts like so many tokens; heads: (layer, head) pairs whose
    attention it is about, None = the last layer's. ValueError, TypeError.
    """

    stage: str
    steps: int
    batch_tokens: int
    lr: float
    warmup: int
    clip: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    evidence_weight: float = 0.0
    seed: int = 0
    heads: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage: got {self.stage!r}, expected one of {STAGES}")
        integer("steps", self.steps, 1)
        integer("batch_tokens", self.batch_tokens, 1)
        integer("warmup", self.warmup, 0, self.steps)
        integer("seed", self.seed, 0)
        number("lr", self.lr, math.inf, above=0.0)
        for name in ("clip", "weight_decay", "evidence_weight"):
            number(name, getattr(self, name), math.inf)
        for name in ("beta1", "beta2"):
            number(name, getattr(self, name), 1.0)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        pairs = self.heads and [list(pair) for pair in self.heads]
        return {**asdict(self), "heads": pairs}


def number(name: str, value: Any, below: float, above: float | None = None) -> None:
    """TypeError, or ValueError unless 0 <= value < below (and value > above)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not 0 <= value < below or (above is not None and value <= above):
        limits = "above 0" if above is not None else f"in [0, {below:g})"
        raise ValueError(f"{name}: got {value}, expected a finite number {limits}")


def settled(
    stage: str,
    steps: int | None,
    tokens: int | None,
    lr: float | None,
    warmup: int | None,
    batch_tokens: int,
    **others: Any,
) -> Settings:
    """Settings with what was left out: steps from tokens, the stage's rate, a warm-up
    of 3 percent. ValueError unless exactly one of steps and tokens is given."""
    if (steps is None) == (tokens is None):
        raise ValueError(f"steps, tokens: got {steps} and {tokens}, expected one")
    if stage not in STAGES:
        raise ValueError(f"stage: got {stage!r}, expected one of {STAGES}")
    batch = integer("batch_tokens", batch_tokens, 1)
    if steps is None:
        steps = -(-integer("tokens", tokens, 1) // batch)
    if warmup is None:
        warmup = -(-3 * integer("steps", steps, 1) // 100)
    rate = RATES[stage] if lr is None else lr
    return Settings(stage, steps, batch, rate, warmup, **others)
