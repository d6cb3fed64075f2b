"""What an adapter says beside its parameters: windows, and how groups are scored."""

from __future__ import annotations

import json

import pytest
import toy
from adapting import KEYS, made, opened

from acre import cli
from acre.errors import ModelFileError
from acre.training.adapter import describe, merge_adapter, pack_adapter, write_adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """As `made` gives it."""
    return made(tmp_path_factory.mktemp("adapter"), "qwen2")


CHOSEN = {"heads": [[0, 1], [1, 0]], "rotated": False, "calibrated": True}


def test_windows_are_those_of_the_training(place, tmp_path):
    """Unless told otherwise; pooled entries come from no training."""
    path, _, base = place
    text = toy.sentence(2, 90)
    adapter = path / "bf16.safetensors"
    adapted = opened(path / "model", adapter)
    merge_adapter(path / "model", adapter, tmp_path / "merged")
    merged = opened(tmp_path / "merged", None)
    for model, proxy, wanted in (
        (base, "auto", (4096, 2048)),
        (adapted, "pooled", (4096, 2048)),
        (adapted, "auto", (64, 32)),
        (merged, "auto", (64, 32)),
    ):
        plan = model.build(text, 8, eta=8, reserve=8, proxy=proxy).plan
        assert (plan["window"], plan["stride"]) == wanted
    plan = adapted.build(text, 8, window=50, eta=8, reserve=8).plan
    assert (plan["window"], plan["stride"]) == (50, 32)


@pytest.mark.parametrize("window", ["0", "x", "-4", "1.5"])
def test_windows_that_are_none(place, tmp_path, window):
    path, own, base = place
    said = describe(base.prints, "model", **KEYS | {"acre_window": window})
    write_adapter(tmp_path / "a.safetensors", own, said)
    with pytest.raises(ModelFileError, match="acre_window, acre_stride: got"):
        opened(path / "model", tmp_path / "a.safetensors")


def test_scoring_is_replaced_when_packed(place, tmp_path):
    path, _, _ = place
    chosen, packed = tmp_path / "scoring.json", tmp_path / "a.safetensors"
    chosen.write_text(json.dumps(CHOSEN))
    cli.main(["adapter", "pack", str(path / "bf16.safetensors"), "-o", str(packed),
              "--model", str(path / "model"), "--scoring", str(chosen)])  # fmt: skip
    scoring = opened(path / "model", packed).scoring
    assert scoring["trained"].record() == CHOSEN
    assert scoring["pooled"].record() != CHOSEN


@pytest.mark.parametrize(
    "bad", [{"heads": [[9, 9]]}, {"heads": [[0]]}, {"heads": []}, {"heads": 3}]
)
def test_scoring_that_does_not_fit(place, tmp_path, bad):
    path, _, _ = place
    out = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="scoring: got"):
        pack_adapter(path / "bf16.safetensors", out, path / "model", scoring=bad)
    with pytest.raises(ValueError, match="model: a scoring"):
        pack_adapter(path / "bf16.safetensors", out, storage="f32", scoring=CHOSEN)
    assert not out.exists()


def test_scoring_that_is_no_json(place, tmp_path, capsys):
    path, _, _ = place
    broken = tmp_path / "scoring.json"
    broken.write_text("{")
    said = [
        "adapter",
        "pack",
        str(path / "bf16.safetensors"),
        "-o",
        str(tmp_path / "a"),
    ]
    assert cli.main([*said, "--scoring", str(broken)]) != 0
    assert f"{broken}: not JSON" in capsys.readouterr().err
