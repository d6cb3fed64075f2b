"""Where the L2 cache lies, as users choose it: on the CPU one memory whatever is asked
for; on the CUDA backend as any machine runs it the same bits on either side, and files
that go from one device to the other."""

from __future__ import annotations

import host_cuda
import numpy as np
import pytest
import toy

import acre
from acre import Cache, cli, devices

PLACES = ("auto", "device", "host")
TEXT, MORE = toy.sentence(3, 160), toy.sentence(4, 60)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """device="cuda" is the backend as this machine runs it."""
    path = host_cuda.plugin()
    if path is None:
        pytest.skip("no build/c/cuda_host.so: make ctest builds it")
    monkeypatch.setattr(devices, "cuda_plugin", lambda: path)
    monkeypatch.setattr(devices, "cuda_libraries", lambda: str(host_cuda.BUILD))


def build(model: acre.Model, l2: str = "auto", text: str = TEXT) -> Cache:
    return model.build(text, l2=l2, **toy.BUILD)


def views(cache: Cache) -> list[np.ndarray]:
    """Everything that a cache holds."""
    core, out = cache.core, []
    for part in ("l1_keys", "l1_values", "recent_keys", "recent_values"):
        out += [core.view(part, layer)[0].numpy() for layer in range(2)]
    for part in ("l2_keys", "l2_values"):
        for layer in range(2):
            pages = [core.view(part, layer, i)[0].numpy() for i in range(core.pages)]
            out.append(np.concatenate(pages))
    return out


def same(a: Cache, b: Cache) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(views(a), views(b), strict=True))


def answer(cache: Cache) -> list[int]:
    return cache.ask("the blue ledger", eta=32, max_new_tokens=4).ids.tolist()


# ------------------------------------------------------------------------------ the CPU


def test_one_memory_on_the_cpu():
    model = toy.model()
    first = build(model)
    for l2 in PLACES:
        cache = build(model, l2)
        assert cache.plan["l2"] == "device" and cache.plan["host_bytes"] == 0
        assert cache.stats.l2 == "device" and cache.plan == first.plan
        assert same(cache, first) and model.core.engine.host_bytes == 0
        assert cache.extend(MORE, progress=False).plan["l2"] == "device"


@pytest.mark.parametrize(
    ("l2", "error", "words"),
    [
        ("gpu", ValueError, "l2: got 'gpu', expected .*auto.*device.*host"),
        ("", ValueError, "l2"),
        (1, TypeError, "l2"),
        (None, TypeError, "l2"),
    ],
)
def test_refusals(l2, error, words):
    model = toy.model()
    with pytest.raises(error, match=words):
        build(model, l2)


def test_the_command_line_takes_it(tmp_path, capsys):
    toy.directory(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = ["ask", str(tmp_path / "text.txt"), "-q", "the ledger", "--model"]
    words += [str(tmp_path / "model"), "--max-new-tokens", "2", "--interval", "8"]
    words += ["--eta", "64"]
    assert cli.main([*words, "--l2", "host"]) == 0
    assert cli.main([*words, "--l2", "moon"]) == 2
    assert "moon" in capsys.readouterr().err


# ----------------------------------------------------------------------- a device apart


def test_either_side_has_the_same_bits(cuda):
    model = toy.model(device="cuda")
    engine = model.core.engine
    device, host = build(model, "device"), build(model, "host")
    assert device.plan["l2"] == build(model).plan["l2"] == "device"
    assert host.plan["l2"] == host.stats.l2 == "host"
    assert host.plan["host_bytes"] == host.plan["l2_bytes"] == engine.host_bytes > 0
    assert host.plan["peak_bytes"] < device.plan["peak_bytes"]
    assert same(host, device) and answer(host) == answer(device)
    for cache in (device, host):
        before = cache.plan["l2"]
        assert cache.extend(MORE, progress=False).plan["l2"] == before
    assert same(host, device) and answer(host) == answer(device)


def test_files_go_from_one_device_to_the_other(cuda, tmp_path):
    here, there = toy.model(), toy.model(device="cuda")
    path = tmp_path / "cache.acre"
    for l2 in ("device", "host"):
        built = build(there, l2)
        built.save(path)
        mapped, back = Cache.load(path, here), Cache.load(path, there, verify=True)
        assert mapped.plan["l2"] == "device" and back.plan["l2"] == "host"
        assert same(mapped, built) and same(back, built)
        assert answer(back) == answer(built)
    del built, mapped, back
    own = build(here)
    own.save(path)
    carried = Cache.load(path, there)
    assert same(carried, own)
    longer = carried.extend(MORE, progress=False)
    assert longer.plan["l2"] == "host" and answer(longer)
    assert 0 < there.core.engine.host_bytes < longer.plan["l2_bytes"]


def test_views_leave_where_they_lie(cuda):
    model = toy.model(device="cuda")
    device, host = build(model, "device"), build(model, "host")
    tensor = device.core.view("l2_keys", 1)[0]
    assert tensor.device == "cuda:0" and tensor.__dlpack_device__() == (2, 0)
    assert host.core.view("l2_keys", 1)[0].device == "cpu"  # pinned, and the host's
    assert host.l1_keys(0).__dlpack_device__() == (2, 0)
    home = np.from_dlpack(host.core.view("l2_keys", 1)[0])
    assert np.array_equal(home, np.asarray(tensor))


def test_a_gpu_that_is_not_there(cuda):
    with pytest.raises(ValueError, match="this machine has 1 GPU"):
        toy.model(device="cuda:3")
