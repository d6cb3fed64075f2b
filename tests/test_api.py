"""The Python API on a tiny model: answers, spans, streams, extension."""

from __future__ import annotations

import gc
import json
import threading
import weakref

import numpy as np
import pytest
import toy

import acre
from acre import scoring
from acre.generate import Detokenizer, Sampling, StopFinder, Streamer

QUESTION = "who wrote the ledger?"


def same(a: acre.Answer, b: acre.Answer) -> bool:
    return (
        a.text == b.text
        and a.ids.tolist() == b.ids.tolist()
        and a.spans == b.spans
        and a.groups.tolist() == b.groups.tolist()
    )


def all_keys(cache: acre.Cache, layer: int = 0) -> np.ndarray:
    pages = cache.l2_keys(layer)
    pages = pages if isinstance(pages, list) else [pages]
    parts = [cache.l1_keys(layer), *pages, cache.recent_keys(layer)]
    return np.concatenate([part.numpy() for part in parts])


# ------------------------------------------------------------------------------- model


def test_logits_and_generation_agree(model):
    ids = model.tokenizer.encode("the quiet harbour")
    logits = model.logits(ids)
    assert logits.shape == (len(ids), toy.VOCAB) and logits.dtype == np.float32
    new = model.generate_ids(ids, max_new_tokens=4)
    row = np.concatenate([ids, new[:-1]]).astype(np.int32)
    again = model.logits(row)[len(ids) - 1 :].argmax(axis=1)
    assert new.tolist() == again.tolist()


def test_generate_strings_ids_and_lists(model):
    prompt = "the quiet harbour"
    one = model.generate(prompt, max_new_tokens=6)
    assert isinstance(one, str)
    assert model.generate(model.tokenizer.encode(prompt), max_new_tokens=6) == one
    assert model.generate(model.tokenizer.encode(prompt).tolist(), 6) == one
    assert model.generate([prompt, prompt], max_new_tokens=6) == [one, one]
    assert "".join(model.stream(prompt, max_new_tokens=6)) == one


def test_sampling_is_repeatable(model):
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95, "top_k": 50}
    ids = [model.generate_ids("gulls", seed=s, **options).tolist() for s in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_from_pretrained_equals_from_arrays(model, tmp_path):
    other = acre.Model.from_pretrained(toy.directory(tmp_path / "m"), dtype="f32")
    ids = np.arange(3, 40, dtype=np.int32)
    assert np.array_equal(other.logits(ids), model.logits(ids))
    assert other.fingerprint == model.fingerprint
    assert other.fingerprints["tokenizer"] == model.fingerprints["tokenizer"]
    assert other.info()["layers"] == 2


def test_fingerprints_name_the_part_that_changed(model, tmp_path):
    from safetensors.numpy import save_file

    assert toy.model(rng=1).fingerprint != model.fingerprint
    arrays = dict(reversed(toy.arrays().items()))
    again = acre.Model.from_arrays(toy.hf_config(), arrays, toy.tokenizer(), "f32")
    assert again.fingerprints == model.fingerprints
    save_file(toy.adapter(), tmp_path / "adapter.safetensors")
    path = toy.directory(tmp_path / "m")
    adapted = acre.Model.from_pretrained(
        path, "f32", adapter=tmp_path / "adapter.safetensors"
    )
    assert adapted.fingerprint == model.fingerprint
    assert adapted.fingerprints["adapter"] != model.fingerprints["adapter"] == "none"
    assert adapted.core.has_l1


def test_arrays_of_other_kinds(model):
    torch = pytest.importorskip("torch")
    ids = np.arange(3, 30)
    tensors = {k: torch.from_numpy(v) for k, v in toy.arrays().items()}
    by_torch = acre.Model.from_arrays(toy.hf_config(), tensors, dtype=torch.float32)
    assert np.array_equal(by_torch.logits(ids), model.logits(ids))
    halves = {k: v.to(torch.bfloat16) for k, v in tensors.items()}
    bits = {k: v.view(torch.uint16).numpy() for k, v in halves.items()}
    models = [acre.Model.from_arrays(toy.hf_config(), a) for a in (halves, bits)]
    assert np.array_equal(models[0].logits(ids), models[1].logits(ids))


# --------------------------------------------------------------------------- the cache


def test_facts(cache, model, text):
    plan = cache.plan
    assert len(cache) == plan["n"] == len(cache.ids)
    assert cache.text == text and cache.interval == 8
    assert cache.nbytes > 0 and cache.proxy == "pooled"
    assert cache.stats.tokens_built == len(cache) and cache.stats.build_s > 0
    shape = (plan["m"], 2, 8)
    for layer in (0, 1, -1):
        assert cache.l1_keys(layer).shape == cache.l1_values(layer).shape == shape
    assert cache.recent_keys(0).shape[0] == cache.recent_values(0).shape[0]
    pages = cache.l2_values(1)
    pages = pages if isinstance(pages, list) else [pages]
    assert sum(page.shape[0] for page in pages) == plan["l2_tokens"]
    view = np.from_dlpack(cache.l1_keys(0))
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="layer"):
        cache.l1_keys(2)


