"""The benchmarks' prompts, as their authors publish them.

Takes the name of a file in acre/eval/prompts; gives its JSON object. One idea: the
words of a benchmark are data, kept apart from the code, each file with its source and
licence. A template is split at the text's place and filled on both sides, so that what
is read once (the text) and what is asked (all after it) join to the authors' prompt.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def published(name: str) -> dict[str, Any]:
    """The object of acre/eval/prompts/<name>.json; not to be changed."""
    path = resources.files("acre.eval") / "prompts" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def around(template: str, mark: str = "{context}", **fields: str) -> tuple[str, str]:
    """What precedes and what follows `mark`, with `fields` filled in on both sides."""
    before, found, after = template.partition(mark)
    if not found:
        raise ValueError(f"template: expected {mark} in {template[:60]!r}")
    return before.format(**fields), after.format(**fields)
