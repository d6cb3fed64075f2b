"""The training loop and its files: the schedule, being killed, stopped, refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import numpy as np
import pytest

import acre
from acre import cli
from acre.training import checkpoint
from acre.training.checkpoint import Checkpoints, read_part, read_state
from acre.training.log import Log
from acre.training.schedule import learning_rate
from acre.training.settings import settled
from acre.training.stops import terminable, uninterrupted

TESTS = Path(__file__).resolve().parent
TIMES = ("seconds", "tokens_per_s")


def rows(folder: Path) -> list[dict]:
    """The log without what differs from run to run."""
    text = (folder / "log.jsonl").read_text("utf-8")
    every = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in every]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(Path(acre.__file__).parents[1]), str(TESTS)])
    return {**os.environ, "PYTHONPATH": paths, **more}


def process(folder: Path, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(TESTS / "fakes.py"), str(folder)],
        env=environment(**more), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def parameters(folder: Path) -> bytes:
    newest = Checkpoints(folder / "checkpoints").latest()
    return (newest / "adapter.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    chosen = fakes.loop(folder, held=fakes.held())
    chosen.run()
    Log.draw(chosen.folder.log)
    chosen.folder.log.close()
    return folder


def same(folder: Path, whole: Path) -> bool:
    names = ("adapter", "first", "second")
    paths = [f"checkpoints/step-00000012/{name}.safetensors" for name in names]
    return rows(folder) == rows(whole) and all(
        (folder / path).read_bytes() == (whole / path).read_bytes() for path in paths
    )


# ---------------------------------------------------------------- schedule and settings


def test_schedule():
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[54] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half-way down
    assert rates[-1] == pytest.approx(0.2) and np.all(np.diff(rates[9:]) < 0)
    assert learning_rate(1, 1, 2.0, 1) == 2.0
    assert learning_rate(1, 1, 2.0, 0) == pytest.approx(0.2)
    for step in (0, 101):
        with pytest.raises(ValueError, match="step"):
            learning_rate(step, 100, 2.0, 10)


def test_what_is_left_out():
    one = settled("stage1", None, 1001, None, None, 100)
    assert (one.steps, one.warmup, one.lr) == (11, 1, 5e-5)
    assert settled("stage2", 200, None, None, None, 1).warmup == 6
    assert settled("stage2", 200, None, None, None, 1).lr == 1e-5
    for steps, tokens in ((None, None), (1, 1)):
        with pytest.raises(ValueError, match="steps, tokens"):
            settled("stage1", steps, tokens, None, None, 1)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"stage": "stage3"}, ValueError),
        ({"steps": 0}, ValueError),
        ({"warmup": 13}, ValueError),
        ({"lr": 0.0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": "fast"}, TypeError),
        ({"clip": -1.0}, ValueError),
        ({"beta2": 1.0}, ValueError),
        ({"batch_tokens": 2.5}, TypeError),
    ],
)
def test_bad_settings_are_named(changes, error):
    with pytest.raises(error, match=next(iter(changes))):
        fakes.settings(**changes)


# ------------------------------------------------------------------------- a whole run


def test_rows_and_checkpoints(whole):
    steps = [row for row in rows(whole) if "loss" in row]
    held = [row["step"] for row in rows(whole) if "held_out" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert held == [0, 4, 8, 12]
    assert all(row["tokens"] == 40 and row["examples"] == 4 for row in steps)
    assert steps[-1]["seen"] == 480 and steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["lr"] == pytest.approx(0.05 / 3)
    # Of examples 0 ... 3 the odd ones have evidence: 1 and 3 of ten tokens.
    assert steps[0]["evidence"] == pytest.approx(0.2)
    kept = [path.name for path in Checkpoints(whole / "checkpoints").all()]
    assert kept == ["step-00000009", "step-00000012"]
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_mean_gradient_is_over_tokens(tmp_path):
    """One step by hand: the loss is a mean over tokens, whatever the examples."""
    trainer = fakes.Trainer()
    start, stream = trainer.read("parameters"), fakes.Stream()
    chosen = fakes.loop(tmp_path, trainer=trainer, steps=1, warmup=0, lr=0.1)
    chosen.run()
    targets = []
    for _ in range(4):
        rng = np.random.default_rng([int(i) for i in next(stream).ids])
        targets.append(rng.standard_normal(fakes.SIZE))
    gradient = start - np.mean(targets, axis=0)
    row = rows(tmp_path)[0]
    assert row["norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    misses = np.mean([np.mean((start - t) ** 2) for t in targets])
    assert row["loss"] == pytest.approx(0.5 * misses, rel=1e-5)
    moved = np.sign(trainer.read("parameters") - start)
    assert np.array_equal(moved, -np.sign(gradient))


def test_the_data_may_end_early(tmp_path):
    chosen = fakes.loop(tmp_path, stream=fakes.Stream(count=10))
    state = chosen.run()
    assert chosen.ended and state.step == 3 and state.seen == 100
    assert [row["examples"] for row in rows(tmp_path)] == [4, 4, 2]
    with pytest.raises(ValueError, match="no example"):
        fakes.loop(tmp_path / "b", stream=fakes.Stream(count=0)).run()


def test_a_finished_run_stays(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "again")
    state = fakes.loop(tmp_path / "again", held=fakes.held()).run()
    assert state.step == 12 and same(tmp_path / "again", whole)


# ------------------------------------------------------------------------- being killed


@pytest.mark.parametrize(
    "kill",
    ["update:1", "update:8", "line:3", "line:11", "logged:6", "tensor:9", "tensor:25",
     "replace:4", "replace:6", "rename:2", "rename:5"],
)  # fmt: skip
def test_killed_and_resumed_is_the_same_run(tmp_path, whole, kill):
    folder = tmp_path / "run"
    killed = process(folder, KILL=kill)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    fakes.loop(folder, held=fakes.held()).run()
    assert same(folder, whole)
    hidden = list((folder / "checkpoints").glob(".*"))
    assert hidden == []


def test_killed_again_and_again(tmp_path, whole):
    folder = tmp_path / "run"
    for kill in ("line:4", "tensor:12", "update:3", "rename:1", "logged:2"):
        process(folder, KILL=kill).communicate(timeout=60)
    fakes.loop(folder, held=fakes.held()).run()
    assert same(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_the_last_step(tmp_path, whole, number):
    folder = tmp_path / "run"
    running = process(folder, DELAY="0.05")
    deadline = time.monotonic() + 60
    while not (folder / "log.jsonl").exists() or len(rows(folder)) < 3:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert running.returncode == 143 and not err
    else:
        assert running.returncode != 0 and err.rstrip().endswith("KeyboardInterrupt")
    last = max(row["step"] for row in rows(folder))
    newest = Checkpoints(folder / "checkpoints").latest()
    assert newest.name == f"step-{last:08d}" and last < 12
    fakes.loop(folder, held=fakes.held()).run()
    assert same(folder, whole)


def test_ctrl_c_while_a_step_is_booked(tmp_path, whole):
    """It waits for the end of what must not be split, at every place of it."""
    for name in ("update", "report"):
        folder, trainer = tmp_path / name, fakes.Trainer()
        chosen = fakes.loop(folder, trainer=trainer, held=fakes.held())
        owner = trainer if name == "update" else chosen
        attribute = name if name == "update" else "_report"
        work, left = getattr(owner, attribute), [5]

        def struck(*given, work=work, left=left, **named):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            return work(*given, **named)

        setattr(owner, attribute, struck)
        with pytest.raises(KeyboardInterrupt):
            chosen.run()
        chosen.folder.log.close()
        fakes.loop(folder, held=fakes.held()).run()
        assert same(folder, whole), name


def test_handlers_of_the_program_stay():
    own = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with terminable():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, own)
    with pytest.raises(SystemExit), terminable(), uninterrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is own


def test_what_must_not_be_split():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -------------------------------------------------------------------------- the log


def test_log_is_cut_and_held(tmp_path):
    path = tmp_path / "log.jsonl"
    own = Log(path)
    own.add({"step": 1})
    size = own.sync()
    own.add({"step": 2})
    with pytest.raises(BlockingIOError):
        Log(path)
    own.close()
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    again = Log(path)
    with pytest.raises(ValueError, match="log.jsonl:3"):
        again.rows()
    again.cut(size)
    again.add({"step": 2})
    assert [row["step"] for row in again.rows()] == [1, 2]
    with pytest.raises(ValueError, match="the checkpoint was made at 999"):
        again.cut(999)
    with pytest.raises(ValueError):
        again.add({"step": float("nan")})
    again.close()


# ------------------------------------------------------------------------- refusals


def test_another_run_is_refused(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    facts = {"model": {"fingerprint": "xyz"}}
    with pytest.raises(ValueError, match="fingerprint: 'abc', now 'xyz'"):
        fakes.loop(tmp_path / "run", facts=facts).run()
    with pytest.raises(ValueError, match=r"lr: 0\.05, now 0\.1"):
        fakes.loop(tmp_path / "run", lr=0.1).run()


def test_damaged_checkpoints_are_refused(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    newest = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    data = bytearray((newest / "first.safetensors").read_bytes())
    data[-3] ^= 1
    (newest / "first.safetensors").write_bytes(data)
    with pytest.raises(acre.ModelFileError, match="first.safetensors: damaged"):
        fakes.loop(tmp_path / "run").run()
    (newest / "first.safetensors").write_bytes(data[:-9])
    with pytest.raises(acre.ModelFileError, match="first.safetensors"):
        fakes.loop(tmp_path / "run").run()
    (newest / "state.json").write_text("{")
    with pytest.raises(ValueError, match="state.json: damaged"):
        fakes.loop(tmp_path / "run").run()


def test_a_checkpoint_is_an_adapter(whole):
    newest = Checkpoints(whole / "checkpoints").latest()
    read = {name: array for name, array, _ in acre.loaders.open_adapter(newest)}
    assert [*read] == [name for name, _, _ in fakes.ENTRIES]
    state = read_state(newest, {"model": {"fingerprint": "abc"}})
    values = read_part(newest, "parameters", fakes.Trainer(), state)
    assert np.array_equal(np.concatenate([a.ravel() for a in read.values()]), values)


# ------------------------------------------------------------------------- what fails


def test_nan_loss_names_step_and_example(tmp_path):
    chosen = fakes.loop(tmp_path, stream=fakes.Stream(bad=18))
    with pytest.raises(FloatingPointError, match="step 5, example 3.*step-00000003"):
        chosen.run()
    assert chosen.folder.checkpoints.latest().name == "step-00000003"
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert not chosen.trainer.read("gradients").any()
    with pytest.raises(FloatingPointError, match="none was saved yet"):
        fakes.loop(tmp_path / "b", stream=fakes.Stream(bad=0)).run()


def test_inf_norm_names_the_step(tmp_path, monkeypatch):
    chosen = fakes.loop(tmp_path)
    plain = chosen.trainer.accumulate

    def poisoned(ids, **arguments):
        out = plain(ids, **arguments)
        if ids[0] == 116:
            chosen.trainer.parts["gradients"][0] = np.inf
        return out

    monkeypatch.setattr(chosen.trainer, "accumulate", poisoned)
    with pytest.raises(FloatingPointError, match="step 5.*norm: inf.*step-00000003"):
        chosen.run()


@pytest.mark.parametrize("writes", [1, 2, 6])
def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, writes, whole):
    chosen = fakes.loop(tmp_path / "run", held=fakes.held())
    work, left = checkpoint.write_tensors, [3 + writes]  # three files of step 3

    def full(*arguments):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        work(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    step, good = (6, "step-00000003") if writes < 4 else (9, "step-00000006")
    with pytest.raises(
        OSError, match=f"step {step} is not saved: No.*{good}"
    ) as caught:
        chosen.run()
    assert caught.value.errno == errno.ENOSPC
    assert chosen.folder.checkpoints.latest().name == good
    assert list((tmp_path / "run" / "checkpoints").glob(".*")) == []
    chosen.folder.log.close()
    monkeypatch.undo()
    fakes.loop(tmp_path / "run", held=fakes.held()).run()
    assert same(tmp_path / "run", whole)


def test_full_disk_while_logging(tmp_path, whole):
    """A limit on file size stands for a full disk: a line is torn, not the run."""
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    chosen = fakes.loop(folder, held=fakes.held())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
        with pytest.raises(OSError):
            chosen.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    chosen.folder.log.close()
    fakes.loop(folder, held=fakes.held()).run()
    assert same(folder, whole)


def test_no_room_is_refused_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="no space"):
        fakes.loop(tmp_path).run()
    assert Checkpoints(tmp_path / "checkpoints").all() == []


# ------------------------------------------------------------------------- the command


@pytest.mark.parametrize("command", ["train", "adapter", "adapter merge"])
def test_help(capsys, command):
    assert cli.main([*command.split(), "--help"]) == 0
    assert "usage" in capsys.readouterr().out


def test_wrong_usage(capsys):
    assert cli.main(["train", "stage3", "--data", "x", "--out", "y"]) == 2
    assert cli.main(["train", "stage1", "--out", "y"]) == 2
    capsys.readouterr()


def test_sources_with_weights():
    from acre.training.cli import mix

    assert mix(["a.jsonl", "b=2.5"]) == {"a.jsonl": 1.0, "b": 2.5}
    assert mix(["odd=name.jsonl"]) == {"odd=name.jsonl": 1.0}


def test_losses_are_drawn():
    from matplotlib.figure import Figure

    some = [{"step": i, "loss": 3.0 - i / 100} for i in range(1, 101)]
    ax = acre.plot.losses(
        [*some, {"step": 50, "held_out": 2.6}], Figure().add_subplot()
    )
    assert [line.get_label() for line in ax.lines] == [
        "loss",
        "mean of 2 steps",
        "held out",
    ]
    assert ax.lines[1].get_ydata()[1] == pytest.approx(3.0 - 0.015)
    with pytest.raises(ValueError, match="loss"):
        acre.plot.losses([{"step": 1}])