def test_spans_map_to_the_text(cache, model, text):
    answer = cache.ask(QUESTION, eta=64, max_new_tokens=3)
    assert answer.groups.shape == (8,) and answer.spans
    own, prefix = cache.ids[cache.prefix_tokens :], cache.prefix_tokens
    offsets = cache.offsets
    for span in answer.spans:
        assert text[span.char_start : span.char_end] == span.text
        assert span.group in answer.groups.tolist()
        assert span.score == pytest.approx(float(answer.scores[span.group]))
        start = max(0, span.group * 8 - prefix)
        assert (span.token_start, span.token_end) == (
            start,
            min(len(own), span.group * 8 + 8 - prefix),
        )
        assert span.char_start == offsets[span.token_start, 0]
        assert span.char_end == offsets[span.token_end - 1, 1]
    starts = [span.token_start for span in answer.spans]
    assert starts == sorted(starts)
    merged = answer.passages()
    assert sum(p.token_end - p.token_start for p in merged) == sum(
        s.token_end - s.token_start for s in answer.spans
    )
    assert all(text[p.char_start : p.char_end] == p.text for p in merged)


def test_prefix_groups_are_cut(cache):
    m, prefix = cache.plan["m"], cache.prefix_tokens
    assert prefix > 8
    answer = cache.ask(QUESTION, groups=list(range(m)), max_new_tokens=1)
    assert answer.spans[0].token_start == 0 and answer.spans[0].char_start == 0
    assert len(answer.spans) == m - prefix // 8
    assert np.isnan(answer.spans[0].score) and answer.scores is None


def test_groups_by_hand_equal_groups_by_score(cache):
    chosen = cache.ask(QUESTION, eta=32, max_new_tokens=8)
    by_hand = cache.ask(QUESTION, groups=chosen.groups, max_new_tokens=8)
    assert chosen.ids.tolist() == by_hand.ids.tolist()
    layers = np.stack([chosen.groups] * 2)
    assert (
        cache.ask(QUESTION, groups=layers, max_new_tokens=8).ids.tolist()
        == chosen.ids.tolist()
    )


def test_score_and_refill_agree_with_ask(cache):
    answer = cache.ask(QUESTION, eta=32, max_new_tokens=2)
    scores = cache.score(QUESTION)
    assert scores.dtype == np.float32 and scores.shape == (cache.plan["m"],)
    assert np.array_equal(scores, answer.scores)
    assert cache.refill(QUESTION, eta=32) == answer.spans
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    assert answer.groups.tolist() == sorted(order[:4])


def test_a_query_scores_and_the_whole_question_is_asked(cache):
    question, query = "Say it in one word: where are the bridges?", "the bridges"
    whole, part = cache.score(question), cache.score(question, query=query)
    assert not np.array_equal(whole, part)
    answer = cache.ask(question, eta=32, query=query, max_new_tokens=3)
    assert np.array_equal(answer.scores, part)
    assert cache.refill(question, eta=32, query=query) == answer.spans
    by_hand = cache.ask(question, groups=answer.groups, max_new_tokens=3)
    assert by_hand.ids.tolist() == answer.ids.tolist()
    streamed = cache.stream(question, eta=32, query=query, max_new_tokens=3)
    assert streamed.finish().text == answer.text
    with pytest.raises(ValueError, match="query"):
        cache.ask(question, query="the harbour")
    with pytest.raises(ValueError, match="query"):
        cache.score([1, 2, 3], query="a")


