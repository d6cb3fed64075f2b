"""Which attention scores a question's groups: heads, rotation, calibration.

Takes a session's raw scores (docs: METHOD section 4); gives the scores that choose.
One idea: a mean of many keys attracts some mass from every question alike, so under
`calibrated` each group's score is divided by its prior, what stretches of the text
itself give to it. The choice for a model is measured (benchmarks/scoring_heads.py) and
kept in scoring.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from acre import _core

PROXIES = ("pooled", "trained")
SNIPPETS, SNIPPET_TOKENS = 8, 16
FLOOR = 1e-3  # of the mean prior: keeps quotients finite
PRIORS_KEPT = 8


@dataclass(frozen=True, eq=False)
class Scoring:
    """How groups are scored.

    heads: uint8 [L, h], nonzero = counts; None = the last layer's heads (shared
    selection) or every layer's own (per_layer). rotated: queries and keys after RoPE.
    calibrated: scores divided by the group's prior (its mean over groups being 1).
    """

    heads: np.ndarray | None = None
    rotated: bool = True
    calibrated: bool = False

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", np.asarray(self.heads))

    def record(self) -> dict[str, Any]:
        """As JSON values: heads as [layer, head] pairs, or None."""
        pairs = None if self.heads is None else np.argwhere(self.heads).tolist()
        return {"heads": pairs, "rotated": self.rotated, "calibrated": self.calibrated}


def head_mask(pairs: Iterable[Sequence[int]], layers: int, heads: int) -> np.ndarray:
    """uint8 [L, h] with the (layer, head) pairs set. TypeError, ValueError."""
    mask = np.zeros((layers, heads), dtype=np.uint8)
    for pair in pairs:
        layer, head = (int(number) for number in pair)
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ValueError(
                f"heads: got ({layer}, {head}), the model has {layers} layers of "
                f"{heads} heads"
            )
        mask[layer, head] = 1
    if not mask.any():
        raise ValueError("heads: got none, expected (layer, head) pairs")
    return mask


def from_record(record: Mapping[str, Any], layers: int, heads: int) -> Scoring:
    """What `Scoring.record` wrote. TypeError, ValueError, KeyError."""
    mask = None
    if record.get("heads") is not None:
        mask = head_mask(record["heads"], layers, heads)
    rotated, calibrated = record.get("rotated", True), record.get("calibrated", False)
    return Scoring(mask, bool(rotated), bool(calibrated))


def registered(keys: Iterable[str], layers: int, heads: int) -> dict[str, Scoring]:
    """The choice per proxy: that of the first key in scoring.json, or the default.

    An entry: {proxy: {"heads": [[layer, head], ...] or null, "rotated": bool,
    "calibrated": bool}, "pooling": {"weight": int, "sink": int}}.
    """
    known = _known(keys)
    return {
        proxy: from_record(known.get(proxy, {}), layers, heads) for proxy in PROXIES
    }


def pooling(keys: Iterable[str]) -> dict[str, int]:
    """How pooled entries are made: weight (0 = the interval) and sink (0 or 1), of the
    first key in scoring.json, or METHOD's."""
    return {"weight": 0, "sink": 0, **_known(keys).get("pooling", {})}


def _known(keys: Iterable[str]) -> dict[str, Any]:
    text = resources.files("acre").joinpath("scoring.json").read_text("utf-8")
    table = json.loads(text)
    return next((table[key] for key in keys if key in table), {})


def own_question(ids: np.ndarray, most: int) -> np.ndarray:
    """Stretches of the text, evenly spread, as one question: at most `most` ids."""
    length = min(SNIPPET_TOKENS, len(ids))
    starts = (np.arange(SNIPPETS) + 0.5) * (len(ids) - length) / SNIPPETS
    parts = [ids[start : start + length] for start in starts.astype(np.int64)]
    return np.ascontiguousarray(np.concatenate(parts)[:most])


def calibrate(scores: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """float32, the shape of `scores` ([m] or [L, m], as `prior`)."""
    mean = prior.mean(axis=-1, keepdims=True)
    return (scores * mean / (prior + FLOOR * mean)).astype(np.float32)


class Scorer:
    """Scores questions against one core cache; computes each prior once."""

    def __init__(self, core: _core.Cache) -> None:
        self.core = core
        self._priors: dict[tuple, np.ndarray] = {}

    def scores(
        self,
        session: _core.Session,
        query: tuple[np.ndarray, int, int],
        scoring: Scoring,
        select: str,
    ) -> np.ndarray:
        """float32 [m], or [L, m] per layer, of the query (ids, first, last)."""
        raw = self._raw(session, query, scoring, select)
        return (
            calibrate(raw, self.prior(scoring, select)) if scoring.calibrated else raw
        )

    def prior(self, scoring: Scoring, select: str) -> np.ndarray:
        """The raw scores of the text's own question; one short pass the first time."""
        heads = scoring.heads
        mask = None if heads is None else (heads.shape, heads.tobytes())
        key = (mask, scoring.rotated, select)
        found = self._priors.get(key)
        if found is None:
            plan = self.core.plan
            read = self.core.ids[: plan["m"] * plan["interval"]]
            ids = own_question(read, plan["reserve"])
            session = _core.Session(self.core.model, self.core, capacity=len(ids))
            found = self._raw(session, (ids, 0, len(ids)), scoring, select)
            if len(self._priors) >= PRIORS_KEPT:
                self._priors.clear()
            self._priors[key] = found
        return found

    @staticmethod
    def _raw(
        session: _core.Session,
        query: tuple[np.ndarray, int, int],
        scoring: Scoring,
        select: str,
    ) -> np.ndarray:
        return session.score(
            *query, select=select, rotated=scoring.rotated, heads=scoring.heads
        )
