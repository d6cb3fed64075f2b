"""The tree keeps its shape: includes point downward, and the list in DESIGN.md is the
tree."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import acre

ROOT = pathlib.Path(__file__).resolve().parent.parent
ORDER = """
    acre base bf16 status platform buffer tensor pool backend plugin engine rope model
    timeline tape forward loss backward nested select l2 cache build score refill decode
    desk ahead session sweep trainer
""".split()
RANK = {name: rank for rank, name in enumerate(ORDER)}


def includes(path: pathlib.Path) -> list[str]:
    return re.findall(r'^#include "([^"]+)"', path.read_text(), flags=re.MULTILINE)


def test_core_includes_point_downward():
    wrong = []
    for path in sorted((ROOT / "csrc").glob("*.[ch]")):
        assert path.stem in RANK, (
            f"{path.name} is not in the order; add it here and to docs"
        )
        for name in includes(path):
            stem = pathlib.Path(name).stem
            if RANK.get(stem, len(ORDER)) > RANK[path.stem]:
                wrong.append(f"{path.name} includes {name}")
    assert not wrong


def test_backend_sees_no_stage():
    below = set(ORDER[: RANK["backend"] + 1])
    for path in sorted((ROOT / "csrc" / "cpu").glob("*")):
        if path.suffix not in {".c", ".h", ".inc"}:
            continue
        for name in includes(path):
            stem = pathlib.Path(name).stem
            assert stem not in RANK or stem in below or (path.parent / name).exists(), (
                f"cpu/{path.name} includes {name}"
            )


def test_binding_sees_only_the_public_header():
    own = {path.name for path in (ROOT / "acre" / "binding").glob("*.h")}
    for path in sorted((ROOT / "acre" / "binding").glob("*.[ch]")):
        for name in includes(path):
            assert name in own | {"acre.h"}, f"{path.name} includes {name}"


def test_design_names_every_file():
    text = (ROOT / "docs" / "DESIGN.md").read_text()
    for name in ORDER[1:]:
        assert f"`{name}" in text, f"docs/DESIGN.md does not name {name}"


def test_no_shipped_fast_math_or_host_tuning():
    forbidden = re.compile(r"-ffast-math|-Ofast|-march=native")
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Makefile"]:
        assert not forbidden.search(path.read_text()), path.name


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_seam_is_also_cxx():
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    header = ROOT / "csrc" / "backend.h"
    subprocess.run([*command, "-x", "c++", "-include", header, "/dev/null"], check=True)


def test_what_is_loaded_late_is_there():
    code = (
        "import sys, acre; late = {'acre.eval.run', 'acre.eval.sweep', 'acre.plot', "
        "'acre.training.run', "
        "'acre.page', 'matplotlib'}; assert not late & set(sys.modules); "
        "assert {'evaluate', 'plot'} <= set(dir(acre)); "
        "assert 'methods' in acre.evaluate.__doc__ and acre.sweep and acre.page; "
        "import acre.training.log; assert 'steps' in acre.train.__doc__; "
        "assert acre.plot.surface and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        _ = acre.evalute
