"""`acre.evaluate`: tasks x methods, with results that survive being interrupted.

Takes a model, names of tasks, data and methods; gives a `Report` and a folder of
results. One idea: the same three steps whatever the engine: prepare what is asked, do
what is not yet done, publish in the order of the data. Refuses settings that a folder
was not begun with.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from acre.build import proxy_of
from acre.eval import engines
from acre.eval.methods import Method, OwnMethod, Settings, make_all
from acre.eval.pictures import draw
from acre.eval.prepare import Ask, Prepared, prepare
from acre.eval.readers import Data
from acre.eval.report import Report, with_settings
from acre.eval.results import Journal, Sample, versions
from acre.eval.work import ModelSpec, Work, order, works
from acre.model import Model

MODEL_FACTS = ("dtype", "weights", "w_max", "layers", "hidden")


class _Progress:
    """A bar over the samples with the running score; silent off a terminal."""

    def __init__(self, total: int, done: int, shown: bool | Callable) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=total, initial=done, desc="evaluating", unit="sample",
            disable=None if shown is True else True,
        )  # fmt: skip
        self.call = shown if callable(shown) else None
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, sample: Sample) -> None:
        """One more sample."""
        if "nats" not in sample and "score" in sample:
            total, count = self.sums.get(sample["method"], (0.0, 0))
            self.sums[sample["method"]] = (total + sample["score"], count + 1)
        scores = {m: f"{100 * t / n:.1f}" for m, (t, n) in self.sums.items()}
        self.bar.set_postfix(scores, refresh=False)
        self.bar.update(1)
        if self.call:
            self.call(sample)


def _open(
    model: Model | ModelSpec | str | os.PathLike[str],
) -> tuple[Model, ModelSpec | None]:
    """(the model, how another process opens it)."""
    if isinstance(model, Model):
        return model, None
    spec = model if isinstance(model, ModelSpec) else ModelSpec(os.fspath(model), {})
    return spec.open(), spec


def _run_facts(
    model: Model, methods: Sequence[Method], prepared: Prepared
) -> dict[str, Any]:
    """What goes into run.json."""
    facts = {name: model.config[name] for name in MODEL_FACTS}
    return {
        "model": {"name": model.name, **facts, "fingerprints": model.fingerprints},
        "methods": {method.label: dict(method.settings()) for method in methods},
        "tasks": prepared.facts,
        "versions": versions(),
    }


def _stream(
    engine: str | engines.Ray,
    model: Model,
    spec: ModelSpec | None,
    methods: Sequence[Method],
    todo: Sequence[Work],
) -> Iterator[Sample]:
    """Samples of the works by the engine asked for."""
    if engine == "local":
        return engines.local(model, methods, todo)
    chosen = engines.Ray() if engine == "ray" else engine
    if not isinstance(chosen, engines.Ray):
        raise ValueError(f"engine: got {engine!r}, expected one of {engines.ENGINES}")
    if spec is None:
        raise ValueError("model: got an open Model; Ray's workers need its path")
    return chosen.run(spec, model, methods, todo)


def evaluate(
    tasks: str | Sequence[str],
    model: Model | ModelSpec | str | os.PathLike[str],
    data: Data = None,
    methods: Sequence[str | Method] = ("acre", "full"),
    output: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    lengths: Sequence[int] = (8192,),
    questions: int = 10,
    depths: Sequence[float] | None = None,
    texts: int = 1,
    seed: int = 0,
    engine: str | engines.Ray = "local",
    progress: bool | Callable[[Sample], None] = True,
    **settings: Any,
) -> Report:
    """Scores methods on tasks; finished samples are kept in `output` and not repeated.

    tasks: names of tasks or benchmarks (acre.eval.tasks.TASKS). model: an open model,
    or its path. data: folder or file of the published JSONL, or rows; None = by name
    from the Hugging Face hub. methods: names with settings ("acre:eta=512"), see
    acre.eval.methods, or objects of that protocol. output: folder of the results; None
    keeps nothing. limit: questions per task. lengths, questions, depths, texts: of
    generated probes, in tokens; lengths also of texts whose perplexity is measured.
    engine: "local", "ray" or an `engines.Ray`. progress: a bar, or a callable that
    takes each sample. settings: of all methods (interval, window, stride, carry, eta,
    select, proxy, budget, passage).

    ValueError for unknown names and for a folder of other settings; FileNotFoundError;
    BlockingIOError where another run is writing to the folder. A record that cannot be
    used, and a question that fails, is counted and reported, never fatal.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    given = _known({k: v for k, v in settings.items() if v is not None})
    make_all(methods, Settings(**given))  # refuses before any work
    ask = Ask(
        limit, tuple(lengths), questions,
        None if depths is None else tuple(depths), texts, seed,
    )  # fmt: skip
    opened, spec = _open(model)
    first, later = opened.windows[proxy_of(opened, given.get("proxy", "auto"))]
    whole = {"seed": seed, "window": first, "stride": later, **given}
    chosen = make_all(methods, Settings(**whole))
    chosen = [m.on(opened) if isinstance(m, OwnMethod) else m for m in chosen]
    if opened.tokenizer is None:
        raise ValueError("model: has no tokenizer, evaluation needs one")
    prepared = prepare(names, data, ask, lambda t: len(opened.tokenizer.encode(t)))
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            return _evaluate(
                Path(folder), opened, spec, chosen, prepared, engine, progress
            )
    return _evaluate(Path(output), opened, spec, chosen, prepared, engine, progress)


def _known(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings, refusing a name that is none."""
    for name, value in settings.items():
        Settings.parse(name, str(value).lower())
    return settings


def _evaluate(
    folder: Path,
    model: Model,
    spec: ModelSpec | None,
    methods: Sequence[Method],
    prepared: Prepared,
    engine: str | engines.Ray,
    progress: bool | Callable[[Sample], None],
) -> Report:
    facts, keys = (
        _run_facts(model, methods, prepared),
        order(prepared.documents, methods),
    )
    with Journal(folder) as journal:
        journal.settle(facts)
        todo = works(prepared.documents, methods, journal.done())
        left = sum(map(len, todo))
        shown = _Progress(len(keys), len(keys) - left, progress)
        with shown.bar:
            for sample in _stream(engine, model, spec, methods, todo):
                journal.add(sample)
                shown.add(sample)
        journal.publish(keys)
        samples = [journal.samples[key] for key in keys if key in journal.samples]
    report = Report(samples, facts, [str(record) for record in prepared.bad])
    report.save(folder)
    rows, buckets = (
        with_settings(some, facts) for some in (report.table(), report.buckets())
    )
    draw(folder, samples, rows, buckets, {})
    return report
