"""acre as a model of lm-evaluation-harness: `--model acre --model_args path=MODEL,...`.

Takes the harness's requests; gives log-likelihoods and generated texts. One idea: the
harness's TemplateLM encodes and `contexts` reads, so this file only puts requests of
one context beside each other. Short contexts are computed with full attention, longer
ones from a bi-layer cache (docs/LM_EVAL.md). Refuses unknown arguments, values of
another kind and contexts that no cache can hold, before any work.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs  # registers theirs, too
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if not str(error.name).startswith("lm_eval"):
        raise
    raise ImportError(
        'acre.harness needs lm-eval 0.4.13 or later: pip install "acre[lm-eval]"'
    ) from error

from tqdm import tqdm

from acre import chat, together
from acre.build import proxy_of
from acre.generate import Sampling, Streamer, Writer, integer
from acre.harness.contexts import Context, Contexts, Reading
from acre.model import Model
from acre.tokenizer import Tokenizer

log = logging.getLogger("lm_eval.acre")  # the harness shows loggers below its own

Score = tuple[float, bool]
Encoded = tuple[Any, Sequence[int], Sequence[int]]

# What is used of a request's generation_kwargs.
SAMPLING = ("top_p", "top_k", "repetition_penalty", "seed")
GENERATION = {*SAMPLING, "until", "max_gen_toks", "do_sample", "temperature"}


# --------------------------------------------------------------------------- arguments


def _text(name: str, value: Any) -> str:
    """A string; the harness turns some into numbers, which are turned back."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a string")
    return str(value)


