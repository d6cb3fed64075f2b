"""End to end on a device, beside the CPU: what is read, asked and learned is the same
but for rounding; files go both ways; what does not fit is refused and leaves all well.

The operations themselves are tested in C (cuda/README.md).
"""

from __future__ import annotations

import dataclasses

import gpu
import numpy as np
import pytest
import tiny
import toy

import acre
from acre import _core

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(gpu.missing()), reason=gpu.missing() or "a device"),
]
large = pytest.mark.skipif(gpu.HOST, reason="too large for the host's CUDA")
QUESTION = "who wrote every arrival in the blue ledger?"
# A float32 logit is off by the roundings of some hundred sums of both sides.
NEAR = 1e-4


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    gpu.use_plugin(monkeypatch)


def ask(cache: acre.Cache) -> acre.Answer:
    return cache.ask(QUESTION, eta=64, max_new_tokens=8)


def build(model: acre.Model, seed: int = 1, **options) -> acre.Cache:
    return model.build(toy.sentence(seed, 120), **(toy.BUILD | options))


# --------------------------------------------------------------------- one and the same


def test_the_device_is_told():
    _, device = gpu.pair()
    info = device.info()
    assert info["device"] == "cuda:0" and info["isa"].startswith("sm_")
    assert 0 < info["bytes"] <= info["peak_bytes"]


@pytest.mark.parametrize("proxy", ["pooled", "trained"])
def test_the_same_answers(proxy):
    """float32: greedy answers are the same, scores and logits near."""
    cpu, device = gpu.pair(trained=proxy == "trained")
    ids = tiny.ids(3, 90, toy.VOCAB)
    assert gpu.off(device.logits(ids), cpu.logits(ids)) < NEAR
    caches = [build(model, proxy=proxy) for model in (cpu, device)]
    first, other = map(ask, caches)
    assert other.ids.tolist() == first.ids.tolist()
    assert other.groups.tolist() == first.groups.tolist()
    assert gpu.off(other.scores, first.scores) < NEAR
    again = ask(caches[1])
    assert again.ids.tolist() == other.ids.tolist()
    assert np.array_equal(again.scores, other.scores)  # the same device, the same bits


def test_extending_and_batches():
    cpu, device = gpu.pair()
    questions = [QUESTION, "seven stone bridges", "the quiet harbour"]
    answers = []
    for model in (cpu, device):
        cache = build(model)
        cache.extend(toy.sentence(2, 60))
        answers.append(cache.ask(questions, eta=64, max_new_tokens=6))
    for first, other in zip(*answers, strict=True):
        assert other.ids.tolist() == first.ids.tolist()


def test_bf16_errs_as_on_the_cpu():
    """Against float32 the device's bf16 is off by what the CPU's is, and half more."""
    ids = tiny.ids(4, 200, toy.VOCAB)
    right = gpu.pair()[0].logits(ids)
    cpu, device = gpu.pair(dtype="bf16")
    theirs = gpu.off(cpu.logits(ids), right)
    assert 1e-4 < theirs and gpu.off(device.logits(ids), right) < 1.5 * theirs
    answer = ask(build(device))
    assert len(answer.ids) and np.isfinite(answer.scores).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_recorded_steps_are_those_of_one_by_one(head_dim):
    """bf16, greedy: what the device goes on with by itself, to the bit."""
    shape = {"head_dim": head_dim}
    arrays, config = toy.arrays(rng=2, **shape), toy.hf_config(**shape)
    _, device = gpu.pair(arrays, config, dtype="bf16")
    cache, question = build(device), tiny.ids(5, 9, toy.VOCAB)
    alone, ahead = (
        _core.Session(device.core, cache.core, capacity=64) for _ in range(2)
    )
    for session in (alone, ahead):
        session.refill([1, 4])
        session.prefill(question)
    held = device.core.engine.bytes
    expected = [_core.sessions_next([alone], [{}])[0] for _ in range(40)]
    assert device.core.engine.bytes == held
    assert len(set(expected)) > 3
    assert [ahead.next() for _ in range(40)] == expected
    assert device.core.engine.bytes > held  # steps were recorded
    assert np.array_equal(ahead.logits(), alone.logits())


@pytest.mark.parametrize("way", ["cpu to device", "device to cpu", "device to device"])
def test_files_go_both_ways(tmp_path, way):
    models = dict(zip(("cpu", "device"), gpu.pair(), strict=True))
    saved, opened = (models[name] for name in way.split(" to "))
    cache, path = build(saved), tmp_path / "one.acre"
    cache.save(path)
    loaded = acre.Cache.load(path, opened, verify=True)
    assert ask(loaded).ids.tolist() == ask(cache).ids.tolist()
    loaded.extend(toy.sentence(5, 40))
    cache.extend(toy.sentence(5, 40))
    assert ask(loaded).ids.tolist() == ask(cache).ids.tolist()


def test_gradients_and_an_update():
    sides = [model.core for model in gpu.pair(trained=True)]
    ids, found = tiny.ids(3, 70, toy.VOCAB), []
    evidence = np.zeros(70, bool)
    evidence[20] = True
    asked = (tiny.ids(6, 9, toy.VOCAB), None, (2, 6), evidence)
    for model in sides:
        trainer = _core.Trainer(model)
        loss = trainer.accumulate(
            ids, intervals=[4, 2, 8, 4], window=24, stride=16, carry=5,
            questions=[asked], evidence_weight=3.0,
        )["loss"]  # fmt: skip
        gradients = trainer.read("gradients")
        norm = trainer.update(step=1, lr=0.01, divisor=70.0, clip=1.0)
        found.append((loss, gradients, norm))
    (loss, right, norm), (other_loss, other, other_norm) = found
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert gpu.off(other, right) < NEAR
    assert other_norm == pytest.approx(norm, rel=1e-4)


