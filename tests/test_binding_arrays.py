"""Arrays through acre._core: weights and token ids in, tensors out, stored caches back.

Every door (buffer protocol, both DLPack generations, sequences) must give the same
bits, and each refusal must name the argument, what came and what was expected.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from acre import _core

NUMPY_SPEAKS_1_0 = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture(scope="module")
def cache(model: Any) -> Any:
    return tiny.build(model)


@pytest.fixture(scope="module")
def bf16_cache() -> Any:
    return tiny.build(tiny.model(dtype="bf16"))


# --------------------------------------------------------------- binding weights


def fresh(**changes: Any) -> Any:
    return _core.Model(_core.Engine(threads=1), tiny.config(**changes))


def with_tensors(
    transform: Callable[[np.ndarray], Any], dtype: str | None = None
) -> Any:
    model = fresh()
    for name, array in tiny.tensors().items():
        if dtype is None:
            model.bind(name, transform(array))
        else:
            model.bind(name, transform(array), dtype)
    model.ready()
    return tiny.answer(model)


class Legacy:
    """A DLPack producer from before max_version."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, stream: None = None) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Versioned(Legacy):
    """Hides everything but DLPack, so that no other door is open."""

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)


def spread(array: np.ndarray) -> np.ndarray:
    """The same values with gaps, backwards in memory."""
    wide = np.full([2 * s for s in array.shape], np.nan, array.dtype)
    view = wide[tuple(slice(None, None, -2) for _ in array.shape)]
    view[...] = array
    return view


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "transform",
    [
        np.asfortranarray,
        spread,
        read_only,
        memoryview,
        Legacy,
        Versioned,
        lambda a: a.__dlpack__(),
        lambda a: Versioned(spread(a)),
        lambda a: Legacy(np.asfortranarray(a)),
        lambda a: a.astype(np.float64),
        lambda a: a.astype("=f4"),
        lambda a: a.tolist(),
    ],
    ids=str,
)
def test_bind_takes_any_float_array(transform: Callable, model: Any) -> None:
    assert np.array_equal(with_tensors(transform), tiny.answer(model))


def to_bits(array: np.ndarray) -> np.ndarray:
    """bfloat16 bits, rounded to nearest even."""
    bits = array.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def rounded(array: np.ndarray) -> np.ndarray:
    return (to_bits(array).astype(np.uint32) << 16).view(np.float32)


def test_bind_takes_halves() -> None:
    half = with_tensors(lambda a: a.astype(np.float16))
    back = with_tensors(lambda a: a.astype(np.float16).astype(np.float32))
    assert np.array_equal(half, back)
    expected = with_tensors(rounded)
    assert np.array_equal(with_tensors(to_bits, "bf16"), expected)
    assert np.array_equal(
        with_tensors(lambda a: Versioned(to_bits(a)), "bf16"), expected
    )


def test_bind_takes_torch() -> None:
    torch = pytest.importorskip("torch")
    expected = with_tensors(rounded)
    assert np.array_equal(with_tensors(lambda a: torch.tensor(rounded(a))), expected)
    assert np.array_equal(with_tensors(lambda a: torch.tensor(a).bfloat16()), expected)
    with pytest.raises(BufferError, match="grad"):
        fresh().bind("model.norm.weight", torch.ones(32, requires_grad=True))
    with pytest.raises(ValueError, match="got an array on|device"):
        fresh().bind("model.norm.weight", torch.ones(32, device="meta"))


def test_bind_takes_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    got = with_tensors(lambda a: a.astype(ml_dtypes.bfloat16))
    assert np.array_equal(got, with_tensors(rounded))


class OnDevice(Versioned):
    def __init__(self, array: Any, device: tuple[int, int]) -> None:
        super().__init__(array)
        self.device = device

    def __dlpack__(self, **kwargs: Any) -> Any:
        raise AssertionError("asked for data on a device that is refused")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


