"""The adapter of adapters/smollm2-135m: its L1 entries are found where pooled ones are
not, and worth nearly as much to what is read after them.

How often, and at which lengths, is measured: the adapter's card.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from model_files import smollm2

import acre
from acre import _core
from acre.demo import reference_text

ADAPTER = Path(__file__).parent.parent / "adapters/smollm2-135m"
KEYS, ASKED, ETA, INTERVAL = 110, 24, 256, 16
WINDOWS = {"window": 1024, "stride": 1024, "interval": INTERVAL}


@pytest.fixture(scope="module")
def model() -> acre.Model:
    return acre.Model.from_pretrained(smollm2(), adapter=ADAPTER)


@pytest.mark.slow
def test_keys_are_found(model):
    """A table that no training text held; a random choice finds a tenth."""
    rng = random.Random(20)
    codes = [f"{rng.getrandbits(32):08x}" for _ in range(2 * KEYS)]
    table = dict(zip(codes[:KEYS], codes[KEYS:], strict=True))
    text = "".join(f'"{key}": "{value}",\n' for key, value in table.items())
    found = {}
    for proxy in ("pooled", "trained"):
        cache = model.build(text, proxy=proxy, progress=False, **WINDOWS)
        assert cache.plan["m"] > 4 * ETA // INTERVAL
        found[proxy] = 0
        for key in random.Random(1).sample(sorted(table), ASKED):
            asked = f'What is the value of the key "{key}"?'
            told = cache.ask(asked, eta=ETA, max_new_tokens=1)
            found[proxy] += any(table[key] in part.text for part in told.passages())
    assert found["trained"] >= found["pooled"] + ASKED // 6, found


@pytest.mark.slow
def test_reading_on_loses_little(model):
    """Loss of later windows, which see earlier ones as L1 entries only."""
    ids = np.asarray(model.tokenizer.encode(reference_text())[:4096], dtype=np.int32)
    loss = {}
    for proxy in ("pooled", "trained"):
        builder = _core.Builder(
            model.core,
            ids,
            proxy=proxy,
            eta=512,
            losses=True,
            **WINDOWS,
            **(model.pooling if proxy == "pooled" else {}),
        )
        done, total = 0, 1
        while done < total:
            done, total = builder.step()
        loss[proxy] = float(np.mean(builder.losses()[WINDOWS["window"] :]))
    assert loss["trained"] < 1.05 * loss["pooled"], loss
