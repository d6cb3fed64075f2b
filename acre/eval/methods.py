"""The ways of answering that are compared: acre's own, and what it must beat.

Takes a model, a document and a question; gives a `Reply`. One idea: every method reads
something into an acre cache and asks it, so weights, prompts and arithmetic are the
same and only what the answer may attend to differs. The budget is counted in entries:
what a layer holds for the answer besides the question, m + r + k l for acre; the
methods that read an excerpt fill as many.

    acre           the bi-layer cache, the groups that the question needs refilled
    l1-only        the same cache, eta = 0 (the form of Activation Beacon)
    random-refill  the same cache, groups drawn at random
    oracle-refill  the same cache, the evidence's groups first, then acre's
    full           full attention over the text, its middle cut to the model's positions
    stream         the first tokens (sinks) and the most recent ones, full attention
    bm25, dense    passages that the question retrieves, full attention

Refuses unknown names and settings.
"""

from __future__ import annotations

import difflib
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np

from acre import _core
from acre.build import entry_options, proxy_of
from acre.cache import SELECTS, Cache
from acre.eval import retrieve
from acre.eval.excerpt import Excerpt, ends, merged, middle_cut
from acre.eval.records import Document, Question, Range
from acre.eval.shelf import Asked, Held, Shelf, default_reserve
from acre.model import Model
from acre.report import Answer
from acre.scoring import PROXIES

SINKS = 4  # tokens, as StreamingLLM keeps
PASSAGE = 128  # tokens
SEAM = 8  # tokens


class NotApplicableError(Exception):
    """A method that this document or question gives nothing to work with."""


