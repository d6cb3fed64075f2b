"""The tasks of `acre eval`: benchmarks as their authors publish them, samples, probes.

Takes names; gives `Task` records: how a row becomes documents, which metric judges them
and where the data lies. One idea: every task has one name; a benchmark's name stands
for all its tasks. Refuses unknown names, with those that come close.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from acre.eval.probes import PROBES
from acre.eval.records import Document
from acre.eval.tasks import infinitebench, leval, longbench, samples, ultradomain
from acre.eval.tasks.task import Hub, Row, Task

__all__ = ["ALIASES", "TASKS", "Hub", "Task", "find"]


def _generated(row: Row, line: int) -> list[Document]:
    """Probes have no rows."""
    raise ValueError("a probe is generated, not read: acre.eval.probes.generate")


def _table(tasks: Iterable[Task]) -> dict[str, Task]:
    """Tasks by name; two of one name are a mistake in the tables."""
    table: dict[str, Task] = {}
    for task in tasks:
        if table.setdefault(task.name, task) is not task:
            raise ValueError(f"two tasks named {task.name}")
    return table


TASKS = _table(
    [
        *longbench.TASKS,
        *infinitebench.TASKS,
        *ultradomain.TASKS,
        *leval.TASKS,
        *(
            Task(f"probe_{name}", "probe", probe.metric, _generated)
            for name, probe in PROBES.items()
        ),
        *samples.TASKS,
    ]
)
# Other names, in lower case. A published benchmark's come before a probe's.
ALIASES = {
    **{f"{name}": f"probe_{name}" for name in PROBES if name not in TASKS},
    **{name.lower(): task for name, task in infinitebench.ALIASES.items()},
}


def find(names: Iterable[str]) -> list[Task]:
    """Tasks by their names, aliases or benchmarks, each once, in the order asked for.

    Raises ValueError for a name that is none of these.
    """
    found: dict[str, Task] = {}
    for name in [names] if isinstance(names, str) else names:
        for task in _named(name):
            found[task.name] = task
    return list(found.values())


def _named(name: str) -> list[Task]:
    """The tasks that one name stands for."""
    exact = TASKS.get(name) or TASKS.get(ALIASES.get(name.lower(), ""))
    several = [task for task in TASKS.values() if task.benchmark == name]
    if exact or several:
        return [exact] if exact else several
    benchmarks = {task.benchmark for task in TASKS.values()}
    known = [*TASKS, *infinitebench.ALIASES, *ALIASES, *sorted(benchmarks)]
    close = difflib.get_close_matches(name, known, n=4)
    hint = (
        f"did you mean {', '.join(dict.fromkeys(close))}?"
        if close
        else (f"expected a task or one of {', '.join(sorted(benchmarks))}")
    )
    raise ValueError(f"unknown task {name!r}; {hint}")
