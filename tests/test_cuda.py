"""The CUDA backend as far as a machine without a GPU shows it: what is refused, and
what the compiler made. The kernels themselves run in the C tests (cuda/README.md)."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import toy

import acre
from acre import _core, devices

ROOT = pathlib.Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "cuda" / "cuda"
PLUGIN = devices.cuda_plugin()
built = pytest.mark.skipif(PLUGIN is None, reason="no nvcc, so no acre/_cuda.so")


def loads(library: str) -> bool:
    """Whether the dynamic loader has it."""
    code = f"import ctypes; ctypes.CDLL({library!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True)
    return run.returncode == 0


def from_wheel(pattern: str) -> pathlib.Path | None:
    """A file of the nvidia-* wheels, by its path below nvidia/."""
    for directory in sys.path:
        for path in pathlib.Path(directory, "nvidia").glob(pattern):
            return path
    return None


# ------------------------------------------------------------------------- refusals


@pytest.mark.skipif(loads("libcuda.so.1"), reason="there is a driver")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
def test_without_a_driver(device):
    words = "no NVIDIA driver" if PLUGIN else "nvcc"
    with pytest.raises(NotImplementedError, match=words):
        acre.Model.from_arrays(toy.hf_config(), toy.arrays(), device=device)


@pytest.mark.parametrize("device", ["cuda:", "cuda:one", "cuda:-1", "cuda0", "gpu", ""])
def test_names_that_are_none(device):
    with pytest.raises(ValueError, match="expected 'cpu', 'cuda' or 'cuda:N'"):
        acre.Model.from_arrays(toy.hf_config(), toy.arrays(), device=device)


def test_a_file_that_is_no_plugin(tmp_path):
    path = tmp_path / "_cuda.so"
    path.write_bytes(b"not this")
    with pytest.raises(NotImplementedError, match="does not load.*_cuda.so"):
        _core.Engine(device="cuda", plugin=str(path))
    with pytest.raises(NotImplementedError, match="version unknown"):
        _core.Engine(device="cuda", plugin=_core.__file__)


def test_a_plugin_of_other_sources(tmp_path):
    """Of this version, but its table has another size: its calls would go astray."""
    source, path = tmp_path / "fake.c", tmp_path / "_cuda.so"
    source.write_text(
        f'const char acre_cuda_version[] = "{acre.__version__}";'
        "const unsigned long acre_cuda_seam = 8;"
        "int acre_cuda_backend_open(void) { return 0; }"
    )
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", path], check=True)
    with pytest.raises(NotImplementedError, match="built from other sources"):
        _core.Engine(device="cuda", plugin=str(path))


def test_nothing_is_loaded_before_it_is_asked_for():
    code = (
        "import acre, toy; acre.Model.from_arrays(toy.hf_config(), toy.arrays());"
        "maps = open('/proc/self/maps').read();"
        "names = ('_cuda', 'libcuda', 'cublas', 'libnccl');"
        "print([name for name in names if name in maps])"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert run.stdout.strip() == "[]", run.stderr


def test_libraries_of_wheels_are_found(tmp_path, monkeypatch):
    for name in ("one/nvidia/cublas/lib", "two/nvidia/cu13/lib", "two/nvidia/cu13/bin"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "one"), str(tmp_path / "two")])
    found = devices.cuda_libraries().split(":")
    wanted = ["one/nvidia/cublas/lib", "two/nvidia/cu13/lib"]
    assert found == [str(tmp_path / name) for name in wanted]
    monkeypatch.setattr(sys, "path", [])
    assert devices.cuda_libraries() == ""


# ------------------------------------------------------------------ what was compiled


@built
def test_exports_and_needs():
    names = subprocess.run(
        ["nm", "-D", "--defined-only", PLUGIN], capture_output=True, text=True
    ).stdout.split()[2::3]
    assert sorted(names) == [
        "acre_cuda_backend_open", "acre_cuda_seam", "acre_cuda_version",
    ]  # fmt: skip
    needs = subprocess.run(["readelf", "-d", PLUGIN], capture_output=True, text=True)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", needs.stdout))
    assert not {name for name in needed if re.search(r"cuda|cublas|stdc\+\+", name)}


@built
def test_machine_code_of_each_chip_and_ptx():
    tool = shutil.which("cuobjdump") or from_wheel("*/bin/cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump (nvidia-cuda-cuobjdump)")
    command = [tool, "--list-elf", "--list-ptx", PLUGIN]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = Counter(re.findall(r"(sm_\w+)\.(cubin|ptx)", listed))
    sources = list((ROOT / "cuda").rglob("*.cu"))
    everywhere = [path for path in sources if path.parent.name != "sm90"]
    assert kinds["sm_80", "cubin"] >= len(everywhere)
    assert kinds["sm_90a", "cubin"] >= len(sources)
    assert kinds["sm_90", "ptx"] == len(everywhere)
    assert set(kinds) == {("sm_80", "cubin"), ("sm_90a", "cubin"), ("sm_90", "ptx")}


@built
def test_no_kernel_spills():
    """Of the compiler's reports: registers that go to memory and back."""
    logs = sorted(OBJECTS.rglob("*.cu.log"))
    if not logs:
        pytest.skip("the backend was built elsewhere")
    kernels, spilling = 0, []
    entry = re.compile(
        r"function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+)", re.DOTALL
    )
    for log in logs:
        for name, chip, stores, loads_ in entry.findall(log.read_text()):
            kernels += 1
            if (stores, loads_) != ("0", "0"):
                spilling.append((name, chip, stores, loads_))
    assert kernels > 100
    assert not spilling


