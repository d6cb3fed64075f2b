"""Stops from outside: Ctrl-C, and the SIGTERM that batch systems send before they kill.

Takes blocks of code; holds such a stop back until a block's end, or lets SIGTERM come
out of one as an exception. One idea: a stop is an exception at a moment of our
choosing, so what saves after Ctrl-C saves after SIGTERM. Refuses nothing; handlers that
a program has installed itself stay in force.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A stop in this block takes effect at its end. (Only the main thread is ever
    interrupted, so elsewhere there is nothing to hold back.)"""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        before = {n: handler for n, handler in handlers.items() if callable(handler)}
    came: list[Any] = []
    for number in before:
        signal.signal(number, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        number, frame = came[0]
        before[number](number, frame)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM in this block raises SystemExit, with the status that shells report."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