def test_a_text_within_one_window_has_nothing_to_score(model):
    small = model.build("the quiet harbour", **(toy.BUILD | {"window": 512}))
    assert small.plan["m"] == 0 and small.score(QUESTION).shape == (0,)
    assert small.refill(QUESTION) == []
    answer = small.ask(QUESTION, max_new_tokens=2)
    assert answer.spans == [] and answer.passages() == [] and len(answer.ids) == 2


def test_per_layer(cache):
    answer = cache.ask(QUESTION, eta=32, select="per_layer", max_new_tokens=2)
    assert answer.groups.shape == (2, 4) and answer.scores.shape == (
        2,
        len(cache.score("a")),
    )
    union = {int(j) for j in answer.groups.flat}
    assert {span.group for span in answer.spans} <= union
    for span in answer.spans:
        assert span.score == pytest.approx(float(answer.scores[:, span.group].sum()))


def test_heads_and_rotation_change_the_scores(cache, model):
    mask = np.zeros((2, 4), dtype=np.uint8)
    mask[0, 1] = 1
    own, usual = (
        cache.score(QUESTION, scoring=acre.Scoring(mask)),
        cache.score(QUESTION),
    )
    assert not np.allclose(own, usual)
    assert not np.allclose(
        cache.score(QUESTION, scoring=acre.Scoring(rotated=False)), usual
    )
    before = dict(model.scoring)
    try:
        model.scoring["pooled"] = acre.Scoring(mask)
        assert np.array_equal(cache.score(QUESTION), own)
    finally:
        model.scoring = before


@pytest.mark.parametrize("select", ["shared", "per_layer"])
def test_calibrated_scores_are_divided_by_the_prior(cache, text, select):
    """The prior, from its definition: eight stretches of the text asked as one."""
    raw = cache.score(QUESTION, select)
    closed = cache.plan["m"] * cache.plan["interval"]
    ids = np.asarray(cache.ids[:closed])
    starts = [int((i + 0.5) * (closed - 16) / 8) for i in range(8)]
    own = np.concatenate([ids[start : start + 16] for start in starts])
    prior = cache.score(own, select)
    got = cache.score(QUESTION, select, scoring=acre.Scoring(calibrated=True))
    relative = prior / prior.mean(axis=-1, keepdims=True)
    assert np.allclose(got * (relative + 1e-3), raw, rtol=1e-5)
    assert not np.allclose(got, raw)
    answer = cache.ask(QUESTION, 32, select, scoring=acre.Scoring(calibrated=True))
    assert np.array_equal(answer.scores, got)


def test_weights_and_sinks(model, text):
    """With `sink` entry 0 is the first token, as it is for trained entries where tokens
    are carried over; `weight` is the interval by default."""
    plain = model.build(text, **toy.BUILD)
    assert (plain.plan["weight"], plain.plan["sink"]) == (8, 0)
    before = dict(model.pooling)
    try:
        model.pooling = {"weight": 1, "sink": 1}
        cache = model.build(text, **toy.BUILD)
        assert (cache.plan["weight"], cache.plan["sink"]) == (1, 1)
        trained = model.build(text, **(toy.BUILD | {"proxy": "trained"}))
        assert (trained.plan["weight"], trained.plan["sink"]) == (1, 0)
        carrying = toy.BUILD | {"proxy": "trained", "carry": 8}
        carried = [model.build(text, **carrying, sink=s) for s in (None, True, False)]
        assert [one.plan["sink"] for one in carried] == [1, 1, 0]
        own = model.build(text, weight=3, sink=False, **toy.BUILD)
        assert (own.plan["weight"], own.plan["sink"]) == (3, 0)
    finally:
        model.pooling = before
    for one in (cache, plain, carried[0], carried[2]):
        first = one.l2_keys(0)
        first = first[0] if isinstance(first, list) else first
        assert np.array_equal(one.l1_keys(0).numpy()[0], first.numpy()[0]) is bool(
            one.plan["sink"]
        )
    longer = model.build(text, weight=3, sink=True, **toy.BUILD).extend(text, False)
    assert (longer.plan["weight"], longer.plan["sink"]) == (3, 1)


