"""Data files of a task, as documents.

Takes a task and where its rows lie: a folder, a file (JSON lines, plain, xz or gz; a
JSON list; a zip with the task's member), rows at hand, or nothing, which asks the
Hugging Face hub. Gives the documents, grouped by text, with the lines that could not be
used. One idea: rows are read one by one, and a bad one is a record of what is wrong
with it, never the end. Refuses data without a single usable row.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from acre.eval.records import BadRecord, Document, grouped
from acre.eval.tasks.task import Hub, Task

ENDINGS = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".json")
# What broken or truncated archives raise while they are read.
BROKEN = (EOFError, OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)
BOM = b"\xef\xbb\xbf"
Data = str | os.PathLike | Iterable[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Loaded:
    """What a task's data holds.

    documents: by text, in the order of the file. bad: lines left out. path: the file,
    <zip>/<member>, or "<rows>". digest: sha256 of the file (all of a zip) or the rows.
    """

    documents: list[Document]
    bad: list[BadRecord]
    path: str
    digest: str


@dataclass(frozen=True)
class Source:
    """A file of rows; member: where it is a zip, what to read in it."""

    file: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.file}/{self.member}" if self.member else str(self.file)


def load(task: Task, data: Data = None, limit: int | None = None) -> Loaded:
    """The documents of `task`.

    data: a folder, a file, or an iterable of rows, as the `datasets` library gives
    them; None = the hub, or for the samples the folder ACRE_DATA names. limit: the
    first so many questions. Raises FileNotFoundError where there is no such data and
    ValueError where no row of it can be used.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if task.benchmark == "probe":
        raise ValueError(f"{task.name}: is generated, see acre.eval.probes.generate")
    if data is None or isinstance(data, (str, os.PathLike)):
        source = locate(task, None if data is None else Path(data))
        path, rows, sha = str(source), read_rows(source), None
    else:
        sha = hashlib.sha256()
        path, rows = "<rows>", _given(data, sha)
    documents, bad = _documents(task, path, rows, None if task.merge else limit)
    if not documents:
        first = f"; the first: {bad[0]}" if bad else ""
        raise ValueError(f"{path}: no usable record for {task.name}{first}")
    documents = grouped(documents)
    if task.merge:
        documents = _first(task.merge(documents), limit)
    digest = sha.hexdigest() if sha else _digest(source.file)
    return Loaded(documents, bad, path, digest)


# -------------------------------------------------------------------------- documents


def _documents(
    task: Task,
    path: str,
    rows: Iterable[tuple[int, Any, str]],
    limit: int | None,
) -> tuple[list[Document], list[BadRecord]]:
    """Documents of the rows, until `limit` questions are had, and the bad lines."""
    documents, bad, had = [], [], 0
    seen: set[tuple[str, str]] = set()
    texts: dict[str, str] = {}  # many rows repeat a text: keep it once
    for line, row, wrong in rows:
        made, wrong = ([], wrong) if wrong else _parsed(task, row, line)
        if wrong:
            bad.append(BadRecord(path, line, wrong))
        for document in _first(made, None if limit is None else limit - had):
            text = texts.setdefault(document.text, document.text)
            documents.append(_distinct(replace(document, text=text), line, seen))
            had += max(1, len(document.questions))
        if limit is not None and had >= limit:
            break
    return documents, bad


def _parsed(task: Task, row: Any, line: int) -> tuple[list[Document], str]:
    """The documents of a row, or why it has none."""
    if not isinstance(row, Mapping):
        return [], f"expected an object, got {type(row).__name__}"
    try:
        made = task.parse(dict(row), line)
    except KeyError as error:
        return [], f"no field {error}"
    except (ValueError, TypeError, RecursionError) as error:
        return [], str(error) or type(error).__name__
    wrong = next(filter(None, map(_wrong, made)), "" if made else "no document")
    return ([], wrong) if wrong else (made, "")


def _wrong(document: Document) -> str:
    """What keeps a document from being asked, or ""."""
    if not document.text.strip():
        return "the text is empty"
    parts = [document.instruction, document.text]
    for question in document.questions:
        if not any(answer.strip() for answer in question.answers):
            return f"question {question.id}: no answers"
        parts += [question.prompt, *question.answers]
    try:
        for part in parts:
            part.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not Unicode text: {error.reason}"
    return ""


def _distinct(document: Document, line: int, seen: set[tuple[str, str]]) -> Document:
    """The document, its questions' ids made unique within the task by their line."""
    questions = []
    for question in document.questions:
        if (document.task, question.id) in seen:
            question = replace(question, id=f"{question.id}@{line}")
        seen.add((document.task, question.id))
        questions.append(question)
    return replace(document, questions=tuple(questions))


def _first(documents: list[Document], limit: int | None) -> list[Document]:
    """The documents with the first `limit` questions; one without any counts as one."""
    if limit is None:
        return documents
    kept = []
    for document in documents:
        if limit <= 0:
            break
        kept.append(replace(document, questions=document.questions[:limit]))
        limit -= max(1, len(document.questions))
    return kept


# ------------------------------------------------------------------------------- rows