def machine_code(folder: str, chip: str) -> dict[str, str]:
    """The disassembly for `chip` of every kernel of a folder of cuda/, by its mangled
    name."""
    objects = sorted((OBJECTS / folder).glob("*.o"))
    if not objects:
        pytest.skip("the backend was built elsewhere")
    tools = [
        shutil.which(name) or from_wheel(f"*/bin/{name}")
        for name in ("cuobjdump", "nvdisasm")
    ]
    if None in tools:
        pytest.skip("no cuobjdump or nvdisasm (nvidia-cuda-cuobjdump, -nvdisasm)")
    path = os.pathsep.join([str(pathlib.Path(tools[1]).parent), os.environ["PATH"]])
    found = {}
    for file in objects:
        listed = subprocess.run(
            [tools[0], "-sass", "-arch", chip, file],
            capture_output=True, text=True, check=True, env=os.environ | {"PATH": path},
        ).stdout  # fmt: skip
        parts = re.split(r"Function : (\S+)", listed)
        found |= zip(parts[1::2], parts[2::2], strict=True)
    return found


@built
def test_attention_uses_matrix_units():
    """Of 8.0: products of fragments, fragments from shared memory, copies past the
    registers; and nothing in local memory."""
    kernels = re.compile(r"_cu_.*(attend|decode|dq|dkv)_kernelILi(\d+)E")
    wanted = [
        "HMMA.16816.F32.BF16",
        "LDSM.16.M88.4",
        "LDSM.16.MT88.4",
        "LDGSTS.E.BYPASS.128",
    ]
    found = Counter()
    for name, text in machine_code("sm80", "sm_80").items():
        kernel = kernels.search(name)
        if kernel is None:
            continue
        found[kernel[1]] += 1
        for instruction in wanted:
            assert instruction in text, (name, instruction)
        assert not re.search(r"\b(LDL|STL)\b", text), name
    assert found == {"attend": 5, "decode": 5, "dq": 5, "dkv": 5}


@built
def test_hopper_s_own_instructions():
    """Of 9.0: matrix products of warpgroups, bulk copies of tensors, registers that
    change hands; and nothing in local memory."""
    kernels = machine_code("sm90", "sm_90a")
    assert len(kernels) == 2
    for text in kernels.values():
        for instruction in ("HGMMA", "UTMALDG", "USETMAXREG", "MUFU.EX2"):
            assert instruction in text, instruction
        assert not re.search(r"\b(STL|LDL|HMMA)\b", text)


@built
def test_products_of_warpgroups_run_side_by_side():
    log = OBJECTS / "sm90" / "attend.cu.log"
    if not log.exists():
        pytest.skip("the backend was built elsewhere")
    assert "serialized" not in log.read_text() and "C75" not in log.read_text()


def test_numbers_of_nccl_are_the_library_s():
    header = from_wheel("nccl/include/nccl.h")
    if header is None:
        pytest.skip("no nccl.h (nvidia-nccl-cu13)")
    theirs = re.sub(r"\s+", " ", header.read_text())
    ours = (ROOT / "cuda" / "nccl.h").read_text()
    names = {"SUCCESS": "Success", "INVALID_ARGUMENT": "InvalidArgument",
             "REMOTE_ERROR": "RemoteError", "IN_PROGRESS": "InProgress",
             "FLOAT32": "Float32", "SUM": "Sum"}  # fmt: skip
    for name, theirs_name in names.items():
        number = re.search(rf"NCCL_{name} = (\d+)", ours)[1]
        assert re.search(rf"\bnccl{theirs_name} = {number}\b", theirs), name
    fields = "size_t size; unsigned int magic; unsigned int version;"
    assert "0xcafebeef" in theirs and "NCCL_UNIQUE_ID_BYTES 128" in theirs
    assert re.search(re.escape(fields) + r".{0,80} int blocking;", theirs)
    found = re.findall(r"X\([^,]+, (nccl\w+)", ours)
    assert len(found) == 10
    for name in found:
        assert re.search(rf"\b{name}\(", theirs), name


def test_numbers_of_cublaslt_are_the_library_s():
    header = from_wheel("*/include/cublasLt.h")
    if header is None:
        pytest.skip("no cublasLt.h (nvidia-cublas)")
    theirs = header.read_text() + (header.parent / "cublas_api.h").read_text()
    ours = (ROOT / "cuda" / "cublaslt.h").read_text()
    prefixes = {"DESC": "CUBLASLT_MATMUL_DESC", "PREF": "CUBLASLT_MATMUL_PREF"}
    prefixes |= {"EPILOGUE": "CUBLASLT_EPILOGUE", "OP": "CUBLAS_OP"}
    found = re.findall(r"LT_(DESC|PREF|EPILOGUE|OP)_(\w+) = (\d+)", ours)
    assert len(found) == 13
    for kind, name, number in found:
        assert re.search(rf"\b{prefixes[kind]}_{name} = {number}\b", theirs), name
    assert "CUBLAS_COMPUTE_32F = 68" in theirs
    for name in re.findall(r"X\([^,]+, (cublasLt\w+)", ours):
        assert re.search(rf"\b{name}\(", theirs), name
