"""Several processes that train as one: who they are, their sums, a peer that dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
import toy
from processes import KEY, free_port, together

import acre
from acre import _core, loaders
from acre.training.checkpoint import Checkpoints
from acre.training.parallel import Alone, Place, Sockets, join, place

TESTS = Path(__file__).resolve().parent


# ------------------------------------------------------------------------ where it is


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ("RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=7",
         (3, 8, 1, "a", 7)),
        ("SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0",
         (1, 2, 0, "127.0.0.1", 29500)),
        ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 ACRE_PORT=9 MASTER_PORT=7",
         (0, 4, 0, "127.0.0.1", 9)),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=7 TORCHELASTIC_USE_AGENT_STORE=True",
         (0, 2, 0, "127.0.0.1", 8)),
        ("RANK=3", (0, 1, 0, "127.0.0.1", 29500)),
        ("", (0, 1, 0, "127.0.0.1", 29500)),
    ],
)  # fmt: skip
def test_launchers(variables, expected):
    found = place(dict(pair.split("=") for pair in variables.split()))
    assert (found.rank, found.world, found.local, found.address, found.port) == expected
    assert isinstance(join(Place()), Alone)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT"),
    ],
)
def test_bad_environments_are_named(variables, name):
    with pytest.raises(ValueError, match=name):
        place(variables)


def test_keys_are_of_the_job():
    env = {"RANK": "0", "WORLD_SIZE": "2"}
    keys = [
        place({**env, **more}).key
        for more in ({}, {"SLURM_JOB_ID": "5"}, {"MASTER_PORT": "7"}, {"ACRE_KEY": "x"})
    ]
    assert len(set(keys)) == 4
    assert place({**env, "MASTER_PORT": "7", "ACRE_KEY": "x"}).key == keys[3]


# --------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_sums_are_in_the_order_of_ranks(monkeypatch, size):
    monkeypatch.setattr("acre.training.parallel.PIECE", 64)  # many pieces
    rng = np.random.default_rng(size)
    arrays = (
        rng.standard_normal((4, size)) * 10.0 ** rng.integers(-6, 6, (4, 1))
    ).astype(np.float32)
    expected = ((arrays[0] + arrays[1]) + arrays[2]) + arrays[3]

    def work(group):
        own = arrays[group.rank].copy()
        group.sum(own)
        return own, group.exchange({"rank": group.rank, "x": 0.1 * group.rank})

    for own, said in together(4, work):
        assert own.tobytes() == expected.tobytes()
        assert said == [{"rank": r, "x": 0.1 * r} for r in range(4)]


def test_other_arrays_are_refused():
    for array in (
        np.zeros(3),
        np.zeros((2, 2), np.float32),
        np.zeros(8, np.float32)[::2],
    ):
        for error in together(2, lambda group, a=array: group.sum(a)):
            assert isinstance(error, ValueError | ConnectionError)


def test_alone():
    group, array = Alone(), np.ones(3, np.float32)
    group.sum(array)
    assert array.tolist() == [1, 1, 1] and group.exchange((1, 2)) == [[1, 2]]


# ---------------------------------------------------------------------- what goes wrong


def test_a_peer_that_leaves_is_named():
    def work(group):
        if group.rank == 1:
            return None
        return group.exchange(0)

    zero, one, two = together(3, work)
    assert isinstance(zero, ConnectionError) and "rank 1 has gone" in str(zero)
    assert one is None
    assert isinstance(two, ConnectionError) and "rank 0 has gone" in str(two)


def test_a_silent_peer_is_named():
    def work(group):
        if group.rank == 1:
            time.sleep(1.5)
            return None
        return group.exchange(0)

    zero, _ = together(2, work, timeout=0.3)
    assert isinstance(zero, TimeoutError) and "rank 1 was silent" in str(zero)


def test_another_key_is_sent_away():
    zero, one = together(
        2, lambda group: group.exchange(0), keys=[KEY, b"x" * 32], meeting=1.0
    )
    assert isinstance(zero, TimeoutError) and "ranks [1]" in str(zero)
    assert isinstance(one, ConnectionError)


def test_nobody_comes():
    where = Place(0, 2, 0, "127.0.0.1", free_port(), KEY)
    with pytest.raises(TimeoutError, match=r"waited for ranks \[1\]"):
        Sockets(where, 1.0, meeting=0.1)
    where = Place(1, 2, 0, "127.0.0.1", free_port(), KEY)
    with pytest.raises(ConnectionError, match="MASTER_ADDR"):
        Sockets(where, 1.0, meeting=0.1)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b""])
def test_strangers_do_not_disturb(said):
    """A caller that says nothing sensible, or nothing, is sent away, and the others are
    let in."""
    port = free_port()
    out: list = []

    def zero():
        where = Place(0, 2, 0, "127.0.0.1", port, KEY)
        group = Sockets(where, 1.0, meeting=30.0)
        out.append(group.exchange(0))
        group.close()

    thread = threading.Thread(target=zero)
    thread.start()
    for _ in range(100):
        try:
            stranger = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            time.sleep(0.02)
    stranger.sendall(said)
    group = Sockets(Place(1, 2, 0, "127.0.0.1", port, KEY), 5.0)
    assert group.exchange(1) == [0, 1]
    group.close()
    thread.join(30)
    stranger.close()
    assert out == [[0, 1]]


# ----------------------------------------------------------------------------- training


def start(folder: Path, rank: int, world: int, port: int, **more) -> subprocess.Popen:
    paths = os.pathsep.join([str(Path(acre.__file__).parents[1]), str(TESTS)])
    env = {**os.environ, "PYTHONPATH": paths, "RANK": str(rank), **more}
    env |= {"WORLD_SIZE": str(world), "ACRE_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, str(TESTS / "fakes.py"), str(folder)],
        env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder: Path, world: int, **more: str) -> list[np.ndarray]:
    """The parameters of each rank after a whole run."""
    port = free_port()
    every = [start(folder, rank, world, port, **more) for rank in range(world)]
    for one in every:
        _, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
    return [np.fromfile(f"{folder}.rank{r}", np.float32) for r in range(world)]


def test_two_processes_train_as_one(tmp_path):
    """The same bits on each rank; those of one process up to the order of summation:
    float32 sums of four gradients, (0 + 2) + (1 + 3) for 0 + 1 + 2 + 3."""
    alone, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert two[0].tobytes() == two[1].tobytes()
    np.testing.assert_allclose(two[0], alone[0], rtol=0, atol=2e-6)
    moved = np.abs(alone[0] - fakes.Trainer().read("parameters"))
    assert moved.max() > 1e-2  # or the tolerance would say nothing


def test_killed_together_and_resumed(tmp_path):
    """Only rank 0 reads and writes; the others get its checkpoint."""
    whole = run(tmp_path / "whole", 2)
    port = free_port()
    zero = start(tmp_path / "run", 0, 2, port, KILL="update:8")
    one = start(tmp_path / "run", 1, 2, port)
    _, err = one.communicate(timeout=60)
    zero.communicate(timeout=60)
    assert zero.returncode == -signal.SIGKILL
    assert one.returncode == 1 and "rank 0 has gone" in err
    again = run(tmp_path / "run", 2)
    assert again[0].tobytes() == again[1].tobytes() == whole[0].tobytes()


def test_a_dead_peer_leaves_a_checkpoint(tmp_path):
    port = free_port()
    zero = start(tmp_path / "run", 0, 2, port)
    one = start(tmp_path / "run", 1, 2, port, KILL="update:5")
    one.communicate(timeout=60)
    _, err = zero.communicate(timeout=60)
    assert one.returncode == -signal.SIGKILL
    assert zero.returncode == 1 and "rank 1 has gone" in err
    newest = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert newest.name in ("step-00000004", "step-00000005")


def test_nan_stops_every_rank(tmp_path):
    def work(group):
        stream = fakes.Stream(group.rank, group.world, bad=5)
        fakes.loop(tmp_path, stream=stream, group=group).run()

    for error in together(2, work):
        assert isinstance(error, FloatingPointError)
        assert "step 2, example 2" in str(error)


@pytest.mark.skipif(not hasattr(_core, "Trainer"), reason="no trainer in this build")
def test_the_real_trainer(tmp_path):
    """Texts of one length, so that one and two processes make the same batches: they
    come to the same parameters up to the order of summation."""
    toy.directory(tmp_path / "model")
    texts = [json.dumps({"text": toy.sentence(i, 400)}) for i in range(4)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")

    def run(out: str, group=None) -> None:
        model = acre.Model.from_pretrained(tmp_path / "model", "f32", threads=1)
        acre.train(
            model, "stage1", f"excerpts:{tmp_path / 'texts.jsonl'}", tmp_path / out,
            steps=4, batch_tokens=800, lr=0.01, length=200, window=64, stride=32,
            intervals=(8, 16), progress=False, group=group,
        )  # fmt: skip

    def result(out: str) -> tuple[np.ndarray, list[float]]:
        lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["examples"] for row in rows] == [4] * 4
        read = loaders.open_adapter(
            Checkpoints(tmp_path / out / "checkpoints").latest()
        )
        values = np.concatenate([array.ravel() for _, array, _ in read])
        return values, [row["loss"] for row in rows]

    run("one")
    assert together(2, lambda group: run("two", group)) == [None, None]
    (alone, losses), (two, more) = result("one"), result("two")
    np.testing.assert_allclose(two, alone, rtol=0, atol=1e-5)  # steps are up to 0.01
    np.testing.assert_allclose(more, losses, rtol=1e-6)
