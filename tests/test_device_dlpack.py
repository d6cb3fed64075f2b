"""Arrays on a GPU through DLPack, both ways, on the CUDA backend as any machine runs
it: what a producer is told, what a consumer is given, and what is refused. No GPU's own
library takes part."""

from __future__ import annotations

import ctypes

import host_cuda
import numpy as np
import pytest
import tiny
from host_cuda import Array

from acre import _core

NORM = "model.norm.weight"
OPTIONS = {"interval": 4, "window": 32, "stride": 16, "eta": 16, "reserve": 32}


@pytest.fixture(scope="module")
def engine() -> _core.Engine:
    path = host_cuda.plugin()
    if path is None:
        pytest.skip("no build/c/cuda_host.so: make ctest builds it")
    return _core.Engine(device="cuda", plugin=path, libraries=str(host_cuda.BUILD))


def bf16(array: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers."""
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def logits(engine: _core.Engine, wrap, **changes) -> np.ndarray:
    model = _core.Model(engine, tiny.config(**changes))
    for name, array in tiny.tensors().items():
        model.bind(name, wrap(array))
    model.ready()
    session = _core.Session(model, None, capacity=8)
    return session.prefill(np.arange(8), logits=True)


def cache_of(engine: _core.Engine, dtype: str = "f32", l2: str = "device"):
    model = _core.Model(engine, tiny.config(dtype=dtype))
    for name, array in tiny.tensors().items():
        model.bind(name, array)
    model.ready()
    builder = _core.Builder(model, np.arange(60) % 61, l2=l2, **OPTIONS)
    while len(set(builder.step())) > 1:
        pass
    return builder.freeze()


# ------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("weights", ["same", "q8"])
@pytest.mark.parametrize("kind", ["f32", "f16", "f64", "bf16", "turned"])
def test_weights_stay_on_the_device(engine, kind, weights):
    kinds = {"f16": np.float16, "f64": np.float64}

    def narrow(array):
        if kind == "bf16":
            return bf16(array)
        if kind == "turned":
            return np.asfortranarray(array)
        return array.astype(kinds.get(kind, np.float32))

    def host(array):
        bits = narrow(array)
        wide = (bits.astype(np.uint32) << 16).view(np.float32)
        return wide if kind == "bf16" else bits

    made: list[Array] = []

    def there(array):
        made.append(Array(narrow(array), bf16=kind == "bf16"))
        return made[-1]

    changes = {"dtype": "bf16", "weights": weights}
    expected = logits(engine, host, **changes)
    assert np.array_equal(logits(engine, there, **changes), expected)
    for array in made:  # asked once, for our stream, and let go
        assert len(array.streams) == array.deleted == 1
        assert isinstance(array.streams[0], int) and array.streams[0] > 2


def test_values_that_are_not_finite(engine):
    model = _core.Model(engine, tiny.config())
    for name in (
        NORM,
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        array = tiny.tensors()[name].copy()
        array.reshape(-1)[-1] = np.nan
        with pytest.raises(ValueError, match="holds NaN"):
            model.bind(name, Array(array))
        model.bind(name, Array(tiny.tensors()[name]))


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ((2, 1), "cuda:1, expected one on the cpu or on cuda:0"),
        ((10, 0), "rocm:0, expected one on the cpu or on cuda:0"),
        ((13, 0), "cuda_managed:0"),
        ((-4, 0), "an unknown device"),
    ],
)
def test_other_devices(engine, device, words):
    array = Array(np.ones(32, np.float32), device)
    with pytest.raises(ValueError, match=f"{NORM}: got an array on .*{words}"):
        _core.Model(engine, tiny.config()).bind(NORM, array)
    assert array.streams == []  # nothing was moved or waited for


def test_a_gpu_array_for_a_model_on_the_cpu():
    model = _core.Model(_core.Engine(threads=1), tiny.config())
    array = Array(np.ones(32, np.float32))
    with pytest.raises(ValueError, match="cuda:0, expected one on the cpu$"):
        model.bind(NORM, array)
    assert array.streams == []


def test_a_capsule_without_its_producer(engine):
    array = Array(np.ones(32, np.float32))
    capsule = array.__dlpack__(stream=1)
    with pytest.raises(ValueError, match="pass the array itself"):
        _core.Model(engine, tiny.config()).bind(NORM, capsule)
    assert array.deleted == 1


class Liar(Array):
    """It says that it lies elsewhere than it does."""

    said = (1, 0)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.said


def test_a_producer_that_lies(engine):
    for said, given in (((1, 0), (2, 0)), ((2, 0), (2, 1))):
        array = Liar(np.ones(32, np.float32), given)
        array.said = said
        with pytest.raises(ValueError, match="got an? (capsule|array) on cuda"):
            _core.Model(engine, tiny.config()).bind(NORM, array)
        assert array.deleted == 1


def test_fetch(engine):
    numbers = np.arange(24, dtype=np.int64).reshape(4, 6)
    for array in (numbers, numbers[1:, ::2], numbers.T, numbers[:0], numbers[0, 0:1]):
        got = engine.fetch(Array(array))
        assert got.dtype == array.dtype and np.array_equal(got, array)
        assert np.array_equal(engine.fetch(array), array)
    bits = bf16(np.float32([1, 2]))
    got = engine.fetch(Array(bits, bf16=True))
    assert got.dtype == np.uint16 and np.array_equal(got, bits)
    with pytest.raises(ValueError, match="run backwards"):
        engine.fetch(Array(numbers[::-1]))
    with pytest.raises(ValueError, match="cuda:1"):
        engine.fetch(Array(numbers, (2, 1)))


# -------------------------------------------------------------------------------- views


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_views_on_the_device(engine, dtype):
    cache = cache_of(engine, dtype)
    tensor = cache.view("l1_keys", 1)[0]
    assert tensor.device == "cuda:0" and tensor.__dlpack_device__() == (2, 0)
    for stream in (None, -1, 1, 2, 0x7F0012345678):
        capsule = tensor.__dlpack__(max_version=(1, 0), stream=stream)
        seen = host_cuda.read_capsule(capsule)
        assert (seen.device_type, seen.device_id) == (2, 0)
        size = tensor.nbytes
        there = np.frombuffer((ctypes.c_char * size).from_address(seen.data), np.uint8)
        assert bytes(there) == memoryview(tensor).tobytes()
        own = tensor.__dlpack__(max_version=(1, 0), stream=stream, copy=True)
        assert host_cuda.read_capsule(own).data != seen.data
        assert host_cuda.read_capsule(own).device_type == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stream": 0}, "stream: got 0, expected None, -1, 1, 2 or the handle"),
        ({"stream": -2}, "stream: got -2"),
        ({"dl_device": (2, 1)}, r"expected \(2, 0\) or the cpu"),
        ({"dl_device": (10, 0)}, r"expected \(2, 0\) or the cpu"),
        ({"dl_device": (1, 0), "copy": False}, "no way without"),
    ],
)
def test_what_a_consumer_may_not_ask(engine, arguments, words):
    tensor = cache_of(engine).view("l2_values", 0)[0]
    with pytest.raises(BufferError, match=words):
        tensor.__dlpack__(max_version=(1, 0), **arguments)


def test_a_view_on_the_host(engine):
    tensor = cache_of(engine).view("l2_values", 0)[0]
    capsule = tensor.__dlpack__(max_version=(1, 0), dl_device=(1, 0))
    assert host_cuda.read_capsule(capsule).device_type == 1
    array = tensor.numpy()
    assert array.shape == tensor.shape and not array.flags.writeable
    assert np.shares_memory(array, np.asarray(tensor))  # copied once
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(tensor)  # which knows no GPU


def test_a_view_outlives_its_cache(engine):
    held = engine.bytes
    cache = cache_of(engine, l2="host")
    tensors = [cache.view("l1_values", 0)[0], cache.view("l2_values", 0)[0]]
    expected = [tensor.numpy().copy() for tensor in tensors]
    capsules = [tensor.__dlpack__(max_version=(1, 0)) for tensor in tensors]
    del cache
    assert engine.bytes > held and engine.host_bytes > 0
    for tensor, array in zip(tensors, expected, strict=True):
        assert np.array_equal(tensor.numpy(), array)
    del tensor, tensors, capsules
    assert engine.bytes == held and engine.host_bytes == 0