def test_registered_choices(monkeypatch, tmp_path):
    scored = {"heads": [[1, 2]], "calibrated": True}
    table = {"some": {"pooled": scored, "pooling": {"weight": 1}}}
    (tmp_path / "scoring.json").write_text(json.dumps(table))
    monkeypatch.setattr(scoring.resources, "files", lambda _: tmp_path)
    found = scoring.registered(("other", "some"), 2, 4)
    assert found["pooled"].calibrated and found["pooled"].rotated
    assert np.flatnonzero(found["pooled"].heads).tolist() == [6]
    assert found["trained"].heads is None and not found["trained"].calibrated
    assert scoring.registered(("other",), 2, 4)["pooled"].heads is None
    assert scoring.pooling(("some",)) == {"weight": 1, "sink": 0}
    assert scoring.pooling(("other",)) == {"weight": 0, "sink": 0}


def test_order_of_questions_does_not_matter(cache):
    questions = [QUESTION, "where are the gulls?", "how many bridges?"]
    forward = cache.ask(questions, eta=32, max_new_tokens=5)
    backward = cache.ask(questions[::-1], eta=32, max_new_tokens=5)[::-1]
    assert isinstance(forward, list)
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))


def test_threads_ask_one_cache(cache):
    questions = [f"{QUESTION} {i}" for i in range(4)]
    want = cache.ask(questions, eta=32, max_new_tokens=4)
    got: list[acre.Answer | None] = [None] * len(questions)

    def work(i: int) -> None:
        got[i] = cache.ask(questions[i], eta=32, max_new_tokens=4)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(want, got, strict=True))


def test_stream_is_ask(cache):
    stream = cache.stream(QUESTION, eta=32, max_new_tokens=12)
    assert stream.answer is None
    pieces = list(stream)
    answer = cache.ask(QUESTION, eta=32, max_new_tokens=12)
    assert "".join(pieces) == stream.answer.text == answer.text
    assert same(stream.answer, answer)
    assert list(stream) == [] and stream.answer is not None


def test_stats(cache):
    stats = cache.ask(QUESTION, eta=32, max_new_tokens=6).stats
    assert stats.tokens_reused == stats.tokens_built == len(cache)
    assert stats.tokens_recomputed == 0 and stats.groups_refilled == 4
    assert stats.new_tokens == 6 and stats.prompt_tokens > 6
    assert 0 < stats.score_ms < stats.time_to_first_token_ms
    assert stats.decode_tokens_per_s > 0 and stats.peak_bytes > 0
    assert stats.l2_bytes == cache.plan["l2_bytes"]
    assert set(stats.to_dict()) >= {"build_s", "refill_ms", "recent_bytes"}


def test_answer_as_plain_values(cache):
    import json

    answer = cache.ask(QUESTION, eta=32, max_new_tokens=2)
    assert (
        json.loads(json.dumps(answer.to_dict()))["text"] == answer.text == str(answer)
    )


def test_ids_without_tokenizer():
    model = toy.model(words=False)
    ids = np.random.default_rng(0).integers(3, toy.VOCAB, 200)
    cache = model.build(ids, **toy.BUILD)
    assert cache.prefix_tokens == 0 and len(cache) == 200 and cache.text == ""
    answer = cache.ask([5, 6, 7], eta=16, max_new_tokens=3)
    assert answer.text == "" and len(answer.ids) == 3
    assert answer.spans[0].char_start is None and answer.spans[0].text == ""
    with pytest.raises(ValueError, match="no tokenizer"):
        cache.ask("a question")
    with pytest.raises(ValueError, match="no tokenizer"):
        model.build("a text")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        cache.ask([5], stop="x")


