"""The compiled trainer beside its gradients (test_gradients.py): vectors, refusals, and
what an example leaves behind."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tiny

from acre import _core

IDS = tiny.ids(3, 40)
READING = {"window": 16, "stride": 8, "intervals": [4, 2, 8, 4]}


def trainer(**changes):
    return _core.Trainer(tiny.model(**changes))


ALL = np.ones(len(IDS), bool)


def example(**changes):
    return {"ids": IDS, **READING, **changes}


def asked(ids=(1, 2), weights=None, query=None, evidence=None):
    """A question as a change of an example."""
    return {"questions": [(list(ids), weights, query, evidence)]}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_entries_cover_the_vector_without_gaps(family):
    t = trainer(family=family)
    end = 0
    for name, offset, shape in t.entries:
        assert offset == end and "acre_" in name
        end += int(np.prod(shape))
    assert end == t.size
    names = {name for name, _, _ in t.entries}
    shapes = tiny.shapes(family, trained=True)
    assert names == {name for name in shapes if "acre_" in name}
    assert all(shapes[name] == shape for name, _, shape in t.entries)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_starts_from_eos_and_copies_of_the_base(family):
    tensors, t = tiny.tensors(0, family), trainer(family=family)
    parameters = t.read("parameters")
    for name, offset, shape in t.entries:
        start = parameters[offset : offset + int(np.prod(shape))].reshape(shape)
        base = tensors[name.replace("acre_", "")]
        np.testing.assert_array_equal(start, base[2:3] if "embed" in name else base)


def test_starts_from_what_the_model_has():
    tensors = tiny.tensors(0, trained=True)
    t = trainer(trained=True)
    parameters = t.read("parameters")
    for name, offset, shape in t.entries:
        piece = parameters[offset : offset + int(np.prod(shape))].reshape(shape)
        np.testing.assert_array_equal(piece, tensors[name])


def test_loss_is_the_builders():
    """The same reading attention: `Builder(losses=True)` sums it another way."""
    model = tiny.model(trained=True)
    result = _core.Trainer(model).accumulate(
        IDS, window=16, stride=8, intervals=[4] * 4, carry=5, gradients=False
    )
    builder = _core.Builder(
        model, IDS, proxy="trained", interval=4, window=16, stride=8, carry=5, eta=8,
        reserve=8, losses=True,
    )  # fmt: skip
    tiny.finish(builder)
    losses = builder.losses()[1:].astype(np.float64)
    assert result["weight"] == len(losses)
    assert result["loss"] == pytest.approx(losses.sum(), rel=1e-6)
    assert result["evidence"] == result["known"] == 0


def test_the_way_back_changes_no_loss():
    t = trainer(trained=True)
    asked = (tiny.ids(4, 7), np.linspace(0, 2, 7), None, None)
    more = {"questions": [asked] * 2, "weights": np.linspace(0, 2, 40)}
    there = t.accumulate(**example(gradients=False, **more))
    assert not t.read("gradients").any()
    back = t.accumulate(**example(**more))
    assert back["loss"] == pytest.approx(there["loss"], rel=1e-6)
    assert back["rows"] == there["rows"] and back["weight"] == there["weight"]
    assert t.read("gradients").any()


def test_evidence_behind_the_last_entry_asks_for_nothing():
    """It is seen anyway: no entry stands for it, and no gradient comes from it."""
    t, ids = trainer(trained=True), IDS[:39]
    evidence = np.arange(39) >= 38
    gradients = []
    for known in (None, evidence):
        question = (tiny.ids(4, 6), None, (0, 3), known)
        told = t.accumulate(**example(ids=ids, questions=[question], evidence_weight=9))
        assert told["known"] == told["evidence"] == 0
        gradients.append(t.read("gradients"))
        t.clear()
    np.testing.assert_array_equal(*gradients)


def test_the_base_model_does_not_change():
    model = tiny.model()
    before = tiny.answer(model)
    t = _core.Trainer(model)
    t.accumulate(**example())
    t.update(step=1, lr=0.1, divisor=1.0)
    np.testing.assert_array_equal(tiny.answer(model), before)
    assert not model.has_l1


def test_update_clears_and_clips():
    t = trainer()
    t.accumulate(**example())
    gradients = t.read("gradients").astype(np.float64)
    norm = t.update(step=1, lr=0.0, divisor=39.0, clip=1e-3)
    assert norm == pytest.approx(np.linalg.norm(gradients) / 39, rel=1e-6)
    assert not t.read("gradients").any()
    assert np.linalg.norm(t.read("first")) == pytest.approx(0.1 * 1e-3, rel=1e-5)


def test_norm_that_is_not_finite_changes_nothing():
    t = trainer()
    parameters = t.read("parameters")
    gradients = np.zeros(t.size, np.float32)
    gradients[3] = 2e38
    t.write("gradients", gradients)
    assert t.update(step=1, lr=1.0, divisor=1.0, clip=1.0) == pytest.approx(2e38)
    t.write("parameters", parameters)
    with pytest.raises(ValueError, match="finite"):
        t.write("gradients", np.full(t.size, np.nan))
    with pytest.raises(ValueError, match="finite"):
        t.write("parameters", np.full(t.size, np.inf))
    np.testing.assert_array_equal(t.read("parameters"), parameters)


def test_threads_and_repeats_give_the_same_bits():
    def run(threads):
        engine = _core.Engine(threads=threads)
        t = _core.Trainer(tiny.model(trained=True, engine=engine, dtype="bf16"))
        questions = [(tiny.ids(4, 5), None, None, None)] * 3
        t.accumulate(**example(questions=questions, carry=3))
        return t.read("gradients")

    first = run(1)
    for threads in (1, 3):
        np.testing.assert_array_equal(run(threads), first)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ids": [1, 61]}, ValueError, r"ids\[1\].*61.*vocabulary"),
        ({"intervals": [4, 4]}, ValueError, "intervals: got 2.*40 tokens make 4"),
        ({"intervals": [4, 0, 4, 4]}, ValueError, r"intervals\[1\].*got 0"),
        ({"window": 0}, ValueError, "window"),
        ({"carry": 9}, ValueError, "carry: got 9, expected 0 to 8"),
        ({"weights": np.ones(39)}, ValueError, "weights.*expected one dimension of 40"),
        ({"weights": np.full(40, -1.0)}, ValueError, r"weights\[0\]: got -1"),
        ({"weights": np.full(40, np.nan)}, ValueError, "weights"),
        (asked(evidence=ALL), TypeError, "query"),
        (asked(query=(0, 1), evidence=ALL[1:]), ValueError, "evidence.*39"),
        (
            asked(query=(0, 3), evidence=ALL),
            ValueError,
            r"\[0\]: query.*2 tok",
        ),
        (asked(query=(1, 1), evidence=ALL), ValueError, "query"),
        (asked(query=3, evidence=ALL), TypeError, "query"),
        (asked(weights=np.ones(3)), ValueError, "weights.*expected one dimension of 2"),
        (asked(weights=np.full(2, -1.0)), ValueError, r"questions\[0\]: weights\[0\]"),
        (asked(ids=[1, -2]), ValueError, r"questions\[0\]: ids\[1\]: got -2"),
        (asked(ids=[]), ValueError, r"questions\[0\]: got 0 tokens"),
        ({"questions": [([1], None, None)]}, TypeError, "question.*tuple"),
        ({"questions": 3}, TypeError, "questions"),
        ({"heads": np.ones((2, 3))}, (TypeError, ValueError), "heads"),
        ({"heads": np.zeros((2, 4), bool)}, ValueError, "heads: got none"),
        ({"evidence_weight": -1.0}, ValueError, "evidence_weight"),
        ({"window": "16"}, TypeError, "window"),
    ],
)
def test_bad_examples(changes, error, words):
    t = trainer()
    with pytest.raises(error, match=words):
        t.accumulate(**example(**changes))
    assert not t.read("gradients").any()


def test_positions_that_do_not_suffice():
    t = trainer(w_max=20)
    with pytest.raises(_core.TooLongError, match="window 0 needs 24"):
        t.accumulate(**example(window=12, stride=8, intervals=[1, 4, 4, 4, 4]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 0}, "step"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"divisor": 0.0}, "divisor"),
        ({"beta1": 1.0}, "beta1"),
        ({"eps": 0.0}, "eps"),
        ({"clip": -1.0}, "clip"),
    ],
)
def test_bad_updates(changes, words):
    with pytest.raises(ValueError, match=words):
        trainer().update(**{"step": 1, "lr": 0.1, "divisor": 1.0, **changes})


def test_other_bad_arguments():
    t = trainer()
    with pytest.raises(ValueError, match="part"):
        t.read("weights")
    with pytest.raises(ValueError, match=f"expected one dimension of {t.size}"):
        t.write("parameters", np.zeros(3))
    with pytest.raises(TypeError):
        _core.Trainer("model")


def test_busy_on_another_thread():
    t = trainer()
    errors, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                t.accumulate(tiny.ids(1, 200), window=64, stride=64, intervals=[4] * 4)
            except _core.BusyError as error:
                errors.append(error)
                stop.set()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    stop.wait(20)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors
