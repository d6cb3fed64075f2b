"""Several processes that train as one: who they are, and how they sum.

Takes the environment that the usual launchers set; gives a `Group`. One idea: rank 0
receives the others' numbers in the order of their ranks, adds them in that order and
sends the sum back, so every process has the same bits, whatever the network does. Small
values travel as JSON, arrays as their bytes, nothing is unpickled. Refuses peers that
do not know the key, and reports one that died or is silent for too long by its rank.

On GPUs gradients have a faster way to be summed (acre.training.sums).
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, Protocol

import numpy as np

LAUNCHERS = (  # rank, processes, rank on this machine
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
JOBS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "OMPI_MCA_ess_base_jobid")
PORT, TIMEOUT, MEETING = 29500, 1800.0, 300.0  # seconds: of a step, of all to come
PIECE = 4 << 20  # numbers that travel at once
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class Group(Protocol):
    """The processes that train together. Every one of them makes the same calls in the
    same order; ConnectionError or TimeoutError names a rank that does not."""

    rank: int
    world: int

    def sum(self, array: np.ndarray) -> None:
        """float32 [P], in place: the sum over all ranks, the same bits on each."""

    def exchange(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order."""

    def whole(self) -> bool:
        """Whether nobody, of those that this rank would hear of, has gone; at once."""

    def close(self) -> None:
        """Ends it; the others' next call fails."""


