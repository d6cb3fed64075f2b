"""The learning rate of each step: a linear warm-up, then a cosine to a tenth.

Takes a step and the run's length; gives the rate. Depends on nothing else, so a resumed
run has the same rates. Refuses steps outside the run.
"""

from __future__ import annotations

import math

FLOOR = 0.1  # of the peak, at the last step


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The rate of step 1 ... steps: peak * step / warmup up to `warmup`, then down to
    FLOOR * peak at the last one. ValueError for another step."""
    if not 1 <= step <= steps:
        raise ValueError(f"step: got {step}, expected 1 to {steps}")
    if step <= warmup:
        return peak * step / warmup
    share = (step - warmup) / (steps - warmup)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))
