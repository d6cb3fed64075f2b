"""The loop: examples in, updates, rows, checkpoints.

Takes a trainer, a stream of examples, settings and a group of processes; leaves the
trainer trained and the folder of rank 0 written. One idea: a run's whole state is that
of its last completed step, and changes in one place that no stop can split, so what
is saved at any moment is a step's end and a resumed run repeats the same numbers.
Refuses, with what it was and where, losses and gradients that are not finite.

All processes draw an example each, in rounds, until a batch has its tokens; they agree
on every round's sums, so that all of them stop at the same one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from acre.training.checkpoint import Checkpoints, Learner, read_part, read_state
from acre.training.log import Log, Row
from acre.training.parallel import Alone, Group
from acre.training.schedule import learning_rate
from acre.training.settings import Settings
from acre.training.stops import terminable, uninterrupted
from acre.training.sums import Adder, Shared, ThroughGroup, choose

if TYPE_CHECKING:
    from acre.training.examples import Example

Progress = bool | Callable[[Row], None]


class Examples(Protocol):
    """A stream: an iterator whose place is JSON, the same for every rank."""

    def __next__(self) -> Example: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Trainer(Learner, Shared, Protocol):
    """See `_core.Trainer`."""

    def accumulate(self, ids: Any, **arguments: Any) -> dict[str, float]: ...
    def update(self, **arguments: Any) -> float: ...
    def clear(self) -> None: ...


@dataclass
class State:
    """Of the last completed step. evaluated: the last step whose held-out loss is in
    the log. stream: the data's place."""

    step: int = 0
    seen: int = 0
    evaluated: int = -1
    loss: float | None = None
    stream: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sums:
    """Of a batch or of the held-out examples; those of all ranks, in their order."""

    examples: int = 0
    tokens: int = 0
    loss: float = 0.0
    weight: float = 0.0
    evidence: float = 0.0
    known: int = 0
    fault: str = ""

    def add(self, other: dict[str, Any]) -> None:
        """Those of one example; the first fault stays."""
        for name, value in other.items():
            if name != "fault" or not self.fault:
                setattr(self, name, getattr(self, name) + value)


class Folder:
    """What a run leaves behind; of rank 0 only."""

    def __init__(self, path: Path, metadata: dict[str, str], keep: int = 2) -> None:
        """Creates the folder and takes hold of it. BlockingIOError, OSError."""
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.metadata = path, metadata
        self.log = Log(path / "log.jsonl")
        self.checkpoints = Checkpoints(path / "checkpoints", keep)

    def described(self, step: int, seen: int) -> dict[str, str]:
        """An adapter's metadata after so many steps and tokens."""
        return {**self.metadata, "steps": str(step), "tokens": str(seen)}


