"""A trainer and a stream with the interfaces of the real ones, and nothing behind.

`Trainer` learns a vector towards targets that the tokens give (a quadratic loss, AdamW
in float32); `Stream` gives examples by their number. As a program it runs one training
in the folder of its first argument, and dies or stops where its environment says:
KILL="update:3" kills it in the third call of update.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ENTRIES = [
    ("model.acre_embed_tokens.weight", 0, (1, 8)),
    ("model.layers.0.self_attn.acre_q_proj.weight", 8, (4, 8)),
    ("model.layers.0.self_attn.acre_q_proj.bias", 40, (4,)),
]
SIZE = 44
FACTS = {"model": {"fingerprint": "abc"}}
METADATA = {"base_name": "toy", "base_fingerprint": "abc"}


class Trainer:
    """L1 parameters in name only."""

    def __init__(self, delay: float = 0.0) -> None:
        zeros = [np.zeros(SIZE, dtype=np.float32) for _ in range(4)]
        names = ("parameters", "gradients", "first", "second")
        self.parts = dict(zip(names, zeros, strict=True))
        self.parts["parameters"] += np.linspace(-1, 1, SIZE, dtype=np.float32)
        self.size, self.entries, self.delay = SIZE, ENTRIES, delay

    def read(self, part: str) -> np.ndarray:
        return self.parts[part].copy()

    def write(self, part: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise ValueError(f"{part}: not finite")
        self.parts[part][:] = values

    def clear(self) -> None:
        self.parts["gradients"][:] = 0

    def invite(self) -> bytes:
        raise NotImplementedError("a fake has no device")

    def leave(self) -> None:
        """It has joined nobody."""

    def accumulate(self, ids, *, gradients=True, questions=(), **_) -> dict:
        time.sleep(self.delay)
        rng = np.random.default_rng([int(i) for i in ids])
        target = rng.standard_normal(SIZE).astype(np.float32)
        miss, weight = self.parts["parameters"] - target, float(len(ids))
        if gradients:
            self.parts["gradients"] += np.float32(weight) * miss
        share = float(sum(np.mean(evidence) for evidence in questions))
        loss = 0.5 * weight * float(np.mean(np.float64(miss) ** 2))
        loss = float("nan") if ids[0] == 13 else loss
        counts = {"known": len(questions), "rows": 0}
        return {"loss": loss, "weight": weight, "evidence": share, **counts}

    def update(
        self, *, step, lr, divisor, clip, beta1, beta2, weight_decay, eps=1e-8
    ) -> float:
        p = self.parts
        g = p["gradients"] / np.float32(divisor)
        norm = float(np.sqrt(np.sum(np.float64(g) ** 2)))
        if not np.isfinite(norm):
            raise ValueError(f"norm: {norm}")
        if clip and norm > clip:
            g *= np.float32(clip / norm)
        p["first"][:] = beta1 * p["first"] + (1 - beta1) * g
        p["second"][:] = beta2 * p["second"] + (1 - beta2) * g * g
        m, v = p["first"] / (1 - beta1**step), p["second"] / (1 - beta2**step)
        p["parameters"] *= np.float32(1 - lr * weight_decay)
        p["parameters"] -= np.float32(lr) * m / (np.sqrt(v) + np.float32(eps))
        self.clear()
        return norm


@dataclass
class Example:
    ids: np.ndarray
    questions: tuple = ()  # of booleans, in place of the real ones

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def arguments(self) -> dict[str, Any]:
        return {"questions": self.questions, "intervals": [8]}


class Stream:
    """Examples 0, 1, ... of ten tokens each; number `bad` has a loss of nan."""

    def __init__(self, rank=0, world=1, count=10**6, bad=-1) -> None:
        self.rank, self.world, self.count, self.bad = rank, world, count, bad
        self.at = 0

    def __next__(self) -> Example:
        number = self.at + self.rank
        self.at += self.world
        if number >= self.count:
            raise StopIteration
        ids = np.arange(10, dtype=np.int32) + 100 + number
        if number == self.bad:
            ids[0] = 13
        questions = (np.arange(10) < number % 4,) if number % 2 else ()
        return Example(ids, questions)

    def state(self) -> dict[str, int]:
        return {"at": self.at}

    def restore(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def settings(**changes: Any) -> Any:
    from acre.training.settings import Settings

    plain = {"stage": "stage1", "steps": 12, "batch_tokens": 40, "lr": 0.05,
             "warmup": 3, "evidence_weight": 2.0}  # fmt: skip
    return Settings(**{**plain, **changes})


def loop(
    out: Path, *, stream=None, trainer=None, group=None, facts=FACTS, held=(), **changes
) -> Any:
    """A Loop over the fakes; its folder is there on rank 0."""
    from acre.training.loop import Folder, Loop

    chosen = settings(**changes)
    rank, world = (group.rank, group.world) if group else (0, 1)
    stream = stream or Stream(rank, world)
    every, folder = 4 if held else 0, None
    if rank == 0:
        folder = Folder(out, METADATA)
        folder.log.draw = lambda: None  # matplotlib takes its time
    return Loop(
        trainer or Trainer(), stream, chosen, {**facts, "settings": chosen.record()},
        folder, group,
        save_every=3, held_out=held, evaluate_every=every, progress=False,
    )  # fmt: skip


def held() -> list[Example]:
    """Two examples to measure."""
    return [Example(np.arange(5) + i) for i in range(2)]


# ---------------------------------------------------------------------------- a process


def _dying(owner: Any, name: str, call: int, half: bool) -> None:
    """Kills this process in the call-th call of owner.name: after half of what it
    would write, or after its work."""
    work, left = getattr(owner, name), [call]

    def die(*arguments, **named):
        left[0] -= 1
        if left[0] == 0 and half:
            file, data = arguments
            file.write(memoryview(data)[: len(memoryview(data)) // 2])
        else:
            out = work(*arguments, **named)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    setattr(owner, name, die)


def main() -> None:
    from acre import files, safetensors_file
    from acre.training import log, parallel

    owners = {"update": (Trainer, "update", False), "line": (log, "write", True),
              "logged": (log, "write", False), "rename": (files.os, "rename", False),
              "replace": (files.os, "replace", False),
              "tensor": (safetensors_file, "write", True)}  # fmt: skip
    if "KILL" in os.environ:
        name, _, call = os.environ["KILL"].partition(":")
        owner, function, half = owners[name]
        _dying(owner, function, int(call), half)
    delay = float(os.environ.get("DELAY", "0"))
    group = parallel.join(timeout=20)
    chosen = loop(Path(sys.argv[1]), trainer=Trainer(delay), group=group, held=held())
    try:
        chosen.run()
    finally:
        group.close()
    chosen.trainer.parts["parameters"].tofile(f"{sys.argv[1]}.rank{group.rank}")


if __name__ == "__main__":
    main()
