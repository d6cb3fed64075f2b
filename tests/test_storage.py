"""Saving and loading: round trips, atomic writing, damaged and foreign files."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy

import acre
from acre import storage

QUESTION = "who wrote the ledger?"
TESTS = Path(__file__).parent


@pytest.fixture
def saved(cache, tmp_path):
    path = tmp_path / "text.acre"
    cache.save(path)
    return path


def answer(cache: acre.Cache) -> tuple:
    got = cache.ask(QUESTION, eta=32, max_new_tokens=6)
    return got.text, got.ids.tolist(), got.spans, got.groups.tolist()


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix == ".tmp")


# ------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("proxy", ["pooled", "trained"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_round_trip(tmp_path, proxy, dtype):
    model = toy.model(dtype=dtype, trained=proxy == "trained")
    cache = model.build(toy.sentence(1, 100), **toy.BUILD, proxy=proxy)
    path = tmp_path / "a.acre"
    cache.save(path)
    back = acre.Cache.load(path, model, verify=True)
    assert back.text == cache.text and back.plan == cache.plan
    assert back.ids.tolist() == cache.ids.tolist() and back.proxy == proxy
    assert np.array_equal(back.offsets, cache.offsets)
    for part in ("l1_keys", "l1_values", "recent_keys", "recent_values"):
        ours, theirs = getattr(cache, part)(1), getattr(back, part)(1)
        assert np.array_equal(ours.numpy(), theirs.numpy())
    assert answer(back) == answer(cache)
    assert back.stats.tokens_built == 0
    assert back.ask(QUESTION, eta=32, max_new_tokens=1).stats.tokens_reused == len(back)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("words", [10, 64])
def test_round_trip_of_small_texts(model, tmp_path, words):
    """No full window, so no L1 and no L2 entries; and ids in place of a text."""
    for source in (toy.sentence(3, words), np.arange(3, 3 + words)):
        cache = model.build(source, **(toy.BUILD | {"window": 512}))
        cache.save(tmp_path / "a")
        back = acre.Cache.load(tmp_path / "a", model)
        assert answer(back) == answer(cache) and back.text == cache.text


def test_loaded_cache_extends_and_saves_over_itself(model, tmp_path):
    text = toy.sentence(1, 140)
    whole = model.build(text, **toy.BUILD)
    path = tmp_path / "a.acre"
    model.build(text[:411], **toy.BUILD).save(path)
    back = acre.Cache.load(path, model)
    back.extend(text[411:], progress=False)
    back.save(path)
    again = acre.Cache.load(path, model, verify=True)
    assert again.ids.tolist() == whole.ids.tolist()
    assert answer(again)[:2] == answer(whole)[:2]


def test_own_frames_survive(model, tmp_path):
    frame = acre.Frame(model.tokenizer, instruction="Read.", system="Be brief.")
    cache = model.build(toy.sentence(1, 60), frame=frame, **toy.BUILD)
    cache.save(tmp_path / "a")
    back = acre.Cache.load(tmp_path / "a", model)
    assert back.frame.fingerprint == frame.fingerprint
    assert answer(back) == answer(cache)
    with pytest.raises(acre.CacheFileError, match="frame"):
        acre.Cache.load(tmp_path / "a", model, frame=acre.Frame(model.tokenizer))


def test_others_can_read_it(cache, saved):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(saved, framework="np") as file:
        meta = file.metadata()
        assert meta["format"] == "acre-cache"
        keys = file.get_tensor("l1.keys")
        assert np.array_equal(keys[1], cache.l1_keys(1).numpy())
        assert file.get_tensor("ids").tolist() == cache.ids.tolist()
        assert file.get_tensor("text").tobytes().decode() == cache.text
        assert set(file.keys()) == {*storage.PARTS, "ids", "offsets", "text"}
    length = int.from_bytes(saved.read_bytes()[:8], "little")
    assert (8 + length) % storage.ALIGNMENT == 0


def test_describe_needs_no_model(cache, saved):
    facts = storage.describe(saved)
    assert facts["n"] == len(cache) and facts["proxy"] == "pooled"
    assert facts["file_bytes"] == saved.stat().st_size


def test_loading_does_not_read_the_keys(model, saved):
    start = time.perf_counter()
    back = acre.Cache.load(saved, model)
    assert time.perf_counter() - start < 1.0
    assert back.nbytes > 0


# ------------------------------------------------------------------------------- saving


def test_symbolic_links_and_modes(cache, tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "a.acre")
    cache.save(link)
    assert link.is_symlink() and (tmp_path / "real" / "a.acre").is_file()
    mask = os.umask(0o022)
    os.umask(mask)
    assert (tmp_path / "real" / "a.acre").stat().st_mode & 0o777 == 0o666 & ~mask


def test_bad_targets(cache, tmp_path):
    with pytest.raises(IsADirectoryError):
        cache.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cache.save(tmp_path / "nowhere" / "a.acre")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("after", [0, 1, 5])
def test_failed_write_keeps_the_old_file(cache, saved, monkeypatch, failure, after):
    old, left = saved.read_bytes(), [after]
    write = storage.write

    def failing(file, data):
        if left[0] == 0:
            raise failure
        left[0] -= 1
        write(file, data)

    monkeypatch.setattr(storage, "write", failing)
    with pytest.raises(type(failure)) as caught:
        cache.save(saved)
    if isinstance(failure, OSError):
        assert caught.value.errno == errno.ENOSPC and str(saved) in str(caught.value)
    assert saved.read_bytes() == old and leftovers(saved.parent) == []


def test_full_disk_keeps_the_old_file(cache, saved):
    """A limit on file size stands for a full disk: the write itself fails."""
    old = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
        with pytest.raises(OSError, match="text.acre"):
            cache.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert saved.read_bytes() == old and leftovers(saved.parent) == []


def test_no_space_is_refused_before_writing(cache, saved, monkeypatch):
    old = saved.read_bytes()
    usage = shutil.disk_usage(saved.parent)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="no space") as caught:
        cache.save(saved)
    assert caught.value.errno == errno.ENOSPC
    assert saved.read_bytes() == old and leftovers(saved.parent) == []


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import toy
from acre import storage
cache = toy.model().build(toy.sentence(9, 100), **toy.BUILD)
write, left = storage.write, [int(sys.argv[3])]
def dying(file, data):
    write(file, data)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
storage.write = dying
cache.save(sys.argv[2])
"""


