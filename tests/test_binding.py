"""The extension module acre._core: arguments, arrays, lifetimes, threads, interpreters.

What the method computes is tested elsewhere; here a tiny random model stands for any.
Each refusal is checked for its exception and for the words that let a caller find the
fault.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import mmap
import platform
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from acre import _core


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture(scope="module")
def cache(model: Any) -> Any:
    return tiny.build(model)


# --------------------------------------------------------------- module


def load_again() -> types.ModuleType:
    """The extension once more, as a module object of its own."""
    spec = importlib.util.spec_from_file_location("acre._core", _core.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_twice() -> None:
    again = load_again()
    assert again is not _core
    assert again.Engine is not _core.Engine
    with pytest.raises(TypeError, match="engine: got acre._core.Engine"):
        again.Model(_core.Engine(threads=1), tiny.config())
    engine = again.Engine(threads=1)
    del again
    gc.collect()
    assert engine.threads == 1  # the module lives as long as its types


SUBINTERPRETER = """
import importlib.util
spec = importlib.util.spec_from_file_location("acre._core", {path!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
engine = core.Engine(threads=2)
model = core.Model(engine, {config!r})
try:
    model.ready()
except RuntimeError:
    pass
assert model.plan(50, interval=4, window=32, stride=16)["m"] > 0
"""


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="interpreters with their own GIL came in 3.12"
)
def test_subinterpreter_with_its_own_gil() -> None:
    code = SUBINTERPRETER.format(path=_core.__file__, config=tiny.config())
    if sys.version_info >= (3, 13):
        import _interpreters as interpreters

        one = interpreters.create("isolated")
    else:
        import _xxsubinterpreters as interpreters

        one = interpreters.create(isolated=True)
    try:
        assert interpreters.run_string(one, code) is None
    finally:
        interpreters.destroy(one)


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_exports_only_its_init_function() -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", _core.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [line.split()[-1] for line in listing.splitlines()] == ["PyInit__core"]


READ_MXCSR = bytes.fromhex("0fae1fc3")  # stmxcsr [rdi]; ret


@pytest.mark.skipif(platform.machine() != "x86_64", reason="MXCSR is x86")
def test_import_and_use_leave_mxcsr_alone() -> None:
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=7)
    code.write(READ_MXCSR)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    store = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))(address)

    def control() -> int:
        word = ctypes.c_uint32()
        store(ctypes.byref(word))
        return word.value & ~0x3F  # without the sticky exception flags

    assert control() == 0x1F80  # masked, round to nearest, no flush to zero
    tiny.answer(tiny.model(engine=_core.Engine(threads=2)))
    assert control() == 0x1F80


def test_import_leaves_denormals_alone() -> None:
    code = (
        "import sys\n"
        "tiny = sys.float_info.min\n"
        "before = tiny / 2, 5e-324 * 1.0\n"
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        f"s = spec_from_file_location('acre._core', {_core.__file__!r})\n"
        "s.loader.exec_module(module_from_spec(s))\n"
        "assert (tiny / 2, 5e-324 * 1.0) == before and before[0] > 0 < before[1]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_is_the_headers() -> None:
    header = Path(__file__).parents[1] / "csrc" / "acre.h"
    assert f'#define ACRE_VERSION "{_core.__version__}"' in header.read_text()


NORM = np.ones(32, np.float32)


# --------------------------------------------------------------- configuration


def test_config_comes_back_whole() -> None:
    config = tiny.config("qwen2", rope={"kind": "linear", "theta": 5e4, "factor": 2})
    got = _core.Model(_core.Engine(threads=1), config).config
    rope = got.pop("rope")
    assert {k: got[k] for k in config if k != "rope"} == {
        k: v for k, v in config.items() if k != "rope"
    }
    assert (rope["kind"], rope["theta"], rope["factor"]) == ("linear", 5e4, 2.0)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hiden": 32}, ValueError, "config: unknown key 'hiden'.*hidden"),
        ({3: 32}, ValueError, "config: unknown key 3"),
        ({"hidden": None}, TypeError, r"config\['hidden'\]: got NoneType.*integer"),
        ({"hidden": 32.0}, TypeError, r"config\['hidden'\]: got float.*integer"),
        ({"hidden": 2**63}, ValueError, r"config\['hidden'\]: got 9223372036854775808"),
        ({"hidden": -1}, ValueError, "hidden"),
        ({"heads": 3}, ValueError, "heads"),
        ({"rms_eps": "1"}, TypeError, r"config\['rms_eps'\]: got str.*number"),
        ({"rms_eps": 10**400}, ValueError, "rms_eps"),
        ({"tied_head": 1}, TypeError, r"config\['tied_head'\]: got int.*True or False"),
        ({"dtype": "f64"}, ValueError, r"config\['dtype'\]: got 'f64'.*'f32', 'bf16'"),
        ({"rope": 1}, TypeError, "config.rope: got int, expected a dict"),
        ({"rope": {"kind": "ntk"}}, ValueError, r"config.rope\['kind'\]: got 'ntk'"),
        ({"rope": {"thet": 1.0}}, ValueError, "config.rope: unknown key 'thet'"),
    ],
)
def test_config_refusals(changes: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        _core.Model(_core.Engine(threads=1), tiny.config() | changes)


@pytest.mark.parametrize("key", ["vocab_size", "layers", "w_max"])
def test_config_missing_key(key: str) -> None:
    config = tiny.config()
    del config[key]
    with pytest.raises(ValueError, match=f"config: the key '{key}' is missing"):
        _core.Model(_core.Engine(threads=1), config)


def test_engine_arguments() -> None:
    assert _core.Engine(threads=2).threads == 2
    assert _core.Engine("cpu", 1, "scalar").isa == "scalar"
    assert _core.Engine(device=None, isa=None).threads >= 1
    for bad, error, words in [
        ({"threads": -1}, ValueError, "threads"),
        ({"threads": 2**31}, ValueError, "threads: got 2147483648.*32-bit"),
        ({"threads": "2"}, TypeError, "threads: got str, expected an integer"),
        ({"device": 1}, TypeError, "device: got int, expected a string"),
        ({"device": "c\0pu"}, ValueError, "device: got .*without NUL"),
        ({"device": "abacus"}, (ValueError, NotImplementedError), "abacus"),
        ({"isa": "mmx"}, (ValueError, NotImplementedError), "mmx"),
        ({"thread": 1}, TypeError, "thread"),
    ]:
        with pytest.raises(error, match=words):
            _core.Engine(**bad)


def test_engine_counts_bytes() -> None:
    engine = _core.Engine(threads=1)
    start = engine.bytes
    model = tiny.model(engine=engine)
    held = engine.bytes
    assert held > start
    cache = tiny.build(model)
    assert engine.peak_bytes >= engine.bytes > held
    tensor = cache.view("l1_keys", 0)[0]
    values = np.array(tensor.numpy())
    del cache
    gc.collect()
    engine.reset_peak()
    assert engine.peak_bytes == engine.bytes
    del model
    assert np.array_equal(values, tensor.numpy())
    del tensor
    gc.collect()
    assert engine.bytes == start


# --------------------------------------------------------------- builder, plan


def test_plan_and_cache_agree(model: Any, cache: Any) -> None:
    plan = model.plan(tiny.N, **tiny.OPTIONS)
    assert plan == cache.plan
    assert plan["m"] == 24 and plan["windows"] == 5 and plan["interval"] == 4
    assert cache.closed_tokens == 96 and cache.proxy == "pooled"
    assert cache.model is model and cache.pages >= 1
    assert cache.nbytes >= plan["l1_bytes"] + plan["l2_bytes"] + plan["recent_bytes"]
    assert np.array_equal(cache.ids, tiny.ids(1, tiny.N))
    with pytest.raises(ValueError, match="read-only"):
        cache.ids[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        cache.ids.flags.writeable = True


def test_build_refusals(model: Any, cache: Any) -> None:
    with pytest.raises(_core.TooLongError, match="interval"):
        model.plan(10**9, **tiny.OPTIONS)
    assert issubclass(_core.TooLongError, ValueError)
    with pytest.raises(TypeError, match="windw"):
        model.plan(10, windw=3)
    with pytest.raises(ValueError, match="proxy: got 'mean', expected one of 'pooled'"):
        model.plan(10, proxy="mean")
    with pytest.raises(ValueError, match="window"):
        _core.Builder(model, [1], window=0)
    with pytest.raises(TypeError, match="model: got int, expected acre._core.Model"):
        _core.Builder(3, [1])
    with pytest.raises(TypeError, match="keep"):
        _core.Builder(model, [1], keep=3)
    with pytest.raises(TypeError, match="interval: not allowed with base"):
        _core.Builder(model, [1], base=cache, interval=4)
    with pytest.raises(TypeError, match="base: got list"):
        _core.Builder(model, [1], base=[])
    with pytest.raises(ValueError, match="keep"):
        _core.Builder(model, [1], base=cache, keep=tiny.N + 1)
    with pytest.raises(ValueError, match="keep"):
        _core.Builder(model, [1], base=cache, keep=95)


def test_builder_is_spent(model: Any) -> None:
    builder = _core.Builder(model, tiny.ids(1, 40), **tiny.OPTIONS)
    with pytest.raises(RuntimeError):
        builder.freeze()
    assert builder.model is model
    tiny.finish(builder)
    for method in (builder.freeze, builder.step):
        with pytest.raises(RuntimeError):
            method()


def test_continuation(model: Any, cache: Any) -> None:
    more = tiny.ids(5, 30)
    builder = _core.Builder(model, more, base=cache, keep=100)
    longer = tiny.finish(builder)
    assert np.array_equal(longer.ids, np.concatenate([cache.ids[:100], more]))
    assert longer.plan == model.plan(130, **tiny.OPTIONS)
    assert cache.plan["n"] == tiny.N


# --------------------------------------------------------------- session


def test_question(model: Any, cache: Any) -> None:
    session = _core.Session(model, cache, capacity=20)
    ids = tiny.ids(2, 5)
    m, layers, heads = cache.plan["m"], 2, 4
    scores = session.score(ids, 1, 5)
    assert scores.shape == (m,) and scores.dtype == np.float32
    assert scores.sum() == pytest.approx(4 * heads, rel=1e-4)
    table = session.score(ids, 1, 5, select="per_layer", rotated=False)
    assert table.shape == (layers, m)
    one = np.zeros((layers, heads), bool)
    one[0, 2] = True
    for form in (one, one.astype(np.uint8), one.astype(np.int64), one.tolist()):
        assert session.score(ids, 1, 5, heads=form).sum() == pytest.approx(4, rel=1e-4)
    k = cache.refill_count(16)
    assert k == 4 and cache.refill_count(0) == 0
    groups = _core.select_groups(scores, k)
    assert groups.dtype == np.int32 and len(groups) == k
    assert set(groups) == set(np.argsort(-scores, kind="stable")[:k])
    session.refill(groups)
    logits = session.prefill(ids, logits=True)
    assert logits.shape == (5, 61)
    assert np.array_equal(session.logits(), logits[-1])
    assert session.next() == int(np.argmax(logits[-1]))
    assert session.model is model and session.cache is cache
    session.refill(np.stack([groups, groups]))
    assert np.array_equal(session.prefill(ids, True), logits)
    session.refill([])
    assert session.prefill(ids) is None
    plain = _core.Session(model, cache, capacity=20).prefill(ids, logits=True)
    assert np.array_equal(session.logits(), plain[-1])


def test_session_refusals(model: Any, cache: Any) -> None:
    with pytest.raises(TypeError, match="capacity"):
        _core.Session(model)
    with pytest.raises(TypeError, match="cache: got int, expected acre._core.Cache"):
        _core.Session(model, 3, capacity=4)
    with pytest.raises(ValueError, match="capacity"):
        _core.Session(model, cache, capacity=-1)
    with pytest.raises(_core.TooLongError):
        _core.Session(model, cache, capacity=10**9)
    with pytest.raises(ValueError, match="model"):
        _core.Session(tiny.model(), cache, capacity=4)
    session = _core.Session(model, cache, capacity=6)
    with pytest.raises(RuntimeError):
        session.logits()
    with pytest.raises(RuntimeError):
        session.next()
    with pytest.raises(
        ValueError, match=r"heads: got shape \[4, 2\], expected \[2, 4\]"
    ):
        session.score([1, 2], 0, 2, heads=np.ones((4, 2), bool))
    with pytest.raises(ValueError, match="heads: got dtype float64"):
        session.score([1, 2], 0, 2, heads=np.ones((2, 4)))
    with pytest.raises(ValueError, match="select: got 'all'"):
        session.score([1, 2], 0, 2, select="all")
    with pytest.raises(TypeError, match="rotated: got int"):
        session.score([1, 2], 0, 2, rotated=1)
    for first, last in [(2, 1), (0, 3), (-1, 1), (1, 1)]:
        with pytest.raises(ValueError):
            session.score([1, 2], first, last)
    for groups in (
        [1, 0],
        [3, 3],
        [24],
        [-1],
        [[0, 1]],
        [[0], [1], [2]],
        [0.5],
        [True],
    ):
        with pytest.raises(ValueError, match="group"):
            session.refill(groups)
    with pytest.raises(_core.TooLongError):
        session.prefill([1] * 7)
    with pytest.raises(TypeError, match="logits: got int"):
        session.prefill([1], logits=1)
    session.prefill([1, 2])
    for bad, words in [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed: got -1, expected an integer from 0"),
        ({"seed": 2**64}, "seed"),
    ]:
        with pytest.raises(ValueError, match=words):
            session.next(**bad)
    with pytest.raises(RuntimeError):
        _core.Session(model, capacity=6).score([1, 2], 0, 2)


def test_same_seed_same_tokens(model: Any, cache: Any) -> None:
    def run(seed: int) -> list[int]:
        session = _core.Session(model, cache, capacity=20)
        session.prefill(tiny.ids(2, 5))
        return [session.next(temperature=1.5, seed=seed) for _ in range(12)]

    assert run(2**64 - 1) == run(2**64 - 1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([1, 3, 2], 2, [1, 2]),
        ([1, 1, 1, 1], 2, [0, 1]),
        ([5, 1, 5, 1, 5], 3, [0, 2, 4]),
        ([1.0], 0, []),
    ],
)
def test_select_groups(scores: list, k: int, expected: list) -> None:
    array = np.array(scores, np.float32)
    for form in (array, np.repeat(array, 3)[::3], array[::-1].copy()[::-1]):
        assert _core.select_groups(form, k).tolist() == expected


def test_select_groups_refusals() -> None:
    scores = np.ones(4, np.float32)
    for k in (-1, 5, 2**63):
        with pytest.raises(ValueError, match="k: got"):
            _core.select_groups(scores, k)
    with pytest.raises(ValueError, match="scores: got 2 dimensions of f32"):
        _core.select_groups(scores.reshape(2, 2), 1)
    with pytest.raises(ValueError, match="scores: got 1 dimensions of f64"):
        _core.select_groups(np.ones(4), 1)


# --------------------------------------------------------------- lifetimes, threads


def test_no_leaks(model: Any, cache: Any, tmp_path: Path) -> None:
    """Each leaked object would hold a reference to its type or to its model."""
    blocks = tiny.save(cache, tmp_path / "cache")
    options = tiny.resolved(cache)
    ids = tiny.ids(2, 5)
    engine = model.engine

    def work() -> None:
        built = tiny.build(model)
        session = _core.Session(model, built, capacity=12)
        scores = session.score(ids, 0, 5, heads=np.ones((2, 4), bool))
        session.refill(_core.select_groups(scores, 2))
        session.prefill(ids, logits=True)
        session.next()
        session.logits()
        tensor = built.view("l1_keys", 0)[0]
        np.from_dlpack(tensor)
        tensor.numpy()
        tensor.__dlpack__(copy=True)
        assert built.plan and model.config and tensor.shape and model.engine
        _core.Cache.restore(model, cache.ids, options, tmp_path / "cache", blocks)
        for bad in (
            lambda: session.prefill("x"),
            lambda: session.prefill([61]),
            lambda: session.refill([[0, 1]]),
            lambda: session.score(ids, 0, 9),
            lambda: session.score(ids, 0, 5, heads=np.ones((1, 1), bool)),
            lambda: built.view("l1_keys", 7),
            lambda: _core.Builder(model, [61]),
            lambda: _core.Builder(model, [1], base=built, carry=1),
            lambda: _core.Session(model, built, capacity=-1),
            lambda: _core.Model(engine, {"hidden": 3}),
            lambda: _core.Cache.restore(
                model, ids, options, tmp_path / "cache", blocks
            ),
            lambda: model.bind("model.norm.weight", NORM),
        ):
            try:
                bad()
            except (ValueError, TypeError, RuntimeError):
                continue
            raise AssertionError("no refusal")

    def counts() -> list[int]:
        gc.collect()
        kinds = "Engine Model Builder Cache Session Tensor".split()
        held = [sys.getrefcount(getattr(_core, kind)) for kind in kinds]
        return [*held, sys.getrefcount(model), sys.getrefcount(NORM), engine.bytes]

    rounds = 200
    for _ in range(rounds):
        work()
    before, blocks_before = counts(), sys.getallocatedblocks()
    for _ in range(rounds):
        work()
    assert counts() == before
    # One object leaked per round would show; caches of the interpreter grow by less.
    assert sys.getallocatedblocks() - blocks_before < rounds


def until_busy(attempt: Callable[[], Any], background: Callable[[], Any]) -> None:
    """Runs `background` on a thread until `attempt` is answered busy.

    Between its calls the object is free, and may say that it is in no state for this.
    """
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            try:
                background()
            except _core.BusyError:
                pass

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                attempt()
            except _core.BusyError:
                return
            except RuntimeError:
                pass
        pytest.fail("never busy")
    finally:
        stop.set()
        thread.join()


def test_busy_session() -> None:
    model = tiny.model(layers=4, w_max=2048)
    cache = tiny.build(model)
    session = _core.Session(model, cache, capacity=1024)
    ids = tiny.ids(1, 1024)

    def background() -> None:
        session.refill([])
        session.prefill(ids)

    background()
    until_busy(session.logits, background)
    assert issubclass(_core.BusyError, RuntimeError)


@pytest.mark.parametrize("method", ["step", "freeze"])
def test_busy_builder(method: str) -> None:
    model = tiny.model(layers=4, w_max=2048)
    options = {"interval": 8, "window": 500, "stride": 500, "eta": 64}
    ids = tiny.ids(1, 2000)
    current = [_core.Builder(model, ids, **options)]

    def background() -> None:
        builder = current[0]
        done, total = builder.step()
        if done == total:
            current[0] = _core.Builder(model, ids, **options)

    until_busy(lambda: getattr(current[0], method)(), background)


def test_busy_model() -> None:
    model = _core.Model(_core.Engine(threads=1), tiny.config(vocab_size=20000))
    table = np.ones((20000, 32), np.float32)

    def bind() -> None:
        model.bind("model.embed_tokens.weight", table)

    until_busy(bind, bind)


def test_sessions_on_many_threads(model: Any, cache: Any) -> None:
    expected = tiny.answer(model, cache)
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(tiny.answer(model, cache)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(np.array_equal(result, expected) for result in results)


def test_garbage_collector_sees_the_types(model: Any, cache: Any) -> None:
    session = _core.Session(model, cache, capacity=4)
    for thing in (model.engine, model, cache, session, cache.view("l1_keys", 0)[0]):
        assert type(thing) in gc.get_referents(thing)
    assert model in gc.get_referents(session) and cache in gc.get_referents(session)