NORM = np.ones(32, np.float32)
MISALIGNED = np.zeros(32 * 4 + 1, np.uint8)[1:].view(np.float32)
PACKED = np.zeros(32, [("a", "u1"), ("b", "f4")])["b"]


@pytest.mark.parametrize(
    ("array", "error", "words"),
    [
        (None, TypeError, "got NoneType, expected an array of floats"),
        ("weights", TypeError, "got str"),
        (b"\0" * 128, TypeError, "got bytes"),
        (3.0, TypeError, "got float"),
        (NORM[:31], ValueError, "31"),
        (NORM.reshape(1, 32), ValueError, "32"),
        (NORM.reshape(1, 1, 1, 1, 32), ValueError, "5 dimensions"),
        (NORM.astype(np.int32), ValueError, "got dtype int32, expected bfloat16"),
        (NORM.astype(np.uint16), ValueError, "got dtype uint16"),
        (NORM.astype(np.complex64), ValueError, "format 'Zf'"),
        (NORM.astype(">f4"), ValueError, "foreign byte order"),
        (NORM.astype(np.longdouble), ValueError, "format 'g'"),
        (NORM.astype("M8[s]"), ValueError, "no buffer describes"),
        (NORM.astype(object), ValueError, "format 'O'"),
        (MISALIGNED, ValueError, "unaligned"),
        (PACKED, ValueError, "stride of 5 bytes"),
        (Versioned(NORM.astype(np.complex64)), ValueError, "code 5"),
        (Versioned(NORM.astype(bool)), ValueError, "got dtype bool"),
        (OnDevice(NORM, (2, 1)), ValueError, "got an array on cuda:1.*cpu"),
        (OnDevice(NORM, (10, 0)), ValueError, "rocm:0"),
        (OnDevice(NORM, (99, 0)), ValueError, "unknown device:0"),
        ([1.0, [2.0]], ValueError, "list that is no array"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bind_refusals(array: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        fresh().bind("model.norm.weight", array)
    assert "model.norm.weight" in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bind_refuses_what_is_not_finite(bad: float, dtype: type) -> None:
    for name, array in tiny.tensors().items():
        array = array.astype(dtype)
        array.flat[-1] = bad
        with pytest.raises(ValueError, match=name):
            fresh().bind(name, array)


def test_bind_names_and_dtypes() -> None:
    model = fresh()
    with pytest.raises(ValueError, match="model.nrom.weight"):
        model.bind("model.nrom.weight", NORM)
    with pytest.raises(TypeError, match="name: got int"):
        model.bind(1, NORM)
    with pytest.raises(ValueError, match="dtype: got 'f64' .*f32"):
        model.bind("model.norm.weight", NORM, "f64")
    with pytest.raises(ValueError, match="dtype: got 'bf16' .*f32"):
        model.bind("model.norm.weight", NORM, dtype="bf16")
    with pytest.raises(RuntimeError, match="model.embed_tokens.weight|lm_head.weight"):
        model.ready()
    with pytest.raises(RuntimeError, match="model: not ready"):
        _core.Builder(model, [1, 2, 3])
    with pytest.raises(RuntimeError, match="model: not ready"):
        _core.Session(model, capacity=4)


def test_bound_model_is_fixed(model: Any) -> None:
    with pytest.raises(RuntimeError):
        model.bind("model.norm.weight", NORM)
    assert not model.has_l1
    assert tiny.model("qwen2", trained=True).has_l1


def versioned_capsules(array: np.ndarray) -> list[Any]:
    """One capsule, or none where NumPy is older than that generation."""
    return [array.__dlpack__(max_version=(1, 0))] if NUMPY_SPEAKS_1_0 else []


def test_capsule_is_used_once() -> None:
    for capsule in (NORM.__dlpack__(), *versioned_capsules(NORM)):
        model = fresh()
        model.bind("model.norm.weight", capsule)
        with pytest.raises(ValueError, match="consumed already"):
            model.bind("model.norm.weight", capsule)
    with pytest.raises(TypeError, match="expected a DLPack capsule"):
        fresh().bind("model.norm.weight", datetime.datetime_CAPI)


def test_inputs_are_not_kept() -> None:
    model = fresh()
    for form in (lambda a: a, Legacy, Versioned, memoryview, spread):
        array = np.ones(32, np.float32)
        before = sys.getrefcount(array)
        model.bind("model.norm.weight", form(array))
        with pytest.raises(ValueError, match="embed"):
            model.bind("model.embed_tokens.weight", form(array))
        assert sys.getrefcount(array) == before


# --------------------------------------------------------------- token ids


@pytest.mark.parametrize(
    "form",
    [
        np.int32,
        np.int64,
        np.uint8,
        np.uint64,
        np.int16,
        lambda a: np.repeat(a, 2)[::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: a.tolist(),
        lambda a: tuple(a),
        lambda a: Versioned(np.asarray(a, np.int64)),
        lambda a: range(len(a)),
    ],
)
def test_ids_of_any_integer_kind(form: Callable, model: Any) -> None:
    ids = tiny.ids(3, 40)
    built = tiny.finish(_core.Builder(model, form(ids), **tiny.OPTIONS))
    expected = np.arange(40) if isinstance(form(ids), range) else ids
    got = built.ids
    assert got.dtype == np.int32 and np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ("text", TypeError, "ids: got str"),
        (b"text", TypeError, "ids: got bytes"),
        (None, TypeError, "ids: got NoneType"),
        (7, TypeError, "ids: got int"),
        ({1, 2}, TypeError, "ids: got set"),
        ([1.0, 2.0], ValueError, "ids: got dtype float64, expected integers"),
        ([True, False], ValueError, "ids: got dtype bool"),
        ([[1, 2]], ValueError, "ids: got 2 dimensions"),
        (np.int32(3), ValueError, "ids: got 0 dimensions"),
        ([1, 2**31], ValueError, "ids: got 2147483648 as element 1"),
        (np.array([2**64 - 1], np.uint64), ValueError, "ids: got .*element 0"),
        ([2**70], ValueError, "ids: got .*format 'O'"),
        ([1, None], ValueError, "ids: got .*format 'O'"),
        ([5, 61], ValueError, "61"),
        ([5, -1], ValueError, "-1"),
        ([], ValueError, "ids|n"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_ids_refusals(ids: Any, error: type, words: str, model: Any) -> None:
    with pytest.raises(error, match=words):
        _core.Builder(model, ids, **tiny.OPTIONS)
    with pytest.raises(error):
        _core.Session(model, capacity=8).prefill(ids)


# --------------------------------------------------------------- tensors


def test_tensor_views(model: Any, cache: Any) -> None:
    rows = {"l1": 24, "recent": cache.plan["recent"]}
    for part in tiny.PARTS:
        if part.startswith("l2"):
            continue
        tensor, first = cache.view(part, 1)
        assert tensor.shape == (rows[part.split("_")[0]], 2, 8) and first == 0
        assert tensor.dtype == "f32" and tensor.strides[-1] == 1
        assert tensor.nbytes == 4 * np.prod(tensor.shape)
    total = 0
    for page in range(cache.pages):
        tensor, first = cache.view("l2_keys", 0, page)
        assert first == total
        total += tensor.shape[0]
    assert total == cache.plan["l2_tokens"] == 96
    for bad, error, words in [
        (("l3_keys", 0), ValueError, "part: got 'l3_keys', expected one of 'l1_keys'"),
        ((0, 0), TypeError, "part: got int"),
        (("l1_keys", 2), ValueError, "layer"),
        (("l1_keys", -1), ValueError, "layer"),
        (("l1_keys", 0, 1), ValueError, "page"),
        (("l2_keys", 0, cache.pages), ValueError, "page"),
    ]:
        with pytest.raises(error, match=words):
            cache.view(*bad)


def test_tensor_buffer(cache: Any, bf16_cache: Any) -> None:
    tensor = cache.view("l1_values", 0)[0]
    array = tensor.numpy()
    assert array.dtype == np.float32 and not array.flags.writeable
    assert np.shares_memory(array, np.asarray(tensor))
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    view = memoryview(tensor)
    assert view.readonly and view.format == "f" and view.shape == tensor.shape
    with pytest.raises(TypeError, match="read-write"):
        io.BytesIO(b"1234").readinto(tensor)
    half = bf16_cache.view("l1_values", 0)[0]
    assert half.dtype == "bf16" and memoryview(half).format == "H"
    bits = np.asarray(half)
    assert bits.dtype == np.uint16
    assert np.array_equal(half.numpy(), (bits.astype(np.uint32) << 16).view(np.float32))


def test_tensor_dlpack_numpy(cache: Any) -> None:
    tensor = cache.view("recent_keys", 1)[0]
    assert tensor.__dlpack_device__() == (1, 0)
    array = np.from_dlpack(tensor)
    assert np.array_equal(array, tensor.numpy()) and not array.flags.writeable
    assert np.shares_memory(array, tensor.numpy())
    old = np.from_dlpack(Legacy(tensor))
    assert np.array_equal(old, array)
    if NUMPY_SPEAKS_1_0:
        copy = np.from_dlpack(tensor, copy=True)
        assert np.array_equal(array, copy) and not np.shares_memory(array, copy)
        copy[...] = 0
        assert array.any()


def test_tensor_dlpack_torch(cache: Any, bf16_cache: Any) -> None:
    torch = pytest.importorskip("torch")
    for source in (cache, bf16_cache):
        tensor = source.view("l1_keys", 1)[0]
        for form in (tensor, Legacy(tensor), tensor.__dlpack__()):
            got = torch.from_dlpack(form)
            assert got.shape == tensor.shape
            assert np.array_equal(got.float().numpy(), tensor.numpy())
    assert got.dtype == torch.bfloat16


def test_tensor_dlpack_requests(cache: Any) -> None:
    tensor = cache.view("l1_keys", 0)[0]
    assert '"dltensor"' in repr(tensor.__dlpack__())
    assert '"dltensor"' in repr(tensor.__dlpack__(max_version=(0, 8)))
    for version in ((1, 0), (1, 1), (2, 0)):
        capsule = tensor.__dlpack__(max_version=version)
        assert '"dltensor_versioned"' in repr(capsule)
    tensor.__dlpack__(dl_device=(1, 0), copy=False, stream=None)
    for bad, error, words in [
        ({"stream": 1}, BufferError, "stream: got 1, expected None"),
        ({"dl_device": (2, 0)}, BufferError, r"dl_device: got \(2, 0\)"),
        ({"dl_device": "cpu"}, TypeError, "dl_device: got str"),
        ({"max_version": 1}, TypeError, "max_version: got int"),
        ({"max_version": (1.0, 0)}, TypeError, "max_version: got float"),
        ({"copy": 1}, TypeError, "copy: got int"),
    ]:
        with pytest.raises(error, match=words):
            tensor.__dlpack__(**bad)
    with pytest.raises(TypeError):
        tensor.__dlpack__(None)


def test_exports_outlive_everything() -> None:
    model = tiny.model()
    cache = tiny.build(model)
    tensor = cache.view("l2_values", 1)[0]
    views = [tensor.numpy(), np.from_dlpack(tensor), np.asarray(memoryview(tensor))]
    unused = tensor.__dlpack__(max_version=(1, 0))
    expected = views[0].copy()
    del model, cache, tensor, unused
    gc.collect()
    for view in views:
        assert np.array_equal(view, expected)


def test_export_is_dropped_on_a_foreign_thread(cache: Any) -> None:
    """The deleter runs on a thread that has never seen Python."""
    capsule = cache.view("l1_keys", 0)[0].__dlpack__()
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
    managed = api.PyCapsule_GetPointer(capsule, b"dltensor")
    used = ctypes.create_string_buffer(b"used_dltensor")
    assert api.PyCapsule_SetName(capsule, ctypes.cast(used, ctypes.c_char_p)) == 0
    words = ctypes.cast(managed, ctypes.POINTER(ctypes.c_void_p))
    deleter = words[7]  # after the 48 bytes of DLTensor and manager_ctx
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    create = libc.pthread_create
    create.argtypes = [ctypes.c_void_p] * 4
    assert create(ctypes.byref(thread), None, deleter, managed) == 0
    assert libc.pthread_join(thread, None) == 0


# --------------------------------------------------------------- restoring


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_restore(dtype: str, tmp_path: Path) -> None:
    model = tiny.model(dtype=dtype)
    cache = tiny.build(model)
    path = tmp_path / "cache"
    blocks = tiny.save(cache, path)
    again = _core.Cache.restore(model, cache.ids, tiny.resolved(cache), path, blocks)
    path.unlink()
    assert again.plan == cache.plan and again.closed_tokens == cache.closed_tokens
    expected = _core.Session(model, cache, capacity=20)
    got = _core.Session(model, again, capacity=20)
    ids = tiny.ids(2, 5)
    assert np.array_equal(got.score(ids, 0, 5), expected.score(ids, 0, 5))
    for session in (expected, got):
        session.refill([0, 7, 23])
        session.prefill(ids)
    assert np.array_equal(got.logits(), expected.logits())
    tensor = again.view("l1_values", 1)[0]
    assert np.array_equal(tensor.numpy(), cache.view("l1_values", 1)[0].numpy())
    del again, got, session
    gc.collect()
    assert np.isfinite(tensor.numpy()).all()  # the map lives on


def test_restore_refusals(model: Any, cache: Any, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    blocks = tiny.save(cache, path)
    size = path.stat().st_size
    options = tiny.resolved(cache)

    def restore(**changes: Any) -> Any:
        arguments = {
            "model": model,
            "ids": cache.ids,
            "options": options,
            "path": str(path),
            "blocks": blocks,
        }
        return _core.Cache.restore(**(arguments | changes))

    restore()
    start, length = blocks["l2_keys"]
    for changed, words in [
        ((start, size), r"blocks\['l2_keys'\]: got offset .* inside the file's"),
        ((-64, length), r"blocks\['l2_keys'\]: got offset -64"),
        ((start, -1), "-1 bytes"),
        ((2**62, 2**62), "inside the file's"),
        ((start, length - 4), "l2|block|bytes"),
        ((start, length + 4), r"blocks\['l2_keys'\]: got .* bytes, expected"),
        ((start + 1, length - 1), "l2|block|bytes|align"),
    ]:
        with pytest.raises(ValueError, match=words):
            restore(blocks=blocks | {"l2_keys": changed})
    with pytest.raises(ValueError, match="l2"):
        restore(blocks={k: v for k, v in blocks.items() if k != "l2_keys"})
    with pytest.raises(ValueError, match="blocks: got 'l3_keys'"):
        restore(blocks=blocks | {"l3_keys": (0, 1)})
    with pytest.raises(TypeError, match=r"blocks\['l2_keys'\]: got int"):
        restore(blocks=blocks | {"l2_keys": 3})
    with pytest.raises(TypeError, match="blocks: got list"):
        restore(blocks=[])
    with pytest.raises(ValueError, match="options: unknown key 'n'"):
        restore(options=options | {"n": 3})
    with pytest.raises(ValueError):
        restore(ids=cache.ids[:50])
    with pytest.raises(ValueError, match="61"):
        restore(ids=np.full(tiny.N, 61))
    with pytest.raises(FileNotFoundError):
        restore(path=tmp_path / "absent")
    with pytest.raises(ValueError, match="empty or no regular file"):
        restore(path=tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty or no regular file"):
        restore(path=tmp_path / "empty")
    with pytest.raises(TypeError):
        restore(path=3.0)
    with pytest.raises(TypeError, match="model: got NoneType"):
        restore(model=None)
