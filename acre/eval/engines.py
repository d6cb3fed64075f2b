"""Where the work is done: in this process, or spread over a Ray cluster.

Takes the works of an evaluation; gives samples as they are finished. One idea: a
document with all its questions goes to one worker, which holds one model, so a cache is
built once wherever it is needed; a worker that is lost hands its unfinished questions
to another. Refuses Ray where it is not installed, and workers whose model is not the
driver's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from acre.eval.methods import Method
from acre.eval.results import Key, Sample, key_of
from acre.eval.shelf import Shelf
from acre.eval.work import RETRIES, ModelSpec, Work, lost, samples
from acre.model import Model
from acre.optional import needs

ENGINES = ("local", "ray")


def local(
    model: Model, methods: Sequence[Method], works: Sequence[Work]
) -> Iterator[Sample]:
    """One document after the other, in this process."""
    shelf = Shelf(model)
    for work in works:
        yield from samples(shelf, methods, work)


class _Worker:
    """A process of the cluster with a model of its own."""

    def __init__(
        self, spec: ModelSpec, fingerprints: Mapping[str, str], methods: list[Method]
    ) -> None:
        model = spec.open()
        if dict(model.fingerprints) != dict(fingerprints):
            raise ValueError(
                f"model: {spec.path} on this node is not the driver's: fingerprints "
                f"{model.fingerprints} here, {dict(fingerprints)} there"
            )
        self.shelf, self.methods = Shelf(model), methods

    def run(self, work: Work) -> Iterator[Sample]:
        yield from samples(self.shelf, self.methods, work)


@dataclass
class _Running:
    """A worker at a document."""

    actor: Any
    stream: Any
    work: Work
    done: set[Key] = field(default_factory=set)


class Ray:
    """Documents over the workers of a Ray cluster.

    workers: None = as many as the cluster's CPUs (or GPUs) allow, no more than there
    are documents. threads: CPUs of each. gpus: of each. address: None = the running
    cluster (RAY_ADDRESS), or one of this machine's own.
    """

    def __init__(
        self,
        workers: int | None = None,
        threads: int = 1,
        gpus: float = 0,
        address: str | None = None,
    ) -> None:
        for name, value in (("workers", 1 if workers is None else workers),
                            ("threads", threads)):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.workers, self.threads, self.gpus = workers, threads, gpus
        self.address = address

    def run(
        self,
        spec: ModelSpec,
        model: Model,
        methods: Sequence[Method],
        works: Sequence[Work],
    ) -> Iterator[Sample]:
        """Samples in the order in which they are finished."""
        ray = needs("ray", "ray")
        own = not ray.is_initialized()
        if own:
            ray.init(address=self.address, log_to_driver=False, logging_level="error")
        try:
            yield from _Drive(self, ray, spec, model, list(methods), works).run()
        finally:
            if own:
                ray.shutdown()


class _Drive:
    """One run of `Ray`: who is at what, and what waits."""

    def __init__(
        self,
        engine: Ray,
        ray: Any,
        spec: ModelSpec,
        model: Model,
        methods: list[Method],
        works: Sequence[Work],
    ) -> None:
        self.engine, self.ray, self.methods = engine, ray, methods
        self.labels = [method.label for method in methods]
        self.waiting = deque(works)
        options = {**spec.options, "threads": engine.threads}
        start = (ModelSpec(spec.path, options), dict(model.fingerprints), methods)
        remote = ray.remote(
            num_cpus=engine.threads, num_gpus=engine.gpus, max_restarts=0
        )(_Worker)
        self.new_actor = lambda: remote.remote(*start)
        self.running: dict[Any, _Running] = {}

    def count(self) -> int:
        """How many workers to start."""
        have = self.ray.cluster_resources()
        most = int(have.get("CPU", 1) // self.engine.threads)
        if self.engine.gpus:
            most = min(most, int(have.get("GPU", 0) / self.engine.gpus))
        wanted = self.engine.workers or max(most, 1)
        if most < 1 or (self.engine.workers or 0) > most:
            raise ValueError(
                f"workers: {wanted} of {self.engine.threads} CPUs and "
                f"{self.engine.gpus} GPUs do not fit the cluster: {have}"
            )
        return min(wanted, len(self.waiting))

    def give(self, actor: Any) -> None:
        """The next document to a worker that is free."""
        if self.waiting:
            work = self.waiting.popleft()
            stream = actor.run.options(num_returns="streaming").remote(work)
            self.running[stream] = _Running(actor, stream, work)

    def run(self) -> Iterator[Sample]:
        for _ in range(self.count()):
            self.give(self.new_actor())
        while self.running:
            ready, _ = self.ray.wait(list(self.running), num_returns=1)
            for stream in ready:
                yield from self.take(self.running[stream])

    def take(self, at: _Running) -> Iterator[Sample]:
        """One sample of a stream, or what its end means."""
        try:
            sample = self.ray.get(next(at.stream))
        except StopIteration:
            del self.running[at.stream]
            self.give(at.actor)
            return
        except self.ray.exceptions.RayTaskError as error:  # the worker cannot work
            raise error.as_instanceof_cause() from None
        except self.ray.exceptions.RayError as error:
            del self.running[at.stream]
            yield from self.replace(at, error)
            return
        at.done.add(key_of(sample))
        yield sample

    def replace(self, at: _Running, error: Exception) -> Iterator[Sample]:
        """A lost worker's unfinished questions go to a new one, RETRIES times."""
        rest = at.work.without(self.labels, at.done)
        if rest.attempt >= RETRIES:
            yield from lost(rest, self.methods, error)
        elif len(rest):
            self.waiting.appendleft(rest)
        if self.waiting:
            self.give(self.new_actor())
