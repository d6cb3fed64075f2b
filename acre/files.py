"""Files that are whole or not there.

Takes a path and what to write; leaves the finished file under its name, or what was
there before. One idea: write beside the target, sync, rename. Refuses what cannot fit
on the disk before writing any of it. A process that is killed leaves a hidden
".NAME.*.tmp" beside the old file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 8 << 20


def write(file: BinaryIO, data: Any) -> None:
    """Writes all of the bytes through an unbuffered file."""
    view = memoryview(data)
    while view.nbytes:
        view = view[file.write(view) :]


def check_space(directory: str | os.PathLike[str], size: int) -> None:
    """OSError (ENOSPC) where `size` bytes cannot fit."""
    free = shutil.disk_usage(directory).free
    if size > free:
        raise OSError(errno.ENOSPC, f"no space for {size} bytes, {free} are free")


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Makes a rename last; some file systems refuse to sync directories."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def hidden(target: str | os.PathLike[str]) -> str:
    """A name beside the target that nothing else has."""
    directory, name = os.path.split(os.fspath(target))
    return os.path.join(directory, f".{name}.{secrets.token_hex(6)}.tmp")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An unbuffered file that becomes `path` at the end of the block; on any failure an
    old file stays. OSError names the path."""
    target = os.path.realpath(os.fsdecode(path))
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "is a directory", os.fsdecode(path))
    temporary = hidden(target)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        handle = os.open(temporary, flags, 0o666)
        try:
            with open(handle, "wb", buffering=0) as raw:
                yield raw
                os.fsync(raw.fileno())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_directory(os.path.dirname(target))
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder that becomes `path` at the end of the block, its files synced by whoever
    wrote them; on any failure nothing is left. FileExistsError; OSError."""
    if path.exists():
        raise FileExistsError(errno.EEXIST, "already exists", str(path))
    temporary = Path(hidden(path))
    temporary.mkdir()
    try:
        yield temporary
        sync_directory(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def copy(source: Path, target: Path) -> None:
    """A file's content, synced."""
    with open(source, "rb") as old, open(target, "xb") as new:
        shutil.copyfileobj(old, new, CHUNK)
        new.flush()
        os.fsync(new.fileno())
