"""`make gpu-check`: builds, checks and times everything on a machine with a GPU.

    python tests/gpu_check.py [--only STEP,..] [--skip STEP,..] [--quick] [--limit S]
                              [--json FILE] [--seed N] [--plugin FILE]

Takes the tree as it lies; needs Python's standard library, make, a C and a C++
compiler, and nvcc where acre/_cuda.so is not built yet. Steps, in this order:

    device     the GPU and its driver, asked of libcuda
    build      acre/_cuda.so, the C tests, the C benchmark
    extension  acre._core for this Python
    kernels    the C tests of the operations, carried to the device, random data
    model      the C test of a whole model: CPU and device give the same
    pytest     tests/test_gpu.py, end to end through Python
    bench      benchmarks/bench_gpu.py: rows beside their targets
    memcheck, racecheck, synccheck    the C tests under compute-sanitizer

A step is ok, FAILED, or skipped with the reason: what it needs is not there, or no
time is left of the limit (600 s). Ends with a table, and with 1 where a step failed or
nothing ran on a device. A target that was missed is no failure: the table says it. Logs
lie under build/gpu-check/. --json appends a line per step and per row of the benchmark,
with device, driver and commit (of git, or ACRE_COMMIT). --plugin takes another file in
place of acre/_cuda.so, such as the host's build/c/cuda_host.so, and asks for no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs import LOGS, ROOT, Ended, Fault, Job, OutOfTime, Skip, run, run_all

PROGRAMS = ROOT / "build" / "c"
OPERATIONS = ("backend", "learn", "attention", "attend_back", "choose")
MODELS = ("plugin", "loop")
TOOLS = ("memcheck", "racecheck", "synccheck")
TOOL_FOUND = 9  # what compute-sanitizer ends with where it found something
OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"


@dataclass
class Outcome:
    """How a step ended."""

    step: str
    result: str
    seconds: float
    what: str


@dataclass
class Check:
    """One run: its settings, and what the steps learn on the way."""

    quick: bool = False
    limit: float = 600.0
    seed: int = 1
    plugin: pathlib.Path = ROOT / "acre" / "_cuda.so"
    given: bool = False  # the plug-in, and with it no GPU
    started: float = field(default_factory=time.monotonic)
    device: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def left(self) -> float:
        """Seconds of the limit."""
        return self.limit - (time.monotonic() - self.started)

    def within(self, seconds: float) -> float:
        """What a step may take; the host's CUDA is slow, and has all that is left."""
        return self.left() if self.given else min(self.left(), seconds)

    def failed(self, step: str) -> bool:
        return any(o.step == step and o.result != OK for o in self.outcomes)

    def needs_device(self) -> None:
        if not self.given and self.failed("device"):
            raise Skip("no device")
        if not self.plugin.is_file():
            raise Skip(f"{self.plugin.name} is not built")

    def environment(self) -> dict[str, str]:
        """Of everything that opens the device."""
        found = libraries(self.given)
        return environment() | {
            "ACRE_TEST_PLUGIN": str(self.plugin),
            "ACRE_TEST_LIBRARIES": found,
        }


# ------------------------------------------------------------------ what programs need


def environment() -> dict[str, str]:
    """Of programs that import acre: this tree's."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def libraries(given: bool = False) -> str:
    """Directories with cuBLASLt: the nvidia-* wheels, as acre finds them, and the
    toolkit's; with a plug-in of the host's, those of its stand-in."""
    if given:
        return str(PROGRAMS)
    path = ROOT / "acre" / "devices.py"
    spec = importlib.util.spec_from_file_location("acre_devices", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.cuda_libraries().split(os.pathsep)
    homes = [pathlib.Path("/usr/local/cuda")]
    if nvcc := shutil.which("nvcc"):
        homes.append(pathlib.Path(nvcc).resolve().parent.parent)
    found += [str(home / "lib64") for home in homes if (home / "lib64").is_dir()]
    return os.pathsep.join(part for part in found if part)


def tool_of(name: str) -> str | None:
    """A program of the toolkit: on the path, or beside nvcc."""
    nvcc = shutil.which("nvcc")
    places = ["/usr/local/cuda/bin"]
    if nvcc:
        places.insert(0, str(pathlib.Path(nvcc).resolve().parent))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


# -------------------------------------------------------------------------------- steps


def driver_of(cuda: Any) -> str:
    """The driver's own number where the kernel tells it, else the CUDA it supports."""
    path = pathlib.Path("/proc/driver/nvidia/version")
    if path.is_file():
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text())
        if found:
            return found[1]
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def step_device(check: Check) -> str:
    """Device 0 as libcuda describes it, without a context."""
    if check.given:
        check.device = {"device": check.plugin.name, "driver": "none"}
        raise Skip(f"{check.plugin.name} was given")
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Fault(f"no NVIDIA driver: {error}") from None
    count, device = ctypes.c_int(), ctypes.c_int()
    failed = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if failed or not count.value:
        raise Fault(f"a driver, but no GPU that it can use (CUDA error {failed})")
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    name, memory = ctypes.create_string_buffer(128), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, 128, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    numbers = []
    for attribute in (75, 76, 16):  # compute capability, multiprocessors
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    check.device = {
        "device": name.value.decode(errors="replace"),
        "driver": driver_of(cuda),
        "capability": f"{numbers[0]}.{numbers[1]}",
        "multiprocessors": numbers[2],
        "bytes": memory.value,
    }
    return (
        f"{check.device['device']}, compute capability {check.device['capability']}, "
        f"{memory.value / 2**30:.0f} GiB, driver {check.device['driver']}"
    )


