"""How the gradients of all processes become one: on their GPUs, or through the group.

Takes a trainer and its group; gives something with `sum(trainer)` and `close()`. One
idea: every rank says what it can at each step of getting there, and all go the fast way
or none does, so that no rank waits for one that went another. On the GPUs NCCL adds
(`Trainer.share`); through the group every gradient travels by way of rank 0's memory.
Why the fast way is not taken on GPUs is said once, by rank 0.

ACRE_NCCL=0 in the environment of any rank turns the fast way off.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from acre.training.parallel import Group

LIMIT = 300.0  # seconds that all may take to meet, or one sum
LOOK = 0.2  # seconds between looks at the peers
GRACE = 5.0  # seconds for a sum to end that a peer, by then gone, may have seen ended
log = logging.getLogger("acre.training")


class Shared(Protocol):
    """What sums need of a trainer; see `_core.Trainer`."""

    def read(self, part: str) -> np.ndarray: ...
    def write(self, part: str, values: np.ndarray) -> None: ...
    def invite(self) -> bytes: ...
    def join(self, rank: int, world: int, id: bytes) -> None: ...
    def share(self) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def leave(self) -> None: ...


class Adder(Protocol):
    """A way to add up. Every rank calls `sum` at the same steps."""

    def sum(self, trainer: Shared) -> None:
        """The sum of all ranks' gradients becomes each one's, with the same bits.
        ConnectionError, TimeoutError where a rank does not come, ValueError where the
        sum is not finite (or the trainer's update says so): the gradients are none."""

    def close(self) -> None:
        """Ends it; the group stays open."""


class ThroughGroup:
    """By the group itself, in host memory."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def sum(self, trainer: Shared) -> None:
        """See `Adder`."""
        if self._group.world == 1:
            return
        gradients = trainer.read("gradients")
        self._group.sum(gradients)
        trainer.write("gradients", gradients)

    def close(self) -> None:
        """Nothing of its own."""


class OnDevices:
    """By the devices, whose trainers have joined."""

    def __init__(self, trainer: Shared, group: Group, limit: float = LIMIT) -> None:
        self._trainer, self._group, self._limit = trainer, group, limit

    def sum(self, trainer: Shared) -> None:
        """See `Adder`; whatever happens, the trainer does not go on waiting."""
        try:
            trainer.share()
            wait(trainer, self._group, "sum", self._limit)
        except BaseException:
            trainer.leave()
            raise

    def close(self) -> None:
        """Parts from the others."""
        self._trainer.leave()


def wait(trainer: Shared, group: Group, what: str, limit: float) -> None:
    """Until what `trainer` began is through. ConnectionError where a peer has gone,
    TimeoutError after `limit` seconds: then leave()."""
    began, gone = time.monotonic(), None
    while not trainer.wait(LOOK):
        now = time.monotonic()
        if gone is None and not group.whole():
            gone = now
        if gone is not None and now >= gone + GRACE:
            raise ConnectionError(
                f"rank {group.rank}: another rank has gone in the middle of a {what} "
                "on the devices (its own message says why)"
            )
        if now >= began + limit:
            raise TimeoutError(
                f"rank {group.rank}: a {what} on the devices was not through after "
                f"{limit:g} s"
            )


# ----------------------------------------------------------------------------- choosing


def choose(
    trainer: Shared,
    group: Group,
    environment: Mapping[str, str] | None = None,
    limit: float = LIMIT,
) -> Adder:
    """The fastest way that all ranks can go. ConnectionError, TimeoutError of the
    group; ValueError where ACRE_NCCL is neither 0 nor 1."""
    through = ThroughGroup(group)
    if group.world == 1:
        return through
    environment = os.environ if environment is None else environment
    try:
        why = _meet(trainer, group, environment, limit)
    except BaseException:
        trainer.leave()
        raise
    if why is None:
        return OnDevices(trainer, group, limit)
    trainer.leave()
    if group.rank == 0 and _on_gpu(trainer):
        log.warning("gradients are summed through host memory: %s", why)
    return through


def _meet(
    trainer: Shared, group: Group, environment: Mapping[str, str], limit: float
) -> str | None:
    """Meets the others on the devices; None, or the first reason why not, on all."""
    found: dict[str, bytes] = {}

    def invite() -> None:
        if group.rank == 0:
            found["id"] = trainer.invite()

    def join() -> None:
        trainer.join(group.rank, group.world, found["id"])

    why = _agree(group, lambda: _allowed(environment)) or _agree(group, invite)
    if why is not None:
        return why
    said = group.exchange(found["id"].hex() if group.rank == 0 else None)
    found["id"] = bytes.fromhex(said[0])
    return _agree(group, join) or _agree(
        group, lambda: wait(trainer, group, "meeting", limit)
    )


def _agree(group: Group, work: Callable[[], Any]) -> str | None:
    """Does this rank's work; None, or why the first rank that failed did, on all."""
    why = None
    try:
        work()
    except (NotImplementedError, ConnectionError, TimeoutError, MemoryError) as error:
        why = f"{error}"
    for rank, said in enumerate(group.exchange(why)):
        if said is not None:
            return f"rank {rank}: {said}"
    return None


def _allowed(environment: Mapping[str, str]) -> None:
    """NotImplementedError where the environment turns the fast way off."""
    said = environment.get("ACRE_NCCL", "1")
    if said not in ("0", "1"):
        raise ValueError(f"ACRE_NCCL: got {said!r}, expected 0 or 1")
    if said == "0":
        raise NotImplementedError("ACRE_NCCL=0")


def _on_gpu(trainer: Any) -> bool:
    """Whether there would be a faster way at all."""
    model = getattr(trainer, "model", None)
    return model is not None and model.engine.device.startswith("cuda")
