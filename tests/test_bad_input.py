"""Bad input to the Python API: each refused by name, nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
import toy

import acre

QUESTION = "who wrote the ledger?"


@pytest.mark.parametrize("bad", ["", "   \n"])
def test_empty_text_and_question(model, cache, bad):
    with pytest.raises(ValueError, match="empty"):
        model.build(bad, **toy.BUILD)
    with pytest.raises(ValueError, match="empty"):
        cache.ask(bad)
    with pytest.raises(ValueError, match="empty"):
        model.generate(bad)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ([], ValueError, "no tokens"),
        ([1, toy.VOCAB], ValueError, "outside the vocabulary"),
        ([1, -1], ValueError, "outside the vocabulary"),
        ([1, 2**40], ValueError, "outside the vocabulary"),
        ([1.5, 2.0], TypeError, "integer"),
        ([True, False], TypeError, "integer"),
        (np.zeros((2, 2), dtype=np.int64), ValueError, "dimension"),
        (b"bytes", TypeError, "."),
        (None, (TypeError, ValueError), "."),
        ("lone \ud800 surrogate", ValueError, "surrogate"),
    ],
)
def test_bad_ids_and_text(model, bad, error, words):
    with pytest.raises(error, match=words):
        model.build(bad, **toy.BUILD)
    with pytest.raises(error):
        model.generate(bad)


def test_empty_list_of_questions(cache):
    with pytest.raises(ValueError, match="empty"):
        cache.ask([])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"interval": "8"}, ValueError),
        ({"interval": 0}, ValueError),
        ({"interval": 2.5}, TypeError),
        ({"window": 0}, ValueError),
        ({"stride": -1}, ValueError),
        ({"carry": -1}, ValueError),
        ({"carry": 10**6}, ValueError),
        ({"proxy": "mean"}, ValueError),
        ({"eta": -1}, ValueError),
        ({"reserve": 0}, ValueError),
        ({"reserve": 10**6}, ValueError),
        ({"window": 10**30}, ValueError),
        ({"weight": 0}, ValueError),
        ({"weight": 1.5}, TypeError),
        ({"sink": 1}, TypeError),
        ({"weight": 2, "proxy": "trained"}, ValueError),
    ],
)
def test_bad_build_options(model, text, options, error):
    with pytest.raises(error):
        model.build(text, **(toy.BUILD | options))


def test_too_long_names_an_interval(model):
    ids = np.full(6000, 5)
    with pytest.raises(acre.TooLongError, match="16"):
        model.build(ids, **toy.BUILD)
    assert model.build(ids, **(toy.BUILD | {"interval": "auto"})).interval == 16


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"eta": 7}, ValueError, "eta"),
        ({"eta": -1}, ValueError, "eta"),
        ({"eta": "64"}, TypeError, "eta"),
        ({"select": "all"}, ValueError, "select"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens"),
        ({"max_new_tokens": 4000}, acre.TooLongError, "4000"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty"),
        ({"seed": -1}, ValueError, "seed"),
        ({"stop": ""}, ValueError, "stop"),
        ({"stop": [1]}, TypeError, "stop"),
        ({"groups": [3, 3]}, ValueError, "group"),
        ({"groups": [5, 2]}, ValueError, "group"),
        ({"groups": [10**6]}, ValueError, "group"),
        ({"groups": [0.5]}, TypeError, "groups"),
        ({"scoring": acre.Scoring(np.ones((1, 4), np.uint8))}, ValueError, "heads"),
        ({"scoring": acre.Scoring(np.zeros((2, 4), np.uint8))}, ValueError, "head"),
        ({"scoring": "last"}, TypeError, "scoring"),
    ],
)
def test_bad_ask_options(cache, options, error, words):
    with pytest.raises(error, match=words):
        cache.ask(QUESTION, **({"eta": 32} | options))


def test_question_beyond_the_reserve(model, text):
    cache = model.build(text, **(toy.BUILD | {"reserve": 130}))
    long = toy.sentence(0, 60)
    for ask in (cache.ask, cache.score, cache.refill):
        with pytest.raises(acre.TooLongError, match="130"):
            ask(long)
    answer = cache.ask("who?", eta=32, temperature=2.0)
    assert answer.stats.prompt_tokens + answer.stats.new_tokens <= 130


def test_prompt_beyond_the_positions(model):
    with pytest.raises(acre.TooLongError):
        model.logits(np.full(1025, 5))
    with pytest.raises(acre.TooLongError, match="1024"):
        model.generate(np.full(1025, 5))
    with pytest.raises(acre.TooLongError):
        model.generate("a", max_new_tokens=2000)


@pytest.mark.parametrize(
    ("device", "error"),
    [
        ("cuda", NotImplementedError),
        ("cuda:0", NotImplementedError),
        ("tpu", ValueError),
    ],
)
def test_other_devices(device, error):
    with pytest.raises(error, match="device"):
        acre.Model.from_arrays(toy.hf_config(), toy.arrays(), device=device)


def test_bad_arrays():
    def load(change, **options):
        arrays = toy.arrays()
        change(arrays)
        acre.Model.from_arrays(toy.hf_config(), arrays, dtype="f32", **options)

    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match="q_proj"):
        load(lambda a: a.update({name: a[name].T.copy()[:, :5]}))
    with pytest.raises(ValueError, match="q_proj"):
        load(lambda a: a.update({name: np.full_like(a[name], np.nan)}))
    with pytest.raises((ValueError, TypeError), match="q_proj|int32"):
        load(lambda a: a.update({name: a[name].astype(np.int32)}))
    with pytest.raises(ValueError, match="nonsense"):
        load(lambda a: a.update({"nonsense.weight": a[name]}))
    with pytest.raises((ValueError, RuntimeError), match="missing"):
        load(lambda a: a.pop(name))
    with pytest.raises(ValueError, match="dtype"):
        acre.Model.from_arrays(toy.hf_config(), toy.arrays(), dtype="int8")
    with pytest.raises(TypeError, match="config"):
        acre.Model.from_arrays("config.json", toy.arrays())
    with pytest.raises(TypeError, match="arrays"):
        acre.Model.from_arrays(toy.hf_config(), [1])
    with pytest.raises(TypeError, match="tokenizer"):
        acre.Model.from_arrays(toy.hf_config(), toy.arrays(), tokenizer=5)


def test_strided_arrays_are_taken(model):
    arrays = {k: np.asfortranarray(v) for k, v in toy.arrays().items()}
    other = acre.Model.from_arrays(toy.hf_config(), arrays, dtype="f32")
    ids = np.arange(3, 30)
    assert np.array_equal(other.logits(ids), model.logits(ids))
    assert other.fingerprint == model.fingerprint


def test_missing_and_damaged_models(tmp_path):
    with pytest.raises(FileNotFoundError):
        acre.Model.from_pretrained(tmp_path / "nowhere")
    path = toy.directory(tmp_path / "m")
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(acre.ModelFileError, match="model.safetensors"):
        acre.Model.from_pretrained(path)


def test_adapter_of_another_shape(tmp_path):
    from safetensors.numpy import save_file

    path = toy.directory(tmp_path / "m")
    wrong = {k: v[..., :-1].copy() for k, v in toy.adapter().items()}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(acre.ModelFileError, match="acre_"):
        acre.Model.from_pretrained(path, adapter=tmp_path / "wrong.safetensors")


def test_no_memory_is_refused_up_front():
    """A text whose cache exceeds the machine's memory is refused before any window."""
    shape = {"head_dim": 64, "layers": 64, "w_max": 1 << 17}
    wide = toy.model(words=False, **shape)
    before, steps = wide.core.engine.bytes, []
    with pytest.raises(MemoryError, match="bytes|GB|GiB"):
        wide.build(
            np.full(8_000_000, 5, dtype=np.int32),
            interval=128,
            window=64,
            stride=32,
            progress=lambda done, total: steps.append(done),
        )
    assert wide.core.engine.bytes == before and not steps
