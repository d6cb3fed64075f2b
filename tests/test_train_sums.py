"""How gradients become one: on devices where all ranks can, else through the group."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pytest
import tiny
import toy
from processes import free_port, together

import acre
from acre import _core, devices, loaders
from acre.training import sums
from acre.training.checkpoint import Checkpoints
from acre.training.parallel import Alone, own_device
from acre.training.sums import OnDevices, ThroughGroup, choose

TESTS = Path(__file__).resolve().parent
HOST = TESTS.parent / "build" / "c"  # `make ctest`: the CUDA backend on the host
UNSEEN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}


class Meeting:
    """The trainers that got one id: who is there, and what they gave of each sum."""

    def __init__(self) -> None:
        self.joined: set[int] = set()
        self.given: list[dict[int, np.ndarray]] = []


class Device(fakes.Trainer):
    """A trainer that sums with those that join it, in the order of their ranks; fails
    where it is told to: {"invite", "join" or "wait": an exception}."""

    meetings: dict[bytes, Meeting] = {}
    lock = threading.Lock()

    def __init__(self, failing: dict | None = None, device: str = "cuda:0") -> None:
        super().__init__()
        self.failing, self.calls = failing or {}, []
        self.model = SimpleNamespace(engine=SimpleNamespace(device=device))
        self.rank, self.world, self.meeting, self.at = 0, 0, None, None

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise self.failing[name]

    def invite(self) -> bytes:
        self._call("invite")
        with self.lock:
            id = bytes([len(self.meetings)]) * 128
            self.meetings[id] = Meeting()
        return id

    def join(self, rank: int, world: int, id: bytes) -> None:
        self._call("join")
        self.rank, self.world, self.meeting = rank, world, self.meetings[id]
        self.meeting.joined.add(rank)

    def share(self) -> None:
        self._call("share")
        self.at = 0 if self.at is None else self.at + 1
        with self.lock:
            if len(self.meeting.given) == self.at:
                self.meeting.given.append({})
            self.meeting.given[self.at][self.rank] = self.read("gradients")

    def wait(self, seconds: float) -> bool:
        self._call("wait")
        end = time.monotonic() + seconds
        there = self.meeting.joined if self.at is None else self.meeting.given[self.at]
        while len(there) < self.world:
            if time.monotonic() >= end:
                return False
            time.sleep(0.001)
        if self.at is not None:
            total = there[0].copy()
            for rank in range(1, self.world):
                total += there[rank]
            self.write("gradients", total)
        return True

    def leave(self) -> None:
        self.calls.append("leave")
        self.meeting = None


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sums, "LOOK", 0.01)
    monkeypatch.setattr(sums, "GRACE", 0.3)


def gradients(rank: int) -> np.ndarray:
    rng = np.random.default_rng(rank)
    return rng.standard_normal(fakes.SIZE).astype(np.float32) * np.float32(10.0**rank)


def summed(adder, trainer, group) -> np.ndarray:
    trainer.write("gradients", gradients(group.rank))
    adder.sum(trainer)
    return trainer.read("gradients")


EXPECTED = (gradients(0) + gradients(1)) + gradients(2)


# ----------------------------------------------------------------------------- choosing


def test_all_can():
    def work(group):
        trainer = Device()
        adder = choose(trainer, group, {})
        first, again = summed(adder, trainer, group), summed(adder, trainer, group)
        adder.close()
        return adder, trainer, first, again

    for rank, (adder, trainer, first, again) in enumerate(together(3, work)):
        assert isinstance(adder, OnDevices)
        assert first.tobytes() == again.tobytes() == EXPECTED.tobytes()
        assert ("invite" in trainer.calls) == (rank == 0)
        assert trainer.calls.count("share") == 2 and trainer.meeting is None


FAULTS = [
    ("join", NotImplementedError("NCCL is of version 2.8")),
    ("wait", ConnectionError("NCCL: two ranks on one GPU")),
    ("wait", MemoryError("out of memory")),
    ("environment", "ACRE_NCCL=0"),
]


@pytest.mark.parametrize(
    ("rank", "name", "error"),
    [
        (0, "invite", NotImplementedError("NCCL was not found")),
        (0, "invite", ConnectionError("NCCL, ncclGetUniqueId: no network")),
        *((rank, *fault) for rank in range(3) for fault in FAULTS),
    ],
)
def test_where_one_cannot_all_use_the_group(caplog, rank, name, error):
    def work(group):
        told = group.rank == rank
        trainer = Device({name: error} if told else None)
        off = {"ACRE_NCCL": "0"} if told and name == "environment" else {}
        adder = choose(trainer, group, off)
        return adder, trainer, summed(adder, trainer, group)

    with caplog.at_level(logging.WARNING, "acre.training"):
        for adder, trainer, result in together(3, work):
            assert isinstance(adder, ThroughGroup)
            assert result.tobytes() == EXPECTED.tobytes()
            assert trainer.meeting is None and "share" not in trainer.calls
    (record,) = caplog.records
    assert f"rank {rank}: {error}" in record.getMessage()
    assert "through host memory" in record.getMessage()


def test_one_process_asks_nobody():
    trainer = Device()
    adder = choose(trainer, Alone(), {})
    before = trainer.read("gradients")
    adder.sum(trainer)
    adder.close()
    assert trainer.calls == [] and (trainer.read("gradients") == before).all()


@pytest.mark.parametrize("said", ["", "no", "2"])
def test_other_values_of_the_variable_are_refused(said):
    def work(group):
        choose(Device(), group, {"ACRE_NCCL": said} if group.rank else {})

    zero, one = together(2, work)
    assert isinstance(one, ValueError) and "expected 0 or 1" in str(one)
    assert isinstance(zero, ConnectionError) and "rank 1 has gone" in str(zero)


def test_on_processors_nothing_is_said(caplog):
    failing = {"invite": NotImplementedError("'cpu' has no sums over processes")}
    with caplog.at_level(logging.WARNING, "acre.training"):
        together(2, lambda group: choose(Device(failing, "cpu"), group, {}))
    assert not caplog.records


# ---------------------------------------------------------------------- what goes wrong


def test_a_peer_that_dies_in_a_sum_is_noticed():
    def work(group):
        trainer = Device()
        adder = choose(trainer, group, {})
        if group.rank == 1:
            return trainer
        began = time.monotonic()
        with pytest.raises(ConnectionError, match="another rank has gone"):
            summed(adder, trainer, group)
        assert time.monotonic() - began < 10
        return trainer

    zero, _ = together(2, work)
    assert zero.calls[-1] == "leave" and zero.meeting is None


def test_a_silent_peer_is_not_waited_for_without_end():
    said = threading.Event()

    def work(group):
        trainer = Device()
        adder = choose(trainer, group, {}, limit=0.5)
        if group.rank == 1:
            said.wait(30)
            return trainer
        try:
            summed(adder, trainer, group)
        except TimeoutError as error:
            assert "rank 0" in str(error) and "0.5 s" in str(error)
            return trainer
        finally:
            said.set()

    zero, _ = together(2, work)
    assert zero.calls[-1] == "leave"


def test_a_peer_may_be_through_first(monkeypatch):
    """It has its sum, and goes; the other's stream still runs, and comes to rest."""
    monkeypatch.setattr(sums, "GRACE", 20.0)
    gone = threading.Event()

    class Late(Device):
        def wait(self, seconds: float) -> bool:
            if self.at is not None and not gone.is_set():
                return False
            return super().wait(seconds)

    def work(group):
        trainer = Late() if group.rank == 0 else Device()
        adder = choose(trainer, group, {})
        if group.rank == 0:
            whole = group.whole

            def look() -> bool:
                if not whole():
                    threading.Timer(0.1, gone.set).start()
                    return False
                return True

            group.whole = look
        return summed(adder, trainer, group)

    zero, one = together(2, work)
    assert zero.tobytes() == one.tobytes() == (gradients(0) + gradients(1)).tobytes()


