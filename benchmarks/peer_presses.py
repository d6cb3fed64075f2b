"""Others' compressed KV caches as methods of the evaluation, through transformers.

Takes a model file, the name of a press of the package kvpress and how acre would read;
gives a method (acre.eval.methods.Method) that reads a document once and answers its
questions greedily from as many entries as acre's answers attend to. One idea: weights,
prompts, detokenising and stopping are acre's own, so that all that differs is which
keys and values are kept. They keep the positions at which they were read, as in
kvpress' pipeline. Refuses unknown presses, budgets that a press cannot keep, and a
press that keeps another number of entries than asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peer_models import torch_from_file

from acre.eval.excerpt import Excerpt, middle_cut
from acre.eval.methods import Reply, Settings, entries, positions
from acre.eval.records import Document, Question
from acre.eval.shelf import Shelf
from acre.generate import Generation, Sampling, Stream, Streamer, Writer
from acre.generate import run as decode

REQUIREMENTS = "benchmarks/requirements-peers.txt"


@dataclass(frozen=True)
class Press:
    """A class of kvpress with its options, and the fewest entries it can keep."""

    kind: str
    least: int
    options: Mapping[str, Any] = field(default_factory=dict)


# The options are kvpress' defaults, written out so that they are among the settings.
PRESSES: dict[str, Press | None] = {
    "full": None,
    # arXiv 2404.14469: what the last 64 tokens attend to.
    "snapkv": Press("SnapKVPress", 65, {"window_size": 64, "kernel_size": 5}),
    # arXiv 2510.00636: what queries drawn like the text's own would attend to.
    "expected_attention": Press(
        "ExpectedAttentionPress",
        5,
        {
            "n_future_positions": 512,
            "n_sink": 4,
            "use_covariance": True,
            "use_vnorm": True,
            "epsilon": 0.0,
        },
    ),
}


# ---------------------------------------------------------------------- keys and values


def ratio(entries: int, keep: int) -> float:
    """The share to remove so that kvpress, which rounds down, keeps just `keep`."""
    return 0.0 if keep >= entries else 1.0 - (keep + 0.5) / entries


def kvpress() -> Any:
    """The package; ImportError says how to get it."""
    try:
        return importlib.import_module("kvpress")
    except ImportError as error:
        raise ImportError(
            f"kvpress is not installed: pip install -r {REQUIREMENTS}, in its own venv"
        ) from error


@functools.lru_cache(maxsize=1)
def _open(path: Path, dtype: str) -> Any:
    """The transformers model; the methods of one run share it."""
    return torch_from_file(path, dtype)


class TorchSequence:
    """Keys and values of one sequence in a transformers model, and its next token."""

    def __init__(self, model: Any) -> None:
        import transformers

        names = inspect.signature(model.forward).parameters
        self._argument = "cache" if "cache" in names else "past_key_values"
        self._model = model
        self._cache = transformers.DynamicCache(config=model.config)
        self._logits: Any = None
        self._pending: int | None = None
        self.position = 0

    @property
    def entries(self) -> int:
        """Entries per head; RuntimeError if layers differ."""
        sizes = {layer.keys.shape[2] for layer in self._cache.layers}
        if len(sizes) != 1:
            raise RuntimeError(f"layers keep {sorted(sizes)} entries, expected alike")
        return sizes.pop()

    def _forward(self, network: Any, ids: np.ndarray, **options: Any) -> Any:
        import torch

        stop = self.position + len(ids)
        with torch.inference_mode():
            out = network(
                input_ids=torch.from_numpy(ids.astype(np.int64))[None],
                position_ids=torch.arange(self.position, stop)[None],
                use_cache=True,
                **{self._argument: self._cache},
                **options,
            )
        self.position = stop
        return out

    def read(self, ids: np.ndarray, press: Press | None, keep: int) -> None:
        """Reads ids int32 [n] in one pass, then keeps `keep` entries per head.

        In one pass, since kvpress compresses after the first. RuntimeError when another
        number of entries is left.
        """
        keep = min(keep, len(ids))
        pressing: Any = contextlib.nullcontext()
        if press is not None:
            kind = getattr(kvpress(), press.kind)
            share = ratio(len(ids), keep)
            pressing = kind(compression_ratio=share, **press.options)(self._model)
        with pressing:
            self._forward(self._model.model, ids)
        if self.entries != keep:
            raise RuntimeError(f"press kept {self.entries} entries, expected {keep}")

    def feed(self, ids: np.ndarray) -> None:
        """Reads ids int32 [t] and keeps them all."""
        out = self._forward(self._model, ids, logits_to_keep=1)
        self._logits, self._pending = out.logits[0, -1], None

    def next(self, **_: Any) -> int:
        """The likeliest token after what was fed; the next call feeds it. The options
        are those of acre's sessions, at their greedy defaults."""
        if self._pending is not None:
            self.feed(np.array([self._pending]))
        self._pending = int(self._logits.argmax())
        return self._pending

    def cut(self, entries: int, position: int) -> None:
        """Forgets the entries after the first `entries`; `position` comes next."""
        for layer in self._cache.layers:
            layer.keys = layer.keys[:, :, :entries]
            layer.values = layer.values[:, :, :entries]
        self.position = position


# --------------------------------------------------------------------------- the method


