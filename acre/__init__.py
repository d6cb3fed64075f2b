"""acre: long documents, read once and questioned many times.

    model = acre.Model.from_pretrained("path/to/model")
    cache = model.build(open("book.txt").read())
    answer = cache.ask("Who found the letter?")
    print(answer.text, answer.passages(limit=3))

Reading makes a bi-layer cache; a question refills only the passages that it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from acre._core import BusyError, DeviceError, TooLongError, __version__
from acre.cache import Cache
from acre.chat import Frame
from acre.errors import CacheFileError, ModelFileError
from acre.generate import Stream
from acre.model import Model
from acre.report import Answer, Span, Stats
from acre.scoring import Scoring
from acre.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "BusyError",
    "Cache",
    "CacheFileError",
    "DeviceError",
    "Frame",
    "Model",
    "ModelFileError",
    "Scoring",
    "Span",
    "Stats",
    "Stream",
    "Tokenizer",
    "TooLongError",
    "__version__",
    "evaluate",
    "page",
    "plot",
    "sweep",
    "train",
]

if TYPE_CHECKING:
    from acre import page, plot
    from acre.eval.run import evaluate
    from acre.eval.sweep import sweep
    from acre.training.run import train

# Loaded when first asked for: they bring packages that reading and asking do not need.
_LATE = {
    "evaluate": "acre.eval.run",
    "sweep": "acre.eval.sweep",
    "train": "acre.training.run",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    if name in ("page", "plot"):
        return importlib.import_module(f"acre.{name}")
    raise AttributeError(f"module 'acre' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
