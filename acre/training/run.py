"""`acre.train`: a model, a stage and data to an adapter, in a folder that survives.

Takes a model, data and settings; leaves checkpoints, a log with its picture and, at the
end, the adapter. One idea: the same call again goes on where the last one was stopped,
and ends in the same bits. Refuses a folder of another model or of other settings.

    run.json              model, settings, versions
    log.jsonl, loss.png   a line per step; see acre.training.log
    checkpoints/step-N/   the last two; see acre.training.checkpoint
    adapter.safetensors   at the end, for Model.from_pretrained(adapter=...)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from acre import _core
from acre.eval.results import versions, write_atomically
from acre.generate import integer
from acre.loaders import ADAPTER
from acre.model import Model
from acre.scoring import Scoring, head_mask
from acre.training.adapter import describe, settings_of, write_adapter
from acre.training.checkpoint import Learner, check_facts
from acre.training.examples import INTERVALS, Example
from acre.training.loop import Examples, Folder, Loop, Progress
from acre.training.parallel import Group, join, own_device
from acre.training.settings import PASSES, Settings, settled
from acre.training.stream import Stream


@dataclass(frozen=True)
class Trained:
    """What a run came to.

    adapter: the file, None but on rank 0. ended_early: the data ended before the steps
    did. loss: nats per token of the last step.
    """

    folder: Path
    adapter: Path | None
    step: int
    tokens: int
    loss: float | None
    ended_early: bool


def train(
    model: Model | str | os.PathLike[str],
    stage: str,
    data: Any,
    out: str | os.PathLike[str],
    *,
    steps: int | None = None,
    tokens: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    batch_tokens: int = 65536,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.95,
    length: int | tuple[int, int] = 16384,
    window: int = 4096,
    stride: int = 2048,
    carry: int = 0,
    intervals: Sequence[int] = INTERVALS,
    questions: int = 16,
    context_weight: float = 0.0,
    evidence_weight: float = 0.0,
    evidence_heads: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    passes: int | None = None,
    save_every: int = 100,
    keep: int = 2,
    held_out: Any = None,
    held_out_examples: int = 16,
    evaluate_every: int = 100,
    adapter: str | os.PathLike[str] | None = None,
    device: str | None = None,
    resume: bool = True,
    progress: Progress = True,
    group: Group | None = None,
) -> Trained:
    """Trains the L1 parameters of a frozen model; writes them as an adapter.

    model: an open model, whose L1 parameters are the start (copies of its own
    projections where it has none), or a path, opened with `adapter` as the start, on
    `device` (None = "cpu"): several processes take a GPU each for "cuda".
    stage: "stage1" (texts) or "stage2" (questions). data: as `Stream` takes it (files,
    folders, builders, with their shares), or a stream. out: the folder.

    steps: updates in all, or tokens: as many updates as they make. lr: peak rate; None
    = 5e-5 in stage 1, 1e-5 in stage 2. warmup: steps; None = 3 percent; then a cosine
    to a tenth. batch_tokens: least tokens of an update, of all processes together.
    clip: greatest norm of a gradient, 0 = any. length: tokens of an example, or (least,
    most). window, stride, carry: as `Model.build`. intervals: what l of each window is
    drawn from. questions: the most that are asked of one context.
    context_weight: what a token of that context counts in the loss, where an answer's
    counts 1; above 0, the entries keep what stage 1 taught them. evidence_weight: the
    term that rewards attention to a question's known evidence counts like so many
    tokens; evidence_heads: the (layer, head) pairs that it trains and that then score
    questions, None = the last layer's. passes: over the files; None = 1 in stage 1, 2
    in stage 2. length ... context_weight and passes are a given stream's own affair.

    save_every: steps between checkpoints, of which the last `keep` stay. held_out: data
    whose loss is measured every `evaluate_every` steps, on its first examples. resume:
    False refuses a folder that holds a run. progress: a tqdm bar (silent off a
    terminal), or a callable that takes each row of the log. group: of the processes
    that train together; None = as the launcher's environment says.

    Ctrl-C saves the last completed step and comes out as KeyboardInterrupt.
    ValueError, TypeError, FileNotFoundError, ModelFileError; BlockingIOError where
    another run is writing to the folder; FloatingPointError where a loss or gradient is
    not finite, OSError where the disk is full: earlier checkpoints stay as they are.
    """
    settings = settled(
        stage, steps, tokens, lr, warmup, batch_tokens, clip=clip,
        weight_decay=weight_decay, beta1=beta1, beta2=beta2,
        evidence_weight=evidence_weight, seed=seed,
        heads=_pairs(evidence_heads),
    )  # fmt: skip
    integer("save_every", save_every, 1)
    integer("keep", keep, 1)
    integer("evaluate_every", evaluate_every, 1)
    opened = _open(model, adapter, device)
    scoring = _scoring(opened, settings)
    shape = {"window": window, "stride": stride, "carry": carry}
    shape |= {"length": length, "intervals": tuple(intervals), "seed": seed}
    shape |= {"questions": questions, "context_weight": context_weight}
    shape["passes"] = PASSES[stage] if passes is None else passes
    peers = join() if group is None else group
    try:
        stream = _stream(opened, data, shape, peers)
        checked = _held_out(opened, held_out, shape, peers, held_out_examples)
        trainer = _core.Trainer(opened.core)
        facts = run_facts(opened, trainer, settings, peers)
        metadata = describe(
            opened.prints, opened.name, stage=stage, scoring=scoring.record(),
            **settings_of(window, stride, intervals),
        )  # fmt: skip
        folder = open_folder(Path(out), facts, metadata, keep, resume, peers)
        loop = Loop(
            trainer, stream, settings, facts, folder, peers, save_every=save_every,
            held_out=checked, evaluate_every=evaluate_every if checked else 0,
            progress=progress, heads=scoring.heads,
        )  # fmt: skip
        return finish(loop, Path(out))
    finally:
        if group is None:
            peers.close()


def finish(loop: Loop, out: Path) -> Trained:
    """Runs the loop and writes the adapter."""
    folder = loop.folder
    try:
        state = loop.run()
        path = None
        if folder is not None:
            path = out / ADAPTER
            tensors = by_name(loop.trainer)
            write_adapter(path, tensors, folder.described(state.step, state.seen))
        return Trained(out, path, state.step, state.seen, state.loss, loop.ended)
    finally:
        if folder is not None:
            folder.log.close()


def by_name(trainer: Learner) -> dict[str, np.ndarray]:
    """The parameters, float32 by Hugging Face name; views of one vector."""
    values = trainer.read("parameters")
    return {
        name: values[at : at + int(np.prod(shape))].reshape(shape)
        for name, at, shape in trainer.entries
    }


def _open(
    model: Model | str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    device: str | None,
) -> Model:
    if not isinstance(model, Model):
        device = own_device("cpu" if device is None else device)
        return Model.from_pretrained(model, adapter=adapter, device=device)
    if adapter is not None:
        raise ValueError("adapter: the model is open; open it with this adapter")
    if device is not None:
        raise ValueError("device: the model is open; open it on this device")
    return model


def _pairs(
    heads: Sequence[tuple[int, int]] | None,
) -> tuple[tuple[int, int], ...] | None:
    """(layer, head) pairs as integers."""
    return None if heads is None else tuple((int(a), int(b)) for a, b in heads)


def _scoring(model: Model, settings: Settings) -> Scoring:
    """How the trained entries are scored: by the heads of the evidence term, or as the
    model's own L1 parameters were."""
    if settings.heads is None:
        return model.scoring["trained"]
    sizes = (model.config[name] for name in ("layers", "heads"))
    return Scoring(head_mask(settings.heads, *sizes))


