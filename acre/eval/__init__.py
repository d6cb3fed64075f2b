"""Evaluation: tasks, methods and metrics behind `acre eval` and `acre.evaluate`.

Importing it is cheap: what an evaluation needs is loaded when one is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acre.eval.report import Report
    from acre.eval.sweep import Sweep


def evaluate(*args: Any, **options: Any) -> Report:
    """Scores methods on tasks; see `acre.eval.run.evaluate` for the arguments."""
    from acre.eval.run import evaluate as run

    return run(*args, **options)


def sweep(*args: Any, **options: Any) -> Sweep:
    """Scores combinations of settings; see `acre.eval.sweep.sweep`."""
    from acre.eval.sweep import sweep as run

    return run(*args, **options)
