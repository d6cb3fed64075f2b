"""q8 weights: the numbers that the contract promises, and the method with them.

The oracle multiplies with the promised numbers, so it is held to the bounds of bf16;
what q8 costs in quality is measured, not tested: benchmarks/perplexity.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import toy
from parity import BOUNDS
from reference import Reference, round_bf16

import acre
from acre import _core
from acre.errors import CacheFileError

BLOCK = 32


def q8(weights: np.ndarray) -> np.ndarray:
    """[N, K] as bf16(scale * q): per block of a row the least bf16 scale that keeps q
    within 127."""
    kept = np.zeros_like(weights, dtype=np.float64)
    for start in range(0, weights.shape[1], BLOCK):
        block = weights[:, start : start + BLOCK].astype(np.float32)
        highest = np.abs(block).max(axis=1, keepdims=True)
        scale = round_bf16(highest / np.float32(127)).astype(np.float32)
        too_small = scale * 127 < highest
        bits = scale.view(np.uint32) + np.where(too_small, np.uint32(1 << 16), 0)
        scale = bits.astype(np.uint32).view(np.float32)
        q = np.rint(block / np.where(scale > 0, scale, 1))
        kept[:, start : start + BLOCK] = round_bf16(q * scale)
    return kept


def oracle(family: str, **changes: int) -> Reference:
    """The reference with the matrices that q8 keeps; the embedding stays as it is."""
    settings = tiny.config(family, dtype="bf16", tied_head=False, **changes)
    tensors = tiny.tensors(0, family, False, settings)
    for name, array in tensors.items():
        if array.ndim == 2 and "embed_tokens" not in name:
            tensors[name] = q8(array)
    return Reference(settings, tensors)


def model(family: str = "llama", engine: _core.Engine | None = None, **changes: int):
    changes = {"tied_head": False} | changes
    return tiny.model(family, engine=engine, dtype="bf16", weights="q8", **changes)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_products_are_those_of_the_promised_numbers(family: str) -> None:
    sizes = {"hidden": 70, "ffn": 53}  # no multiple of a block
    wanted = oracle(family, **sizes).logits(tiny.ids(2, 5))
    got = tiny.answer(model(family, **sizes))
    error = np.abs(got - wanted) / np.abs(wanted).max()
    worst, mean = BOUNDS["bf16"]
    assert error.max() < worst and error.mean() < mean
    plain = tiny.answer(tiny.model(family, dtype="bf16", tied_head=False, **sizes))
    assert np.abs(got - plain).max() > 4 * np.abs(got - wanted).max()  # it is q8


def test_any_rows_threads_and_instructions_give_the_same_bits() -> None:
    engines = [_core.Engine(threads=n) for n in (1, 3)]
    for isa in ("scalar", "avx2", "avx512"):
        try:
            engines.append(_core.Engine(threads=2, isa=isa))
        except NotImplementedError:
            continue
    first = tiny.answer(model(engine=engines[0]))
    for engine in engines:
        own = model(engine=engine)
        assert np.array_equal(tiny.answer(own), first)
        session = _core.Session(own, None, capacity=8)  # token by token
        rows = [session.prefill(tiny.ids(2, 5)[i : i + 1], logits=True) for i in (0, 1)]
        assert np.allclose(np.concatenate(rows), first[:2], atol=1e-2)


def test_takes_about_half_the_memory() -> None:
    sizes = {"hidden": 256, "ffn": 512, "head_dim": 64}
    bytes_of = {}
    for weights in ("same", "q8"):
        engine = _core.Engine(threads=1)
        kept = tiny.model(engine=engine, dtype="bf16", weights=weights, **sizes)
        bytes_of[weights] = engine.bytes
        assert kept.config["weights"] == weights
    matrices = 2 * (256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 512) * 2
    saved = bytes_of["same"] - bytes_of["q8"]
    assert matrices * 15 / 32 <= saved < matrices * 15 / 32 * 1.1  # and the head


def test_a_cache_belongs_to_its_weights(tmp_path) -> None:
    made = {
        weights: acre.Model.from_arrays(
            toy.hf_config(), toy.arrays(), toy.tokenizer(), weights=weights
        )
        for weights in ("same", "q8")
    }
    cache = made["q8"].build(toy.sentence(1, 90), **toy.BUILD)
    cache.save(tmp_path / "q8.acre")
    question = toy.sentence(2, 4)
    again = acre.Cache.load(tmp_path / "q8.acre", made["q8"])
    wanted = cache.ask(question, max_new_tokens=6).ids
    assert np.array_equal(again.ask(question, max_new_tokens=6).ids, wanted)
    with pytest.raises(CacheFileError, match="another model: fingerprint q8:"):
        acre.Cache.load(tmp_path / "q8.acre", made["same"])


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match="weights: got 'q4', expected 'same' or 'q8'"):
        acre.Model.from_arrays(toy.hf_config(), toy.arrays(), weights="q4")
    with pytest.raises(ValueError, match="weights: 'q8' needs dtype 'bf16', got 'f32'"):
        acre.Model.from_arrays(toy.hf_config(), toy.arrays(), dtype="f32", weights="q8")
    with pytest.raises(ValueError, match="weights: q8 needs dtype bf16"):
        tiny.model(weights="q8")
