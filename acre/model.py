"""The model: weights and tokenizer, opened once and asked many times.

Takes a Hugging Face directory, a GGUF file or arrays with a configuration; gives
logits, plain generation and `build`, which reads a long text into a `Cache`. One idea:
every tensor goes to the core as it is read and is fingerprinted on the way, so that a
saved cache can name what it belongs to. Refuses unknown devices and dtypes, ids outside
the vocabulary, empty prompts and prompts longer than the position range.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from acre import _core, devices, generate, loaders, together
from acre.adapter import trained_windows
from acre.errors import ModelFileError
from acre.fingerprints import Fingerprints, Prints
from acre.generate import Generation, Sampling, Stream, Streamer, Writer, integer
from acre.scoring import PROXIES, pooling, registered
from acre.tokenizer import Tokenizer

if TYPE_CHECKING:
    from acre.adapter import Adapter
    from acre.cache import Cache
    from acre.chat import Frame

Ids = Sequence[int] | np.ndarray
Tensors = Iterable[tuple[str, Any, str | None]]

CPU = 1  # as DLPack counts devices
WINDOWS = (4096, 2048)  # tokens of the first window and of later ones
DTYPES = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "f32": "f32",
    "fp32": "f32",
    "float32": "f32",
}


# ------------------------------------------------------------------------------- inputs


def check_dtype(dtype: Any) -> str:
    """ "f32" or "bf16" from the names that users write, torch's among them."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected 'bf16' or 'f32'")
    return DTYPES[name]


def check_weights(weights: Any, dtype: str) -> str:
    """ "same" or "q8"; ValueError for others, and for q8 in f32."""
    if weights not in ("same", "q8"):
        raise ValueError(f"weights: got {weights!r}, expected 'same' or 'q8'")
    if weights == "q8" and dtype != "bf16":
        raise ValueError(f"weights: 'q8' needs dtype 'bf16', got {dtype!r}")
    return weights


def _engine(device: str, threads: int) -> _core.Engine:
    """Opens the device; clear errors for what this build lacks."""
    if not isinstance(device, str):
        kind = type(device).__name__
        raise TypeError(f"device: got {kind}, expected 'cpu', 'cuda' or 'cuda:N'")
    threads = integer("threads", threads, 0, 1024)
    if device == "cpu":
        return _core.Engine(device=device, threads=threads)
    return _core.Engine(
        device=device,
        threads=threads,
        plugin=devices.cuda_plugin(),
        libraries=devices.cuda_libraries(),
    )


def on_host(array: Any, engine: _core.Engine) -> Any:
    """An array of the engine's GPU (DLPack) as NumPy's; anything else as it is."""
    device = getattr(array, "__dlpack_device__", None)
    if device is None or isinstance(array, np.ndarray) or int(device()[0]) == CPU:
        return array
    return engine.fetch(array)


def check_ids(
    name: str, ids: Any, vocab_size: int, engine: _core.Engine | None = None
) -> np.ndarray:
    """Token ids as int32 [n], n >= 1, each in [0, vocab_size). With an engine they may
    lie on its GPU.

    TypeError for what are no integers, ValueError for other shapes, an empty sequence
    or ids outside the vocabulary (the first is named with its position).
    """
    array = np.asarray(ids if engine is None else on_host(ids, engine))
    if array.size == 0:
        raise ValueError(f"{name}: got no tokens")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: got {array.dtype}, expected integer token ids")
    if array.ndim != 1:
        raise ValueError(f"{name}: got shape {array.shape}, expected one dimension")
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if bad.size:
        raise ValueError(
            f"{name}: id {array[bad[0]]} at position {bad[0]} is outside the "
            f"vocabulary of {vocab_size}"
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def check_text(name: str, text: str) -> str:
    """`text` itself; ValueError when empty or not encodable as UTF-8."""
    if not text.strip():
        raise ValueError(f"{name}: got an empty text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start} is a lone surrogate, no valid Unicode"
        ) from None
    return text


def is_batch(value: Any) -> bool:
    """True for a list of prompts, False for one (a string or a sequence of ids)."""
    if isinstance(value, (str, bytes, np.ndarray)):
        return False
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and isinstance(value[0], (str, list, tuple, np.ndarray))
    )


# -------------------------------------------------------------------------------- model