def step_build(check: Check) -> str:
    jobs = f"-j{os.cpu_count() or 1}"
    done = []
    if check.given:
        done.append(f"{check.plugin.name} was given")
    elif shutil.which("nvcc"):
        run(Job("build-cuda", ["make", jobs, "cuda"]), check.left())
        done.append("acre/_cuda.so")
    elif check.plugin.is_file():
        done.append("no nvcc, acre/_cuda.so as it lies there")
    else:
        raise Fault("no nvcc, and no acre/_cuda.so")
    programs = [f"test_{name}" for name in (*OPERATIONS, "cases", *MODELS)]
    targets = [f"build/c/{name}" for name in (*programs, "bench_device")]
    run(Job("build-programs", ["make", jobs, *targets]), check.left())
    return ", ".join([*done, f"{len(targets)} programs"])


def importable(*modules: str) -> str:
    """ "" where this Python has the modules, else the first that it lacks, and why."""
    code = "import importlib, sys; [*map(importlib.import_module, sys.argv[1:])]"
    probe = subprocess.run(
        [sys.executable, "-c", code, *modules],
        capture_output=True, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    lines = probe.stderr.strip().splitlines()
    return "" if probe.returncode == 0 else (lines or ["it ended without a word"])[-1]


def step_extension(check: Check) -> str:
    """Always anew where it can be built: one of other sources would not fit the
    plug-in, and nothing would say so. By the compiler alone, without setuptools."""
    include = pathlib.Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        if missing := importable("acre"):
            raise Skip(f"no {include / 'Python.h'} to build it with; {missing}")
        return "acre._core as it lies there"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = sorted((ROOT / "acre" / "binding").glob("*.c"))
    command = [
        os.environ.get("CC", "cc"), "-shared", "-std=c11", "-O2", "-fPIC",
        "-D_GNU_SOURCE", "-fvisibility=hidden", "-ffp-contract=off",
        "-fno-math-errno", "-pthread", "-Icsrc", f"-I{include}", *sources,
        PROGRAMS / "libacre.a", "-lm", "-ldl",
        "-o", f"acre/_core{suffix}",
    ]  # fmt: skip
    run(Job("extension", command), check.left())
    if missing := importable("acre"):
        raise Skip(missing)
    return f"acre/_core{suffix}"


def counted(ended: Ended) -> int:
    """Checks that a C test passed; Fault where one failed or none was made."""
    found = re.findall(r"^(\d+) passed, (\d+) failed", ended.text, re.MULTILINE)
    if ended.code is None:
        raise OutOfTime(f"{ended.log.stem} did not end in time")
    if ended.code != 0 or not found or found[-1][1] != "0":
        raise Fault(f"{ended.log.stem} failed ({ended.log})\n{ended.last()}")
    return int(found[-1][0])


def step_kernels(check: Check) -> str:
    """Every operation on the device against the oracle, with little scratch and with
    what a session has; also at the sizes of real models."""
    check.needs_device()
    names = list(OPERATIONS) if check.given else [*OPERATIONS, "cases"]
    light = {"ACRE_TEST_LIGHT": "1"} if check.quick else {}
    jobs = [
        Job(
            f"kernels-{name}",
            [PROGRAMS / f"test_{name}", str(check.seed)],
            check.environment() | light,
        )
        for name in names
    ]
    ended = run_all(jobs, check.within(240), min(len(jobs), os.cpu_count() or 1))
    passed = sum(counted(one) for one in ended)
    tables = {table for one in ended for table in re.findall(r"carried/\S+", one.text)}
    if len(tables) != 1:
        raise Fault(f"the tests ran on {sorted(tables) or 'no device'}")
    return f"{passed} checks on {tables.pop().removeprefix('carried/')}"


def step_model(check: Check) -> str:
    check.needs_device()
    jobs = [
        Job(f"model-{name}", [PROGRAMS / f"test_{name}"], check.environment())
        for name in MODELS
    ]
    ended = run_all(jobs, check.within(120), 1)
    return f"{sum(counted(one) for one in ended)} checks"


def step_pytest(check: Check) -> str:
    check.needs_device()
    if missing := importable("acre", "numpy", "pytest"):
        raise Skip(missing)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-m",
        "gpu",
        "tests/test_gpu.py",
    ]
    ended = run_all(
        [Job("pytest", command, check.environment())], check.within(240), 1
    )[0]
    if ended.code is None:
        raise OutOfTime("pytest did not end in time")
    summary = ended.last(1).strip("= ")
    if ended.code != 0:
        raise Fault(f"{summary} ({ended.log})\n{ended.last(30)}")
    if "passed" not in summary:
        raise Skip(f"{summary}: {ended.last(4).splitlines()[0]}")
    return summary


