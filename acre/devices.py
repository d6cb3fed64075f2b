"""Where the CUDA backend and NVIDIA's libraries lie on this machine.

Nothing here loads anything or asks for a GPU: the paths are handed to the core, which
opens the device or says in its error what is missing.
"""

from __future__ import annotations

import os
from importlib.machinery import PathFinder
from pathlib import Path


def cuda_plugin() -> str | None:
    """The file of the CUDA backend beside this package; None where it was not built."""
    path = Path(__file__).with_name("_cuda.so")
    return str(path) if path.is_file() else None


def cuda_libraries() -> str:
    """Directories of installed nvidia-* wheels (nvidia/*/lib), joined by ':'.

    The wheels share the namespace package `nvidia`, whose parts may lie in several
    site directories.
    """
    spec = PathFinder.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    found = (path for root in roots for path in sorted(Path(root).glob("*/lib")))
    return os.pathsep.join(str(path) for path in found if path.is_dir())
