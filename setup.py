"""Builds the extension acre._core from the C sources; all else is in pyproject.toml.

Where nvcc is, the CUDA backend is built beside it by the Makefile, as a shared object
of its own; ACRE_CUDA=0 leaves it out.

The version is written once, in csrc/acre.h. No host tuning and no fast math:
instruction sets are chosen at run time, and linking with fast math would change the
floating point mode of the whole process at import.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE_DIRS = ("csrc", "csrc/cpu", "acre/binding")
FLAGS = [
    "-std=c11",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-D_GNU_SOURCE",
    "-Wall",
    "-Wextra",
    "-pthread",
]


def files(pattern: str) -> list[str]:
    """Files of the source directories, in a fixed order."""
    return sorted(str(path) for d in SOURCE_DIRS for path in Path(d).glob(pattern))


def version() -> str:
    """ACRE_VERSION of csrc/acre.h."""
    header = Path("csrc/acre.h").read_text(encoding="utf-8")
    found = re.search(r'^#define ACRE_VERSION "([^"]+)"', header, re.MULTILINE)
    if not found:
        raise SystemExit("csrc/acre.h: no ACRE_VERSION")
    return found.group(1)


def build_cuda(folder: Path) -> None:
    """acre/_cuda.so into `folder`, where nvcc is and nobody said ACRE_CUDA=0."""
    if os.environ.get("ACRE_CUDA") == "0" or not shutil.which("nvcc"):
        return
    target = folder / "_cuda.so"
    # Jobs and overrides of a make that runs us are not for this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", f"-j{os.cpu_count() or 1}", "cuda", f"CUDA_SO={target}"]
    if subprocess.run(command, env=environment).returncode != 0:
        raise SystemExit("the CUDA backend does not compile; ACRE_CUDA=0 leaves it out")


class ParallelBuild(build_ext):
    """Compiles the sources of one extension side by side, then the CUDA backend."""

    def run(self) -> None:
        super().run()
        build_cuda(Path(self.get_ext_fullpath("acre._core")).parent)

    def build_extensions(self) -> None:
        compile_some = self.compiler.compile
        workers = self.parallel or os.cpu_count() or 1

        def compile_all(sources, *args, **kwargs):
            with ThreadPoolExecutor(workers) as pool:
                parts = pool.map(
                    lambda source: compile_some([source], *args, **kwargs), sources
                )
                return [path for part in parts for path in part]

        self.compiler.compile = compile_all
        super().build_extensions()


setup(
    version=version(),
    ext_modules=[
        Extension(
            "acre._core",
            sources=files("*.c"),
            depends=files("*.h") + files("*.inc"),
            include_dirs=["csrc"],
            libraries=["m", "dl"],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": ParallelBuild},
)
