"""acre, transformers and llama.cpp behind one face, for bench_peers.py.

Takes `Weights` and a thread count; gives `Peer`s: engines that read token ids with full
causal attention and decode greedily. One idea: all engines do exactly the same steps
(a fresh cache, logits of the last token only, one forward pass per later `next`), and
each peer runs in the settings that were fastest on this machine: llama.cpp with or
without flash attention and with either batch size, separately for reading and decoding;
transformers in eager PyTorch with scaled_dot_product_attention, long texts in chunks or
at once, without the overhead of its `generate`.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from bench_cpu import median_seconds
from peer_models import Weights

import acre
from acre import _core

NAMES = ("torch-bf16", "torch-f32", "llama-bf16", "llama-q8_0", "llama-f16")
NEEDS = {"torch": ("torch", "transformers"), "llama": ("llama_cpp",)}
PROMPT, NEW = 64, 64  # tokens before and in a short decoding
CHUNKS = (2048, 1 << 30)  # tokens that transformers reads at once: some, or all
UBATCHES = (512, 2048)  # tokens that llama.cpp computes at once


class Engine(Protocol):
    """One sequence on one model."""

    settings: str

    def read(self, ids: np.ndarray) -> None:
        """Forgets all, reads ids int32 [n]."""
        ...

    def next(self) -> int:
        """The likeliest token after what was read; it is read by the next call."""
        ...

    def logits(self) -> np.ndarray:
        """Logits after the last token read, float32 [vocab]."""
        ...


@dataclass(frozen=True)
class Peer:
    """An engine per kind of work. long: makers of engines with room for n tokens, one
    per setting that is worth trying."""

    name: str
    prefill: Engine
    decode: Engine
    long: list[Callable[[int], Engine]]


def missing(name: str) -> str:
    """The package that a peer needs and that is not installed, or ""."""
    needed = NEEDS[name.split("-")[0]]
    return next((each for each in needed if importlib.util.find_spec(each) is None), "")


# --------------------------------------------------------------------------------- acre


class AcreEngine:
    """A session without a cache: full attention."""

    settings = ""

    def __init__(self, model: acre.Model) -> None:
        self.model = model
        self.session: _core.Session | None = None

    def read(self, ids: np.ndarray) -> None:
        room = min(len(ids) + NEW, self.model.config["w_max"])
        self.session = _core.Session(self.model.core, None, capacity=room)
        self.session.prefill(ids)

    def next(self) -> int:
        return self.session.next()

    def logits(self) -> np.ndarray:
        return self.session.logits()


def acre_peer(name: str, model: acre.Model) -> Peer:
    """acre itself, on its full-attention path."""
    engine = AcreEngine(model)
    return Peer(name, engine, engine, [lambda n: engine])


# ------------------------------------------------------------------------- transformers


class TorchEngine:
    """A transformers model with a dynamic KV cache, in eager mode."""

    def __init__(self, model: Any, chunk: int) -> None:
        attention = model.config._attn_implementation
        if attention != "sdpa":
            raise RuntimeError(f"transformers runs {attention} attention, not sdpa")
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.model, self.chunk = model, chunk
        self.settings = f"in chunks of {chunk}" if chunk == CHUNKS[0] else "at once"

    def _forward(self, ids: np.ndarray) -> None:
        import torch

        with torch.inference_mode():
            self.last = self.model(
                input_ids=torch.from_numpy(ids.astype(np.int64))[None],
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_name: self.cache},
            ).logits[0, -1]
        self.pending: int | None = None

    def read(self, ids: np.ndarray) -> None:
        import transformers

        self.cache = transformers.DynamicCache(config=self.model.config)
        for start in range(0, len(ids), self.chunk):
            self._forward(ids[start : start + self.chunk])

    def next(self) -> int:
        if self.pending is not None:
            self._forward(np.array([self.pending]))
        self.pending = int(self.last.argmax())
        return self.pending

    def logits(self) -> np.ndarray:
        return self.last.float().numpy()


def torch_peers(weights: Weights, names: list[str], threads: int) -> list[Peer]:
    """transformers on the same bf16 weights, computing in bf16 and in float32."""
    import torch

    torch.set_num_threads(threads)
    base, peers = weights.open_torch(), []
    for name in names:
        model = base if name == "torch-bf16" else copy.deepcopy(base).float()
        engines = [TorchEngine(model, chunk) for chunk in CHUNKS]
        long = [lambda n, engine=engine: engine for engine in engines]
        peers.append(Peer(name, engines[-1], engines[-1], long))
    return peers


# ---------------------------------------------------------------------------- llama.cpp


class LlamaModel:
    """A GGUF file in llama.cpp, loaded with its defaults, on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        llama_cpp.llama_backend_init()
        self.lib, self.threads = llama_cpp, threads
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        words = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(words)

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.lib.llama_model_free(self.model)


