"""SmolLM2-135M: facts of a short text are answered from the groups refilled.

How often evidence is found in longer texts is measured, not tested:
benchmarks/retrieval.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from model_files import smollm2

import acre

FACTS = {
    "What is the name of the miller's cat?": (
        "The name of the miller's cat is {}. ",
        "Quixote",
    ),
    "What colour is the door of the inn?": (
        "The door of the inn is painted {}. ",
        "green",
    ),
    "Where did the ship sail to?": ("The ship sailed to {}. ", "Iceland"),
    "What did the captain eat?": ("The captain ate only {}. ", "cherries"),
    "Who built the bridge?": ("The bridge was built by {}. ", "Stokes"),
}
ETA, INTERVAL = 128, 8


@pytest.fixture(scope="module")
def model() -> acre.Model:
    return acre.Model.from_pretrained(smollm2())


@pytest.mark.slow
def test_generates(model):
    text = model.generate("The capital of France is", max_new_tokens=2)
    assert text.strip() == "Paris."


@pytest.mark.slow
def test_answers_from_refilled_passages(model):
    """The best groups hold most facts and answer some; the worst answer none."""
    filler = "The river ran past the mill and the days went by. " * 6
    told = [filler + fact.format(answer) for fact, answer in FACTS.values()]
    text = "".join([*told, filler])
    cache = model.build(text, window=128, stride=64, interval=INTERVAL, progress=False)
    count = ETA // INTERVAL
    assert cache.plan["m"] >= 4 * count
    found = right = right_from_worst = 0
    for question, (_, answer) in FACTS.items():
        best = cache.ask(question, eta=ETA, max_new_tokens=20)
        worst = np.sort(np.argsort(best.scores)[:count])
        other = cache.ask(question, groups=worst, max_new_tokens=20)
        found += any(answer in passage.text for passage in best.passages())
        right += answer in best.text
        right_from_worst += answer in other.text
    assert found >= 3 and right >= 2 and right_from_worst == 0
