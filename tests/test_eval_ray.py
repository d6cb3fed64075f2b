"""Documents spread over a real Ray of two workers, one of which is killed."""

from __future__ import annotations

import os

import evaluations
import pytest
from evaluations import SETTINGS, TASK

import acre
from acre.eval import engines
from acre.eval.engines import Ray
from acre.eval.work import ModelSpec

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return evaluations.folder(tmp_path_factory.mktemp("ray"), texts=5, questions=3)


@pytest.fixture(scope="module")
def spec(place):
    return ModelSpec(str(place / "model"), {"dtype": "f32", "threads": 1})


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error",
             include_dashboard=False)  # fmt: skip
    yield
    ray.shutdown()


def evaluate(spec, place, output, methods, **options):
    options = {"progress": False, **SETTINGS, **options}
    return acre.evaluate(TASK, spec, place, methods, output, **options)


def killer(marker, times=1):
    """acre's own method, which takes its process with it at one question. Made here, so
    that it travels to the workers by value."""
    from acre.eval.methods import Settings, make

    class Killer:
        label = "killer"

        def settings(self):
            return {}

        def open(self, shelf, document):
            inner = make("acre", Settings(**SETTINGS)).open(shelf, document)

            class Reading:
                def ask(self, question):
                    if question.id == "1.1":
                        left = [i for i in range(times)
                                if not os.path.exists(f"{marker}{i}")]  # fmt: skip
                        if left:
                            open(f"{marker}{left[0]}", "w").close()
                            os.kill(os.getpid(), 9)
                    return inner.ask(question)

            return Reading()

    return Killer()


def test_results_are_those_of_one_process(cluster, spec, place, tmp_path):
    methods = ("acre", "bm25")
    evaluate(spec, place, tmp_path / "one", methods)
    seen = []
    engine = Ray(workers=2)
    evaluate(
        spec, place, tmp_path / "two", methods, engine=engine, progress=seen.append
    )
    one, two = (tmp_path / name / "predictions.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert len(seen) == 30
    evaluate(
        spec, place, tmp_path / "two", methods, engine=engine, progress=seen.append
    )
    assert len(seen) == 30  # nothing was left to do


def test_a_killed_workers_questions_are_answered_by_another(
    cluster, spec, place, tmp_path
):
    marker, seen = tmp_path / "killed", []
    evaluate(spec, place, tmp_path / "one", (killer(marker, 0),))
    evaluate(spec, place, tmp_path / "two", (killer(marker),), engine=Ray(workers=2),
             progress=seen.append)  # fmt: skip
    assert (tmp_path / "killed0").exists()
    one, two = (tmp_path / name / "predictions.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(s["id"] for s in seen) == [
        f"{t}.{q}" for t in range(5) for q in range(3)
    ]


def test_a_document_that_kills_every_worker_is_given_up(cluster, spec, place, tmp_path):
    report = evaluate(spec, place, tmp_path, (killer(tmp_path / "dead", 99),),
                      engine=Ray(workers=2))  # fmt: skip
    row = report.table()[0]
    assert (row["count"], row["errors"]) == (13, 2)  # 1.0 was answered before
    assert "3 workers were lost" in report.markdown()


def test_engines_that_do_not_fit_are_refused(cluster, spec, place, tmp_path):
    with pytest.raises(ValueError, match="workers"):
        evaluate(spec, place, tmp_path, ("acre",), engine=Ray(workers=64))
    for wrong in ({"workers": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Ray(**wrong)


def test_another_model_on_a_node_is_refused(spec):
    with pytest.raises(ValueError, match="not the driver's"):
        engines._Worker(spec, {"model": "another"}, [])