class LlamaEngine:
    """A llama.cpp context with room for n tokens; keys and values in f16."""

    def __init__(self, model: LlamaModel, n: int, flash: bool, ubatch: int) -> None:
        self.owner, self.lib = model, model.lib
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = n
        options.n_ubatch = ubatch
        options.n_threads = options.n_threads_batch = model.threads
        options.flash_attn_type = int(flash)  # 0 and 1: never, always; -1 would choose
        options.no_perf = True
        self.context = self.lib.llama_init_from_model(model.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no room for a context of {n}")
        self.flash, self.ubatch = flash, ubatch
        self.settings = f"flash {'on' if flash else 'off'}, ubatch {ubatch}"

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.lib.llama_free(self.context)

    def more(self, ids: np.ndarray) -> None:
        """Reads ids after what was read before."""
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(self.lib.llama_token))
        batch = self.lib.llama_batch_get_one(pointer, len(ids))  # logits of the last
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(ids)} tokens gives {status}")
        row = self.lib.llama_get_logits_ith(self.context, -1)  # waits for the result
        self.last = np.ctypeslib.as_array(row, shape=(self.owner.vocab_size,))
        self.pending: int | None = None

    def read(self, ids: np.ndarray) -> None:
        memory = self.lib.llama_get_memory(self.context)
        self.lib.llama_memory_clear(memory, False)
        self.more(ids)

    def next(self) -> int:
        if self.pending is not None:
            self.more(np.array([self.pending]))
        self.pending = int(self.last.argmax())
        return self.pending

    def logits(self) -> np.ndarray:
        return self.last.copy()


Timed = tuple[float, LlamaEngine]


def _best_readers(model: LlamaModel, ids: np.ndarray) -> list[Timed]:
    """(seconds, engine) without and with flash attention, each at its best ubatch."""
    best = []
    for flash in (False, True):
        timed = []
        for ubatch in UBATCHES:
            engine = LlamaEngine(model, len(ids), flash, ubatch)
            engine.read(ids[:PROMPT])
            timed.append((median_seconds(lambda e=engine: e.read(ids), 2), engine))
        best.append(min(timed, key=lambda pair: pair[0]))
    return best


def _best_decoder(model: LlamaModel, ids: np.ndarray) -> LlamaEngine:
    """The faster of decoding without and with flash attention."""
    timed, steps = [], range(NEW // 2)
    for flash in (False, True):
        engine = LlamaEngine(model, PROMPT + 2 * NEW, flash, UBATCHES[0])
        engine.read(ids[:PROMPT])
        engine.next()
        seconds = median_seconds(lambda e=engine: [e.next() for _ in steps], 3)
        timed.append((seconds, engine))
    return min(timed, key=lambda pair: pair[0])[1]


def llama_peer(name: str, model: LlamaModel, ids: np.ndarray) -> Peer:
    """llama.cpp in the settings that read `ids`, and decode after PROMPT, fastest."""
    readers = _best_readers(model, ids)
    long = [
        lambda n, flash=engine.flash, ubatch=engine.ubatch: LlamaEngine(
            model, n, flash, ubatch
        )
        for _, engine in readers
    ]
    reader = min(readers, key=lambda pair: pair[0])[1]
    return Peer(name, reader, _best_decoder(model, ids), long)


# ------------------------------------------------------------------------------ opening


def open_peers(
    weights: Weights, names: list[str], threads: int, ids: np.ndarray, folder: Path
) -> list[Peer]:
    """The named peers on these weights, in the order of NAMES; folder: for files.

    ids: what llama.cpp's settings are chosen on.
    """
    torch_names = [name for name in names if name.startswith("torch")]
    peers = torch_peers(weights, torch_names, threads) if torch_names else []
    for name in names:
        if name.startswith("llama"):
            path = folder / f"{weights.name}-{name}.gguf"
            weights.write_gguf(path, name.removeprefix("llama-"))
            peers.append(llama_peer(name, LlamaModel(path, threads), ids))
    return peers
