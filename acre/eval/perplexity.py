"""Perplexity of held-out text under the attention that a method reads with.

Takes a document and a method; gives the mean of -log p over its tokens, in nats. One
idea: the builder itself measures, so the figure is of exactly the attention that makes
the cache (METHOD, section 3), not of an imitation. Refuses methods that choose by a
question.

    acre    selective attention with the method's interval, windows and carry
    full    every earlier token; texts beyond the model's positions do not apply
    stream  a sink and a sliding window of as many keys as acre has at the end of the
            text: windows of half of them, the other half carried over. The sink is the
            first token, entry 0 of an interval of a whole window; the few entries of
            later windows weigh a token each
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from acre import _core
from acre.eval.methods import (
    Method,
    NotApplicableError,
    OwnMethod,
    Reply,
    core_options,
    plan,
)
from acre.eval.records import Document
from acre.eval.shelf import Shelf

METRIC = "perplexity"


def options_of(
    shelf: Shelf, method: Method, document: Document, n: int
) -> dict[str, Any]:
    """The arguments of the builder that reads as the method does."""
    if not isinstance(method, OwnMethod):
        raise NotApplicableError("perplexity: not a way of reading")
    settings = method.chosen
    if method.name == "acre":
        return core_options(shelf, document, settings)
    if method.name == "full":
        if n > shelf.w_max:
            raise NotApplicableError(f"{n} tokens exceed {shelf.w_max} positions")
        return {"interval": 1, "window": n + 1, "eta": 0, "reserve": 1}
    if method.name == "stream":
        keys = settings.budget or _keys(shelf, document, settings, n)
        carry = keys // 2
        sizes = {"window": keys, "stride": keys - carry, "carry": carry}
        sink = {"interval": keys, "sink": 1, "weight": 1}
        return {**sink, **sizes, "eta": 0, "reserve": 1}
    raise NotApplicableError("perplexity: chooses by a question")


def _keys(shelf: Shelf, document: Document, settings: Any, n: int) -> int:
    """Keys that acre's last window can see."""
    shape = plan(shelf, document, settings, n)
    return shape["m"] + shape["carry"] + shape["stride"]


def measure(shelf: Shelf, method: Method, document: Document) -> Reply:
    """A Reply with the mean nats as its score (lower is better), over the whole text
    ("nats") and over its second half ("late_nats"), where reading differs most."""
    model = shelf.model
    ids = model.encode("text", document.text)
    options = options_of(shelf, method, document, len(ids))
    engine = model.core.engine
    engine.reset_peak()
    start = time.perf_counter()
    try:
        builder = _core.Builder(model.core, ids, losses=True, **options)
    except _core.TooLongError as error:
        raise NotApplicableError(str(error)) from None
    done, total = 0, len(ids)
    while done < total:
        done, total = builder.step()
    losses = builder.losses().astype(np.float64)
    nats = float(losses[1:].mean()) if len(ids) > 1 else math.nan
    late = float(losses[max(1, len(ids) // 2) :].mean())
    shape = model.core.plan(len(ids), **options)
    return Reply(
        context_tokens=len(ids),
        entries=shape["m"] + shape["recent"],
        build_s=time.perf_counter() - start,
        peak_bytes=engine.peak_bytes,
        extra={"score": round(nats, 6), "nats": round(nats, 6),
               "late_nats": round(late, 6)},
    )  # fmt: skip