# --------------------------------------------------------------------- models of a size


@large
@pytest.mark.slow
@pytest.mark.parametrize("shape", list(gpu.SHAPES))
def test_layers_of_real_sizes(shape):
    """Two layers of Qwen2.5: float32 near, bf16 off by what the CPU's is."""
    sizes = gpu.SHAPES[shape] | {"layers": 2, "w_max": 2048}
    arrays = toy.arrays("qwen2", rng=7, **sizes)
    config = toy.hf_config("qwen2", **sizes)
    ids = tiny.ids(8, 700, toy.VOCAB)
    cpu, device = gpu.pair(arrays, config)
    right = cpu.logits(ids)
    assert gpu.off(device.logits(ids), right) < NEAR
    options = {"interval": 8, "window": 256, "stride": 128, "eta": 128, "reserve": 64}
    answers = [
        model.build(ids, progress=False, **options).ask(
            ids[:20], eta=128, max_new_tokens=4
        )
        for model in (cpu, device)
    ]
    assert answers[1].ids.tolist() == answers[0].ids.tolist()
    assert gpu.off(answers[1].scores, answers[0].scores) < NEAR
    cpu, device = gpu.pair(arrays, config, dtype="bf16")
    theirs = gpu.off(cpu.logits(ids), right)
    assert gpu.off(device.logits(ids), right) < 1.5 * theirs


@large
@pytest.mark.slow
def test_smollm2_answers_alike():
    """Greedy: plain, and from a cache with refilled groups."""
    pytest.importorskip("gguf")
    from model_files import smollm2

    path = smollm2()
    cpu, device = (
        acre.Model.from_pretrained(path, dtype="f32", device=name)
        for name in ("cpu", "cuda")
    )
    prompt = "The capital of France is"
    plain = [model.generate_ids(prompt, max_new_tokens=24) for model in (cpu, device)]
    assert plain[0].tolist() == plain[1].tolist()
    filler = "The river ran past the mill and the days went by. " * 8
    text = filler + "The name of the miller's cat is Quixote. " + filler * 3
    answers = []
    for model in (cpu, device):
        cache = model.build(text, window=128, stride=64, interval=8, progress=False)
        answers.append(
            cache.ask("What is the name of the miller's cat?", eta=128,
                      max_new_tokens=16)
        )  # fmt: skip
    assert answers[0].ids.tolist() == answers[1].ids.tolist()
    ids = np.asarray(cpu.tokenizer.encode(text), np.int32)[:400]
    right = cpu.logits(ids)
    assert gpu.off(device.logits(ids), right) < NEAR
    halves = [
        acre.Model.from_pretrained(path, dtype="bf16", device=name).logits(ids)
        for name in ("cpu", "cuda")
    ]
    assert gpu.off(halves[1], right) < 1.5 * gpu.off(halves[0], right)


# --------------------------------------------------------------------------- bad input


def test_a_device_that_is_not_there():
    config, arrays = toy.hf_config(), toy.arrays()
    with pytest.raises(ValueError, match="cuda:999.*this machine has"):
        acre.Model.from_arrays(config, arrays, device="cuda:999")


def test_what_does_not_fit_is_refused_and_all_goes_on():
    """A text whose cache no GPU holds: refused before any window, with the bytes."""
    shape = {"head_dim": 256, "layers": 16, "w_max": 1 << 17}
    config, arrays = toy.hf_config(**shape), toy.arrays(**shape)
    model = acre.Model.from_arrays(config, arrays, device="cuda", dtype="f32")
    held, steps = model.core.engine.bytes, []
    with pytest.raises(MemoryError, match=r"need \d+ bytes.* \d+ are available"):
        model.build(
            np.full(8_000_000, 5, np.int32),
            interval=128,
            window=64,
            stride=32,
            progress=lambda done, total: steps.append(done),
        )
    assert model.core.engine.bytes == held and not steps
    cache = model.build(tiny.ids(1, 200, toy.VOCAB), **toy.BUILD)
    assert len(cache.ask(tiny.ids(2, 9, toy.VOCAB), eta=64, max_new_tokens=2).ids) > 0


@large
def test_weights_that_do_not_fit():
    """2 TB of one matrix; the process and the device go on."""
    settings = toy.settings(vocab_size=(1 << 31) - 2, hidden=256)
    libraries = gpu.devices.cuda_libraries()
    engine = _core.Engine(
        device="cuda", plugin=gpu.devices.cuda_plugin(), libraries=libraries
    )
    with pytest.raises(MemoryError, match=r"\d+ bytes were wanted, \d+ of \d+"):
        _core.Model(engine, settings)
    small = tiny.model(engine=engine)
    assert np.isfinite(tiny.answer(small)).all()


@pytest.mark.parametrize("damage", ["cut", "turned"])
def test_a_damaged_file_stays_out(tmp_path, damage):
    _, device = gpu.pair()
    cache, path = build(device), tmp_path / "one.acre"
    cache.save(path)
    bytes_ = bytearray(path.read_bytes())
    if damage == "cut":
        del bytes_[len(bytes_) // 2 :]
    else:
        bytes_[len(bytes_) // 2] ^= 0x40
    (tmp_path / "bad.acre").write_bytes(bytes_)
    with pytest.raises(acre.CacheFileError):
        acre.Cache.load(tmp_path / "bad.acre", device, verify=True)
    assert ask(acre.Cache.load(path, device)).ids.tolist() == ask(cache).ids.tolist()


def test_answers_say_what_they_took():
    stats = dataclasses.asdict(ask(build(gpu.pair()[1])).stats)
    assert stats["time_to_first_token_ms"] > 0 and stats["peak_bytes"] > 0
