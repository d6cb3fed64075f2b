"""Evaluations as a whole: results, resuming, reports, the command, being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import evaluations
import numpy as np
import pytest
import toy
from evaluations import SETTINGS, TASK

import acre
from acre import cli
from acre.eval.report import COLUMNS, table
from acre.eval.results import Journal
from acre.eval.work import ModelSpec

METHODS = ("acre", "full", "bm25")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return evaluations.folder(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def reader():
    return toy.model(w_max=evaluations.W_MAX)


def evaluate(reader, place, output, methods=METHODS, **options):
    options = {"progress": False, **SETTINGS, **options}
    return acre.evaluate(TASK, reader, place, methods, output, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_question_is_scored_by_every_method(reader, place, tmp_path):
    report = evaluate(reader, place, tmp_path)
    rows = report.table()
    assert [(row["task"], row["method"]) for row in rows] == [
        (TASK, method) for method in METHODS
    ]
    assert all(row["count"] == 6 and row["errors"] == 0 for row in rows)
    assert all(0 <= row["score"] <= 100 and row["peak_mb"] > 0 for row in rows)
    scores = [100 * s["score"] for s in report.samples if s["method"] == "acre"]
    assert rows[0]["score"] == pytest.approx(np.mean(scores))
    assert rows[0]["stderr"] == pytest.approx(np.std(scores, ddof=1) / 6**0.5)
    samples = lines(tmp_path / "predictions.jsonl")
    assert len(samples) == 18 and "cost" not in samples[0]
    ids = [s["id"] for s in samples if s["method"] == "acre"]
    assert ids == [f"{text}.{q}" for text in range(3) for q in range(2)]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["model"]["fingerprints"] == reader.fingerprints
    assert run["methods"]["acre"]["eta"] == 64 and run["versions"]["acre"]
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["rows"] == json.loads(json.dumps(rows))
    text = (tmp_path / "report.md").read_text()
    assert "| bm25" in text and reader.fingerprint[:12] in text


def test_a_second_run_does_nothing_and_a_third_adds(reader, place, tmp_path):
    evaluate(reader, place, tmp_path, ("acre",))
    before = (tmp_path / "samples.jsonl").read_bytes()
    seen = []
    evaluate(reader, place, tmp_path, ("acre",), progress=seen.append)
    assert not seen and (tmp_path / "samples.jsonl").read_bytes() == before
    report = evaluate(
        reader, place, tmp_path, ("acre", "l1-only"), progress=seen.append
    )
    assert len(seen) == 6 and {sample["method"] for sample in seen} == {"l1-only"}
    assert [row["count"] for row in report.table()] == [6, 6]


def test_other_settings_are_refused(reader, place, tmp_path):
    evaluate(reader, place, tmp_path, ("acre",))
    with pytest.raises(ValueError, match="'eta': 64.*'eta': 32"):
        evaluate(reader, place, tmp_path, ("acre",), eta=32)
    with pytest.raises(ValueError, match=r"multifieldqa_en: .*'limit': None.*now.*3"):
        evaluate(reader, place, tmp_path, ("acre",), limit=3)
    with pytest.raises(ValueError, match="fingerprints"):
        evaluate(toy.model(w_max=evaluations.W_MAX, rng=9), place, tmp_path, ("acre",))
    assert evaluate(reader, place, tmp_path, ("acre",)).table()[0]["count"] == 6


def test_wrong_arguments_are_named(reader, place, tmp_path):
    for options, said in (
        ({"etta": 3}, "eta"),
        ({"engine": "slurm"}, "engine"),
        ({"engine": "ray"}, "path"),
        ({"methods": ["acme"]}, "acme"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(reader, place, tmp_path / "x", **options)
    with pytest.raises(ValueError, match="tokenizer"):
        evaluate(toy.model(words=False), place, None)
    with pytest.raises(ValueError, match="unknown task"):
        acre.evaluate("hotpot", reader, place)
    with pytest.raises(FileNotFoundError):
        acre.evaluate("hotpotqa", reader, place)


def test_bad_records_are_counted_and_the_rest_is_scored(reader, tmp_path):
    place = evaluations.folder(tmp_path / "data", 2, 1)
    with open(place / f"{TASK}.jsonl", "a", encoding="utf-8") as file:
        file.write('{"input": "half\n')
        file.write('{"input": "no context", "answers": ["x"]}\n')
    report = evaluate(reader, place, None, ("acre",))
    assert report.table()[0]["count"] == 2
    assert [record.split(": ")[0].rsplit(":", 1)[1] for record in report.bad] == [
        "3",
        "4",
    ]
    assert "Records left out: 2" in report.markdown()


class Failing:
    """A method that cannot answer one question."""

    label = "failing"

    def __init__(self, fails="0.1"):
        self.fails = fails

    def settings(self):
        return {}

    def open(self, shelf, document):
        from acre.eval.methods import Settings, make

        inner = make("full", Settings(**SETTINGS)).open(shelf, document)
        fails = self.fails

        class Reading:
            def ask(self, question):
                if question.id == fails:
                    raise MemoryError("nothing\nleft")
                return inner.ask(question)

        return Reading()


def test_a_question_that_fails_is_reported_and_tried_again(reader, place, tmp_path):
    report = evaluate(reader, place, tmp_path, (Failing(),))
    assert report.table()[0] | {"count": 5, "errors": 1} == report.table()[0]
    assert "0.1: MemoryError: nothing left" in report.markdown()
    seen = []
    report = evaluate(reader, place, tmp_path, (Failing("none"),), progress=seen.append)
    assert [sample["id"] for sample in seen] == ["0.1"]
    assert report.table()[0]["errors"] == 0 and report.table()[0]["count"] == 6


def test_a_score_of_nothing_is_shown():
    rows = [{"task": "t", "method": "m", "score": 0.0, "count": 3, "errors": 0}]
    said = table(rows, COLUMNS).splitlines()
    assert said[0] == "| task | method | score | n |"
    assert said[2] == "| t    | m      |  0.00 | 3 |"


def test_a_torn_line_is_dropped_and_a_broken_one_refused(reader, place, tmp_path):
    evaluate(reader, place, tmp_path, ("acre",))
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    seen = []
    evaluate(reader, place, tmp_path, ("acre",), progress=seen.append)
    assert len(seen) == 1 and len(lines(path)) == 6
    path.write_bytes(b"no json\n" + whole)
    with pytest.raises(ValueError, match=r"samples.jsonl:1"):
        evaluate(reader, place, tmp_path, ("acre",))


def test_one_run_at_a_time(reader, place, tmp_path):
    with Journal(tmp_path), pytest.raises(BlockingIOError, match="another evaluation"):
        evaluate(reader, place, tmp_path, ("acre",))
    assert evaluate(reader, place, tmp_path, ("acre",)).table()[0]["count"] == 6


def command(place, output, *more):
    return ["eval", TASK, "--data", str(place), "--model", str(place / "model"),
            "--output", str(output), "--method", "acre", "--method", "bm25",
            "--interval", "8", "--window", "128", "--stride", "128", "--eta", "64",
            "--passage", "16", "--dtype", "f32", "--threads", "1", *more]  # fmt: skip


def test_the_command_prints_the_table(place, tmp_path, capsys):
    assert cli.main(command(place, tmp_path / "a")) == 0
    out, err = capsys.readouterr()
    assert "| multifieldqa_en | acre" in out and "results in" in err
    assert cli.main(command(place, tmp_path / "a", "--limit", "2")) == 1
    assert "other settings" in capsys.readouterr().err
    assert cli.main(command(place, tmp_path / "b", "--method", "acme")) == 1
    assert "acme" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(place, tmp_path):
    """SIGKILL at several moments: nothing is lost, nothing is done twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main(command(place, whole)) == 0
    journal, runs, kept = killed / "samples.jsonl", 0, b""
    for stop_at in (1, 4, 9):
        process = subprocess.Popen(
            [sys.executable, "-m", "acre", *command(place, killed)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") >= stop_at:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.wait()
        runs += process.returncode == -signal.SIGKILL
        now = journal.read_bytes()
        assert now.startswith(kept[: kept.rfind(b"\n") + 1])
        kept = now
    assert runs >= 1, "the run was never killed in time"
    assert cli.main(command(place, killed)) == 0
    keys = [(s["method"], s["id"]) for s in lines(journal)]
    assert len(keys) == len(set(keys)) == 12
    same = (killed / "predictions.jsonl").read_bytes()
    assert same == (whole / "predictions.jsonl").read_bytes()


def test_probes_are_generated_and_recall_is_known(reader, tmp_path):
    report = acre.evaluate(
        "needle", reader, None, ("acre", "oracle-refill", "stream"), tmp_path,
        lengths=(700, 900), questions=3, progress=False, **SETTINGS,
    )  # fmt: skip
    rows = {row["method"]: row for row in report.table()}
    assert rows["acre"]["count"] == 6
    assert rows["oracle-refill"]["recall"] == 1.0 > rows["stream"]["recall"]
    buckets = {row["value"] for row in report.buckets() if row["bucket"] == "length"}
    assert buckets == {"700", "900"}


def test_workers_open_the_model_as_they_are_told(place):
    spec = ModelSpec(str(place / "model"), {"dtype": "f32", "threads": 1})
    report = acre.evaluate(TASK, spec, place, ("acre",), progress=False, **SETTINGS)
    assert report.run["model"]["dtype"] == "f32"
    assert os.path.isdir(spec.path)
