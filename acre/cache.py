"""The frozen bi-layer cache of one text: questions, saving, loading, extending.

Takes a text (or token ids) and a model; gives answers with the passages they rest on.
One idea: the core cache never changes, so every question opens a session of its own on
it, any number of threads may ask at once, and an extension makes a new core cache that
takes the old one's place only when it is whole. Refuses empty texts and questions,
questions beyond the reserve, budgets below one group, and files that belong to another
model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from acre import _core, generate, storage, together
from acre.build import (
    Figures,
    Progress,
    State,
    build_options,
    entry_options,
    extended,
    proxy_of,
    read,
)
from acre.chat import Frame
from acre.generate import Generation, Sampling, Stream, Streamer, Writer, integer
from acre.model import check_ids, check_text, elapsed_ms, is_batch, new_token_limit
from acre.report import Answer, Layout, Span, Stats, spans_of
from acre.scoring import Scoring

if TYPE_CHECKING:
    from acre.model import Ids, Model

SELECTS = ("shared", "per_layer")
PLAN_FACTS = ("n", "interval", "window", "stride", "m", "recent", "reserve")


# ------------------------------------------------------------------------------- asking


@dataclass(frozen=True)
class _Ask:
    """The options of one question, checked as far as they can be without it."""

    eta: int
    select: str
    scoring: Scoring
    groups: np.ndarray | None = None
    query: str | None = None


@dataclass(frozen=True)
class _Asked:
    """A question on the text as it was then, its options, and what they come to."""

    state: State
    query: tuple[np.ndarray, int, int]
    ask: _Ask
    sampling: Sampling
    limit: int  # new tokens
    k: int  # groups refilled

    @property
    def capacity(self) -> int:
        """Tokens of question and answer."""
        return len(self.query[0]) + self.limit


@dataclass(frozen=True)
class _Begun:
    """What stands before an answer: groups, scores, and readings of the clock."""

    groups: np.ndarray
    scores: np.ndarray | None
    start: float
    scored: float
    refilled: float


def _check_groups(groups: Any) -> np.ndarray | None:
    """Groups given by the caller as int32 [k] or [L, k]; the core checks order."""
    if groups is None:
        return None
    array = np.asarray(groups)
    if array.size == 0:
        return np.zeros(0, dtype=np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"groups: got {array.dtype}, expected integers")
    return np.ascontiguousarray(array, dtype=np.int32)


class Cache:
    """One text, read once. Thread-safe: questions run side by side on it.

    Made by `Model.build` and `Cache.load`. `len(cache)` = n, the context tokens (frame
    tokens before the text included); group j is `ids[j*l : (j+1)*l]`.
    """

    def __init__(self, model: Model, state: State, frame: Frame | None) -> None:
        """For `build` and `load`."""
        self.model = model
        self.frame = frame
        self._state = state

    @classmethod
    def build(
        cls,
        model: Model,
        text_or_ids: str | Ids,
        *,
        interval: int | str = "auto",
        window: int | None = None,
        stride: int | None = None,
        carry: int = 0,
        proxy: str = "auto",
        progress: Progress = True,
        eta: int = 4096,
        reserve: int | None = None,
        weight: int | None = None,
        sink: bool | None = None,
        l2: str = "auto",
        frame: Frame | bool | None = None,
    ) -> Cache:
        """As `Model.build`, which documents the arguments."""
        proxy = proxy_of(model, proxy)
        first, later = model.windows[proxy]
        options = build_options(
            proxy, interval, first if window is None else window,
            later if stride is None else stride, carry, eta, reserve,
            l2,
        )  # fmt: skip
        options |= entry_options(model, proxy, options["carry"], weight, sink)
        return cls(model, *read(model, text_or_ids, options, progress, frame))

    # ---------------------------------------------------------------------------- facts

    def __len__(self) -> int:
        return self._state.layout.n

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"acre.Cache(n={plan['n']}, interval={plan['interval']}, m={plan['m']}, "
            f"proxy={self.proxy!r}, nbytes={self.nbytes})"
        )

    @property
    def core(self) -> _core.Cache:
        """The frozen core cache."""
        return self._state.core

    @property
    def plan(self) -> dict[str, int]:
        """What the text became: n, interval, window, stride, carry, m, recent, bytes;
        l2: where the L2 cache lies, host_bytes: how much of it in host memory beside
        the device."""
        return self._state.core.plan

    @property
    def interval(self) -> int:
        """l, the L2 tokens of one group."""
        return self._state.layout.interval

    @property
    def proxy(self) -> str:
        """ "pooled" or "trained"."""
        return self._state.core.proxy

    @property
    def nbytes(self) -> int:
        """Bytes of L1, L2 and recent entries."""
        return self._state.core.nbytes

    @property
    def ids(self) -> np.ndarray:
        """Context token ids, read-only int32 [n], the frame's prefix included."""
        return self._state.core.ids

    @property
    def prefix_tokens(self) -> int:
        """Frame tokens before the text's own: token i of a span is ids[prefix + i]."""
        return self._state.layout.prefix

    @property
    def text(self) -> str:
        """The text given to `build`; decoded when ids were given."""
        layout = self._state.layout
        if layout.text is not None:
            return layout.text
        return self.model.decode(self.ids[layout.prefix :])

    @property
    def offsets(self) -> np.ndarray | None:
        """Character range of each of the text's tokens, [n - prefix, 2]; None for
        ids."""
        return self._state.layout.offsets

    @property
    def stats(self) -> Stats:
        """The figures of the last build or extension; nothing built after loading."""
        return self._stats(self._state)

    def _stats(self, state: State) -> Stats:
        plan, figures = state.core.plan, state.figures
        rate = figures.built / figures.seconds if figures.seconds > 0 else 0.0
        return Stats(
            tokens_built=figures.built,
            tokens_reused=figures.reused,
            tokens_recomputed=figures.recomputed,
            build_s=figures.seconds,
            build_tokens_per_s=rate,
            peak_bytes=self.model.core.engine.peak_bytes,
            l1_bytes=plan["l1_bytes"],
            l2_bytes=plan["l2_bytes"],
            recent_bytes=plan["recent_bytes"],
            l2=plan["l2"],
        )

    # ---------------------------------------------------------------------------- views

    def _view(self, part: str, layer: int, page: int = 0) -> _core.Tensor:
        layers = self.model.config["layers"]
        index = integer("layer", layer, -layers, layers - 1) % layers
        return self._state.core.view(part, index, page)[0]

    def _pages(self, part: str, layer: int) -> _core.Tensor | list[_core.Tensor]:
        pages = self._state.core.pages
        views = [self._view(part, layer, page) for page in range(pages)]
        return views[0] if len(views) == 1 else views

    def l1_keys(self, layer: int) -> _core.Tensor:
        """Read-only view [m, g, d] of the L1 keys, before RoPE; no copy."""
        return self._view("l1_keys", layer)

    def l1_values(self, layer: int) -> _core.Tensor:
        """Read-only view [m, g, d] of the L1 values."""
        return self._view("l1_values", layer)

    def l2_keys(self, layer: int) -> _core.Tensor | list[_core.Tensor]:
        """The L2 keys [tokens, g, d], before RoPE: one view, or a list of pages."""
        return self._pages("l2_keys", layer)

    def l2_values(self, layer: int) -> _core.Tensor | list[_core.Tensor]:
        """The L2 values: one view, or a list of pages."""
        return self._pages("l2_values", layer)

    def recent_keys(self, layer: int) -> _core.Tensor:
        """Read-only view [r, g, d] of the entries after the last L1 entry."""
        return self._view("recent_keys", layer)

    def recent_values(self, layer: int) -> _core.Tensor:
        """Read-only view [r, g, d] of the values after the last L1 entry."""
        return self._view("recent_values", layer)

    # --------------------------------------------------------------------------- asking

    def _settings(self, state: State, ask: _Ask, sampling: Sampling) -> dict[str, Any]:
        """How a question is asked, for its report."""
        plan, layout = state.core.plan, state.layout
        start = max(plan["m"] * plan["interval"] - layout.prefix, 0)
        inside = start < layout.n - layout.prefix
        first = layout.chars(start, start + 1) if inside else None
        return {
            "model": self.model.name,
            "dtype": self.model.config["dtype"],
            "proxy": state.core.proxy,
            "select": ask.select,
            "eta": ask.eta if ask.groups is None else None,
            "query": ask.query,
            "prefix": layout.prefix,
            **{key: plan[key] for key in PLAN_FACTS},
            "recent_token": start if inside else None,
            "recent_char": first[0] if first else None,
            **asdict(sampling),
        }

    def _question(
        self, question: str | Ids, query: str | None = None
    ) -> tuple[np.ndarray, int, int]:
        """(ids [t], first, last): the query pass and its scored range.

        A string is framed where the cache has a frame; ids are taken as they are.
        """
        if query is not None and (not isinstance(question, str) or self.frame is None):
            raise ValueError(
                "query: needs a question in words and a cache with a frame"
            )
        if isinstance(question, (bytes, bytearray)):
            raise TypeError("question: got bytes, expected str or token ids")
        if not isinstance(question, str) or self.frame is None:
            ids = self.model.encode("question", question)
            return ids, 0, len(ids)
        check_text("question", question)
        if query is None:  # frames of the caller's own need not know of queries
            framed, first, last = self.frame.question_ids(question)
        else:
            framed, first, last = self.frame.question_ids(question, query)
        ids = check_ids("question", framed, self.model.config["vocab_size"])
        if last <= first:
            raise ValueError("question: has no tokens of its own")
        return ids, int(first), int(last)

    def _options(
        self,
        eta: int,
        select: str,
        scoring: Scoring | None = None,
        groups: Any = None,
        query: str | None = None,
    ) -> _Ask:
        if select not in SELECTS:
            raise ValueError(f"select: got {select!r}, expected one of {SELECTS}")
        if scoring is None:
            scoring = self.model.scoring[self.proxy]
        elif not isinstance(scoring, Scoring):
            kind = type(scoring).__name__
            raise TypeError(f"scoring: got {kind}, expected acre.Scoring")
        chosen = _check_groups(groups)
        return _Ask(integer("eta", eta, 0), select, scoring, chosen, query)

    def _room(self, state: State, t: int) -> int:
        """Positions left for the answer; TooLongError for a question beyond reserve."""
        reserve = state.core.plan["reserve"]
        if t > reserve:
            raise _core.TooLongError(
                f"question: {t} tokens (frame included) exceed the reserve of "
                f"{reserve}; shorten it or build with a larger reserve"
            )
        return reserve - t

    def _choose(
        self,
        state: State,
        session: _core.Session,
        query: tuple[np.ndarray, int, int],
        ask: _Ask,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(groups, scores): the caller's groups, or the best k of the scored ones."""
        if ask.groups is not None:
            return ask.groups, None
        k = state.core.refill_count(ask.eta)
        if k == 0:
            return np.zeros(0, dtype=np.int32), None
        scores = state.scorer.scores(session, query, ask.scoring, ask.select)
        if scores.ndim == 1:
            return _core.select_groups(scores, k), scores
        return np.stack([_core.select_groups(row, k) for row in scores]), scores

    def _spans(
        self, state: State, groups: np.ndarray, scores: np.ndarray | None
    ) -> list[Span]:
        return spans_of(state.layout, state.core.ids, groups, scores, self.model.decode)

    def _asked(self, question: str | Ids, ask: _Ask, sampling: Sampling) -> _Asked:
        """A question whose every check has passed."""
        state = self._state
        if sampling.stop and self.model.tokenizer is None:
            raise ValueError("stop: needs a tokenizer, the model has none")
        k = 0 if ask.groups is None else int(ask.groups.shape[-1])
        if ask.groups is None:
            k = state.core.refill_count(ask.eta)
        query = self._question(question, ask.query)
        t = len(query[0])
        limit = new_token_limit(
            sampling.max_new_tokens, t, self._room(state, t), "question", "the reserve"
        )
        return _Asked(state, query, ask, sampling, limit, k)

    def _begin(self, asked: _Asked, session: _core.Session, target: Streamer) -> _Begun:
        """The two passes: scores, refills and prefills."""
        start = time.perf_counter()
        target.prompt(asked.query[0])
        groups, scores = self._choose(asked.state, session, asked.query, asked.ask)
        scored = time.perf_counter()
        session.refill(groups)
        refilled = time.perf_counter()
        session.prefill(asked.query[0])
        return _Begun(groups, scores, start, scored, refilled)

    def _writer(self, asked: _Asked, target: Streamer) -> Writer:
        model = self.model
        return Writer(
            asked.sampling, asked.limit, model.tokenizer, model.eos_ids, target
        )

    def _end(self, asked: _Asked, begun: _Begun, result: Generation) -> Answer:
        state, groups, scores = asked.state, begun.groups, begun.scores
        stats = replace(
            self._stats(state),
            tokens_reused=state.layout.n,
            tokens_recomputed=0,
            score_ms=elapsed_ms(begun.start, begun.scored),
            refill_ms=elapsed_ms(begun.scored, begun.refilled),
            time_to_first_token_ms=elapsed_ms(begun.start, result.first_token_at),
            decode_tokens_per_s=result.decode_tokens_per_s,
            prompt_tokens=len(asked.query[0]),
            new_tokens=len(result.ids),
            groups_refilled=int(groups.shape[-1]),
        )
        return Answer(
            result.text,
            np.array(result.ids, dtype=np.int32),
            self._spans(state, groups, scores),
            stats,
            groups,
            scores,
            result.finish_reason,
            state.layout.text,
            self._settings(state, asked.ask, asked.sampling),
        )

    def _pieces(self, asked: _Asked, target: Streamer) -> Generator[str, None, Answer]:
        """Scores, refills and decodes when iterated; yields text, returns the
        Answer."""
        session = _core.Session(
            self.model.core, asked.state.core, capacity=asked.capacity
        )
        begun = self._begin(asked, session, target)
        result = yield from generate.run(session, self._writer(asked, target))
        return self._end(asked, begun, result)

    def _task(self, asked: _Asked) -> together.Task:
        return together.Task(
            asked.state.core, asked.capacity, asked.k,
            partial(self._begin, asked), partial(self._writer, asked),
            partial(self._end, asked),
        )  # fmt: skip

    def ask(
        self,
        question: str | Ids | Sequence[str] | Sequence[Ids],
        eta: int = 4096,
        select: str = "shared",
        max_new_tokens: int = generate.DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | list[str] | None = None,
        groups: Any = None,
        scoring: Scoring | None = None,
        query: str | None = None,
        streamer: Any = None,
        batch: int | None = None,
    ) -> Answer | list[Answer]:
        """Answers a question (a list gives a list); the cache stays as it is.

        eta: refill budget in L2 tokens, 0 = none, else at least one group. select: one
        choice of groups for all layers ("shared") or each layer its own ("per_layer").
        groups: int [k] or [L, k] ascending, instead of scoring. scoring: None = the
        model's choice for the cache's proxy. query: the part of the question whose
        tokens score the groups, None = all of it; leave out what is only wording, as
        "answer in one word". Question and new tokens must fit the reserve; only the
        default number of new tokens yields. batch: of a list, how many are decoded in
        step at most (None = 8, as far as memory has room), which changes no answer on
        the CPU; a streamer sees them one after the other all the same, and questions
        are checked before the first is answered. ValueError, TypeError, TooLongError,
        MemoryError.
        """
        options = self._options(eta, select, scoring, groups, query)
        sampling = Sampling(
            max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, stop
        )
        if isinstance(question, (list, tuple)) and not question:
            raise ValueError("question: got an empty list")
        most, target = together.batch_size(batch), Streamer(streamer)
        if is_batch(question):
            asked = [self._asked(one, options, sampling) for one in question]
            tasks = [self._task(one) for one in asked]
            return together.answers(self.model.core, tasks, most, target)
        asked = self._asked(question, options, sampling)
        return Stream(self._pieces(asked, target)).finish()

    def stream(
        self,
        question: str | Ids,
        eta: int = 4096,
        select: str = "shared",
        *,
        groups: Any = None,
        scoring: Scoring | None = None,
        query: str | None = None,
        streamer: Any = None,
        **sampling: Any,
    ) -> Stream:
        """As `ask` for one question, as an iterator over text pieces; its `.answer` is
        the Answer once the pieces are used up."""
        options = self._options(eta, select, scoring, groups, query)
        asked = self._asked(question, options, Sampling(**sampling))
        return Stream(self._pieces(asked, Streamer(streamer)))

    def score(
        self,
        question: str | Ids,
        select: str = "shared",
        scoring: Scoring | None = None,
        query: str | None = None,
    ) -> np.ndarray:
        """Scores of the groups for a question: float32 [m], or [L, m] per layer."""
        state, ask = self._state, self._options(0, select, scoring)
        asked = self._question(question, query)
        self._room(state, len(asked[0]))
        session = _core.Session(self.model.core, state.core, capacity=len(asked[0]))
        return state.scorer.scores(session, asked, ask.scoring, ask.select)

    def refill(
        self,
        question: str | Ids,
        eta: int = 4096,
        select: str = "shared",
        scoring: Scoring | None = None,
        query: str | None = None,
    ) -> list[Span]:
        """The spans that `ask` would refill, without answering."""
        state, ask = self._state, self._options(eta, select, scoring)
        asked = self._question(question, query)
        self._room(state, len(asked[0]))
        session = _core.Session(self.model.core, state.core, capacity=len(asked[0]))
        return self._spans(state, *self._choose(state, session, asked, ask))

    # ------------------------------------------------------------------------ extending

    def extend(self, text_or_ids: str | Ids, progress: Progress = True) -> Cache:
        """Appends to the text, in place; equals having built the longer text.

        A text is tokenised again together with the addition, and the ids that stay the
        same are kept. Where that would change tokens of a full window (the boundary
        lies inside one), the addition is encoded alone. The interval stays as it is.
        Returns self. On any error, and on Ctrl-C, the cache stays as it was; questions
        under way in other threads go on with the text they began with. ValueError,
        TypeError, TooLongError (the longer text does not fit), MemoryError.
        """
        self._state = extended(self.model, self._state, text_or_ids, progress)
        return self

    # -------------------------------------------------------------------------- storing

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to one file in safetensors layout, atomically.

        A failed, interrupted or killed save leaves an older file as it was. OSError
        (disk full among them). See `acre.storage` for the layout.
        """
        state, model = self._state, self.model
        storage.save(
            path,
            state.core,
            storage.Facts(
                fingerprints={
                    **model.fingerprints,
                    "frame": storage.frame_fingerprint(self.frame),
                },
                w_max=model.config["w_max"],
                dtype=model.config["dtype"],
                prefix=state.layout.prefix,
                frame=storage.frame_record(self.frame),
                text=state.layout.text,
                offsets=state.layout.offsets,
            ),
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Model,
        verify: bool = False,
        frame: Frame | None = None,
    ) -> Cache:
        """Opens a saved cache in milliseconds: keys and values are mapped, not read.

        verify: also read everything once and check its checksums. frame: needed only
        where the cache was built with a frame of the caller's own class.
        FileNotFoundError; CacheFileError for a damaged file, and naming what differs
        when model, tokenizer, adapter, frame or parameters are not those of the file.
        The file must not be cut while the cache lives; saving over it is safe.
        """
        stored = storage.open_file(path)
        storage.check_match(stored, model.fingerprints, model.config)
        own = storage.restore_frame(stored, model.tokenizer, frame)
        if verify:
            storage.verify(stored)
        core = storage.restore(stored, model.core)
        facts = stored.facts
        layout = Layout(
            len(stored.ids), facts.prefix, core.plan["interval"], facts.text,
            facts.offsets,
        )  # fmt: skip
        return cls(model, State(core, layout, Figures()), own)
