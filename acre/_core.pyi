"""Types of the extension module: the C library's nouns, one class each.

Shapes use the library's symbols: n context tokens, m L1 entries, k refilled groups, t
query tokens, h query heads, g KV heads, d head dim, L layers, r recent entries.
Statuses of the C library become ValueError, RuntimeError, MemoryError,
NotImplementedError, ConnectionError and the three exceptions below; an argument of the
wrong type is a TypeError.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal, Protocol, SupportsIndex, TypeAlias, TypedDict, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

__version__: str

class SupportsDLPack(Protocol):
    def __dlpack__(self) -> Any: ...

_Floats: TypeAlias = npt.NDArray[np.floating[Any]] | Buffer | SupportsDLPack
_Ids: TypeAlias = (
    npt.NDArray[np.integer[Any]] | Buffer | SupportsDLPack | Sequence[SupportsIndex]
)
_Heads: TypeAlias = (
    npt.NDArray[np.bool_ | np.integer[Any]] | Buffer | Sequence[Sequence[bool]]
)
_Flags: TypeAlias = npt.NDArray[np.bool_ | np.integer[Any]] | Buffer | Sequence[bool]
_Question: TypeAlias = tuple[
    _Ids, _Floats | None, tuple[int, int] | None, _Flags | None
]
_Vector: TypeAlias = Literal["parameters", "gradients", "first", "second"]
_Groups: TypeAlias = _Ids | Sequence[Sequence[SupportsIndex]]
_Proxy: TypeAlias = Literal["pooled", "trained"]
_Place: TypeAlias = Literal["auto", "device", "host"]
_Part: TypeAlias = Literal[
    "l1_keys", "l1_values", "l2_keys", "l2_values", "recent_keys", "recent_values"
]

class _Plan(TypedDict):
    n: int
    interval: int
    window: int
    stride: int
    carry: int
    eta: int
    reserve: int
    weight: int
    sink: int
    windows: int
    m: int
    recent: int
    l2_tokens: int
    l1_bytes: int
    l2_bytes: int
    recent_bytes: int
    peak_bytes: int
    host_bytes: int
    l2: Literal["device", "host"]

class _Loss(TypedDict):
    loss: float
    weight: float
    evidence: float
    known: int
    rows: int

class TooLongError(ValueError):
    """A text or question exceeds the model's usable positions."""

class BusyError(RuntimeError):
    """The object is in use on another thread."""

class DeviceError(RuntimeError):
    """The device failed; the object cannot be used any more."""

@final
class Engine:
    """A device and its threads; shareable, outlives all below."""

    def __new__(
        cls,
        device: str | None = "cpu",
        threads: int = 0,
        isa: str | None = None,
        plugin: str | None = None,
        libraries: str | None = None,
    ) -> Engine: ...
    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    def reset_peak(self) -> None: ...
    def fetch(self, array: Any, /) -> npt.NDArray[Any]: ...

@final
class Model:
    """Configuration and weights; immutable and shareable once ready."""

    def __new__(cls, engine: Engine, config: dict[str, Any]) -> Model: ...
    def bind(self, name: str, array: _Floats, dtype: str | None = None) -> None: ...
    def ready(self) -> None: ...
    def plan(
        self,
        n: int,
        *,
        proxy: _Proxy = "pooled",
        interval: int = 0,
        window: int = 4096,
        stride: int = 2048,
        carry: int = 0,
        eta: int = 4096,
        reserve: int = 0,
        weight: int = 0,
        sink: int = 0,
        l2: _Place = "auto",
    ) -> _Plan: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def has_l1(self) -> bool: ...
    @property
    def engine(self) -> Engine: ...

