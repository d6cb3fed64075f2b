"""Sweeps: products of settings, their rows and files."""

from __future__ import annotations

import json

import evaluations
import pytest
import toy
from evaluations import TASK

import acre
from acre import cli
from acre.eval.sweep import combinations

SIZES = {"window": [128], "interval": [4, 8], "eta": [16, 64]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return evaluations.folder(tmp_path_factory.mktemp("sweep"), 2, 1)


def test_combinations_are_the_product_and_readings_vary_slowest():
    assert combinations({"eta": [1, 2], "interval": [8, 16]}) == [
        "acre:interval=8,eta=1",
        "acre:interval=8,eta=2",
        "acre:interval=16,eta=1",
        "acre:interval=16,eta=2",
    ]
    assert combinations({"window": [64]}) == ["acre:window=64,stride=64"]
    assert combinations({"window": [64], "stride": [32]}) == [
        "acre:window=64,stride=32"
    ]
    assert combinations({}) == ["acre"]
    for wrong, said in (({"heads": [1]}, "heads"), ({"eta": []}, "no values")):
        with pytest.raises(ValueError, match=said):
            combinations(wrong)


def test_rows_carry_their_settings(place, tmp_path):
    model = toy.model(w_max=evaluations.W_MAX)
    done = acre.sweep(TASK, model, SIZES, place, tmp_path, beside=["full"],
                      progress=False)  # fmt: skip
    rows = done.rows()
    assert [(r["way"], r.get("interval"), r.get("eta")) for r in rows] == [
        ("acre", 4, 16), ("acre", 4, 64), ("acre", 8, 16), ("acre", 8, 64),
        ("full", None, None),
    ]  # fmt: skip
    by = {(r["interval"], r["eta"]): r["entries"] for r in rows if r["way"] == "acre"}
    assert by[4, 16] > by[8, 16] and by[8, 64] - by[8, 16] == 48
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert len(stored["rows"]) == 5 and stored["axes"]["eta"] == [16, 64]
    assert "## multifieldqa_en" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / f"{TASK}.score.png").stat().st_size > 5000


def test_perplexity_varies_with_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("acre.eval.prepare.PREFACE", 0)
    model = toy.model(w_max=evaluations.W_MAX)
    books = [{"text": toy.sentence(8, 400)}, {"text": toy.sentence(9, 400)}]
    beside = ["full", "stream:budget=128"]
    done = acre.sweep("books", model, SIZES, books, beside=beside,
                      lengths=(500, 1000), progress=False)  # fmt: skip
    rows = done.rows()
    assert [(r["way"], r.get("interval")) for r in rows][:3] == [
        ("acre", 4), ("acre", 8), ("full", None),
    ]  # fmt: skip
    assert all(row["count"] == 4 and row["score"] > 1 for row in rows)
    assert len({row["score"] for row in rows}) == 4
    assert "## By length" in done.markdown() and "of 2nd half" in done.markdown()
    made = {path.name for path in done.plot(tmp_path)}
    assert made == {"books.perplexity.png", "books.length.score.png"}


def test_needle_maps(tmp_path):
    model = toy.model(w_max=evaluations.W_MAX)
    done = acre.sweep("needle", model, {"interval": [8], "window": [128]}, None,
                      tmp_path, lengths=(700, 900), depths=(0.1, 0.9), beside=["full"],
                      progress=False)  # fmt: skip
    maps = sorted(path.name for path in tmp_path.glob("*.depth.*.png"))
    assert len(maps) == 4 and "probe_needle.depth.recall.full.png" in maps
    assert {row["value"] for row in done.buckets()} == {"700", "900", "0.1", "0.9"}


def test_the_command(place, tmp_path, capsys):
    said = ["sweep", TASK, "--data", str(place), "--model", str(place / "model"),
            "--output", str(tmp_path), "--dtype", "f32", "--threads", "1"]  # fmt: skip
    axes = ["--interval", "8", "--window", "128", "--eta", "16", "32"]
    assert cli.main([*said, *axes]) == 0
    assert "| acre" in capsys.readouterr().out
    assert cli.main(said) == 1
    assert "axis" in capsys.readouterr().err
    assert cli.main([*said, "--eta", "x"]) == 1
    assert "eta: got 'x'" in capsys.readouterr().err