def test_ids_spans_are_decoded(model, text):
    ids = model.tokenizer.encode(text)
    cache = model.build(ids, **toy.BUILD)
    span = cache.ask(QUESTION, eta=8, max_new_tokens=1).spans[0]
    assert span.char_start is None
    assert span.text == model.tokenizer.decode(ids[span.token_start : span.token_end])
    assert cache.text == text


def test_frames(model, text):
    bare = model.build(text, frame=False, **toy.BUILD)
    assert bare.prefix_tokens == 0
    assert bare.ids.tolist() == model.tokenizer.encode(text).tolist()
    frame = acre.Frame(model.tokenizer, instruction="Read.")
    framed = model.build(text, frame=frame, **toy.BUILD)
    assert framed.prefix_tokens == len(frame.prefix_ids)
    with pytest.raises(TypeError, match="frame"):
        model.build(text, frame="chat", **toy.BUILD)


@pytest.mark.parametrize("proxy", ["pooled", "trained"])
@pytest.mark.parametrize("carry", [0, 8])
def test_extend_equals_build(model, text, proxy, carry):
    options = {**toy.BUILD, "proxy": proxy, "carry": carry}
    whole = model.build(text, **options)
    grown = model.build(text[:300], **options)
    before = len(grown)
    assert grown.extend(text[300:351], progress=False) is grown
    grown.extend(text[351:], progress=False)
    assert grown.text == text and len(grown) == len(whole) > before
    assert grown.ids.tolist() == whole.ids.tolist()
    assert grown.stats.tokens_reused > 0
    for layer in (0, 1):
        np.testing.assert_allclose(
            all_keys(grown, layer), all_keys(whole, layer), atol=1e-5
        )
    assert np.array_equal(grown.offsets, whole.offsets)
    assert same(
        grown.ask(QUESTION, eta=32, max_new_tokens=4),
        whole.ask(QUESTION, eta=32, max_new_tokens=4),
    )


def test_extend_ids(model):
    ids = np.random.default_rng(0).integers(3, toy.VOCAB, 200)
    grown = model.build(ids[:150], **toy.BUILD)
    grown.extend(ids[150:], progress=False)
    whole = model.build(ids, **toy.BUILD)
    assert grown.ids.tolist() == whole.ids.tolist()
    np.testing.assert_allclose(all_keys(grown), all_keys(whole), atol=1e-5)


def test_extend_at_a_closed_boundary(model):
    """The old text's last token would merge with the addition inside a closed window:
    then the addition is encoded alone."""
    frame = acre.Frame(model.tokenizer)
    tokens = model.tokenizer.encode(toy.sentence(2, 90))
    head = " the quiet harb"
    for cut in range(40, 90):
        text = model.tokenizer.decode(tokens[:cut]) + head
        n = len(frame.prefix_ids) + len(model.tokenizer.encode(text))
        if n >= 64 and (n - 64) % 32 == 0:
            break
    else:
        pytest.fail("no text ends on a window")
    cache = model.build(text, **toy.BUILD)
    assert cache.core.closed_tokens == len(cache)
    before = cache.ids.tolist()
    cache.extend("our kept its lanterns", progress=False)
    assert cache.ids[: len(before)].tolist() == before
    assert cache.text == text + "our kept its lanterns"
    place = cache.offsets[len(before) - cache.prefix_tokens]
    assert place[0] == len(text)


def test_failed_extension_changes_nothing(model, text):
    cache = model.build(text[:300], **toy.BUILD)
    before = cache.ask(QUESTION, eta=32, max_new_tokens=4)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.extend(text[300:], progress=interrupt)
    with pytest.raises(acre.TooLongError):
        cache.extend(toy.sentence(4, 9000), progress=False)
    with pytest.raises(ValueError, match="empty"):
        cache.extend("", progress=False)
    with pytest.raises(TypeError, match="extend"):
        cache.extend([1, 2, 3], progress=False)
    assert cache.text == text[:300]
    assert same(before, cache.ask(QUESTION, eta=32, max_new_tokens=4))


def test_interrupted_build_frees_everything(model, text):
    gc.collect()
    before = model.core.engine.bytes
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:
        model.build(text, **{**toy.BUILD, "progress": interrupt})
    assert seen[0][0] < seen[1][0] < seen[1][1]
    assert model.core.engine.bytes == before, held


