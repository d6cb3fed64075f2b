"""Typed reads from parsed metadata (a config.json, the keys of a GGUF file).

Takes a mapping of untrusted values; gives ints, floats, flags and strings within stated
bounds. One idea: every refusal names the file and the key. A value of None counts as
absent, as transformers reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acre.errors import ModelFileError

INT32_MAX = 2**31 - 1
NEEDED: Any = object()


def short(value: Any) -> str:
    """repr of an untrusted value, cut to a length that fits an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """A mapping with the name of the file it came from."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; `default` when absent or None, ModelFileError if NEEDED."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is NEEDED:
            raise ModelFileError(f"{self.where}: {key} is missing")
        return default

    def refuse(self, key: str, value: Any, expected: str) -> ModelFileError:
        """The error for a value out of its bounds (the caller raises it)."""
        return ModelFileError(
            f"{self.where}: {key} is {short(value)}, expected {expected}"
        )

    def integer(
        self, key: str, default: Any = NEEDED, low: int = 1, high: int = INT32_MAX
    ) -> Any:
        """An integer in [low, high], or the default as it is."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, value, "an integer")
        if not low <= value <= high:
            raise self.refuse(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = NEEDED, low: float = 0.0) -> Any:
        """A finite number above `low`, or the default as it is."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(key, value, "a number")
        if isinstance(value, int) and abs(value) > 2**63:
            raise self.refuse(key, value, "a number")
        if not math.isfinite(value) or value <= low:
            raise self.refuse(key, value, f"a finite number above {low:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def string(self, key: str, default: Any = NEEDED) -> Any:
        """A string, or the default as it is."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, str):
            raise self.refuse(key, value, "a string")
        return value

    def mapping(self, key: str) -> Fields | None:
        """A nested object; None when absent or empty."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(key, value, "an object")
        return Fields(value, f"{self.where}: {key}") if value else None

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them, as a tuple; () when absent."""
        value = self.get(key)
        if value is None:
            return ()
        items = value if isinstance(value, (list, tuple)) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.refuse(key, value, "a token id or a list of token ids")
            if not 0 <= item <= INT32_MAX:
                raise self.refuse(key, value, "token ids from 0 to 2147483647")
        return tuple(items)


def read_text(path: Path) -> str:
    """A UTF-8 file. FileNotFoundError; ModelFileError for bytes that are no UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: not UTF-8 text ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. FileNotFoundError, ModelFileError."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object with distinct keys; `where` names its source in errors."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return values

    try:
        value = json.loads(text, object_pairs_hook=distinct)
    except RecursionError:
        raise ModelFileError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise ModelFileError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{where}: expected a JSON object, got {short(value)}")
    return value