class Loop:
    """One run. trainer, stream: of this process; folder: None but for rank 0. facts:
    what decides the run's numbers. held_out: examples to measure, of this rank, as many
    as every other has (None fills up). heads: bool [L, h] of the evidence term, None =
    the last layer's."""

    def __init__(
        self,
        trainer: Trainer,
        stream: Examples,
        settings: Settings,
        facts: dict[str, Any],
        folder: Folder | None,
        group: Group | None = None,
        *,
        save_every: int = 100,
        held_out: Sequence[Example | None] = (),
        evaluate_every: int = 0,
        progress: Progress = True,
        heads: np.ndarray | None = None,
    ) -> None:
        self.heads = heads
        self.trainer, self.stream, self.settings = trainer, stream, settings
        self.facts, self.folder, self.group = facts, folder, group or Alone()
        self.save_every, self.evaluate_every = save_every, evaluate_every
        self.held_out, self.progress = held_out, progress
        self.adder: Adder = ThroughGroup(self.group)  # until a faster way is found
        self.state = State(stream=stream.state())
        self.ended = False  # the data, before the steps were done

    # ---------------------------------------------------------------------- the whole

    def run(self) -> State:
        """Trains to the last step, or to the end of the data.

        KeyboardInterrupt, SystemExit on SIGTERM, or an error of the group comes after
        the last completed step was saved. FloatingPointError, OSError: the checkpoints
        before are untouched.
        """
        self._resume()
        self.adder = choose(self.trainer, self.group)
        with terminable(), closing(self.adder), self._bar() as bar:
            try:
                self._evaluate()  # a stop may have come just before it
                while self.state.step < self.settings.steps and self._step(bar):
                    self._evaluate()
                    if self.state.step % self.save_every == 0:
                        self.save()
                self.save()
            except (KeyboardInterrupt, SystemExit, ConnectionError, TimeoutError):
                self.trainer.clear()
                self.save()
                raise
        return self.state

    def _bar(self) -> Any:
        from tqdm import tqdm

        shown = self.progress is True and self.group.rank == 0
        return tqdm(
            total=self.settings.steps, initial=self.state.step, unit="step",
            desc=self.settings.stage, disable=None if shown else True,
        )  # fmt: skip

    def _step(self, bar: Any) -> bool:
        """One update, one row; False where there is no more data."""
        began, step = time.perf_counter(), self.state.step + 1
        sums = self._batch(step)
        if not sums.examples:
            self._end(step)
            return False
        rate = learning_rate(
            step, self.settings.steps, self.settings.lr, self.settings.warmup
        )
        self._share_gradients(step)
        with uninterrupted():
            norm = self._update(step, rate, sums)
            row = self._row(step, rate, norm, sums, time.perf_counter() - began)
            loss, seen = row["loss"], row["seen"]
            self.state = State(
                step, seen, self.state.evaluated, loss, self.stream.state()
            )
            self._report(row)
        bar.set_postfix(
            {"loss": f"{loss:.4f}", "tok/s": f"{row['tokens_per_s']:.0f}"},
            refresh=False,
        )
        bar.update(1)
        return True

    def _end(self, step: int) -> None:
        """The data has ended, before this step."""
        if step == 1:
            raise ValueError("data: gave no example")
        self.ended = True

    # ---------------------------------------------------------------------- one step

    def _batch(self, step: int) -> Sums:
        """Rounds of one example for each rank, until the batch is full or the data at
        its end. FloatingPointError naming the example."""
        sums = Sums()
        while sums.tokens < self.settings.batch_tokens:
            example = next(self.stream, None)
            before = sums.examples
            number = sums.examples + self.group.rank + 1
            self._add(sums, example, True, f"step {step}, example {number}")
            if sums.examples == before:
                break
        return sums

    def _add(
        self, sums: Sums, example: Example | None, gradients: bool, where: str
    ) -> None:
        """Runs this rank's example of a round and adds those of all."""
        mine = {} if example is None else self._accumulate(example, gradients, where)
        for one in self.group.exchange(mine):
            sums.add(one)
        if sums.fault:
            self.trainer.clear()
            raise FloatingPointError(f"{sums.fault}; {self._last_good()}")

    def _accumulate(
        self, example: Example, gradients: bool, where: str
    ) -> dict[str, Any]:
        """Sums of one example."""
        arguments = example.arguments()
        if example.questions:
            arguments["evidence_weight"] = self.settings.evidence_weight
            arguments["heads"] = self.heads
        try:
            got = self.trainer.accumulate(example.ids, gradients=gradients, **arguments)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        out: dict[str, Any] = {"examples": 1, "tokens": example.tokens}
        if not math.isfinite(got["loss"]):
            fault = f"{where}: the loss of its {example.tokens} tokens is {got['loss']}"
            return {**out, "fault": fault}
        return out | {key: got[key] for key in ("loss", "weight", "evidence", "known")}

    def _share_gradients(self, step: int) -> None:
        """The sum over all ranks becomes each one's gradient."""
        try:
            self.adder.sum(self.trainer)
        except ValueError as error:
            raise FloatingPointError(
                f"step {step}: the sum of the gradients: {error}; {self._last_good()}"
            ) from error

    def _update(self, step: int, rate: float, sums: Sums) -> float:
        """AdamW on the mean over the batch's weights; the gradient's norm."""
        if not sums.weight > 0:
            raise ValueError(f"step {step}: its {sums.examples} examples weigh nothing")
        s = self.settings
        try:
            return self.trainer.update(
                step=step, lr=rate, divisor=sums.weight, clip=s.clip, beta1=s.beta1,
                beta2=s.beta2, weight_decay=s.weight_decay,
            )  # fmt: skip
        except ValueError as error:
            raise FloatingPointError(
                f"step {step}, its {sums.examples} examples: {error}; "
                f"{self._last_good()}"
            ) from error

    def _row(
        self, step: int, rate: float, norm: float, sums: Sums, seconds: float
    ) -> Row:
        return {
            "step": step,
            "loss": sums.loss / sums.weight,
            "tokens": sums.tokens,
            "seen": self.state.seen + sums.tokens,
            "examples": sums.examples,
            "lr": rate,
            "norm": norm,
            "evidence": sums.evidence / sums.known if sums.known else None,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(sums.tokens / max(seconds, 1e-9), 1),
        }

    def _report(self, row: Row) -> None:
        if self.folder is not None:
            self.folder.log.add(row)
            if callable(self.progress):
                self.progress(row)

    def _evaluate(self) -> None:
        """The held-out loss after this step, where it is due and not yet known."""
        step, every = self.state.step, self.evaluate_every
        due = every > 0 and (step % every == 0 or step == self.settings.steps)
        if not due or self.state.evaluated >= step:
            return
        sums = Sums()
        for number, example in enumerate(self.held_out, start=1):
            self._add(sums, example, False, f"held-out example {number}")
        loss = sums.loss / sums.weight if sums.weight else None
        with uninterrupted():
            self.state.evaluated = step
            self._report({"step": step, "held_out": loss})

    # ---------------------------------------------------------------------- the folder

    def save(self) -> Path | None:
        """A checkpoint of the last completed step. OSError names the one before."""
        if self.folder is None:
            return None
        state = vars(self.state)
        with uninterrupted():
            try:
                state = {**state, "facts": self.facts, "log": self.folder.log.sync()}
                said = self.folder.described(self.state.step, self.state.seen)
                path = self.folder.checkpoints.save(
                    self.state.step, self.trainer, state, said
                )
                self.folder.log.draw()
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"step {self.state.step} is not saved: {error.strerror}; "
                    f"{self._last_good()}",
                    error.filename,
                ) from error
        return path

    def _last_good(self) -> str:
        path = self.folder and self.folder.checkpoints.latest()
        return f"the last good checkpoint is {path}" if path else "none was saved yet"

    def _resume(self) -> None:
        """Goes to the newest checkpoint, which rank 0 reads for all."""
        said, path = None, None
        if self.folder is not None:
            path = self.folder.checkpoints.latest()
            said = None if path is None else read_state(path, self.facts)
            self.folder.log.cut(0 if said is None else said["log"])
        said = self.group.exchange(said)[0]
        if said is None:
            return
        for part in ("parameters", "first", "second"):
            self.trainer.write(part, self._read(path, part, said))
        self.stream.restore(said["stream"])
        self.state = State(**{name: said[name] for name in vars(self.state)})

    def _read(self, path: Path | None, part: str, said: dict[str, Any]) -> np.ndarray:
        """A part of the checkpoint, on every rank."""
        if path is not None:
            values = read_part(path, part, self.trainer, said)
        else:  # x + -0.0 is x, of either zero too: the sum is what rank 0 has read
            values = np.full(self.trainer.size, -0.0, dtype=np.float32)
        self.group.sum(values)
        return values