class Model:
    """Weights on a device, a tokenizer, measured choices. Immutable but for `scoring`
    (per proxy) and `pooling`; may be used from several threads at once."""

    def __init__(
        self,
        core: _core.Model,
        tokenizer: Tokenizer | None,
        name: str,
        prints: Prints,
    ) -> None:
        """For `from_pretrained` and `from_arrays`; `core` is ready."""
        self.core = core
        self.tokenizer = tokenizer
        self.name = name
        self.config: dict[str, Any] = core.config
        words = tokenizer.fingerprint if tokenizer is not None else "none"
        kept = self.config["weights"]
        self.fingerprints = {
            "model": ("" if kept == "same" else f"{kept}:") + prints.model,
            "adapter": prints.adapter,
            "tokenizer": words,
        }
        self.prints = prints
        known_as = (prints.model, name)
        self.scoring = registered(known_as, self.config["layers"], self.config["heads"])
        self.pooling = pooling(known_as)
        self.windows = dict.fromkeys(PROXIES, WINDOWS)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: Any = "bf16",
        device: str = "cpu",
        adapter: str | os.PathLike[str] | None = None,
        threads: int = 0,
        w_max: int | None = None,
        weights: str = "same",
    ) -> Model:
        """Opens a local Hugging Face directory or a GGUF file.

        dtype: compute and cache dtype, "bf16" (f32 accumulation) or "f32". device:
        "cpu", or "cuda" or "cuda:N" where acre was built with nvcc. adapter: a
        file or directory with trained L1 parameters only, of this model. threads: 0 =
        usable cores. w_max: usable positions, default the model's. weights: "same" as
        dtype, or "q8": 8 bits and a scale per 32 numbers, for faster decoding in about
        half the memory; needs dtype "bf16".
        FileNotFoundError, ModelFileError (names file and fault), ValueError for
        options, NotImplementedError for a device that this build or machine lacks,
        MemoryError.
        """
        dtype, engine = check_dtype(dtype), _engine(device, threads)
        kept = check_weights(weights, dtype)
        positions = None if w_max is None else integer("w_max", w_max, 1)
        source = loaders.open_source(path)
        trained = None if adapter is None else loaders.open_adapter(adapter)
        tensors = source.tensors() if trained is None else trained.on(source)

        said = trained_windows(source.acre, source.path)
        if trained is not None:
            said = trained.windows()
        try:
            model = cls._bind(
                engine, {**source.config, "dtype": dtype, "weights": kept}, positions,
                tensors, source.tokenizer, source.name, trained,
            )  # fmt: skip
            model.windows["trained"] = said or WINDOWS
            return model
        except ModelFileError:
            raise
        except ValueError as error:
            where = f"{path}" + (f" with adapter {adapter}" if adapter else "")
            raise ModelFileError(f"{where}: {error}") from error

    @classmethod
    def from_arrays(
        cls,
        config: Mapping[str, Any],
        arrays: Mapping[str, Any],
        tokenizer: Any = None,
        dtype: Any = "bf16",
        device: str = "cpu",
        threads: int = 0,
        w_max: int | None = None,
        weights: str = "same",
    ) -> Model:
        """A model from tensors in memory.

        config: the content of a Hugging Face config.json. arrays: by Hugging Face name,
        NumPy arrays or DLPack producers on the CPU or on the GPU that is the device
        (tensors of torch or CuPy; they are converted there, and only samples for
        fingerprints go by the host); uint16 arrays are bf16 bits.
        tokenizer: an acre.Tokenizer, what `Tokenizer.wrap` takes, or a directory with
        tokenizer.json. weights and errors as `from_pretrained`; ValueError names the
        tensor that is missing, unknown, of another shape or not finite.
        """
        dtype, engine = check_dtype(dtype), _engine(device, threads)
        kept = check_weights(weights, dtype)
        if not isinstance(config, Mapping):
            kind = type(config).__name__
            raise TypeError(f"config: got {kind}, expected the dict of a config.json")
        if not isinstance(arrays, Mapping):
            kind = type(arrays).__name__
            raise TypeError(f"arrays: got {kind}, expected a dict of arrays by name")
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = Tokenizer.from_hf_dir(tokenizer)
        elif tokenizer is not None:
            tokenizer = Tokenizer.wrap(tokenizer)
        settings = loaders.config_from_hf(dict(config))
        name = str(config.get("_name_or_path") or config.get("model_type") or "arrays")
        tensors = (_bf16_bits(*item) for item in arrays.items())
        settings.update(dtype=dtype, weights=kept)
        return cls._bind(engine, settings, w_max, tensors, tokenizer, name)

    @classmethod
    def _bind(
        cls,
        engine: _core.Engine,
        config: Mapping[str, Any],
        w_max: int | None,
        tensors: Tensors,
        tokenizer: Tokenizer | None,
        name: str,
        adapter: Adapter | None = None,
    ) -> Model:
        """Creates the core model and binds the tensors one at a time."""
        settings = dict(config)
        if w_max is not None:
            settings["w_max"] = integer("w_max", w_max, 1)
        core = _core.Model(engine, settings)
        entered = Fingerprints(config, lambda part: on_host(part, engine))
        for tensor, array, kind in tensors:
            core.bind(tensor, array, kind)
            entered.add(tensor, array, kind)
        prints = entered.result()
        if adapter is not None:
            adapter.check(prints)
        core.ready()
        model = cls(core, tokenizer, name, prints)
        if adapter is not None:
            chosen = adapter.scoring(model.config["layers"], model.config["heads"])
            if chosen is not None:
                model.scoring["trained"] = chosen
        return model

    def __repr__(self) -> str:
        c = self.config
        return (
            f"acre.Model({self.name!r}, layers={c['layers']}, hidden={c['hidden']}, "
            f"w_max={c['w_max']}, dtype={c['dtype']!r}, "
            f"device={self.core.engine.device!r})"
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of the configuration and the base tensors (`fingerprints` has all)."""
        return self.fingerprints["model"]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's, or the configuration's."""
        if self.tokenizer is not None and self.tokenizer.eos_ids:
            return tuple(self.tokenizer.eos_ids)
        eos = self.config.get("eos_id", -1)
        return (eos,) if eos is not None and eos >= 0 else ()

    def info(self) -> dict[str, Any]:
        """Facts for people: sizes, device, memory, tokenizer, fingerprints."""
        engine = self.core.engine
        return {
            "name": self.name,
            **self.config,
            "trained_l1": self.core.has_l1,
            "device": engine.device,
            "isa": engine.isa,
            "threads": engine.threads,
            "bytes": engine.bytes,
            "peak_bytes": engine.peak_bytes,
            "tokenizer": self.tokenizer is not None,
            "chat_template": bool(self.tokenizer and self.tokenizer.chat_template),
            "fingerprints": dict(self.fingerprints),
        }

    def decode(self, ids: Ids) -> str:
        """Text of token ids; "" without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(ids, skip_special=True)

    def encode(self, name: str, prompt: str | Ids, special: bool = False) -> np.ndarray:
        """A prompt as int32 ids [t]: strings encoded, ids checked. `name` is for
        errors."""
        if not isinstance(prompt, str):
            return check_ids(name, prompt, self.config["vocab_size"], self.core.engine)
        if self.tokenizer is None:
            raise ValueError(f"{name}: got a string, but the model has no tokenizer")
        ids = self.tokenizer.encode(check_text(name, prompt), special=special)
        return check_ids(name, ids, self.config["vocab_size"])

    # ------------------------------------------------------------------- full attention

    def logits(self, ids: Ids) -> np.ndarray:
        """Full causal attention over ids [n]: float32 [n, vocab].

        TooLongError when n exceeds w_max.
        """
        checked = check_ids("ids", ids, self.config["vocab_size"], self.core.engine)
        session = _core.Session(self.core, None, capacity=len(checked))
        return session.prefill(checked, logits=True)

    def _generation(
        self, prompt: str | Ids, sampling: Sampling
    ) -> tuple[np.ndarray, Callable[[Streamer], Writer], int]:
        """(ids [t], what writes the answer, capacity) of a prompt, all checked."""
        ids = self.encode("prompt", prompt, special=True)
        room = self.config["w_max"] - len(ids)
        limit = new_token_limit(
            sampling.max_new_tokens, len(ids), room, "prompt", "w_max"
        )
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: needs a tokenizer, the model has none")

        def writer(target: Streamer) -> Writer:
            return Writer(sampling, limit, self.tokenizer, self.eos_ids, target)

        return ids, writer, len(ids) + limit

    def _streamed(self, prompt: str | Ids, sampling: Sampling, streamer: Any) -> Stream:
        """Checks now, generates when iterated."""
        ids, writer, capacity = self._generation(prompt, sampling)
        target = Streamer(streamer)

        def pieces() -> Generator[str, None, Generation]:
            session = _core.Session(self.core, None, capacity=capacity)
            _prefill(ids, session, target)
            return (yield from generate.run(session, writer(target)))

        return Stream(pieces())

    def _task(self, prompt: str | Ids, sampling: Sampling) -> together.Task:
        ids, writer, capacity = self._generation(prompt, sampling)
        return together.Task(
            None, capacity, 0, partial(_prefill, ids), writer, lambda _, made: made.text
        )

    def generate(
        self,
        prompt: str | Ids | Sequence[str] | Sequence[Ids],
        max_new_tokens: int = generate.DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | list[str] | None = None,
        streamer: Any = None,
        batch: int | None = None,
    ) -> str | list[str]:
        """Plain generation with full attention; the new text only.

        prompt: a string (encoded as the tokenizer does, no chat template) or token ids;
        a list of prompts gives a list. streamer: put/end object or a callable taking
        text. batch: of a list, how many are decoded in step at most (None = 8, as far
        as memory has room), which changes no text on the CPU. ValueError, TooLongError
        (prompt and new tokens exceed w_max), MemoryError.
        """
        if self.tokenizer is None:
            raise ValueError("generate: the model has no tokenizer; use generate_ids")
        sampling = Sampling(
            max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, stop
        )
        most = together.batch_size(batch)
        if is_batch(prompt):
            tasks = [self._task(one, sampling) for one in prompt]
            return together.answers(self.core, tasks, most, Streamer(streamer))
        return self._streamed(prompt, sampling, streamer).finish().text

    def generate_ids(self, prompt: str | Ids, **sampling: Any) -> np.ndarray:
        """As `generate` for one prompt, but the new token ids: int32 [new tokens]."""
        streamer = sampling.pop("streamer", None)
        made = self._streamed(prompt, Sampling(**sampling), streamer).finish()
        return np.array(made.ids, dtype=np.int32)

    def stream(self, prompt: str | Ids, **sampling: Any) -> Stream:
        """As `generate` for one prompt, as an iterator over text pieces."""
        streamer = sampling.pop("streamer", None)
        return self._streamed(prompt, Sampling(**sampling), streamer)

    # ------------------------------------------------------------------------ long text

    def build(
        self,
        text_or_ids: str | Ids,
        interval: int | str = "auto",
        window: int | None = None,
        stride: int | None = None,
        carry: int = 0,
        proxy: str = "auto",
        progress: bool | Callable[[int, int], None] = True,
        eta: int = 4096,
        reserve: int | None = None,
        weight: int | None = None,
        sink: bool | None = None,
        l2: str = "auto",
        frame: Frame | bool | None = None,
    ) -> Cache:
        """Reads a text once into a frozen bi-layer cache that answers many questions.

        interval: l, or "auto" for the least of 8 ... 128 that fits. window, stride: L2
        tokens of the first and of later windows; None = what the L1 parameters were
        trained with where that is known, or else 4096 and 2048. carry: L2 tokens of the
        window before that stay attendable. proxy: "pooled" (no training), "trained" (L1
        tokens), or "auto": "trained" where the model or its adapter has L1 parameters.
        eta, reserve: room planned for refilling, and for question and answer (None =
        the smaller of 4096 and w_max/8). weight: tokens that a pooled entry counts for
        in attention, sink: the first L1 entry is the first token alone; None = the
        model's `pooling` (interval and False unless measured better) for pooled ones,
        and for trained ones a sink where there is a carry. l2: where the L2
        cache lies, on a GPU: "device"; "host", pinned memory, of which questions fetch
        the refilled groups alone; "auto", the device where the build, and then the
        cache with a question, fit what it has free. Extending keeps it. On the CPU all
        are one memory, called "device". frame: None =
        the tokenizer's chat frame for a text and none for ids; False = none; or a
        `Frame`. progress: a tqdm bar (silent off a terminal), or a callable (tokens
        done, tokens in all). Ctrl-C takes effect between windows and leaves nothing
        behind. ValueError, TypeError, TooLongError (names an interval that would fit),
        MemoryError.
        """
        from acre.cache import Cache

        return Cache.build(
            self, text_or_ids, interval=interval, window=window, stride=stride,
            carry=carry, proxy=proxy, progress=progress, eta=eta, reserve=reserve,
            weight=weight, sink=sink, l2=l2, frame=frame,
        )  # fmt: skip


def _prefill(ids: np.ndarray, session: _core.Session, target: Streamer) -> None:
    """Begins a plain generation."""
    target.prompt(ids)
    session.prefill(ids)


def _bf16_bits(name: str, array: Any) -> tuple[str, Any, str | None]:
    """(name, array, dtype) as bind takes it: bf16 in NumPy's clothes becomes its
    bits."""
    kind = str(getattr(array, "dtype", ""))
    if isinstance(array, np.ndarray) and kind in ("uint16", "bfloat16"):
        return name, array.view(np.uint16), "bf16"
    return name, array, None


def new_token_limit(wanted: int, used: int, room: int, what: str, cap: str) -> int:
    """How many new tokens to make: `wanted`, where the default yields to what is left.

    TooLongError with the numbers when nothing is left or an explicit wish does not fit.
    """
    if room < 1 or (room < wanted and wanted != generate.DEFAULT_NEW_TOKENS):
        raise _core.TooLongError(
            f"{what}: {used} tokens and {wanted} new ones need {used + wanted} of the "
            f"{used + room} positions of {cap}; {max(room, 0)} new ones are left"
        )
    return min(wanted, room)


def elapsed_ms(start: float, end: float | None = None) -> float:
    """Milliseconds since (or between) perf_counter readings."""
    return ((time.perf_counter() if end is None else end) - start) * 1e3
