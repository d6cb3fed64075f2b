"""Answers in step are those of one by one: whole, in order, and as interruptible."""

from __future__ import annotations

import numpy as np
import pytest

from acre import _core, together

QUESTIONS = [
    "who wrote the ledger?",
    "where?",
    "which gulls circled the quiet harbour before the storm?",
    "the lamp",
    "what did the keeper count?",
]


def same(a, b) -> bool:
    return (
        (a.text, a.ids.tolist(), a.finish_reason, a.spans, a.settings)
        == (b.text, b.ids.tolist(), b.finish_reason, b.spans, b.settings)
        and a.groups.tolist() == b.groups.tolist()
        and a.stats.prompt_tokens == b.stats.prompt_tokens
    )


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 32},
        {"eta": 0, "temperature": 1.5, "seed": 3, "top_k": 20, "top_p": 0.9},
        {"eta": 16, "select": "per_layer", "repetition_penalty": 1.4},
    ],
)
def test_answers_in_step_are_those_of_one_by_one(cache, options, monkeypatch):
    # An id that ends some answers early, others never.
    first = [cache.ask(q, max_new_tokens=9, **options) for q in QUESTIONS]
    monkeypatch.setattr(cache.model.tokenizer, "eos_ids", (int(first[1].ids[2]),))
    alone = [cache.ask(q, max_new_tokens=9, **options) for q in QUESTIONS]
    assert len({len(answer.ids) for answer in alone}) > 1
    for batch in (None, 1, 2):
        some = cache.ask(QUESTIONS, max_new_tokens=9, batch=batch, **options)
        assert all(map(same, some, alone)), batch


def test_stop_strings_and_ids(cache):
    text = cache.ask(QUESTIONS[0], eta=32, max_new_tokens=12).text
    asked = [cache.model.encode("question", q) for q in QUESTIONS[:3]]
    options = {"eta": 32, "max_new_tokens": 12, "stop": text[2:4]}
    some = cache.ask(asked, **options)
    assert all(map(same, some, [cache.ask(q, **options) for q in asked]))


def test_generate(model):
    alone = [model.generate(q, max_new_tokens=7, temperature=1.0) for q in QUESTIONS]
    for batch in (None, 2):
        assert model.generate(QUESTIONS, 7, temperature=1.0, batch=batch) == alone


class Recorder:
    def __init__(self) -> None:
        self.told: list = []

    def put(self, value: np.ndarray) -> None:
        self.told.append(value.tolist())

    def end(self) -> None:
        self.told.append("end")


def test_a_streamer_sees_one_answer_after_the_other(cache):
    recorders, pieces = [Recorder(), Recorder()], [[], []]
    for i, batch in enumerate((1, 4)):
        for to in (recorders[i], pieces[i].append):
            cache.ask(QUESTIONS, eta=32, max_new_tokens=5, streamer=to, batch=batch)
    assert recorders[0].told == recorders[1].told
    assert recorders[1].told.count("end") == len(QUESTIONS)
    assert pieces[0] == pieces[1]


def test_the_first_answer_is_streamed_as_it_comes(cache, monkeypatch):
    steps, seen = [], []
    real = _core.sessions_next

    def counted(*arguments):
        steps.append(None)
        return real(*arguments)

    monkeypatch.setattr(_core, "sessions_next", counted)

    class Clock(Recorder):
        def put(self, value: np.ndarray) -> None:
            seen.append(len(steps))

    cache.ask(QUESTIONS[:2], eta=32, max_new_tokens=4, streamer=Clock())
    assert seen == [0, 1, 2, 3, 4] + [4] * 5 and len(steps) == 4


def test_ctrl_c_ends_the_answer_under_way_alone(cache):
    class Breaker(Recorder):
        def put(self, value: np.ndarray) -> None:
            super().put(value)
            if len(self.told) == 3:
                raise KeyboardInterrupt

    breaker = Breaker()
    with pytest.raises(KeyboardInterrupt):
        cache.ask(QUESTIONS, eta=32, max_new_tokens=5, streamer=breaker)
    assert breaker.told[-1] == "end" and breaker.told.count("end") == 1
    assert cache.ask(QUESTIONS[:2], eta=32, max_new_tokens=1)[1].text is not None


def test_checked_before_any_work(cache, model):
    called = []
    for ask in (cache.ask, model.generate):
        with pytest.raises(TypeError, match="integer"):
            ask([QUESTIONS[0], [0.5]], streamer=called.append)
        with pytest.raises(ValueError, match="batch: got 0"):
            ask(QUESTIONS, batch=0)
        with pytest.raises(TypeError, match="batch: got str"):
            ask(QUESTIONS, batch="many")
    assert not called


