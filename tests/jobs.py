"""Programs that a check runs: some at once, within a time, their output in logs.

`Skip` says why something cannot be done here, `Fault` what went wrong. What still runs
when its time is up, or when the check is stopped, is ended with its children.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"


class Skip(Exception):  # noqa: N818
    """A step cannot run here; the reason."""


class Fault(Exception):  # noqa: N818
    """A step failed; what was found."""


class OutOfTime(Fault):
    """A program did not end in the time that it had."""


@dataclass
class Ended:
    """A program that ended: `code` None where its time was up."""

    code: int | None
    log: pathlib.Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def last(self, lines: int = 12) -> str:
        return "\n".join(self.text.rstrip().splitlines()[-lines:])


@dataclass
class Job:
    """A program to be run with its output in a log."""

    name: str
    command: Sequence[str | os.PathLike[str]]
    environment: dict[str, str] | None = None


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process of ours and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def begin(job: Job) -> tuple[subprocess.Popen[bytes], pathlib.Path]:
    """Starts it in a session of its own, its output in its log."""
    log = LOGS / f"{job.name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [os.fspath(part) for part in job.command],
            stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            cwd=ROOT, env=job.environment, start_new_session=True,
        )  # fmt: skip
    return process, log


def run_all(jobs: Sequence[Job], seconds: float, at_once: int) -> list[Ended]:
    """Runs the jobs, some at once, for `seconds` at most in all; as they came."""
    LOGS.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    waiting = list(enumerate(jobs))
    running: dict[int, tuple[subprocess.Popen[bytes], pathlib.Path]] = {}
    ended: dict[int, Ended] = {}
    try:
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < at_once:
                index, job = waiting.pop(0)
                running[index] = begin(job)
            for index, (process, log) in list(running.items()):
                if process.poll() is not None:
                    ended[index] = Ended(process.returncode, log)
                    del running[index]
            time.sleep(0.02)
    finally:
        for process, _ in running.values():
            stop(process)
    for index, (_, log) in running.items():
        ended[index] = Ended(None, log)
    for index, job in waiting:
        log = LOGS / f"{job.name}.log"
        log.write_text("not begun: no time was left\n")
        ended[index] = Ended(None, log)
    return [ended[index] for index in range(len(jobs))]


def run(job: Job, seconds: float) -> Ended:
    """One job; Fault where it ends otherwise than well."""
    ended = run_all([job], seconds, 1)[0]
    if ended.code is None:
        raise OutOfTime(f"{job.name} did not end within {seconds:.0f} s")
    if ended.code != 0:
        raise Fault(f"{job.name} ended with {ended.code} ({ended.log})\n{ended.last()}")
    return ended