@final
class Builder:
    """Reads a text window by window; one owner."""

    def __new__(
        cls,
        model: Model,
        ids: _Ids,
        *,
        proxy: _Proxy = "pooled",
        interval: int = 0,
        window: int = 4096,
        stride: int = 2048,
        carry: int = 0,
        eta: int = 4096,
        reserve: int = 0,
        weight: int = 0,
        sink: int = 0,
        l2: _Place = "auto",
        base: Cache | None = None,
        keep: int | None = None,
        losses: bool = False,
    ) -> Builder: ...
    def step(self) -> tuple[int, int]: ...
    def freeze(self) -> Cache: ...
    def losses(self) -> npt.NDArray[np.float32]: ...
    @property
    def model(self) -> Model: ...

@final
class Cache:
    """The frozen bi-layer KV cache; immutable and shareable."""

    def view(self, part: _Part, layer: int, page: int = 0) -> tuple[Tensor, int]: ...
    def refill_count(self, eta: int) -> int: ...
    @classmethod
    def restore(
        cls,
        model: Model,
        ids: _Ids,
        options: dict[str, Any],
        path: str | os.PathLike[str],
        blocks: dict[_Part, tuple[int, int]],
    ) -> Cache: ...
    @property
    def plan(self) -> _Plan: ...
    @property
    def proxy(self) -> _Proxy: ...
    @property
    def ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def closed_tokens(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def model(self) -> Model: ...

@final
class Session:
    """One question, or one generation; one owner."""

    def __new__(
        cls, model: Model, cache: Cache | None = None, *, capacity: int
    ) -> Session: ...
    def score(
        self,
        ids: _Ids,
        first: int,
        last: int,
        *,
        select: Literal["shared", "per_layer"] = "shared",
        rotated: bool = True,
        heads: _Heads | None = None,
    ) -> npt.NDArray[np.float32]: ...
    def refill(self, groups: _Groups) -> None: ...
    def prefill(
        self, ids: _Ids, logits: bool = False
    ) -> npt.NDArray[np.float32] | None: ...
    def next(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> int: ...
    def logits(self) -> npt.NDArray[np.float32]: ...
    @property
    def count(self) -> int: ...
    @property
    def model(self) -> Model: ...
    @property
    def cache(self) -> Cache | None: ...

@final
class Trainer:
    """L1 parameters that learn on a frozen model; one owner."""

    def __new__(cls, model: Model) -> Trainer: ...
    def read(self, part: _Vector) -> npt.NDArray[np.float32]: ...
    def write(self, part: _Vector, values: _Floats) -> None: ...
    def accumulate(
        self,
        ids: _Ids,
        *,
        intervals: _Ids,
        window: int,
        stride: int,
        carry: int = 0,
        weights: _Floats | None = None,
        questions: Sequence[_Question] = (),
        evidence_weight: float = 0.0,
        heads: _Heads | None = None,
        gradients: bool = True,
    ) -> _Loss: ...
    def update(
        self,
        *,
        step: int,
        lr: float,
        divisor: float,
        clip: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
    ) -> float: ...
    def clear(self) -> None: ...
    def invite(self) -> bytes: ...
    def join(self, rank: int, world: int, id: bytes) -> None: ...
    def share(self) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def leave(self) -> None: ...
    @property
    def entries(self) -> list[tuple[str, int, tuple[int, ...]]]: ...
    @property
    def size(self) -> int: ...
    @property
    def model(self) -> Model: ...

@final
class Tensor:
    """A read-only view of one cache tensor [rows, g, d]."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Literal["f32", "bf16"]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> str: ...
    def numpy(self) -> npt.NDArray[np.float32]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def select_groups(scores: _Floats, k: int) -> npt.NDArray[np.int32]: ...
def sessions_open(
    model: Model, caches: Sequence[Cache | None], capacities: Sequence[int]
) -> list[Session]: ...
def sessions_next(
    sessions: Sequence[Session], samplings: Sequence[dict[str, Any]]
) -> list[int]: ...
def sessions_fit(
    model: Model, cache: Cache | None, k: int, capacity: int, wanted: int
) -> int: ...
