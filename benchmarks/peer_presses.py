"""Others' compressed KV caches as methods of the evaluation, through transformers.

Takes a model file, the name of a press of the package kvpress and a budget; gives a
method that reads a document once and answers its questions greedily. One idea: weights,
token ids, detokenising and stopping are acre's own, so that all that differs from
acre's methods is which keys and values are kept. They keep the positions at which they
were read, as in kvpress' pipeline. Refuses unknown presses, budgets that a press cannot
keep, questions for which no position is left, and a press that keeps another number of
entries than asked for.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peer_models import torch_from_file

import acre
from acre.chat import Frame
from acre.eval.records import Document, Question, Range
from acre.generate import Generation, Sampling, Stream, Streamer
from acre.generate import run as decode

REQUIREMENTS = "benchmarks/requirements-peers.txt"
UNFRAMED = "{{ messages[0]['content'] }}{{ messages[-1]['content'] }}"


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


@dataclass
class Reply:
    """An answer and what it took.

    context_tokens: tokens of the document that were read, without the frame's.
    entries: KV entries per head that the answer attends to, before the question. kept:
    character ranges of the text that are all there; None = not known. truncated: the
    text's middle was not read. Times in seconds: build_s of reading the text before any
    question (0 where each question reads it), first_token_s from being asked to the
    first token. peak_bytes: the process's largest resident size since the document was
    opened.
    """

    text: str
    context_tokens: int
    entries: int
    kept: list[Range] | None
    truncated: bool
    build_s: float
    first_token_s: float
    decode_s: float
    new_tokens: int
    peak_bytes: int


# ------------------------------------------------------------------------------ prompts


def framed(tokenizer: acre.Tokenizer, document: Document) -> Frame:
    """The document's frame; without chat, instruction, text and question alone."""
    if document.chat:
        return Frame(tokenizer, instruction=document.instruction)
    begin = "{{ bos_token }}" if tokenizer.adds_bos else ""
    return Frame(
        tokenizer,
        instruction=document.instruction,
        acknowledgement="",
        template=begin + UNFRAMED,
    )


@dataclass(frozen=True)
class Prompt:
    """What is read before the question. ids: int32 [n], the frame's and the text's.
    tokens: those of the text. ranges: its characters that were read."""

    ids: np.ndarray
    tokens: int
    ranges: list[Range]
    truncated: bool


def prompt(
    tokenizer: acre.Tokenizer, frame: Frame, document: Document, positions: int
) -> Prompt:
    """Frame and text, cut so that every question and its answer find a position.

    positions: the model's. A text that is too long loses its middle, as LongBench cuts
    it. ValueError when a question leaves no room for any text.
    """
    body, offsets = tokenizer.encode_offsets(document.text)
    asked = [
        len(frame.question_ids(question.prompt)[0]) + question.max_new_tokens
        for question in document.questions
    ]
    room = positions - len(frame.prefix_ids) - max(asked, default=0)
    if room < 1:
        raise ValueError(
            f"questions: the longest and its answer take {max(asked)} of the model's "
            f"{positions} positions, expected some left for the text"
        )
    size = len(document.text)
    if len(body) <= room:
        ids = np.concatenate([frame.prefix_ids, body])
        return Prompt(ids, len(body), [(0, size)], False)
    last = room // 2
    head, tail = room - last, len(body) - last
    ids = np.concatenate([frame.prefix_ids, body[:head], body[tail:]])
    ranges = [(0, int(offsets[head - 1, 1]))]
    if last:
        ranges.append((int(offsets[tail, 0]), size))
    return Prompt(ids, room, ranges, True)


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
    """A press at a budget, in the shape that the evaluation's runner takes."""

    def __init__(
        self,
        press: str,
        budget: int,
        path: Path,
        *,
        question_aware: bool = False,
        dtype: str = "bf16",
    ) -> None:
        """press: one of PRESSES; "full" keeps all and takes no budget (0).

        budget: KV entries per head that stand for frame and text. path: the model's
        file, the same as acre's. question_aware: the text is read anew for each
        question and compressed with it, up to the question's last token, and the
        question's tokens are kept on top of the budget; else once, before any question.
        dtype: "bf16" or "f32". ValueError.
        """
        if press not in PRESSES:
            raise ValueError(f"press: got {press!r}, expected one of {list(PRESSES)}")
        self.press = PRESSES[press]
        least = self.press.least if self.press else 0
        if budget < least or (budget and not self.press):
            expected = f"at least {least}" if self.press else "0"
            raise ValueError(f"budget: got {budget}, {press} expects {expected}")
        if question_aware and not self.press:
            raise ValueError("question_aware: got True, 'full' has nothing to choose")
        self.budget, self.path, self.dtype = budget, Path(path), dtype
        self.question_aware = question_aware
        aware = "+question" if question_aware else ""
        self.name = f"{press}{aware}-{budget}" if budget else f"transformers-{press}"

    def settings(self) -> dict[str, Any]:
        """All that decides the answers, as JSON values."""
        packages = ["torch", "transformers", *(["kvpress"] if self.press else [])]
        return {
            "press": self.press.kind if self.press else "none",
            "options": dict(self.press.options) if self.press else {},
            "budget": self.budget,
            "question_aware": self.question_aware,
            "dtype": self.dtype,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }

    def open(self, model: acre.Model, document: Document) -> TransformersReading:
        """Reads the document; `model` gives tokenizer, positions and ends of answers.

        ValueError without a tokenizer or where questions leave no room.
        """
        if model.tokenizer is None:
            raise ValueError("model: has no tokenizer")
        return TransformersReading(self, model, document)


