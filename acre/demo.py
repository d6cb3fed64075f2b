"""`acre demo`: Python's language reference, read once and asked three times.

Takes a model (SmolLM2-135M by default); gives answers on standard output with the
passages they rest on, and the figures of the build. One idea: the text comes with
Python itself, so the demo needs nothing but the model. Refuses nothing of its own.
"""

from __future__ import annotations

from acre.cli import ask_once, build_line, say
from acre.model import Model

QUESTIONS = (
    "What does the nonlocal statement do?",
    "Which exception does an assert statement raise when its condition is false?",
    "In which order are the decorators of a function applied?",
)


def reference_text() -> str:
    """All topics of Python's language reference in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def run(model: Model, show_passages: bool = True) -> None:
    """Reads the whole text, then answers the questions from the one cache."""
    text = reference_text()
    say(f"{model!r}")
    say(f"reading Python's language reference: {len(text)} characters")
    cache = model.build(text)
    say(build_line(cache.stats, cache.plan, cache.proxy))
    for question in QUESTIONS:
        print(f"\n? {question}", flush=True)
        ask_once(cache, question, show_passages)
