"""`make gpu-check` and its benchmark as far as a machine without a GPU shows them: what
is run, what counts as failed or skipped, and what the table says."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys
import time
import types

import gpu_check
import jobs
import pytest
from gpu_check import FAILED, OK, SKIPPED, Check

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_gpu  # noqa: E402


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    return tmp_path / "logs"


def python(name: str, code: str) -> jobs.Job:
    return jobs.Job(name, [sys.executable, "-c", code])


# --------------------------------------------------------------------- programs


def test_programs_keep_their_order_and_their_output(logs):
    made = [python(f"p{i}", f"print({i}); raise SystemExit({i})") for i in range(3)]
    ended = jobs.run_all(made, 60, 2)
    assert [one.code for one in ended] == [0, 1, 2]
    assert [one.text.strip() for one in ended] == ["0", "1", "2"]
    assert (logs / "p2.log").is_file()


def test_what_takes_too_long_is_ended_with_its_children(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', "
        f"{child!r}]); print('begun', flush=True); time.sleep(60)"
    )
    ended = jobs.run_all([python("long", code), python("late", "1")], 1.5, 1)
    assert [one.code for one in ended] == [None, None]
    assert "not begun" in ended[1].text
    time.sleep(3.5)
    assert not mark.exists()


def test_a_program_that_fails_is_told_with_its_last_words():
    with pytest.raises(jobs.Fault, match="(?s)bad ended with 3.*these words"):
        jobs.run(python("bad", "print('these words'); raise SystemExit(3)"), 60)
    with pytest.raises(jobs.OutOfTime, match="slow did not end"):
        jobs.run(python("slow", "import time; time.sleep(9)"), 0.3)


# ------------------------------------------------------------------------ steps


def outcome_of(step, monkeypatch, **settings):
    check = Check(**settings)
    monkeypatch.setitem(gpu_check.STEPS, "model", step)
    return gpu_check.perform(check, "model"), check


def raising(error):
    def step(check):
        raise error

    return step


def test_how_a_step_ends(monkeypatch):
    def result(step, **settings):
        outcome, check = outcome_of(step, monkeypatch, **settings)
        return outcome.result, outcome.what, gpu_check.code_of(check)

    assert result(lambda check: "well") == (OK, "well", 0)
    assert result(raising(jobs.Skip("none here"))) == (SKIPPED, "none here", 1)
    assert result(raising(jobs.Fault("wrong"))) == (FAILED, "wrong", 1)
    assert result(raising(OSError("x"))) == (FAILED, "OSError: x", 1)
    assert Check(limit=100).within(50) == 50 and 9 < Check(limit=10).within(50) <= 10
    assert Check(limit=100, given=True).within(50) > 90
    late = result(lambda check: "well", limit=4)
    assert late == (SKIPPED, "no time was left of 4 s", 1)
    # What hangs has failed; what the limit cut off has not.
    assert result(raising(jobs.OutOfTime("hangs")))[0] == FAILED

    def until_the_end(check):
        check.limit = 0
        raise jobs.OutOfTime("cut")

    assert result(until_the_end)[0] == SKIPPED


def test_a_machine_without_a_driver(monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open")

    monkeypatch.setattr(gpu_check.ctypes, "CDLL", no_library)
    check = Check()
    assert gpu_check.perform(check, "device").result == FAILED
    assert "no NVIDIA driver" in check.outcomes[0].what
    for step in ("kernels", "model", "pytest", "bench", "memcheck"):
        outcome = gpu_check.perform(check, step)
        assert (outcome.result, outcome.what) == (SKIPPED, "no device")
    assert gpu_check.code_of(check) == 1


def ended(logs, text, code=0, name="memcheck-learn"):
    logs.mkdir(exist_ok=True)
    (logs / f"{name}.log").write_text(text)
    return jobs.Ended(code, logs / f"{name}.log")


def test_what_the_c_tests_say(logs):
    assert gpu_check.counted(ended(logs, "x\n12 passed, 0 failed\n")) == 12
    for text, code in [
        ("12 passed, 1 failed", 1),
        ("12 passed, 1 failed", 0),
        ("12 passed, 0 failed", 1),
        ("nothing", 0),
    ]:
        with pytest.raises(jobs.Fault, match="failed"):
            gpu_check.counted(ended(logs, text, code))
    with pytest.raises(jobs.OutOfTime):
        gpu_check.counted(ended(logs, "12 passed, 0 failed", None))


def test_what_compute_sanitizer_says(logs):
    clean = "========= ERROR SUMMARY: 0 errors\n"
    races = "========= RACECHECK SUMMARY: {} hazards displayed (1 errors, 0 warnings)\n"
    assert gpu_check.sanitized([ended(logs, clean)]) == "nothing found in 1"
    assert gpu_check.sanitized([ended(logs, races.format(0))]) == "nothing found in 1"
    cut = [ended(logs, clean), ended(logs, "", None, "memcheck-backend")]
    assert gpu_check.sanitized(cut).endswith("not to an end: ['memcheck-backend']")
    for text, code in [
        ("========= ERROR SUMMARY: 2 errors\n", 0),
        (races.format(3), 0),
        (clean, gpu_check.TOOL_FOUND),
        ("", 0),
    ]:
        with pytest.raises(jobs.Fault):
            gpu_check.sanitized([ended(logs, text, code)])
    with pytest.raises(jobs.Skip, match="support"):
        gpu_check.sanitized([ended(logs, "Error: Device not supported", 1)])
    with pytest.raises(jobs.Skip, match="none of its programs"):
        gpu_check.sanitized(cut[1:])


def test_kernels_must_have_run_on_one_device(monkeypatch):
    texts = iter([])

    def run_all(made, seconds, at_once):
        text = next(texts)
        return [types.SimpleNamespace(code=0, text=text, log=None) for _ in made]

    monkeypatch.setattr(gpu_check, "run_all", run_all)
    check = Check(given=True, plugin=pathlib.Path(__file__))
    texts = iter(
        ["carried/sm_90 carried/sm_90\n5 passed, 0 failed", "5 passed, 0 failed"]
    )
    told = f"{5 * len(gpu_check.OPERATIONS)} checks on sm_90"
    assert gpu_check.step_kernels(check) == told
    with pytest.raises(jobs.Fault, match="no device"):
        gpu_check.step_kernels(check)


# ----------------------------------------------------------------------- report


def test_names_of_steps():
    assert gpu_check.names("build, bench") == ["build", "bench"]
    assert gpu_check.names("sanitizer") == list(gpu_check.TOOLS)
    with pytest.raises(gpu_check.argparse.ArgumentTypeError, match="expected device"):
        gpu_check.names("nothing")


def test_table_and_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("ACRE_COMMIT", "abc")
    check = Check(seed=3, device={"device": "a chip", "driver": "1.2"})
    row = {"case": "gemm", "value": 700.0, "unit": "TFLOP/s"}
    part = {"case": "decode gemv 3584->18944", "value": 9, "unit": "GB/s"}
    part = bench_gpu.judged(part | {"of": "copy", "share": 0.7})
    check.rows = [row, part]
    monkeypatch.setitem(gpu_check.STEPS, "bench", lambda check: "2 rows")
    monkeypatch.setitem(gpu_check.STEPS, "model", raising(jobs.Fault("one\ntwo")))
    for step in ("bench", "model"):
        gpu_check.perform(check, step)
    text = gpu_check.report(check)
    assert "commit abc, seed 3" in text and "1 ok, 1 failed, 0 skipped" in text
    assert "0.70 of copy" in text and ">= 0.8 of copy" in text and "MISSED" in text
    gpu_check.write_rows(check, tmp_path / "new" / "rows.jsonl")
    lines = (tmp_path / "new" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(r["device"] == "a chip" and r["commit"] == "abc" for r in rows)
    assert [r["result"] for r in rows[:2]] == [OK, FAILED]
    assert rows[1]["what"] == "one" and rows[3]["met"] is False


# -------------------------------------------------------------------- benchmark


def test_targets():
    fast = {"case": "window d=64, 16K on itself", "value": 413, "unit": "TFLOP/s"}
    assert bench_gpu.judged(fast)["met"]
    assert not bench_gpu.judged(fast | {"value": 412.9})["met"]
    assert "met" not in bench_gpu.judged(fast | {"case": "something else"})
    own, peer = {"value": 400.0, "unit": "TFLOP/s", "ms": 2.0}, {"ms": 1.7}
    theirs, ratio = bench_gpu.beside("window d=128, 16K on itself", own, peer)
    assert theirs["value"] == pytest.approx(400 * 2 / 1.7)
    assert not bench_gpu.judged(ratio)["met"] and ratio["value"] == 0.85


def test_every_target_has_its_case():
    """The cases of bench_device.c, and those that bench_gpu.py makes itself."""
    source = (ROOT / "benchmarks" / "bench_device.c").read_text()
    for case in bench_gpu.TARGETS:
        own = case.endswith("beside torch") or case.startswith("build ")
        assert own or f'"{case}"' in source, case


def test_operations_of_a_build():
    """Against a loop over every row and the keys that it sees."""
    c = bench_gpu.SMALL
    plan = {"n": 500, "interval": 8, "window": 64, "stride": 32}
    hidden, kv = 64, 32
    products = 2 * 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * 96)
    seen, start = 0, 0
    for i in range(500):
        if i == 64 or (i > 64 and (i - 64) % 32 == 0):
            start = i
        seen += start // 8 + (i - start) + 1
    exact = products * 500 + 2 * 4 * hidden * seen
    assert bench_gpu.build_flops(c, plan) == pytest.approx(exact)


def test_full_attention_is_left_out_where_the_peer_fails(capsys, monkeypatch):
    def fail(*arguments):
        raise TypeError("unknown setting")

    monkeypatch.setattr(bench_gpu, "full_seconds", fail)
    builds = [{"n": 32768}, {"n": 1 << 20}]
    assert bench_gpu.full_rows({}, builds, bench_gpu.Budget(9)) == []
    assert "left out, TypeError: unknown setting" in capsys.readouterr().out
    monkeypatch.setattr(bench_gpu, "full_seconds", lambda c, n, b: {32768: 2.0})
    rows = bench_gpu.full_rows({}, builds, bench_gpu.Budget(9))
    assert rows[0]["value"] == 16384 and builds[0]["full_seconds"] == 2.0
    assert "full_seconds" not in builds[1]


def test_budget(capsys):
    budget = bench_gpu.Budget(5)
    assert budget.allows("one", 4) and not budget.allows("two", 50)
    assert "two: left out, it would take 50 s of 5" in capsys.readouterr().out


def test_builds_in_small(tmp_path, monkeypatch):
    """The same code as on a GPU, on the CPU: rows, their table and picture."""
    options = types.SimpleNamespace(small=True, quick=False)
    kept = []
    rows = bench_gpu.build_rows(options, 1.0, bench_gpu.Budget(math.inf), kept.extend)
    *by_length, again = kept[::2]
    assert by_length == rows and again["case"] == "build 8K, L2 on the host"
    asked = [row["value"] for row in kept[1::2]]
    assert asked == [row["first_token_ms"] for row in kept[::2]]
    assert [row["n"] for row in rows] == [6000, 9000] and again["n"] == 9000
    for row in rows:
        assert row["seconds"] > 0 and row["first_token_ms"] > 0
        assert row["peak_bytes"] >= row["cache_bytes"] > 0
        assert row["share"] == pytest.approx(row["tflops"])
    bench_gpu.write_table(tmp_path / "builds.csv", rows)
    lines = (tmp_path / "builds.csv").read_text().splitlines()
    assert lines[0].startswith("n,l,seconds") and lines[1].startswith("6000,8,")


# ------------------------------------------------------------- on the host's CUDA

HOST = ROOT / "build" / "c" / "cuda_host.so"
BENCH = ROOT / "build" / "c" / "bench_device"


@pytest.mark.slow
@pytest.mark.skipif(not HOST.is_file(), reason="build/c/cuda_host.so is not built")
def test_bench_device_on_the_host():
    """Every case runs, is right, and gives a row."""
    subprocess.run(["make", "build/c/bench_device"], cwd=ROOT, check=True)
    run = subprocess.run(
        [BENCH, HOST, HOST.parent, "0.001", "2", "small"],
        capture_output=True, text=True, env=os.environ | {"ACRE_HOST_APART": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {"copy", "gemm"} < {row["case"] for row in rows}
    assert len(rows) == 13
    for row in rows:
        assert row["value"] > 0 and row["least_ms"] <= row["ms"] <= row["most_ms"]
        assert row["case"] in ("copy", "gemm") or row["share"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not HOST.is_file(), reason="build/c/cuda_host.so is not built")
def test_the_command_on_the_host(tmp_path):
    command = [
        sys.executable,
        "tests/gpu_check.py",
        "--plugin",
        HOST,
        "--limit",
        "3000",
    ]
    rows = tmp_path / "rows.jsonl"
    run = subprocess.run(
        [*command, "--only", "device build model", "--json", rows],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 ok, 0 failed, 1 skipped" in run.stdout
    steps = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["step"] for row in steps] == ["device", "build", "model"]
    assert all(row["device"] == "cuda_host.so" for row in steps)