class TransformersReading:
    """A document that was read, ready for questions."""

    def __init__(
        self, method: TransformersMethod, model: acre.Model, document: Document
    ) -> None:
        self._method, self._model = method, model
        self._torch = _open(method.path, method.dtype)
        self._frame = framed(model.tokenizer, document)
        self.prompt = prompt(
            model.tokenizer, self._frame, document, model.config["w_max"]
        )
        reset_peak()
        self._sequence: TorchSequence | None = None
        self._build_s = 0.0
        if not method.question_aware:
            start = time.perf_counter()
            self._sequence = self._read(self.prompt.ids, 0)
            self._build_s = time.perf_counter() - start

    def _read(self, ids: np.ndarray, asked: int) -> TorchSequence:
        """A new sequence that keeps the budget and room for `asked` question tokens."""
        method, sequence = self._method, TorchSequence(self._torch)
        keep = method.budget + asked if method.press else len(ids)
        sequence.read(ids, method.press, keep)
        return sequence

    def _begun(
        self, ids: np.ndarray, last: int
    ) -> tuple[TorchSequence, np.ndarray, int]:
        """(sequence, ids to feed, question tokens that it has already)."""
        if not self._method.question_aware:
            if self._sequence is None:
                raise ValueError("reading: it is closed")
            return self._sequence, ids, 0
        asked = min(last, len(ids) - 1)  # something must be fed to get a first token
        sequence = self._read(np.concatenate([self.prompt.ids, ids[:asked]]), asked)
        return sequence, ids[asked:], asked

    def ask(self, question: Question) -> Reply:
        """Answers greedily; the reading stays as it was.

        ValueError for a question that was not the document's and finds no room.
        """
        ids, _, last = self._frame.question_ids(question.prompt)
        needed = len(self.prompt.ids) + len(ids) + question.max_new_tokens
        if needed > self._model.config["w_max"]:
            raise ValueError(
                f"question: with text and answer it takes {needed} positions, the "
                f"model has {self._model.config['w_max']}"
            )
        start = time.perf_counter()
        sequence, rest, asked = self._begun(ids, last)
        size, position = sequence.entries, sequence.position
        try:
            sequence.feed(rest)
            made = self._decode(sequence, question)
        finally:
            sequence.cut(size, position)
        return self._reply(made, size - asked, made.first_token_at - start)

    def _decode(self, sequence: TorchSequence, question: Question) -> Generation:
        limit = question.max_new_tokens
        model = self._model
        pieces = decode(
            sequence,
            Sampling(limit, stop=question.stop),
            limit,
            model.tokenizer,
            model.eos_ids,
            Streamer(None),
        )
        return Stream(pieces).finish()

    def _reply(self, made: Generation, entries: int, first_token_s: float) -> Reply:
        read = self.prompt
        return Reply(
            text=made.text,
            context_tokens=read.tokens,
            entries=entries,
            kept=read.ranges if entries == len(read.ids) else None,
            truncated=read.truncated,
            build_s=self._build_s,
            first_token_s=first_token_s,
            decode_s=made.decode_s,
            new_tokens=len(made.ids),
            peak_bytes=peak_bytes(),
        )

    def close(self) -> None:
        """Frees the keys and values."""
        self._sequence = None


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
