"""The notebooks run from the first cell to the last, and are kept without outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from model_files import smollm2

import acre

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 300  # of one cell, on a machine with other work


def named(paths: list[Path]) -> list[Any]:
    """Test parameters, slow and by the notebook's name."""
    return [pytest.param(path, marks=pytest.mark.slow, id=path.stem) for path in paths]


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A manager of kernels that starts this interpreter, whatever is installed."""
    manager = pytest.importorskip("jupyter_client.manager")
    specs = pytest.importorskip("jupyter_client.kernelspec")
    pytest.importorskip("ipykernel")
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(Path(acre.__file__).resolve().parent.parent))
    folder = tmp_path / "kernels" / "this"
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "this", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    known = specs.KernelSpecManager(kernel_dirs=[str(folder.parent)])
    return manager.AsyncKernelManager(kernel_name="this", kernel_spec_manager=known)


def run(path: Path, kernel: Any, where: Path) -> Any:
    """The notebook with its outputs; an error in a cell is an error here."""
    nbclient, nbformat = (
        pytest.importorskip("nbclient"),
        pytest.importorskip("nbformat"),
    )
    book = nbformat.read(path, as_version=4)
    where.mkdir(exist_ok=True)
    resources = {"metadata": {"path": str(where)}}
    nbclient.NotebookClient(
        book, km=kernel, timeout=SECONDS, resources=resources
    ).execute()
    return book


def outputs(book: Any) -> list[dict[str, Any]]:
    return [out for cell in book.cells for out in cell.get("outputs", [])]


@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_runs(path, kernel, tmp_path):
    smollm2()
    work = tmp_path / "work"
    made = outputs(run(path, kernel, work))
    assert not [out for out in made if out["output_type"] == "error"]
    said = [out["text"] for out in made if out.get("name") == "stderr"]
    assert not [text for text in said if "Warning" in text and "Tqdm" not in text]
    assert not list(work.iterdir()), "a notebook cleans up behind itself"


def test_pictures_and_the_page_are_shown():
    """Cells that end in a picture must not end in something else."""
    for name, count in {"1_nested_sequence": 2, "3_refilling": 2}.items():
        book = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
        last = [
            "".join(cell["source"]).strip().splitlines()[-1] for cell in book["cells"]
        ]
        assert sum(line.endswith(");") for line in last) == count, name


def test_there_are_five():
    assert [path.stem[0] for path in NOTEBOOKS] == list("12345")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_without_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert book.cells[0].cell_type == "markdown"
    assert book.cells[0].source.startswith(f"# {path.stem[0]}. ")
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert len({cell.id for cell in book.cells}) == len(book.cells)
    assert book.metadata.kernelspec.name == "python3"


@pytest.mark.slow
def test_a_failing_cell_is_found(kernel, tmp_path):
    nbclient, nbformat = (
        pytest.importorskip("nbclient"),
        pytest.importorskip("nbformat"),
    )
    bad = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    path = tmp_path / "bad.ipynb"
    nbformat.write(bad, path)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivision"):
        run(path, kernel, tmp_path / "work")
