"""Others' ways of compressing a KV cache, on acre's weights, prompts and budgets.

    python benchmarks/eval_peers.py --data DIR --task longbench_sample --limit 2
        --budget 4096 --methods snapkv,expected_attention --output peers.jsonl

Takes a benchmark's data and names of methods (benchmarks/peer_presses.py; "+question"
behind one lets it see the question while it compresses). Appends one line per answer to
a JSON lines file, without scores: acre's metrics give those later, as for its own
methods. One idea: a line is written when its answer is there, and a run goes on where
an earlier one with the same settings stopped; all methods answer a document before the
next one is read, so a run cut short compares the same questions. A document or question
that fails is reported and left out, and the exit status says so.

It needs a venv of its own: benchmarks/requirements-peers.txt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bench_cpu import smollm2
from peer_presses import TransformersMethod, kvpress

import acre
from acre.eval.records import Document, Question

AWARE = "+question"
FAILURES = (ValueError, RuntimeError, MemoryError)
Key = tuple[str, str, str, str, str]


def methods_of(
    names: str, budget: int, path: Path, dtype: str
) -> list[TransformersMethod]:
    """The methods of a list such as "full,snapkv,snapkv+question". ValueError."""
    return [
        TransformersMethod(
            name.removesuffix(AWARE),
            0 if name == "full" else budget,
            path,
            question_aware=name.endswith(AWARE),
            dtype=dtype,
        )
        for name in names.split(",")
    ]


class Lines:
    """The file of answers. `done` holds the keys of those that it has."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it; half a line, of a run that was killed, is cut off.

        ValueError names a line that is no answer.
        """
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.done: set[Key] = set()
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.done.add(key_of(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: expected an answer") from None
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(record).encode("ascii") + b"\n")
        self._file.flush()
        self.done.add(key_of(record))

    def close(self) -> None:
        """No more records."""
        self._file.close()


def key_of(record: dict[str, Any]) -> Key:
    """What makes an answer the same: task, question, method, settings, model."""
    settings = json.dumps(record["settings"], sort_keys=True)
    task, identity, method, model = (
        str(record[name]) for name in ("task", "id", "method", "model")
    )
    return task, identity, method, model, settings


def head(
    method: Any, model: acre.Model, document: Document, question: Question
) -> dict[str, Any]:
    """A record before it has its answer."""
    return {
        "task": document.task,
        "id": question.id,
        "method": method.name,
        "model": model.fingerprint,
        "settings": method.settings(),
        "answers": list(question.answers),
        "facts": dict(question.facts),
    }


def filled(record: dict[str, Any], reply: Any) -> dict[str, Any]:
    """The record with its answer; `reply`: peer_presses.Reply."""
    own = dict(vars(reply))
    return record | {"prediction": own.pop("text")} | own


def answer(method: Any, model: acre.Model, document: Document, lines: Lines) -> int:
    """Asks what is not answered yet; gives the number of failures."""
    records = [(q, head(method, model, document, q)) for q in document.questions]
    due = [(q, record) for q, record in records if key_of(record) not in lines.done]
    if not due:
        return 0
    failed = 0
    try:
        with closing(method.open(model, document)) as reading:
            for question, record in due:
                try:
                    lines.add(filled(record, reading.ask(question)))
                except FAILURES as error:
                    failed += 1
                    complain(method, document, question.id, error)
    except FAILURES as error:
        complain(method, document, "every question", error)
        return len(due)
    return failed


def complain(method: Any, document: Document, which: str, error: Exception) -> None:
    """One line about what failed."""
    where = f"{document.task} {document.id}, {which}, {method.name}"
    print(f"{where}: {type(error).__name__}: {error}", file=sys.stderr)


def run(
    model: acre.Model,
    documents: Iterable[Document],
    methods: Sequence[Any],
    lines: Lines,
) -> int:
    """Every method on every document; gives the number of failures."""
    failed = 0
    for number, document in enumerate(documents, 1):
        for method in methods:
            start = time.perf_counter()
            failed += answer(method, model, document, lines)
            seconds = time.perf_counter() - start
            print(f"{document.task} {number} {method.name} {seconds:.1f} s", flush=True)
    return failed


def documents_of(name: str, data: Path, limit: int | None) -> list[Document]:
    """The documents of a benchmark's task, as acre's own evaluation reads them."""
    from acre.eval.readers import load
    from acre.eval.tasks import find

    return [doc for task in find([name]) for doc in load(task, data, limit).documents]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--methods", default="snapkv,expected_attention")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Answers, line by line; exit status 1 where something failed."""
    given = options()
    import torch

    torch.set_num_threads(given.threads)
    path = given.model or smollm2()
    try:
        methods = methods_of(given.methods, given.budget, path, given.dtype)
        if any(method.press for method in methods):
            kvpress()
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    documents = documents_of(given.task, given.data, given.limit)
    model = acre.Model.from_pretrained(path, threads=1)
    with closing(Lines(given.output)) as lines:
        failed = run(model, documents, methods, lines)
    if failed:
        sys.exit(f"{failed} answers failed; another run tries them again")


if __name__ == "__main__":
    main()