class Alone:
    """The group of one process."""

    rank, world = 0, 1

    def sum(self, array: np.ndarray) -> None:
        """Nothing to add."""

    def exchange(self, value: Any) -> list[Any]:
        """The value itself, as JSON gives it back."""
        return [json.loads(json.dumps(value))]

    def whole(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Nothing to end."""


# -------------------------------------------------------------------------- where it is


@dataclass(frozen=True)
class Place:
    """A process among others. local: its number on this machine (which GPU it takes).
    address, port: where rank 0 waits. key: what all of them know."""

    rank: int = 0
    world: int = 1
    local: int = 0
    address: str = "127.0.0.1"
    port: int = PORT
    key: bytes = b""


def place(environment: Mapping[str, str] | None = None) -> Place:
    """From RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (torchrun), or what
    Slurm or Open MPI set. ACRE_PORT and ACRE_KEY replace the port, and the key, which
    is else made of the port and the job's number. ValueError naming a variable."""
    env = os.environ if environment is None else environment
    for names in LAUNCHERS:
        if names[0] in env and names[1] in env:
            break
    else:
        return Place()
    world = _count(env, names[1], 1, None)
    rank = _count(env, names[0], 0, world - 1)
    local = _count(env, names[2], 0, None) if names[2] in env else 0
    port = _port(env)
    job = next((env[name] for name in JOBS if name in env), "")
    key = env.get("ACRE_KEY") or f"acre {port} {job}"
    return Place(
        rank, world, local, env.get("MASTER_ADDR", "127.0.0.1"), port,
        hashlib.sha256(key.encode()).digest(),
    )  # fmt: skip


def own_device(device: str, environment: Mapping[str, str] | None = None) -> str:
    """The device that a process opens for `device`: of several processes "cuda" is for
    each the GPU of its number on this machine (LOCAL_RANK), or the only one that it may
    see (CUDA_VISIBLE_DEVICES); all else is as it is. ValueError naming a variable."""
    env = os.environ if environment is None else environment
    where = place(env)
    if device != "cuda" or where.world == 1:
        return device
    seen = env.get("CUDA_VISIBLE_DEVICES", "")
    alone = seen != "" and "," not in seen
    return f"cuda:{0 if alone else where.local}"


def _count(env: Mapping[str, str], name: str, low: int, high: int | None) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: got {env[name]!r}, expected a number, {limits}")
    return value


def _port(env: Mapping[str, str]) -> int:
    if "ACRE_PORT" in env:
        return _count(env, "ACRE_PORT", 1, 65535)
    if "MASTER_PORT" not in env:
        return PORT
    # torchrun itself listens on its port.
    taken = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _count(env, "MASTER_PORT", 1, 65534) + taken


def join(where: Place | None = None, timeout: float = TIMEOUT) -> Group:
    """The group of this process, once all have come. timeout: seconds that a peer may
    be silent. ConnectionError, TimeoutError naming the address or the rank."""
    where = place() if where is None else where
    return Alone() if where.world == 1 else Sockets(where, timeout)


# ------------------------------------------------------------------------------ sockets


class Sockets:
    """A group over TCP: a star with rank 0 in its middle."""

    def __init__(
        self, where: Place, timeout: float = TIMEOUT, meeting: float = MEETING
    ) -> None:
        """meeting: seconds until all must have come."""
        self.rank, self.world = where.rank, where.world
        self._peers: dict[int, Connection] = {}
        self._timeout = timeout
        self._buffer = np.empty(0, dtype=np.float32)
        try:
            meet = self._wait if where.rank == 0 else self._call
            meet(where, time.monotonic() + meeting)
        except BaseException:
            self.close()
            raise

    def _wait(self, where: Place, deadline: float) -> None:
        """Rank 0: takes the others in, in whatever order they come."""
        loopback = where.address in ("localhost", "127.0.0.1")
        host = "127.0.0.1" if loopback else ""
        with socket.create_server((host, where.port), backlog=where.world) as server:
            while len(self._peers) < where.world - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    link = server.accept()[0]
                except TimeoutError:
                    missing = sorted(set(range(1, self.world)) - set(self._peers))
                    raise TimeoutError(
                        f"rank 0 at {where.address}:{where.port}: waited for ranks "
                        f"{missing}, which did not come"
                    ) from None
                self._admit(link, where)

    def _admit(self, link: socket.socket, where: Place) -> None:
        """One caller; whoever does not know the key, or is no rank, is sent away."""
        peer = _connection(link, min(self._timeout, 10.0))
        try:
            deliver_challenge(peer, where.key)
            answer_challenge(peer, where.key)
            rank, world = json.loads(peer.recv_bytes(64))
        except (AuthenticationError, EOFError, OSError, ValueError, TypeError):
            peer.close()
            return
        if world != self.world or rank in self._peers or not 0 < rank < self.world:
            peer.close()
            raise ConnectionError(
                f"rank {rank} of {world} came to a group of {self.world}: two jobs use "
                f"{where.address}:{where.port}, or two processes one rank"
            )
        _limit(peer, self._timeout)
        self._peers[rank] = peer

    def _call(self, where: Place, deadline: float) -> None:
        """The others: call rank 0 until it listens."""
        while True:
            try:
                link = socket.create_connection((where.address, where.port), 10.0)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"rank {self.rank}: no rank 0 at {where.address}:{where.port} "
                        f"({error}); see MASTER_ADDR and MASTER_PORT"
                    ) from error
                time.sleep(0.05)
        self._peers[0] = peer = _connection(link, self._timeout)
        with self._named(0):
            answer_challenge(peer, where.key)
            deliver_challenge(peer, where.key)
            peer.send_bytes(json.dumps([self.rank, self.world]).encode())

    @contextmanager
    def _named(self, rank: int) -> Iterator[None]:
        """What goes wrong with a peer, by its rank."""
        try:
            yield
        except AuthenticationError as error:
            raise ConnectionError(
                f"rank {self.rank}: rank {rank} has another key; see ACRE_KEY"
            ) from error
        except BlockingIOError as error:  # the socket's time limit
            raise TimeoutError(
                f"rank {self.rank}: rank {rank} was silent for {self._timeout:g} s"
            ) from error
        except (EOFError, OSError) as error:
            raise ConnectionError(
                f"rank {self.rank}: rank {rank} has gone (its own message says why)"
            ) from error

    def _through(self, send: Callable, receive: Callable) -> None:
        """To rank 0 and back, or as rank 0 from all in order and back to all."""
        ranks = sorted(self._peers)
        steps = (receive, send) if self.rank == 0 else (send, receive)
        for step in steps:
            for rank in ranks:
                with self._named(rank):
                    step(rank, self._peers[rank])

    def sum(self, array: np.ndarray) -> None:
        """float32 [P], in place; see `Group`. ValueError for other arrays."""
        flat = array.dtype == np.float32 and array.ndim == 1
        if not flat or not array.flags.c_contiguous:
            raise ValueError(
                f"array: got {array.dtype} {array.shape}, expected float32 [P]"
            )
        if self._buffer.size < min(PIECE, array.size):
            self._buffer = np.empty(min(PIECE, array.size), dtype=np.float32)
        for start in range(0, array.size, PIECE):
            self._sum_piece(array[start : start + PIECE])

    def _sum_piece(self, part: np.ndarray) -> None:
        came = self._buffer[: part.size]

        def receive(rank: int, peer: Connection) -> None:
            if peer.recv_bytes_into(memoryview(came).cast("B")) != came.nbytes:
                raise EOFError(f"rank {rank} sent another size")
            if self.rank == 0:
                np.add(part, came, out=part)
            else:
                part[:] = came

        self._through(
            lambda _, peer: peer.send_bytes(memoryview(part).cast("B")), receive
        )

    def exchange(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order."""
        values: list[Any] = [None] * self.world
        values[self.rank] = json.loads(json.dumps(value))

        def receive(rank: int, peer: Connection) -> None:
            got = json.loads(peer.recv_bytes())
            if self.rank == 0:
                values[rank] = got
            else:
                values[:] = got

        def send(_: int, peer: Connection) -> None:
            said = values if self.rank == 0 else value
            peer.send_bytes(json.dumps(said).encode())

        self._through(send, receive)
        return values

    def whole(self) -> bool:
        """Of rank 0: whether all others are there; of these: whether rank 0 is."""
        ends = select.poll()
        for peer in self._peers.values():
            ends.register(peer.fileno(), HUNG_UP)
        return not ends.poll(0)

    def close(self) -> None:
        """Hangs up."""
        for peer in self._peers.values():
            peer.close()
        self._peers = {}


def _connection(link: socket.socket, seconds: float) -> Connection:
    """A socket's messages, with a limit on every wait."""
    link.setblocking(True)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer = Connection(link.detach())
    _limit(peer, seconds)
    return peer


def _limit(peer: Connection, seconds: float) -> None:
    """How long the peer may be silent, by the kernel: it also bounds a message that
    stops in its middle."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(peer.fileno())) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
