"""Packages that only some uses need.

Takes a module's name and the extra that brings it; gives the module, or an ImportError
that says what to install. Refuses nothing else.
"""

from __future__ import annotations

import importlib
from typing import Any


def needs(module: str, extra: str) -> Any:
    """The module; ImportError naming the extra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f'{name} is needed: pip install "acre[{extra}]"') from error