# ----------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """What decides a method's answers. The first row is `Model.build`'s, eta and select
    are `Cache.ask`'s. budget: entries for excerpts, None = what acre would use. seed:
    of random choices. passage: tokens of a retrieved passage."""

    interval: int | str = "auto"
    window: int = 4096
    stride: int = 2048
    carry: int = 0
    proxy: str = "auto"
    eta: int = 4096
    select: str = "shared"
    budget: int | None = None
    seed: int = 0
    passage: int = PASSAGE

    def __post_init__(self) -> None:
        for name, known in (("select", SELECTS), ("proxy", ("auto", *PROXIES))):
            if getattr(self, name) not in known:
                got = getattr(self, name)
                raise ValueError(f"{name}: got {got!r}, expected one of {known}")

    @classmethod
    def parse(cls, name: str, text: str) -> Any:
        """The value of setting `name` as written on a command line."""
        if name not in (known := [f.name for f in fields(cls)]):
            close = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {close[0]!r}?" if close else f", expected {known}"
            raise ValueError(f"method setting: got {name!r}{hint}")
        if name in ("proxy", "select") or (name, text) == ("interval", "auto"):
            return text
        if (name, text) == ("budget", "none"):
            return None
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{name}: got {text!r}, expected an integer") from None

    def build(self, room: int, w_max: int) -> dict[str, Any]:
        """The arguments of `Model.build`."""
        return {
            "interval": self.interval,
            "window": self.window,
            "stride": self.stride,
            "carry": self.carry,
            "proxy": self.proxy,
            "eta": self.eta,
            "reserve": max(room, default_reserve(w_max)),
        }


@dataclass
class Reply:
    """An answer and what it cost.

    context_tokens: of the document, as far as it was read. entries: what a layer held
    besides the question. kept: character ranges of the document that the answer could
    attend to token by token. build_s: once per document (the same for the methods that
    share the cache); first_token_s: from the question to the first token, retrieval
    included; peak_bytes: most that the engine held, weights included. nats: sum of -log
    p, where a text was measured instead of asked.
    """

    text: str = ""
    context_tokens: int = 0
    entries: int = 0
    kept: list[Range] | None = None
    truncated: bool = False
    build_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    new_tokens: int = 0
    peak_bytes: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Reading(Protocol):
    """A document that a method has read."""

    def ask(self, question: Question) -> Reply: ...


class Method(Protocol):
    """A way of answering; `label` names it in tables, `settings` decide its results."""

    label: str

    def settings(self) -> Mapping[str, Any]: ...

    def open(self, shelf: Shelf, document: Document) -> Reading: ...


# ------------------------------------------------------------------------------- asking


def ask(
    shelf: Shelf, held: Held, asked: Asked, excerpt: Excerpt, **options: Any
) -> tuple[Answer, Reply]:
    """Asks a cache greedily; the Reply lacks only what the answer could attend to."""
    engine = shelf.model.core.engine
    engine.reset_peak()
    start = time.perf_counter()
    answer = held.cache.ask(
        asked.prompt,
        query=asked.query,
        max_new_tokens=asked.question.max_new_tokens,
        stop=list(asked.question.stop) or None,
        **options,
    )
    seconds, plan = time.perf_counter() - start, held.cache.plan
    first = answer.stats.time_to_first_token_ms / 1e3
    refilled = answer.stats.groups_refilled * plan["interval"]
    return answer, Reply(
        text=answer.text,
        context_tokens=plan["n"] - held.cache.prefix_tokens,
        entries=plan["m"] + plan["recent"] + refilled,
        truncated=not excerpt.complete or asked.cut,
        build_s=held.build_s,
        first_token_s=first,
        decode_s=seconds - first,
        new_tokens=answer.stats.new_tokens,
        peak_bytes=max(held.peak_bytes, engine.peak_bytes),
    )


@dataclass
class Whole:
    """An excerpt read once with full attention; questions share it."""

    shelf: Shelf
    document: Document
    excerpt: Excerpt
    room: int

    def ask(self, question: Question) -> Reply:
        held = self.shelf.full(self.document, self.excerpt, self.room)
        asked = self.shelf.asked(self.document, question)
        _, reply = ask(self.shelf, held, asked, self.excerpt, eta=0)
        reply.kept = list(self.excerpt.ranges)
        return reply


@dataclass
class Retrieved:
    """Passages chosen and read anew for every question."""

    shelf: Shelf
    document: Document
    budget: int
    settings: Settings
    ranker: str

    def __post_init__(self) -> None:
        start, text = time.perf_counter(), self.document.text
        offsets = self.shelf.offsets(self.document)
        self.parts = retrieve.passages(text, offsets, self.settings.passage)
        texts = [text[a:b] for (a, b), _ in self.parts]
        self.rank = retrieve.RANKERS[self.ranker](texts)
        self.index_s = time.perf_counter() - start

    def ask(self, question: Question) -> Reply:
        start = time.perf_counter()
        asked = self.shelf.asked(self.document, question)
        scores = self.rank(asked.query or asked.prompt)
        excerpt = retrieve.fill(self.document.text, self.parts, scores, self.budget)
        room = asked.tokens + question.max_new_tokens
        held = self.shelf.full(self.document, excerpt, room)
        before = time.perf_counter() - start
        _, reply = ask(self.shelf, held, asked, excerpt, eta=0)
        reply.build_s, reply.kept = self.index_s, list(excerpt.ranges)
        reply.first_token_s += before
        return reply


@dataclass
class Refilled:
    """A bi-layer cache and a way of choosing the groups to refill."""

    shelf: Shelf
    document: Document
    excerpt: Excerpt
    settings: Settings
    options: dict[str, Any]
    choose: str

    def ask(self, question: Question) -> Reply:
        held = self.shelf.read(self.document, self.excerpt, **self.options)
        asked = self.shelf.asked(self.document, question)
        options = self._choice(held.cache, asked)
        answer, reply = ask(self.shelf, held, asked, self.excerpt, **options)
        reply.kept = self.excerpt.original(_attended(held.cache, answer))
        reply.extra = {"groups": answer.stats.groups_refilled}
        return reply

    def _choice(self, cache: Cache, asked: Asked) -> dict[str, Any]:
        """The arguments of `Cache.ask` that say what is refilled."""
        eta, select = self.settings.eta, self.settings.select
        k = cache.core.refill_count(eta)
        if self.choose == "none":
            return {"eta": 0}
        if self.choose == "random":
            return {"groups": drawn(cache.plan["m"], k, self.settings.seed, asked)}
        if self.choose == "oracle" and k:
            wanted = self._evidence(cache, asked.question)
            scores = cache.score(asked.prompt, query=asked.query)
            scores[wanted] += scores.max() + 1.0
            return {"groups": _core.select_groups(scores, k)}
        return {"eta": eta, "select": select}

    def _evidence(self, cache: Cache, question: Question) -> np.ndarray:
        """Groups that hold a character of the evidence."""
        if not question.evidence:
            raise NotApplicableError("the evidence is not known")
        held = np.zeros(cache.plan["m"], bool)
        starts, ends_ = _group_chars(cache)
        for part in self.excerpt.ranges:  # an excerpt has at most two here
            shift = _position(self.excerpt, part)
            for start, end in question.evidence:
                a, b = max(start, part[0]) + shift, min(end, part[1]) + shift
                held |= (starts < b) & (ends_ > a) & (a < b)
        return held


def _position(excerpt: Excerpt, part: Range) -> int:
    """What to add to a character of the source to find it in the excerpt's text."""
    at = 0
    for start, end in excerpt.ranges:
        if (start, end) == part:
            return at - start
        at += end - start + len(excerpt.joint)
    raise KeyError(part)


