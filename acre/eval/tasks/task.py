"""What a task is, and how the fields of its rows are read.

Takes nothing; gives the record `Task` and the checks that every parser shares. A parser
turns one row of a data file into documents; a row it cannot use is refused with a
ValueError, KeyError or TypeError that names the field, what came and what was expected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from acre.eval.records import Document

Row = dict[str, Any]
Parse = Callable[[Row, int], list[Document]]


@dataclass(frozen=True)
class Hub:
    """A data file on the Hugging Face hub: dataset repository, file, and, where the
    file is a zip, the member of it that holds the rows."""

    repo: str
    filename: str
    member: str = ""


@dataclass(frozen=True)
class Task:
    """One task of a benchmark.

    name: its key in TASKS. benchmark: what it belongs to. metric: a key of the metrics
    table; "" = a collection, each document is judged as the task it names. parse: row
    and 1-based line -> documents; raises ValueError, KeyError or TypeError. file: stem
    of its data file. hub: where the file is published; None = nowhere, or generated.
    merge: makes the documents of a whole file into fewer, longer ones.
    """

    name: str
    benchmark: str
    metric: str
    parse: Parse
    file: str = ""
    hub: Hub | None = None
    merge: Callable[[list[Document]], list[Document]] | None = None


def string(row: Row, key: str) -> str:
    """row[key], which has to be a string."""
    value = row[key]
    if not isinstance(value, str):
        raise TypeError(f"{key}: expected a string, got {type(value).__name__}")
    return value


def strings(row: Row, key: str) -> list[str]:
    """row[key], which has to be a list of strings."""
    value = row[key]
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{key}: expected a list of strings, got {_shape(value)}")
    return value


def references(value: Any, key: str = "answers") -> tuple[str, ...]:
    """References from a string, a number or a list of them; at least one not blank."""
    several = value if isinstance(value, list) else [value]
    for one in several:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)):
            raise TypeError(f"{key}: expected strings, got {_shape(value)}")
    found = tuple(str(one) for one in several if str(one).strip())
    if not found:
        raise ValueError(f"{key}: no answers")
    return found


def identity(row: Row, line: int) -> str:
    """The row's own id, or its line."""
    for key in ("_id", "id"):
        value = row.get(key)
        if isinstance(value, (str, int)) and str(value):
            return str(value)
    return str(line)


def _shape(value: Any) -> str:
    """A type's name, for a list with its elements' names."""
    if isinstance(value, list):
        return f"list of {sorted({type(v).__name__ for v in value})}"
    return type(value).__name__
