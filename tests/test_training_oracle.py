"""The oracle of training checked: `torch_method.py` against `reference.py`.

The two share no code but the frequencies of the rotation. What the NumPy oracle cannot
do, intervals that differ from window to window and gradients, is held against a second
formulation, `Spread`: every window's rows in one list, their names instead of indices.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
from reference import Reference, Resident, softmax

torch = pytest.importorskip("torch")

from torch_method import EMBEDDING, TorchMethod  # noqa: E402

CASES = [
    # n, l, W, s, carry
    (37, 4, 16, 8, 0),
    (37, 4, 16, 8, 5),
    (40, 4, 16, 8, 0),  # ends on a boundary: nothing recent
    (41, 5, 13, 7, 0),  # straddling groups, orphans
    (41, 5, 13, 7, 7),
    (10, 4, 16, 8, 0),  # shorter than a window
    (16, 4, 16, 8, 0),  # one window
    (9, 1, 3, 2, 1),  # one token per group
    (11, 2, 1, 1, 1),  # one token per window
    (29, 9, 4, 3, 2),  # a group longer than a window
    (30, 9, 4, 3, 5),  # a carry over more than a window
    (1, 2, 4, 4, 0),  # no token has a loss
]
TAIL = 5


def count(n: int, window: int, stride: int) -> int:
    """Windows of n tokens."""
    return 1 + max(0, math.ceil((n - window) / stride))


def pair(n: int, trained: bool, family: str) -> tuple[Reference, TorchMethod]:
    """The two formulations of one model."""
    settings, tensors = tiny.config(family), tiny.tensors(n, family, trained)
    return Reference(settings, tensors), TorchMethod(settings, tensors)


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_are_those_of_the_reference(case, family, trained):
    n, interval, window, stride, carry = case
    reference, method = pair(n, trained, family)
    ids, tail = tiny.ids(3, n), tiny.ids(4, TAIL)
    cache = reference.build(ids, "trained", interval, window, stride, carry)
    sizes = ([interval] * count(n, window, stride), window, stride, carry)
    rng = np.random.default_rng(n)
    weights = rng.random(n + TAIL) * (rng.random(n + TAIL) < 0.8)
    loss, weight, shares = method.example(ids, *sizes, weights=weights[:n])
    expected = (weights[1:n] * cache.losses[1:]).sum()
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    assert weight == pytest.approx(weights[1:n].sum()) and shares == []
    questions = [(tail, weights[n:], None, None), (tail[::-1].copy(), None, None, None)]
    both, more, _ = method.example(ids, *sizes, weights[:n], questions)
    expected = (weights[n + 1 :] * losses_behind(cache, tail)).sum()
    expected += losses_behind(cache, tail[::-1]).sum()
    assert (both - loss).item() == pytest.approx(expected, abs=1e-10)
    assert more - weight == pytest.approx(weights[n + 1 :].sum() + TAIL - 1)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_each_loss_is_that_of_the_reference(case):
    n, interval, window, stride, carry = case
    reference, method = pair(n, True, "qwen2")
    ids = tiny.ids(3, n)
    losses = reference.build(ids, "trained", *case[1:]).losses
    sizes = ([interval] * count(n, window, stride), window, stride, carry)
    for i, one in enumerate(np.eye(n)[1:], start=1):
        with torch.no_grad():
            loss, _, _ = method.example(ids, *sizes, weights=one)
        assert loss.item() == pytest.approx(losses[i], abs=1e-10)


def losses_behind(cache: Any, asked: np.ndarray) -> np.ndarray:
    """[t - 1] of the reference: a question's tokens but the first."""
    rows = softmax(cache.logits(asked)[:-1])
    return -np.log(rows[np.arange(len(asked) - 1), asked[1:]])