def _stream(model: Model, data: Any, shape: dict[str, Any], group: Group) -> Examples:
    """A stream as it is, or one of the data named."""
    if hasattr(data, "restore"):
        return data
    return Stream(model, data, rank=group.rank, world=group.world, **shape)


def _held_out(
    model: Model, data: Any, shape: dict[str, Any], group: Group, count: int
) -> list[Example | None]:
    """This rank's share of the first `count` examples, None where it has no more."""
    if data is None:
        return []
    stream = _stream(model, data, {**shape, "passes": 1}, group)
    rounds = -(-integer("held_out_examples", count, 1) // group.world)
    some = [*itertools.islice(iter(lambda: next(stream, None), None), rounds)]
    most = max(group.exchange(len(some)))
    if most == 0:
        raise ValueError("held_out: gave no example")
    return some + [None] * (most - len(some))


def run_facts(
    model: Model, trainer: Learner, settings: Settings, group: Group
) -> dict[str, Any]:
    """What decides a run's numbers; ValueError unless all ranks agree on it."""
    start = hashlib.sha256(trainer.read("parameters")).hexdigest()
    facts = {
        "settings": settings.record(),
        "model": {
            "fingerprint": model.fingerprint,
            "dtype": model.config["dtype"],
            "start": start,
        },
        "world": group.world,
    }
    for rank, theirs in enumerate(group.exchange(facts)):
        check_facts(f"rank {rank}", theirs, facts)
    return facts


def open_folder(
    path: Path,
    facts: dict[str, Any],
    metadata: dict[str, str],
    keep: int,
    resume: bool,
    group: Group,
) -> Folder | None:
    """The folder of rank 0, with run.json; None elsewhere. ValueError where it holds
    another run, or any, and `resume` is False."""
    if group.rank:
        return None
    record = path / "run.json"
    if record.exists():
        if not resume:
            raise ValueError(f"out: {path} holds a run already; name another folder")
        check_facts(path, json.loads(record.read_text("utf-8")), facts)
    folder = Folder(path, metadata, keep)
    said = {**facts, "name": metadata.get("base_name"), "versions": versions()}
    write_atomically(record, json.dumps(said, indent=2) + "\n")
    return folder