class TransformersMethod:
    """A press with acre's budget, in the shape that the evaluation takes."""

    def __init__(
        self,
        press: str,
        reading: Settings,
        path: Path,
        *,
        question_aware: bool = False,
        dtype: str = "bf16",
    ) -> None:
        """press: one of PRESSES; "full" keeps everything. path: the model's file, the
        same as acre's.

        reading: acre's settings; as many entries are kept as acre's answers attend to.
        question_aware: the text is read anew for each question and compressed with it,
        and the question's tokens are kept on top; else once, before any question.
        dtype: "bf16" or "f32". ValueError.
        """
        if press not in PRESSES:
            raise ValueError(f"press: got {press!r}, expected one of {list(PRESSES)}")
        self.press = PRESSES[press]
        if question_aware and not self.press:
            raise ValueError("question_aware: got True, 'full' has nothing to choose")
        self.reading, self.path, self.dtype = reading, Path(path), dtype
        self.question_aware = question_aware
        aware = "+question" if question_aware else ""
        self.label = f"{press}{aware}" if self.press else "transformers-full"

    def settings(self) -> dict[str, Any]:
        """All that decides the answers, as JSON values."""
        packages = ["torch", "transformers", *(["kvpress"] if self.press else [])]
        return {
            "press": self.press.kind if self.press else "none",
            "options": dict(self.press.options) if self.press else {},
            "question_aware": self.question_aware,
            "dtype": self.dtype,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            **(asdict(self.reading) if self.press else {}),
        }

    def open(self, shelf: Shelf, document: Document) -> TransformersReading:
        """Reads the document; the shelf gives prompts, positions and the budget.

        ValueError for a budget that the press cannot keep.
        """
        offsets = shelf.offsets(document)
        excerpt = middle_cut(document.text, offsets, positions(shelf, document))
        keep = None
        if self.press:
            prefix = len(shelf.frame(document).prefix_ids)
            keep = entries(shelf, document, self.reading) + prefix
            if keep < self.press.least:
                raise ValueError(
                    f"budget: got {keep}, {self.label} keeps {self.press.least} or more"
                )
        return TransformersReading(self, shelf, document, excerpt, keep)


class TransformersReading:
    """A document that was read, ready for questions."""

    def __init__(
        self,
        method: TransformersMethod,
        shelf: Shelf,
        document: Document,
        excerpt: Excerpt,
        keep: int | None,
    ) -> None:
        self._method, self._shelf, self._document = method, shelf, document
        self._excerpt, self._keep = excerpt, keep
        self._torch = _open(method.path, method.dtype)
        self._frame = shelf.frame(document)
        body = shelf.model.tokenizer.encode(excerpt.text)
        self.ids = np.concatenate([self._frame.prefix_ids, body])
        self._sequence: TorchSequence | None = None
        self._build_s = 0.0
        if not method.question_aware:
            start = time.perf_counter()
            self._sequence = self._read(self.ids, 0)
            self._build_s = time.perf_counter() - start

    def _read(self, ids: np.ndarray, asked: int) -> TorchSequence:
        """A new sequence that keeps the budget and room for `asked` question tokens."""
        sequence = TorchSequence(self._torch)
        keep = len(ids) if self._keep is None else self._keep + asked
        sequence.read(ids, self._method.press, keep)
        return sequence

    def _begun(
        self, ids: np.ndarray, last: int
    ) -> tuple[TorchSequence, np.ndarray, int]:
        """(sequence, ids to feed, question tokens that it has already)."""
        if self._sequence is not None:
            return self._sequence, ids, 0
        asked = min(last, len(ids) - 1)  # something must be fed to get a first token
        sequence = self._read(np.concatenate([self.ids, ids[:asked]]), asked)
        return sequence, ids[asked:], asked

    def ask(self, question: Question) -> Reply:
        """Answers greedily; the reading stays as it was."""
        reset_peak()
        framed = self._shelf.asked(self._document, question)
        ids, _, last = self._frame.question_ids(framed.prompt)
        start = time.perf_counter()
        sequence, rest, asked = self._begun(ids, last)
        size, position = sequence.entries, sequence.position
        try:
            sequence.feed(rest)
            made = self._decode(sequence, question)
        finally:
            sequence.cut(size, position)
        whole = size - asked == len(self.ids)
        return Reply(
            text=made.text,
            context_tokens=len(self.ids) - len(self._frame.prefix_ids),
            entries=size - asked,
            kept=list(self._excerpt.ranges) if whole else None,
            truncated=not self._excerpt.complete or framed.cut,
            build_s=self._build_s,
            first_token_s=made.first_token_at - start,
            decode_s=made.decode_s,
            new_tokens=len(made.ids),
            peak_bytes=peak_bytes(),
        )

    def _decode(self, sequence: TorchSequence, question: Question) -> Generation:
        limit, model = question.max_new_tokens, self._shelf.model
        sampling = Sampling(limit, stop=question.stop)
        writer = Writer(sampling, limit, model.tokenizer, model.eos_ids, Streamer(None))
        return Stream(decode(sequence, writer)).finish()


# ------------------------------------------------------------------------------- memory


def reset_peak() -> None:
    """Lets the peak of memory begin anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The process's largest resident size since `reset_peak`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").split("\n"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