def test_an_interrupt_leaves_the_peers():
    trainer = Device()
    trainer.join(0, 2, trainer.invite())
    trainer.failing["wait"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        OnDevices(trainer, Alone()).sum(trainer)
    assert trainer.calls[-1] == "leave"


# ------------------------------------------------------------------------------- a loop


def test_both_ways_end_in_the_same_bits(tmp_path):
    """These trainers add in the order of the ranks, as the group does."""

    def run(out, failing=None):
        def work(group):
            trainer = Device(failing)
            fakes.loop(tmp_path / out, trainer=trainer, group=group).run()
            return trainer

        return together(2, work)

    fast = run("fast")
    slow = run("slow", {"invite": NotImplementedError("none")})
    every = [trainer.read("parameters").tobytes() for trainer in fast + slow]
    assert len(set(every)) == 1
    assert all(t.calls.count("share") == 12 and t.meeting is None for t in fast)
    assert not any("share" in t.calls for t in slow)


def test_the_last_step_is_saved_when_a_sum_fails(tmp_path):
    class Dying(Device):
        def share(self) -> None:
            if self.at == 3 and self.rank == 1:
                raise SystemExit("killed")
            super().share()

    def work(group):
        try:
            fakes.loop(tmp_path, trainer=Dying(), group=group).run()
        except SystemExit:
            return None
        return "through"

    zero, one = together(2, work)
    assert isinstance(zero, ConnectionError) and one is None
    assert Checkpoints(tmp_path / "checkpoints").latest().name == "step-00000004"


# ----------------------------------------------------------------- the compiled trainer


def test_processors_have_no_sums_of_their_own():
    trainer = _core.Trainer(tiny.model())
    id = bytes(128)
    with pytest.raises(NotImplementedError, match="'cpu' has no sums over processes"):
        trainer.invite()
    with pytest.raises(NotImplementedError, match="'cpu' has no sums over processes"):
        trainer.join(0, 2, id)
    with pytest.raises(RuntimeError, match="joined no peers"):
        trainer.share()
    with pytest.raises(RuntimeError, match="does not wait"):
        trainer.wait(1.0)
    trainer.leave()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((2, 2, bytes(128)), ValueError, "rank: got 2, expected 0 to 1"),
        ((-1, 2, bytes(128)), ValueError, "rank: got -1"),
        ((0, 0, bytes(128)), ValueError, "world: got 0"),
        ((0, 2, bytes(127)), ValueError, "id: got 127 bytes, expected 128"),
        ((0, 2, "x" * 128), TypeError, "id: got str, expected bytes"),
        ((0.0, 2, bytes(128)), TypeError, "rank: got float"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        _core.Trainer(tiny.model()).join(*arguments)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_bad_limits_are_named(seconds):
    with pytest.raises(ValueError, match="seconds: got"):
        _core.Trainer(tiny.model()).wait(seconds)


# ---------------------------------------------------------------------- a GPU for each


@pytest.mark.parametrize(
    ("device", "variables", "expected"),
    [
        ("cuda", UNSEEN, "cuda:3"),
        ("cuda", UNSEEN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "cuda:3"),
        ("cuda", UNSEEN | {"CUDA_VISIBLE_DEVICES": "3"}, "cuda:0"),
        ("cuda", UNSEEN | {"CUDA_VISIBLE_DEVICES": "MIG-1"}, "cuda:0"),
        ("cuda:1", UNSEEN, "cuda:1"),
        ("cpu", UNSEEN, "cpu"),
        ("cuda", {}, "cuda"),
        ("cuda", {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"},
         "cuda:1"),
    ],
)  # fmt: skip
def test_each_process_has_its_own_gpu(device, variables, expected):
    assert own_device(device, variables) == expected


def test_an_open_model_has_its_device(tmp_path):
    model = acre.Model.from_arrays(toy.hf_config(), toy.arrays())
    with pytest.raises(ValueError, match="device: the model is open"):
        acre.train(model, "stage1", [], tmp_path / "run", steps=1, device="cuda")


# ----------------------------------------------- two processes, CUDA as the host has it


def main() -> None:
    """One rank: an acre.train with the CUDA backend that the C tests build."""
    folder = Path(sys.argv[1])
    devices.cuda_plugin = lambda: str(HOST / "cuda_host.so")
    devices.cuda_libraries = lambda: f"{HOST}:{HOST / sys.argv[2]}"
    logging.basicConfig()
    used, plain = [], OnDevices.sum

    def noted(adder, trainer):
        used.append("OnDevices")
        plain(adder, trainer)

    OnDevices.sum = noted
    acre.train(
        folder / "model", "stage1", f"excerpts:{folder / 'texts.jsonl'}",
        folder / sys.argv[2], device="cuda", steps=2, batch_tokens=120, lr=0.01,
        length=60, window=32, stride=16, intervals=(8,), progress=False,
    )  # fmt: skip
    print(json.dumps(used))


@pytest.mark.slow
@pytest.mark.skipif(
    not (HOST / "cuda_host.so").exists() or not (HOST / "nccl").exists(),
    reason="the C tests are not built",
)
def test_two_processes_on_the_host_s_cuda(tmp_path):
    """By NCCL (as the host stands in for it) and, where it lacks something, by sockets:
    two ranks add in one order, so the bits are the same."""
    toy.directory(tmp_path / "model")
    texts = [json.dumps({"text": toy.sentence(i, 400)}) for i in range(4)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])

    def run(kind: str) -> tuple[list[list[str]], str, np.ndarray]:
        env = {**os.environ, "PYTHONPATH": paths, "ACRE_PORT": str(free_port())}
        env |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        every = [
            subprocess.Popen(
                [sys.executable, str(TESTS / "test_train_sums.py"), tmp_path, kind],
                env=env | {"RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        said = [one.communicate(timeout=600) for one in every]
        assert [one.returncode for one in every] == [0, 0], said
        path = Checkpoints(tmp_path / kind / "checkpoints").latest()
        values = [array.ravel() for _, array, _ in loaders.open_adapter(path)]
        used = [json.loads(out.splitlines()[-1]) for out, _ in said]
        return used, said[0][1] + said[1][1], np.concatenate(values)

    used, err, fast = run("nccl")
    assert used == [["OnDevices"] * 2] * 2 and "host memory" not in err
    used, err, slow = run("lacking")
    assert used == [[], []]
    assert err.count("host memory: rank 0: device: the NCCL found has no ncclComm") == 1
    assert fast.tobytes() == slow.tobytes()


if __name__ == "__main__":
    main()