def _group_chars(cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """First and behind-the-last character of each group, [m] each; 0 in the frame."""
    m, interval, prefix = cache.plan["m"], cache.interval, cache.prefix_tokens
    first = np.arange(m) * interval - prefix
    last = first + interval
    offsets, inside = cache.offsets, last > 0
    starts = np.where(inside, offsets[np.maximum(first, 0), 0], 0)
    stops = np.where(inside, offsets[np.maximum(last, 1) - 1, 1], 0)
    return starts, stops


def _attended(cache: Cache, answer: Answer) -> list[Range]:
    """Character ranges of the cache's text whose own entries the answer could see: the
    refilled spans and the recent tokens."""
    kept = [(span.char_start, span.char_end) for span in answer.spans]
    recent = max(cache.plan["m"] * cache.interval - cache.prefix_tokens, 0)
    if recent < len(cache.offsets):
        kept.append((int(cache.offsets[recent, 0]), len(cache.text)))
    return merged(kept)


def drawn(m: int, k: int, seed: int, asked: Asked) -> np.ndarray:
    """k of m groups, ascending; the same for the same seed and question."""
    name = hashlib.sha256(f"{seed}\0{asked.question.id}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(name[:8], "little"))
    return np.sort(rng.choice(m, k, replace=False)).astype(np.int32)


# ------------------------------------------------------------------------ how much fits


def core_options(
    shelf: Shelf, document: Document, settings: Settings
) -> dict[str, Any]:
    """The settings as the core's builder takes them."""
    options = settings.build(shelf.room(document), shelf.w_max)
    if options["interval"] == "auto":
        options["interval"] = 0
    options["proxy"] = proxy = proxy_of(shelf.model, settings.proxy)
    return options | entry_options(shelf.model, proxy, settings.carry, None, None)


def plan(
    shelf: Shelf, document: Document, settings: Settings, n: int
) -> dict[str, int]:
    """What acre makes of the first n tokens (frame included). TooLongError."""
    return shelf.model.core.plan(n, **core_options(shelf, document, settings))


def fitting(shelf: Shelf, document: Document, settings: Settings) -> Excerpt:
    """The document, or, where it is too long for the settings, its ends: as many full
    windows as fit, also if the seam makes a few tokens more or fewer."""
    prefix = len(shelf.frame(document).prefix_ids)
    offsets = shelf.offsets(document)

    def fits(n: int) -> bool:
        try:
            return bool(plan(shelf, document, settings, n))
        except _core.TooLongError:
            return False

    def windows_fit(count: int) -> bool:
        n = settings.window + count * settings.stride
        return all(fits(n + seam) for seam in (-SEAM, 0, SEAM) if n + seam > 0)

    if fits(prefix + len(offsets)):
        return Excerpt.whole(document.text)
    low, high = 0, (len(offsets) + prefix - settings.window) // settings.stride
    if not fits(settings.window):
        plan(shelf, document, settings, settings.window)  # says why
    while low < high:  # windows behind the first that fit
        middle = (low + high + 1) // 2
        if windows_fit(middle):
            low = middle
        else:
            high = middle - 1
    tokens = settings.window + low * settings.stride - prefix
    return middle_cut(document.text, offsets, tokens)


def shaped(
    shelf: Shelf, document: Document, settings: Settings
) -> tuple[Excerpt, dict[str, int]]:
    """What is read of the document, and what becomes of it."""
    excerpt = fitting(shelf, document, settings)
    n = len(shelf.offsets(document))
    if not excerpt.complete:
        n = len(shelf.model.tokenizer.encode(excerpt.text))
    prefix = len(shelf.frame(document).prefix_ids)
    return excerpt, plan(shelf, document, settings, prefix + n)


def entries(shelf: Shelf, document: Document, settings: Settings) -> int:
    """The budget: entries of the document that acre's answers attend to."""
    if settings.budget is not None:
        return settings.budget
    _, shape = shaped(shelf, document, settings)
    held = shape["m"] + shape["recent"]
    room = shelf.w_max - held - shape["reserve"]
    k = min(settings.eta // shape["interval"], room // shape["interval"], shape["m"])
    prefix = len(shelf.frame(document).prefix_ids)
    return held + k * shape["interval"] - prefix


def positions(shelf: Shelf, document: Document) -> int:
    """Tokens of text that full attention has positions for, less what the seam of an
    excerpt may cost when it is tokenised anew."""
    prefix = len(shelf.frame(document).prefix_ids)
    left = shelf.w_max - prefix - shelf.room(document) - SEAM
    if left < 1:
        raise _core.TooLongError(
            f"question: leaves no room for a text within {shelf.w_max} positions"
        )
    return left


# ------------------------------------------------------------------------------ methods


@dataclass(frozen=True)
class OwnMethod:
    """One of the methods above, with its settings."""

    name: str
    label: str
    chosen: Settings

    def settings(self) -> dict[str, Any]:
        """Those that matter to the method."""
        if self.name == "full":
            return {"method": self.name}
        unused = UNUSED_BY_CACHES if self.name in CHOICES else UNUSED_BY_EXCERPTS
        kept = {k: v for k, v in asdict(self.chosen).items() if k not in unused}
        return {"method": self.name, **kept}

    def on(self, model: Model) -> OwnMethod:
        """Itself with the proxy that "auto" means for a model, which results state."""
        chosen = replace(self.chosen, proxy=proxy_of(model, self.chosen.proxy))
        return replace(self, chosen=chosen)

    def open(self, shelf: Shelf, document: Document) -> Reading:
        s = self.on(shelf.model).chosen
        if self.name in CHOICES:
            excerpt, shape = shaped(shelf, document, s)
            options = {k: shape[k] for k in ("interval", *KEPT)} | {"proxy": s.proxy}
            options["eta"] = 0  # was planned for: methods of any eta share the cache
            choose = CHOICES[self.name]
            return Refilled(shelf, document, excerpt, s, options, choose)
        room, most = shelf.room(document), positions(shelf, document)
        offsets = shelf.offsets(document)
        if self.name == "full":
            excerpt = middle_cut(document.text, offsets, most)
            return Whole(shelf, document, excerpt, room)
        budget = min(entries(shelf, document, s), most)
        if self.name == "stream":
            recent = max(budget - SINKS, 0)
            excerpt = ends(document.text, offsets, min(SINKS, budget), recent)
            return Whole(shelf, document, excerpt, room)
        return Retrieved(shelf, document, budget, s, self.name)


CHOICES = {
    "acre": "scores",
    "l1-only": "none",
    "random-refill": "random",
    "oracle-refill": "oracle",
}
NAMES = (*CHOICES, "full", "stream", "bm25", "dense")
KEPT = ("window", "stride", "carry", "reserve")  # of a plan, by a cache's options
UNUSED_BY_CACHES = ("budget", "passage")
UNUSED_BY_EXCERPTS = ("select", "seed")


def make(spec: str | Method, defaults: Settings) -> Method:
    """A method from its name and settings, as "acre:eta=512,select=per_layer"; what is
    not said is as in `defaults`. A Method of the caller's own is taken as it is."""
    if not isinstance(spec, str):
        return spec
    name, _, rest = spec.partition(":")
    if name not in NAMES:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(NAMES)}")
    values = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"method: got {part!r} in {spec!r}, expected key=value")
        values[key] = Settings.parse(key, value)
    return OwnMethod(name, spec, replace(defaults, **values))


def make_all(specs: Sequence[str | Method], defaults: Settings) -> list[Method]:
    """The methods, refusing two of one label."""
    methods = [make(spec, defaults) for spec in specs]
    labels = [method.label for method in methods]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"method: {label!r} is named twice")
    if not methods:
        raise ValueError("method: none given")
    return methods