@pytest.mark.parametrize("heads", [None, "some"])
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_evidence_is_the_share_of_the_scores(case, heads):
    n, interval, window, stride, carry = case
    reference, method = pair(n, True, "llama")
    ids, tail = tiny.ids(3, n), tiny.ids(4, TAIL)
    cache = reference.build(ids, "trained", *case[1:])
    if not cache.shape.m:
        return
    if heads:
        heads = np.array([[0, 1, 1, 0], [1, 0, 0, 0]], bool)
    scores = cache.score(cache.query(tail), 1, 4, heads=heads)
    evidence = np.zeros(n, bool)
    evidence[[interval - 1, interval, -1]] = True  # groups 0 and 1; the last token
    groups = np.unique([0, 1, (n - 1) // interval])
    expected = scores[groups[groups < cache.shape.m]] / scores.sum()
    intervals = [interval] * count(n, window, stride)
    questions = [(tail, None, (1, 4), evidence), (tail, None, None, None)]
    _, _, [share] = method.example(
        ids, intervals, window, stride, carry, None, questions, heads
    )
    np.testing.assert_allclose(share.detach().numpy(), expected, atol=1e-10)


# ------------------------------------------------------------------ mixed intervals


class Spread:
    """Windows of different intervals, read by the reference's forward pass.

    Entries are (layer rows, names): a name is the token, plus a half for an L1 token.
    """

    def __init__(self, model: Reference, ids: np.ndarray):
        self.model, self.ids = model, ids
        self.names = np.zeros(0)
        self.made: list[list[np.ndarray]] = []

    def past(self, names: np.ndarray) -> list[Resident]:
        if not len(names):
            return self.model.nothing()
        at = [int(np.flatnonzero(self.names == name)[0]) for name in names]
        bias = np.zeros(len(at))
        return [Resident(k[at], v[at], bias) for k, v in self.made]

    def read(self, names: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Logits of the named rows over the seen ones; keeps what they made."""
        l1 = names % 1 > 0
        ids = np.where(l1, self.model.vocab, self.ids[names.astype(int)])
        hidden, layers = self.model.forward(ids, self.past(seen))
        new = [[layer.k, layer.v] for layer in layers]
        old = self.made or [[x[:0] for x in pair] for pair in new]
        self.made = [
            [np.concatenate(z) for z in zip(a, b, strict=True)]
            for a, b in zip(old, new, strict=True)
        ]
        self.names = np.concatenate([self.names, names])
        return self.model.head(hidden)

    def losses(
        self, n: int, intervals: list[int], window: int, stride: int, carry: int
    ) -> np.ndarray:
        """[n + t], nan for the first: the text, then the tail behind token n."""
        out = np.full(len(self.ids), np.nan)
        order, rows, closed = [], [], 0
        for i, interval in enumerate(intervals):
            start = 0 if i == 0 else window + (i - 1) * stride
            stop = min(start + (stride if i else window), n)
            tokens = np.arange(start, stop)
            l1 = tokens[(tokens + 1) % interval == 0] + 0.5
            before = self.names[self.names % 1 > 0]
            carried = np.arange(max(start - carry, 0), start)
            names = np.sort(np.concatenate([tokens, l1]))
            rows.append(self.read(names, np.concatenate([before, carried])))
            order.append(names)
            if stop - start == (stride if i else window):
                closed = stop
        l1 = self.names[self.names % 1 > 0]
        old = l1[l1 < closed]
        orphans = np.arange(int(max(old, default=-1)) + 1, closed)
        rest = np.sort(self.names[self.names >= closed])
        tail = np.arange(n, len(self.ids)).astype(float)
        if len(tail):
            rows.append(self.read(tail, np.concatenate([old, orphans, rest])))
            order.append(tail)
        names, logits = np.concatenate(order), np.concatenate(rows)
        for row, token in zip(logits, names[1:], strict=False):
            if token % 1 == 0:
                out[int(token)] = -np.log(softmax(row)[self.ids[int(token)]])
        return out


@pytest.mark.parametrize("carry", [0, 6, 20])
@pytest.mark.parametrize("n", [29, 31, 40, 41])
def test_intervals_may_differ(n, carry):
    intervals = [3, 16, 1, 8, 2, 5][: count(n, 13, 9)]
    reference, method = pair(n, True, tiny.FAMILIES[n % 2])
    ids, tail = tiny.ids(3, n), tiny.ids(4, TAIL)
    spread = Spread(reference, np.concatenate([ids, tail]))
    expected = spread.losses(n, intervals, 13, 9, carry)[1:]
    weights = np.random.default_rng(0).random(n + TAIL)
    questions = [(tail, weights[n:], None, None)]
    loss, _, _ = method.example(ids, intervals, 13, 9, carry, weights[:n], questions)
    weights[n] = 0  # nothing predicts a question's first token
    assert loss.item() == pytest.approx(float(weights[1:] @ expected), abs=1e-10)


# ------------------------------------------------------------------ gradients


def objective(method: TorchMethod, n: int = 41, carry: int = 0) -> Any:
    """A loss in which every part of the objective has a say."""
    evidence = np.arange(n) % 11 == 0
    questions = [(tiny.ids(i, TAIL), None, (1, 4), evidence) for i in (4, 5)]
    loss, _, shares = method.example(
        tiny.ids(3, n), [3, 16, 1, 8, 2], 13, 9, carry, None, questions
    )
    return loss - 3.0 * sum(torch.log(share).mean() for share in shares)


@pytest.mark.parametrize("carry", [0, 6])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_are_differences(family, carry):
    method = pair(2, True, family)[1]
    objective(method, carry=carry).backward()
    for parameter in method.parameters.values():
        assert parameter.grad.abs().max() > 0
        at = np.unravel_index(int(parameter.grad.abs().argmax()), parameter.shape)
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter[at] += step
                sides.append(objective(method, carry=carry).item())
                parameter[at] -= step
        slope = (sides[0] - sides[1]) / 2e-5
        assert parameter.grad[at].item() == pytest.approx(slope, rel=1e-6)


def test_recomputing_changes_nothing():
    methods = [
        TorchMethod(tiny.config(), tiny.tensors(2, trained=True), checkpoint=anew)
        for anew in (False, True)
    ]
    for method in methods:
        objective(method, carry=6).backward()
    for a, b in zip(*(m.parameters.values() for m in methods), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_near_float64():
    settings, tensors = tiny.config("qwen2"), tiny.tensors(2, "qwen2", True)
    near = TorchMethod(settings, tensors, torch.bfloat16)
    loss = objective(near)
    loss.backward()
    assert loss.dtype == torch.float32
    exact = objective(TorchMethod(settings, tensors))
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in near.parameters.values())


def test_parameters_start_as_the_method_says():
    tensors = tiny.tensors(0, "qwen2")
    method = TorchMethod(tiny.config("qwen2"), tensors)
    assert len(method.parameters) == 1 + 2 * 6
    for name, value in method.parameters.items():
        base = tensors[name.replace("acre_", "")]
        expected = base[2:3] if name == EMBEDDING else base
        np.testing.assert_array_equal(value.detach().numpy(), expected)
        assert value.is_leaf and value.requires_grad
    frozen = [t for n, t in method.tensors.items() if n not in method.parameters]
    assert not any(t.requires_grad for t in frozen)


def test_intervals_are_counted():
    with pytest.raises(ValueError, match="intervals: got 2, expected 3"):
        pair(1, False, "llama")[1].example(tiny.ids(0, 30), [2, 2], 16, 8)