def step_bench(check: Check) -> str:
    """Rows for the table, which bench_gpu.py writes; a wrong result is a failure."""
    check.needs_device()
    rows = LOGS / "bench.jsonl"
    LOGS.mkdir(parents=True, exist_ok=True)
    rows.unlink(missing_ok=True)
    seconds = check.within(300)
    command = [
        sys.executable, "benchmarks/bench_gpu.py",
        "--program", PROGRAMS / "bench_device",
        "--plugin", check.plugin, "--libraries", libraries(check.given),
        "--json", rows, "--csv", LOGS / "efficiency.csv",
        "--seconds", f"{max(seconds - 20, 1):.0f}",
    ]  # fmt: skip
    command += ["--quick"] * check.quick + ["--small"] * check.given
    try:
        run(Job("bench", command, check.environment()), seconds)
    finally:
        if rows.is_file():
            lines = rows.read_text().splitlines()
            check.rows += [json.loads(line) for line in lines]
    aimed = [row for row in check.rows if row.get("met") is not None]
    met = sum(row["met"] for row in aimed)
    return f"{len(check.rows)} rows, {met} of {len(aimed)} targets met"


def step_sanitizer(tool: str) -> Callable[[Check], str]:
    def step(check: Check) -> str:
        check.needs_device()
        program = tool_of("compute-sanitizer")
        if not program:
            raise Skip("no compute-sanitizer")
        if check.quick or check.given:
            raise Skip("quick" if check.quick else "no device")
        exact = {"ACRE_TEST_EXACT": "1"} if tool == "memcheck" else {}
        command = [program, "--tool", tool, "--error-exitcode", str(TOOL_FOUND)]
        jobs = [
            Job(
                f"{tool}-{name}",
                [*command, PROGRAMS / f"test_{name}", str(check.seed)],
                check.environment() | exact,
            )
            for name in (*OPERATIONS, "plugin")
        ]
        ended = run_all(jobs, check.left(), min(len(jobs), os.cpu_count() or 1))
        return sanitized(ended)

    return step


def sanitized(ended: Sequence[Ended]) -> str:
    """What a tool said of its programs; Fault for a finding, Skip where it cannot work
    here or no program ended."""
    done = [one for one in ended if one.code is not None]
    for one in done:
        if "Device not supported" in one.text:
            raise Skip("compute-sanitizer does not support this device")
        found = re.search(r"ERROR SUMMARY: (\d+) error", one.text)
        races = re.search(r"RACECHECK SUMMARY: (\d+) hazard", one.text)
        summary = found or races
        if one.code != 0 or (summary and summary[1] != "0"):
            raise Fault(f"{one.log.stem} ({one.log})\n{one.last(30)}")
        if not summary:
            raise Fault(f"{one.log.stem}: no summary ({one.log})\n{one.last()}")
    cut = [one.log.stem for one in ended if one.code is None]
    if not done:
        raise Skip("none of its programs ended in the time that was left")
    return f"nothing found in {len(done)}" + (f"; not to an end: {cut}" if cut else "")


STEPS: dict[str, Callable[[Check], str]] = {
    "device": step_device,
    "build": step_build,
    "extension": step_extension,
    "kernels": step_kernels,
    "model": step_model,
    "pytest": step_pytest,
    "bench": step_bench,
    **{tool: step_sanitizer(tool) for tool in TOOLS},
}