def test_nothing_outlives_its_user(model, text):
    cache = model.build(text, **toy.BUILD)
    stream = cache.stream(QUESTION, eta=32, max_new_tokens=8)
    next(stream)
    gone = weakref.ref(cache)
    stream.close()
    del cache, stream
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------ pieces and stopping


def test_stop_strings(cache):
    whole = cache.ask(QUESTION, eta=32, max_new_tokens=24)
    assert len(whole.text) > 4
    stop = whole.text[2:5]
    cut = cache.ask(QUESTION, eta=32, max_new_tokens=24, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop" and len(cut.ids) <= len(whole.ids)
    many = cache.ask(QUESTION, eta=32, max_new_tokens=24, stop=["\0never", stop])
    assert many.text == cut.text


def test_eos_ends_the_answer(cache, monkeypatch):
    first = cache.ask(QUESTION, eta=32, max_new_tokens=4)
    monkeypatch.setattr(cache.model.tokenizer, "eos_ids", (int(first.ids[1]),))
    ended = cache.ask(QUESTION, eta=32, max_new_tokens=4)
    assert ended.finish_reason == "eos" and ended.ids.tolist() == first.ids[:2].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_whole_characters(seed):
    tok = toy.tokenizer()
    rng = np.random.default_rng(seed)
    if seed % 2:
        ids = rng.integers(3, toy.VOCAB, 60).tolist()
    else:
        ids = tok.encode(toy.sentence(seed, 40) + "\U0001f40b\u6e2f" * 5).tolist()
    words, pieces = Detokenizer(tok.decode), []
    for token in ids:
        pieces.append(words.put(token))
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    pieces.append(words.end())
    assert "".join(pieces) == tok.decode(ids)


def test_stop_finder_never_leaks():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("abc"), 30))
        stops = tuple("".join(rng.choice(list("abc"), n)) for n in (2, 4))
        finder, out = StopFinder(stops), ""
        for i in range(0, 30, 3):
            out += finder.put(text[i : i + 3])
            assert not any(stop in out for stop in stops)
        out += finder.end()
        places = [p for stop in stops if (p := text.find(stop)) >= 0]
        if finder.found:
            assert out in {text[:p] for p in places}
        else:
            assert not places and out == text


def test_streamers(cache):
    class Recorder:
        def __init__(self) -> None:
            self.values, self.ended = [], 0

        def put(self, value: np.ndarray) -> None:
            self.values.append(value)

        def end(self) -> None:
            self.ended += 1

    recorder, pieces = Recorder(), []
    answer = cache.ask(QUESTION, eta=32, max_new_tokens=5, streamer=recorder)
    cache.ask(QUESTION, eta=32, max_new_tokens=5, streamer=pieces.append)
    assert "".join(pieces) == answer.text
    assert recorder.values[0].shape == (1, answer.stats.prompt_tokens)
    assert [int(v[0]) for v in recorder.values[1:]] == answer.ids.tolist()
    assert recorder.ended == 1
    with pytest.raises(TypeError, match="streamer"):
        cache.ask(QUESTION, streamer=7)


def test_transformers_streamer(model):
    transformers = pytest.importorskip("transformers")
    import tokenizers

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(toy.tokenizer_json())
    )
    streamer = transformers.TextIteratorStreamer(fast, skip_prompt=True, timeout=10)
    text = model.generate("the harbour", max_new_tokens=8, streamer=streamer)
    assert "".join(streamer) == text


def test_ctrl_c_between_tokens(cache):
    ended = []

    class Breaker:
        def put(self, value: np.ndarray) -> None:
            if value.ndim == 1:
                raise KeyboardInterrupt

        def end(self) -> None:
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        cache.ask(QUESTION, eta=32, streamer=Breaker())
    assert ended and cache.ask(QUESTION, eta=32, max_new_tokens=1).text is not None


def test_streamer_and_sampling_defaults():
    assert Sampling().stop == () and Sampling(stop="a").stop == ("a",)
    Streamer(None).end()