def test_memory_makes_batches_smaller(cache, monkeypatch):
    alone = [cache.ask(q, eta=32, max_new_tokens=4) for q in QUESTIONS]
    opened, real = [], _core.sessions_open

    def few(model, caches, capacities):
        opened.append(len(caches))
        if len(caches) > 3:
            raise MemoryError
        return real(model, caches, capacities)

    monkeypatch.setattr(_core, "sessions_open", few)
    some = cache.ask(QUESTIONS, eta=32, max_new_tokens=4)
    assert all(map(same, some, alone)) and opened == [5, 2, 3]
    monkeypatch.setattr(_core, "sessions_fit", lambda *arguments: 2)
    opened.clear()
    some = cache.ask(QUESTIONS, eta=32, max_new_tokens=4)
    assert all(map(same, some, alone)) and opened == [2, 2, 1]


def test_memory_that_ends_while_refilling(cache, monkeypatch):
    """The answers begun go first; only the first one of a batch may fail."""
    alone = [cache.ask(q, eta=32, max_new_tokens=4) for q in QUESTIONS]
    recorders = [Recorder(), Recorder()]
    cache.ask(QUESTIONS, eta=32, max_new_tokens=4, streamer=recorders[0])
    real, fails = type(cache)._choose, iter([0, 0, 1, 0, 0, 1, 0])

    def short(*arguments):
        if next(fails):
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(type(cache), "_choose", short)
    some = cache.ask(QUESTIONS, eta=32, max_new_tokens=4, streamer=recorders[1])
    assert all(map(same, some, alone)) and next(fails, None) is None
    assert recorders[0].told == recorders[1].told
    fails = iter([1])
    with pytest.raises(MemoryError):
        cache.ask(QUESTIONS, eta=32, max_new_tokens=4)


# ---------------------------------------------------------------------------- the core


def test_core_functions(cache):
    core = cache.model.core
    sessions = _core.sessions_open(core, (cache.core, None), [12, 9])
    assert [s.cache for s in sessions] == [cache.core, None]
    assert all(type(s) is _core.Session and s.model is core for s in sessions)
    for session in sessions:
        session.prefill([3, 4, 5])
    hot = {"temperature": 1.0, "seed": 4}
    tokens = _core.sessions_next(sessions, [{}, hot])
    for session_cache, options, token in zip((cache.core, None), ({}, hot), tokens,
                                             strict=True):  # fmt: skip
        one = _core.Session(core, session_cache, capacity=9)
        one.prefill([3, 4, 5])
        assert one.next(**options) == token
    assert _core.sessions_fit(core, cache.core, 1, 12, 3) == 3


def test_core_refusals(cache):
    core = cache.model.core
    for arguments, error, words in [
        ((core, [None], [4, 5]), ValueError, "capacities: got 2, expected one for"),
        ((core, [], []), ValueError, "sessions: got 0"),
        ((core, [None, None], [4, 0]), ValueError, r"sessions\[1\]: capacity: got 0"),
        ((core, [None], ["x"]), TypeError, "capacities: got str"),
        ((core, [7], [4]), TypeError, "cache: got int"),
        ((core, 7, [4]), TypeError, "caches: got int, expected a sequence"),
        ((core, [None], [10**6]), _core.TooLongError, "capacity"),
        ((7, [None], [4]), TypeError, "model: got int"),
    ]:
        with pytest.raises(error, match=words):
            _core.sessions_open(*arguments)
    a, b = _core.sessions_open(core, [None, None], [4, 4])
    a.prefill([3])
    other = _core.Session(core, capacity=4)
    for arguments, error, words in [
        (([a], []), ValueError, "samplings: got 0, expected one for each of 1"),
        (([a, 7], [{}, {}]), TypeError, "sessions: got int"),
        (([a], [{"heat": 1}]), ValueError, "unknown key 'heat'"),
        (([a], [7]), TypeError, "sampling: got int, expected a dict"),
        (([a, other], [{}, {}]), ValueError, r"sessions\[1\]: was not opened together"),
        (([a, a], [{}, {}]), ValueError, r"sessions\[1\]: came before"),
        (([a, b], [{}, {}]), RuntimeError, r"sessions\[1\]: session: prefill comes"),
    ]:
        with pytest.raises(error, match=words):
            _core.sessions_next(*arguments)
    assert len(_core.sessions_next([a], [{}])) == 1


def test_nothing_is_kept(cache):
    engine = cache.model.core.engine
    cache.ask(QUESTIONS, eta=32, max_new_tokens=2)
    before = engine.bytes
    cache.ask(QUESTIONS, eta=32, max_new_tokens=2)
    assert engine.bytes == before and together.BATCH == together.batch_size(None)