def _whole(name: str, value: Any) -> int:
    """A non-negative integer, also one that is written as a string."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    return integer(name, value, 0)


def _flag(name: str, value: Any) -> bool:
    """True or false, also as strings."""
    word = str(value).strip().lower()
    if word not in ("true", "false"):
        raise TypeError(f"{name}: got {value!r}, expected true or false")
    return word == "true"


def _interval(name: str, value: Any) -> int | str:
    """ "auto" or an integer."""
    return value if value == "auto" else _whole(name, value)


Kinds = dict[str, Callable[[str, Any], Any]]
MODEL: Kinds = {
    "dtype": _text,
    "adapter": _text,
    "threads": _whole,
    "w_max": _whole,
    "weights": _text,
}
READING: Kinds = {
    "full_below": _whole,
    "question_tokens": _whole,
    "eta": _whole,
    "select": _text,
    "interval": _interval,
    "window": _whole,
    "stride": _whole,
    "carry": _whole,
    "proxy": _text,
    "weight": _whole,
    "sink": _flag,
}
OWN: Kinds = {
    "max_gen_toks": _whole,
    "seed": _whole,
    "add_bos_token": _flag,
    "prefix_token_id": _whole,
}
HARNESS = ("batch_size", "max_batch_size", "device")
HELD = 2**14  # tokens of contexts with full attention that are held for one batch
LOGLIKELIHOOD = "loglikelihood"


def _taken(given: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    """The given values of these arguments, checked; None counts as not given."""
    return {
        name: kind(name, given[name])
        for name, kind in kinds.items()
        if given.get(name) is not None
    }


def _check_names(given: Iterable[str]) -> None:
    known = [*MODEL, *READING, *OWN, *HARNESS]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(
            f"model_args: unknown {', '.join(unknown)}; expected path or "
            f"{', '.join(sorted(known))}"
        )


def _opened(place: Any, settings: dict[str, Any]) -> Model:
    """The model of `path`, which has a tokenizer."""
    if isinstance(place, Model):
        if settings:
            raise TypeError(f"model_args: {', '.join(settings)} need a path")
        model = place
    else:
        file = place if isinstance(place, os.PathLike) else _text("path", place)
        model = Model.from_pretrained(file, **settings)
    if model.tokenizer is None:
        raise ValueError(f"path: {place} has no tokenizer")
    return model


# -------------------------------------------------------------------------- the model


@register_model("acre")
class AcreLM(TemplateLM):
    """A model that the harness evaluates. One owner, one process."""

    def __init__(
        self, path: Any = None, pretrained: Any = None, **options: Any
    ) -> None:
        """path (or pretrained): what `Model.from_pretrained` opens, or a Model.

        options: as in `Model.from_pretrained` and
        `acre.harness.contexts.Reading`; max_gen_toks (256) and seed (0) where a task
        sets none;
        add_bos_token: begin contexts with BOS, None = as the tokenizer does;
        prefix_token_id: stands before a text without context, None = BOS, else the end
        of text. batch_size: answers decoded in step, of requests whose contexts are
        kept at the same time; "auto" = 8, as far as memory has room. device is taken
        and without effect: the harness passes its own default for it. TypeError,
        ValueError (naming the argument), and what `Model.from_pretrained` raises.
        """
        super().__init__()
        _check_names(options)
        if (path is None) == (pretrained is None):
            raise TypeError("model_args: give path (or pretrained, the same)")
        asked = _taken(options, READING)
        Reading(**asked)  # refuses before the model is opened
        self._batch = _batch(options.get("batch_size"))
        own = {"max_gen_toks": 256, "seed": 0, **_taken(options, OWN)}
        settings = _taken(options, MODEL)
        self.acre = _opened(pretrained if path is None else path, settings)
        self.tokenizer: Tokenizer = self.acre.tokenizer
        used = proxy_of(self.acre, asked.get("proxy", "auto"))
        windows = dict(zip(("window", "stride"), self.acre.windows[used], strict=True))
        reading = Reading(**(windows | asked))
        self.contexts = Contexts(self.acre, reading)
        self.max_gen_toks: int = integer("max_gen_toks", own["max_gen_toks"], 1)
        self.seed: int = own["seed"]
        self.add_bos_token: bool | None = own.get("add_bos_token")
        self._prefix = self._prefix_id(own.get("prefix_token_id"))
        self._said: set[str] = set()

    def _prefix_id(self, given: int | None) -> int:
        if given is not None:
            size = self.acre.config["vocab_size"]
            return integer("prefix_token_id", given, 0, size - 1)
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    # ---------------------------------------------------------------------- properties

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text by its name, or the model's first end."""
        name = self.tokenizer.special_names.get("eos_token")
        if name is not None:
            ids = self.tokenizer.encode(name, special=True, bos=False)
            if len(ids) == 1:
                return int(ids[0])
        if not self.acre.eos_ids:
            raise ValueError("prefix_token_id: needed, the model names no BOS and EOS")
        return self.acre.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Positions of full attention; contexts of tasks may be longer."""
        return self.contexts.w_max

    @property
    def batch_size(self) -> int:
        """The most answers that are decoded in step."""
        return self._batch

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's files of encoded requests: model and tokenizer."""
        name = self.acre.name.replace("/", "__")
        return f"{name}__{self.tokenizer.fingerprint[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        config, contexts = self.acre.config, self.contexts
        return {
            "model_dtype": config["dtype"],
            "model_sha": self.acre.fingerprint,
            "acre": {
                "weights": config["weights"],
                "w_max": config["w_max"],
                **vars(contexts.reading),
                "caches_read": contexts.caches_read,
                "caches_extended": contexts.caches_extended,
                "tokens_read": contexts.tokens_read,
                "tokens_shared": contexts.tokens_shared,
            },
        }

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message)

    # -------------------------------------------------------------------------- coding

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; control tokens in the string are recognised, as transformers does.

        add_special_tokens: None = BOS as add_bos_token says, and once at most; False
        none.
        """
        bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        ids = self.tokenizer.encode(string, special=True, bos=bos).tolist()
        first = self.tokenizer.bos_id
        if bos and first is not None and ids[:1] != [first]:
            ids.insert(0, first)  # asked for, though the tokenizer adds none
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as one prompt, by the tokenizer's template.

        add_generation_prompt False: the last message is left open, to be gone on with.
        A template that knows no system turn gets the messages without it, as with the
        harness's own models. ValueError where there is no template, or it refuses.
        """
        template = self.tokenizer.chat_template
        if not template:
            raise ValueError("apply_chat_template: the tokenizer has no chat template")
        names = self.tokenizer.special_names
        try:
            text = chat.render(template, chat_history, names, add_generation_prompt)
        except ValueError:
            fewer = [turn for turn in chat_history if turn["role"] != "system"]
            if len(fewer) == len(chat_history):
                raise
            self._say_once("the chat template refuses a system turn: left out")
            text = chat.render(template, fewer, names, add_generation_prompt)
        if add_generation_prompt:
            return text
        return _left_open(text, chat_history[-1]["content"])

    # ------------------------------------------------------------------ log-likelihoods

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        """(sum of log-probabilities, greedy) for each (strings, context, continuation).

        Requests of one context open it once; those that differ in their last token only
        take one pass. A continuation without tokens is certain: (0.0, True).
        """
        by_context = _grouped(tuple(context) for _, context, _ in requests)
        rooms = {
            context: max(max(len(requests[i][2]) for i in same) - 1, 0)
            for context, same in by_context.items()
        }
        self._check(rooms.items())
        scores: list[Score] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc=LOGLIKELIHOOD, disable=disable_tqdm) as bar:
            for context in sorted(by_context):
                same = by_context[context]
                opened = self.contexts.open(_ids(context), rooms[context])
                tokens = [tuple(requests[i][2]) for i in same]
                for i, score in zip(same, _continued(opened, tokens), strict=True):
                    scores[i] = score
                    self._remember("loglikelihood", requests[i][0], score)
                bar.update(len(same))
        return scores

    def _check(self, contexts: Iterable[tuple[Sequence[int], int]]) -> None:
        """Refuses what cannot be computed before the first is."""
        for context, room in contexts:
            self.contexts.check(_ids(context), room)

    def _remember(self, kind: str, arguments: Any, result: Any) -> None:
        """Enters a result into the harness's --use_cache."""
        self.cache_hook.add_partial(kind, arguments, result)

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in windows of `max_length` tokens with full
        attention, each conditioned on as much before it as fits: the harness's own
        definition of perplexity, which no cache takes part in."""
        totals = []
        bar = tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm)
        for request in bar:
            (string,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            total = math.fsum(
                self._window(*make_disjoint_window(window)) for window in windows
            )
            self._remember("loglikelihood_rolling", (string,), total)
            totals.append(total)
        return totals

    def _window(self, context: list[int], tokens: list[int]) -> float:
        """The log-probability of a window's tokens, with full attention."""
        opened = self.contexts.whole(_ids(context))
        return _scored(opened.logits(_ids(tokens[:-1])), tokens)[0]

    # ---------------------------------------------------------------------- generation

    def generate_until(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """A text for each (context, generation_kwargs).

        The new tokens yield to the positions that are left. Requests that are the same
        (a task's repeats) are sampled from seeds that follow one another.
        """
        jobs = [self._job(*request.args) for request in requests]
        self._check((ids, self._least(sampling)) for ids, sampling in jobs)
        texts = [""] * len(jobs)
        order = sorted(range(len(jobs)), key=lambda i: jobs[i][0])
        seen: Counter[tuple] = Counter()
        waiting: list[_Waiting] = []
        bar = tqdm(total=len(jobs), desc="generate_until", disable=disable_tqdm)

        def answer() -> None:
            for one, text in zip(waiting, self._answers(waiting), strict=True):
                texts[one.place] = text
                self._remember("generate_until", requests[one.place].args, text)
            bar.update(len(waiting))
            waiting.clear()

        for i in order:
            ids, sampling = jobs[i]
            least = self._least(sampling)
            if waiting and not self._beside(waiting, ids, least):
                answer()
            opened = self.contexts.open(_ids(ids), least)
            waiting.append(self._waiting(i, ids, opened, sampling, seen[jobs[i]]))
            seen[jobs[i]] += 1
        if waiting:
            answer()
        bar.close()
        return texts

    def _beside(self, waiting: list[_Waiting], ids: Sequence[int], room: int) -> bool:
        """Whether a context may be opened while those that wait are held: one that is
        read with full attention, as far as HELD goes, or one of the same text."""
        if len(waiting) == self._batch:
            return False
        if self.contexts.is_full(len(ids), room):
            held = sum(one.tokens for one in waiting)
            return waiting[-1].opened.groups is None and held + len(ids) <= HELD
        return self.contexts.at_hand(_ids(ids), room) is waiting[-1].opened.state

    def _job(
        self, context: str, kwargs: dict[str, Any]
    ) -> tuple[tuple[int, ...], Sampling]:
        """A request's context as ids, and how it is answered."""
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return tuple(ids), self._sampling(kwargs)

    def _sampling(self, kwargs: dict[str, Any]) -> Sampling:
        """Generation arguments as acre's; those unknown are named once and left out.

        TypeError, ValueError naming an argument out of its range.
        """
        known = normalize_gen_kwargs(kwargs, self.max_gen_toks)
        unknown = sorted(set(known) - GENERATION)
        if unknown:
            self._say_once(f"generation_kwargs without effect: {', '.join(unknown)}")
        warm = known.get("temperature", 0.0) if known["do_sample"] else 0.0
        rest = {key: known[key] for key in SAMPLING if known.get(key) is not None}
        return Sampling(
            max_new_tokens=known["max_gen_toks"],
            temperature=warm,
            stop=tuple(stop for stop in known["until"] if stop),
            **{"seed": self.seed, **rest},
        )

    def _least(self, sampling: Sampling) -> int:
        """New tokens that there must be room for."""
        return min(sampling.max_new_tokens, self.contexts.answer_room)

    def _waiting(
        self,
        place: int,
        ids: tuple[int, ...],
        opened: Context,
        sampling: Sampling,
        repeat: int,
    ) -> _Waiting:
        """A request whose context is open."""
        limit = min(sampling.max_new_tokens, opened.room)
        if limit < sampling.max_new_tokens:
            self._say_once(
                f"max_gen_toks: {sampling.max_new_tokens} yield to the {limit} that "
                "are left after a context"
            )
        own = replace(sampling, seed=sampling.seed + repeat)
        return _Waiting(place, len(ids), opened, own, limit)

    def _answers(self, waiting: list[_Waiting]) -> list[str]:
        """The texts that follow contexts, each up to its first stop string."""
        tasks = [self._task(one) for one in waiting]
        nobody = Streamer(None)
        return together.answers(self.acre.core, tasks, self._batch, nobody)

    def _task(self, one: _Waiting) -> together.Task:
        opened, ends = one.opened, self._ends(one.sampling.stop)
        k = 0 if opened.groups is None else int(opened.groups.shape[-1])
        return together.Task(
            None if opened.state is None else opened.state.core,
            len(opened.rest) + one.limit,
            k,
            lambda session, _: opened.begin(session),
            lambda to: Writer(one.sampling, one.limit, self.tokenizer, ends, to),
            lambda _, made: made.text,
        )

    def _ends(self, stops: Iterable[str]) -> set[int]:
        """Tokens that end an answer: the model's, and control tokens among the stops,
        which never show in the text."""
        ends = set(self.acre.eos_ids)
        for stop in stops:
            ids = self.tokenizer.encode(stop, special=True, bos=False)
            if len(ids) == 1 and not self.tokenizer.decode(ids):
                ends.add(int(ids[0]))
        return ends


# ------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class _Waiting:
    """A request of generate_until, its context open; tokens: of the context."""

    place: int
    tokens: int
    opened: Context
    sampling: Sampling
    limit: int


def _batch(given: Any) -> int:
    """The harness's batch_size: a number, also as a string, or "auto" (or "auto:N")."""
    if given is None:
        return 1
    if isinstance(given, str) and given.split(":")[0] == "auto":
        return together.batch_size(None)
    return integer("batch_size", _whole("batch_size", given), 1)


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def _grouped(keys: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Key -> the places where it stands."""
    places: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return places


def _continued(opened: Context, wanted: list[tuple[int, ...]]) -> list[Score]:
    """The scores of continuations of one context: one pass for all that are alike up to
    their last token."""
    scores: list[Score] = [(0.0, True)] * len(wanted)
    for inputs, same in _grouped(tokens[:-1] for tokens in wanted).items():
        if any(wanted[i] for i in same):
            pieces = opened.logits(_ids(inputs))
        for i in same:
            if wanted[i]:
                scores[i] = _scored(pieces, wanted[i])
    return scores


def _scored(pieces: Iterable[np.ndarray], tokens: Sequence[int]) -> Score:
    """(sum of log-probabilities, all of them the most likely) of tokens, given rows of
    logits for each: float32 [rows, vocab] in pieces, in order."""
    total, greedy, left = 0.0, True, iter(tokens)
    for rows in pieces:
        part = np.array(list(itertools.islice(left, len(rows))))
        high = rows.max(axis=1, keepdims=True)
        norm = np.log(np.exp(rows - high).sum(axis=1, dtype=np.float64)) + high[:, 0]
        total += float((rows[np.arange(len(rows)), part] - norm).sum())
        greedy = greedy and bool((rows.argmax(axis=1) == part).all())
    return total, greedy


def _left_open(text: str, last: str) -> str:
    """A rendered conversation up to the end of its last message, without what closes
    the turn."""
    place = text.rfind(last.strip())
    if place < 0:
        raise ValueError("chat template: drops or changes the last message")
    kept = last.lstrip()
    end = len(kept) if text.startswith(kept, place) else len(last.strip())
    return text[: place + end]


def main() -> None:
    """The harness's command line, with `--model acre` known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
