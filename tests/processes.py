"""Groups of processes in one: a thread for each rank, with sockets between them."""

from __future__ import annotations

import socket
import threading

from acre.training.parallel import Place, Sockets

KEY = b"k" * 32


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def together(world: int, work, keys=None, timeout: float = 20.0, meeting: float = 20.0):
    """Runs work(group) in a thread for each rank; their results or exceptions."""
    port, out = free_port(), [None] * world

    def one(rank: int) -> None:
        key = KEY if keys is None else keys[rank]
        try:
            where = Place(rank, world, rank, "127.0.0.1", port, key)
            group = Sockets(where, timeout, meeting)
            try:
                out[rank] = work(group)
            finally:
                group.close()
        except Exception as error:
            out[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return out