# ------------------------------------------------------------------------------- report


def perform(check: Check, step: str) -> Outcome:
    """Runs one step; never raises but for Ctrl-C."""
    start = time.monotonic()
    result, what = OK, ""
    try:
        if check.left() <= 5:
            raise Skip(f"no time was left of {check.limit:.0f} s")
        what = STEPS[step](check)
    except Skip as reason:
        result, what = SKIPPED, str(reason)
    except Fault as fault:
        cut = isinstance(fault, OutOfTime) and check.left() <= 0.5
        result, what = SKIPPED if cut else FAILED, str(fault)
        if cut:  # by the limit, not by its own fault
            what += f": no time was left of {check.limit:.0f} s"
    except Exception as error:  # of our own making: the other steps still run
        result, what = FAILED, f"{type(error).__name__}: {error}"
    outcome = Outcome(step, result, time.monotonic() - start, what)
    check.outcomes.append(outcome)
    return outcome


def commit() -> str:
    """ACRE_COMMIT, or git's, or "unknown"."""
    if told := os.environ.get("ACRE_COMMIT"):
        return told
    try:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def line_of(outcome: Outcome) -> str:
    what = outcome.what.replace("\n", "\n" + " " * 31)
    return f"{outcome.step:<10s} {outcome.result:<8s} {outcome.seconds:7.1f} s  {what}"


def bench_line(row: dict[str, Any]) -> str:
    """A figure, its share of the yardstick, its target and whether that was met."""
    share = f"{row['share']:.2f} of {row['of']}" if row.get("share") else ""
    target = row.get("target", "")
    met = {True: "met", False: "MISSED", None: ""}[row.get("met")]
    value = f"{row['value']:.4g} {row['unit']}"
    return f"{row['case']:<44s} {value:>18s}  {share:<16s} {target:<22s} {met}"


def report(check: Check) -> str:
    """The closing table."""
    lines = [f"commit {commit()}, seed {check.seed}"]
    if check.rows:
        lines += ["", *(bench_line(row) for row in check.rows)]
    lines += ["", *(line_of(outcome) for outcome in check.outcomes)]
    count = Counter(o.result for o in check.outcomes)
    total = time.monotonic() - check.started
    lines.append(
        f"{count[OK]} ok, {count[FAILED]} failed, {count[SKIPPED]} skipped "
        f"in {total:.0f} s"
    )
    return "\n".join(lines)


def write_rows(check: Check, path: pathlib.Path) -> None:
    facts = {**check.device, "commit": commit(), "seed": check.seed}
    steps = [
        {"step": o.step, "result": o.result, "seconds": round(o.seconds, 1)}
        | {"what": o.what.splitlines()[0] if o.what else ""}
        for o in check.outcomes
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in [*steps, *check.rows]:
            file.write(json.dumps(facts | row) + "\n")


def code_of(check: Check) -> int:
    """1 where a step failed, or none that uses the device ran."""
    used = {"kernels", "model", "pytest", "bench", *TOOLS}
    ran = any(o.result == OK and o.step in used for o in check.outcomes)
    wanted = any(o.step in used for o in check.outcomes)
    failed = any(o.result == FAILED for o in check.outcomes)
    return int(failed or (wanted and not ran))


def names(text: str) -> list[str]:
    """Steps of "a,b" or "a b"; "sanitizer" stands for its three."""
    found = []
    for name in re.split(r"[,\s]+", text.strip()):
        if name in STEPS:
            found.append(name)
        elif name == "sanitizer":
            found += TOOLS
        else:
            raise argparse.ArgumentTypeError(
                f"got {name!r}, expected {', '.join(STEPS)}"
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=names, default=list(STEPS))
    parser.add_argument("--skip", type=names, default=[])
    parser.add_argument(
        "--quick", action="store_true", help="less of each, no sanitizer"
    )
    parser.add_argument("--limit", type=float, default=600.0, help="seconds in all")
    parser.add_argument("--json", type=pathlib.Path, help="append the rows to it")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 1 << 31))
    parser.add_argument("--plugin", type=pathlib.Path)
    options = parser.parse_args(arguments)
    check = Check(options.quick, options.limit, options.seed)
    if options.plugin:
        check.plugin, check.given = options.plugin.resolve(), True
    for step in STEPS:
        if step in options.only and step not in options.skip:
            print(line_of(perform(check, step)), flush=True)
    print("\n" + report(check))
    if options.json:
        write_rows(check, options.json)
    return code_of(check)


if __name__ == "__main__":
    sys.exit(main())