def _given(rows: Iterable[Any], sha: Any) -> Iterator[tuple[int, Any, str]]:
    """Rows at hand, numbered from 1, each added to the digest."""
    if isinstance(rows, Mapping):
        raise TypeError(f"data: expected the rows of one split, got {list(rows)[:4]}")
    for line, row in enumerate(rows, 1):
        plain = dict(row) if isinstance(row, Mapping) else row
        sha.update(repr(plain).encode("utf-8", "surrogatepass"))
        yield line, plain, ""


def read_rows(source: Source, start: int = 1) -> Iterator[tuple[int, Any, str]]:
    """(1-based line or place in the list, row, what is wrong) of a file.

    start: the first line wanted; those before it are passed over unparsed.
    """
    line = 0
    with opened(source) as file:
        try:
            if str(source).endswith(".json") and _is_list(source):
                rows = _list_rows(source, file)
                yield from (row for row in rows if row[0] >= start)
                return
            for line, raw in enumerate(file, 1):
                raw = raw.removeprefix(BOM) if line == 1 else raw
                if line >= start and raw.strip():
                    yield (line, *_decoded(raw))
        except BROKEN as error:
            yield line + 1, None, f"the file cannot be read on: {error}"


def _decoded(raw: bytes) -> tuple[Any, str]:
    """The value of one line of JSON, or what is wrong with it."""
    try:
        return json.loads(raw.decode("utf-8")), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: byte {error.start} is {raw[error.start]:#04x}"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"


def _is_list(source: Source) -> bool:
    """Does the file begin as a JSON list? Some .json files hold JSON lines."""
    with opened(source) as file:
        head = file.read(4096).removeprefix(BOM)
    return head.lstrip()[:1] == b"["


def _list_rows(source: Source, file: IO[bytes]) -> Iterator[tuple[int, Any, str]]:
    """The elements of a JSON list, which has to be read whole."""
    rows, wrong = _decoded(file.read().removeprefix(BOM))
    if wrong:
        raise ValueError(f"{source}: {wrong}")
    for line, row in enumerate(rows, 1):
        yield line, row, ""


# ------------------------------------------------------------------------------ files


@contextmanager
def opened(source: Source) -> Iterator[IO[bytes]]:
    """The bytes of the rows, unpacked as they are read."""
    with ExitStack() as stack:
        name = source.file.name
        if source.member:
            file = _unzipped(source, stack)
        elif name.endswith(".xz"):
            file = lzma.open(source.file, "rb")
        elif name.endswith(".gz"):
            file = gzip.open(source.file, "rb")
        else:
            file = source.file.open("rb")
        yield stack.enter_context(file)


def _unzipped(source: Source, stack: ExitStack) -> IO[bytes]:
    """The member of a zip, which `stack` closes."""
    try:
        return stack.enter_context(zipfile.ZipFile(source.file)).open(source.member)
    except KeyError:
        raise ValueError(f"{source.file}: no member {source.member}") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source.file}: {error}") from None


def _digest(file: Path) -> str:
    """sha256 of a file as it lies there."""
    sha = hashlib.sha256()
    with file.open("rb") as plain:
        while block := plain.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def locate(task: Task, path: Path | None) -> Source:
    """The file of a task: in a folder, the file itself, or by name from the hub."""
    if path is None:
        folder = os.environ.get("ACRE_DATA")
        if task.benchmark != "data":
            return _downloaded(task)
        if not folder:
            raise FileNotFoundError(
                f"{task.name}: set ACRE_DATA to the folder that holds {task.file}.jsonl"
            )
        path = Path(folder)
    if path.is_dir():
        return _in_folder(task, path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix != ".zip":
        return Source(path)
    if not task.hub or not task.hub.member:
        raise ValueError(f"{path}: {task.name} is not published as a zip; unpack it")
    return Source(path, task.hub.member)


def _in_folder(task: Task, folder: Path) -> Source:
    """The first of the names that a task's file may have."""
    names = [f"{task.file}{part}{end}" for part in ("", ".dev") for end in ENDINGS]
    for name in names:
        if (folder / name).is_file():
            return Source(folder / name)
    if task.hub and task.hub.member and (folder / task.hub.filename).is_file():
        return Source(folder / task.hub.filename, task.hub.member)
    where = f"; {_where(task.hub)}" if task.hub else ""
    raise FileNotFoundError(
        f"{folder}: no file for {task.name}, expected {names[0]} (or .xz, .gz, .json)"
        f"{where}"
    )


def _where(hub: Hub) -> str:
    """Where a file is published."""
    member = f", in it {hub.member}" if hub.member else ""
    return (
        f"it is the dataset {hub.repo} on the Hugging Face hub, {hub.filename}{member}"
    )


def _downloaded(task: Task) -> Source:
    """The task's file from the hub's cache, or fetched into it."""
    hub = task.hub
    if hub is None:
        raise FileNotFoundError(f"{task.name}: published nowhere; name its file")
    advice = f"{_where(hub)}; download it and name its folder (--data)"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{task.name}: no data named, and huggingface_hub is not installed (pip "
            f'install "acre[eval]"); {advice}'
        ) from error
    try:
        file = hf_hub_download(hub.repo, hub.filename, repo_type="dataset")
    # The hub's client raises errors of its own, of requests and of the system.
    except Exception as error:
        raise FileNotFoundError(
            f"{task.name}: cannot be fetched ({type(error).__name__}); {advice}"
        ) from error
    return Source(Path(file), hub.member)
