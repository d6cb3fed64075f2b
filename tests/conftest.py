"""One tiny model with words, a text, and its cache, for the tests of the Python API."""

from __future__ import annotations

import pytest
import toy


@pytest.fixture(scope="session")
def model():
    return toy.model()


@pytest.fixture(scope="session")
def text():
    return toy.sentence(1, 120)


@pytest.fixture(scope="session")
def cache(model, text):
    return model.build(text, **toy.BUILD)


@pytest.fixture(scope="session")
def wide():
    """The toy with room for any training example."""
    return toy.model(w_max=4096)