@pytest.mark.parametrize("writes", [1, 4])
def test_killed_save_keeps_the_old_file(cache, model, saved, writes):
    command = [sys.executable, "-c", KILLED, str(TESTS), str(saved), str(writes)]
    root = str(Path(acre.__file__).parents[1])
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": root})
    assert ended.returncode == -signal.SIGKILL
    assert answer(acre.Cache.load(saved, model, verify=True)) == answer(cache)
    assert len(leftovers(saved.parent)) == 1


# ---------------------------------------------------------------------- foreign caches


def test_another_model_is_refused_by_name(saved, tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(acre.CacheFileError, match="another model"):
        acre.Cache.load(saved, toy.model(rng=1))
    with pytest.raises(acre.CacheFileError, match="another model"):
        acre.Cache.load(saved, toy.model("qwen2"))
    with pytest.raises(acre.CacheFileError, match="another tokenizer"):
        acre.Cache.load(saved, toy.model(words=False))
    with pytest.raises(acre.CacheFileError, match="dtype is f32"):
        acre.Cache.load(saved, toy.model(dtype="bf16"))
    with pytest.raises(acre.CacheFileError, match="w_max is 1024"):
        acre.Cache.load(saved, toy.model(w_max=2048))
    save_file(toy.adapter(), tmp_path / "adapter.safetensors")
    adapted = acre.Model.from_pretrained(
        toy.directory(tmp_path / "m"), "f32", adapter=tmp_path / "adapter.safetensors"
    )
    with pytest.raises(acre.CacheFileError, match="another adapter"):
        acre.Cache.load(saved, adapted)


def test_another_template_is_refused_by_name(saved):
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = toy.TEMPLATE.replace("assistant", "helper")
    other = acre.Model.from_arrays(
        toy.hf_config(), toy.arrays(), tokenizer, dtype="f32", threads=1
    )
    with pytest.raises(acre.CacheFileError, match="another frame"):
        acre.Cache.load(saved, other)


# ----------------------------------------------------------------------- damaged files


def test_no_cache_at_all(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        acre.Cache.load(tmp_path / "nowhere", model)
    other = toy.directory(tmp_path / "m") / "model.safetensors"
    for content in (b"", b"x", b"\0" * 100, b"\xff" * 100, other.read_bytes()):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(acre.CacheFileError, match="a: "):
            acre.Cache.load(tmp_path / "a", model)


def try_load(path: Path, model: acre.Model, verify: bool) -> str:
    try:
        back = acre.Cache.load(path, model, verify=verify)
    except acre.CacheFileError as error:
        assert str(path) in str(error)
        return "refused"
    back.ask([5, 6], eta=32, max_new_tokens=1)
    return "loaded"


def test_cut_files_are_refused(model, saved):
    data = saved.read_bytes()
    rng = np.random.default_rng(0)
    sizes = {0, 1, 7, 8, 9, len(data) - 1, *rng.integers(0, len(data), 150).tolist()}
    for size in sorted(sizes):
        saved.write_bytes(data[:size])
        assert try_load(saved, model, False) == "refused", size
    saved.write_bytes(data + b"\0")
    assert try_load(saved, model, False) == "refused"


def test_flipped_bytes_never_crash(model, saved):
    data = saved.read_bytes()
    stored = storage.open_file(saved)
    payload = stored.entries["offsets"].begin
    base = min(entry.begin for entry in stored.entries.values())
    rng = np.random.default_rng(1)
    places = [*range(24), *rng.integers(0, base, 250).tolist()]
    places += rng.integers(base, len(data), 60).tolist()
    places += rng.integers(payload, len(data), 60).tolist()
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(damaged)
        seen = try_load(saved, model, False)
        if place < base or place >= payload:
            assert seen == "refused", place
        assert try_load(saved, model, True) == "refused", place


def resealed(path: Path, change) -> None:
    """Rewrites the header with `change(table)` applied and its checksum right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table["__metadata__"][storage.HEADER_CRC] = storage.ZERO_CRC
    change(table)
    text = storage._sealed(json.dumps(table, separators=(",", ":")).encode())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def set_meta(**values):
    return lambda table: table["__metadata__"].update(
        {key.replace("__", "."): value for key, value in values.items()}
    )


OPTIONS = {
    "interval": 8, "window": 64, "stride": 32, "carry": 0, "eta": 64, "weight": 8,
    "sink": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        set_meta(format_version="2"),
        set_meta(proxy="mean"),
        set_meta(proxy="trained"),
        set_meta(options="[]"),
        set_meta(options=json.dumps({**OPTIONS, "reserve": 320, "interval": 0})),
        set_meta(options=json.dumps({**OPTIONS, "reserve": 320, "interval": 16})),
        set_meta(options=json.dumps({**OPTIONS, "reserve": 2**60})),
        set_meta(options=json.dumps({**OPTIONS, "reserve": -1})),
        set_meta(prefix_tokens="-1"),
        set_meta(prefix_tokens="99999"),
        set_meta(prefix_tokens="3"),
        set_meta(frame="{}"),
        set_meta(frame='{"kind":"chat","nonsense":1}'),
        set_meta(frame="[" * 5000),
        set_meta(w_max="many"),
        lambda table: table.pop("l1.keys"),
        lambda table: table.update(extra=table["ids"]),
        lambda table: table["l2.keys"].update(data_offsets=[0, 1 << 61]),
        lambda table: table["l2.keys"].update(shape=[1 << 40, 1 << 40, 1, 1]),
        lambda table: table["l2.keys"].update(shape=[True, 1, 1, 1]),
        lambda table: table["l2.keys"].update(dtype="F64"),
        lambda table: table["l2.keys"].update(dtype=[]),
        lambda table: table["ids"].update(dtype="U8", shape=[4]),
        lambda table: table.update(ids=None),
        lambda table: table["l2.keys"].update(table["l2.values"]),
    ],
)
def test_wrong_headers_are_refused(model, saved, change):
    resealed(saved, change)
    assert try_load(saved, model, False) == "refused"


def test_resealing_alone_is_accepted(model, saved):
    resealed(saved, lambda table: None)
    assert try_load(saved, model, True) == "loaded"
