"""Adapters: written, packed, opened on their base and on others, merged."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import fakes
import numpy as np
import pytest
import tiny
import toy
from adapting import KEYS, made, opened, shifted
from model_files import bf16_bits, write_gguf, write_safetensors
from safetensors.numpy import load_file

import acre
from acre import _core, cli, loaders
from acre.errors import ModelFileError
from acre.fingerprints import Fingerprints, widened
from acre.safetensors_file import SafetensorsFile
from acre.training import adapter as writing
from acre.training.adapter import (
    bf16,
    describe,
    merge_adapter,
    pack_adapter,
    write_adapter,
)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def place(request, tmp_path_factory):
    """A model directory, its tensors, and an adapter of it in float32."""
    return made(tmp_path_factory.mktemp("adapter"), request.param)


def trained_logits(model: acre.Model) -> np.ndarray:
    """What a question gives over a cache of L1 tokens."""
    cache = model.build(toy.sentence(3, 60), **toy.BUILD)
    assert cache.proxy == "trained"
    session = _core.Session(model.core, cache.core, capacity=8)
    return session.prefill(np.arange(5, dtype=np.int32) + 9, logits=True)


def from_arrays(place, own) -> acre.Model:
    """The model that an adapter must give."""
    family = json.loads((place / "model" / "config.json").read_text())["model_type"]
    return acre.Model.from_arrays(
        toy.hf_config(family), {**toy.arrays(family), **own}, toy.tokenizer(), "f32",
        threads=1,
    )  # fmt: skip


# ------------------------------------------------------------------------- round trips


def test_f32_round_trip(place):
    path, own, _ = place
    read = loaders.open_adapter(path / "f32.safetensors")
    assert {name for name, _, _ in read} == set(own)
    for name, array, kind in read:
        assert kind == "f32" and np.array_equal(array, own[name])
    model = opened(path / "model", path / "f32.safetensors")
    expected = trained_logits(from_arrays(path, own))
    assert np.array_equal(trained_logits(model), expected)
    assert not np.array_equal(expected, trained_logits(from_arrays(path, {
        name: array + 0.01 for name, array in own.items()})))  # fmt: skip


def test_bf16_round_trip(place):
    path, own, _ = place
    file = load_names(path / "bf16.safetensors")
    for name, array in own.items():
        dtype, values = file[name]
        assert dtype == "BF16"
        assert np.all(np.abs(values - array) <= np.abs(array) * 2.0**-8)
    assert trained_logits(opened(path / "model", path / "bf16.safetensors")).any()


def load_names(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """name -> (dtype, values as float32)."""
    file = SafetensorsFile(path)
    return {
        name: (entry.dtype, widened(*file.read(name)))
        for name, entry in file.entries.items()
    }


def test_bf16_rounds_to_nearest_even():
    values = np.float32([1.0, 1.00390625, 1.01171875, -3.14159, 0.0, -0.0, 3.3e38])
    whole = (bf16(values).astype(np.uint32) << 16).view(np.float32)
    assert whole[:3].tolist() == [1.0, 1.0, 1.015625]  # ties to even
    assert np.all(np.abs(whole[3:] - values[3:]) <= np.abs(values[3:]) * 2.0**-8)
    assert np.signbit(whole[5]) and np.isfinite(whole).all()


def test_metadata(place):
    path, _, base = place
    said = SafetensorsFile(path / "bf16.safetensors").metadata
    assert said["base_fingerprint"] == base.fingerprint and said["storage"] == "bf16"
    assert said["stage"] == "stage1" and said["acre_version"] == acre.__version__
    assert {key: json.loads(said[key]) for key in KEYS} == KEYS


@pytest.mark.parametrize("source", ["f32", "bf16"])
def test_int8_error_bound(place, tmp_path, source):
    path, own, _ = place
    packed = tmp_path / "int8.safetensors"
    pack_adapter(path / f"{source}.safetensors", packed, path / "model")
    matrix = "model.layers.1.self_attn.acre_k_proj.weight"
    assert SafetensorsFile(packed).entries[matrix].dtype == "I8"
    assert SafetensorsFile(packed).entries[matrix + "_scale"].shape == (16,)
    before = {
        name: widened(array, kind)
        for name, array, kind in loaders.open_adapter(path / f"{source}.safetensors")
    }
    source_model = loaders.open_source(path / "model")
    base = {name: widened(array, kind) for name, array, kind in source_model.tensors()}
    seen = set()
    for name, array, kind in loaders.open_adapter(packed).on(source_model):
        if "acre_" not in name:
            continue
        seen.add(name)
        bound = 1e-7
        if "_proj.weight" in name:
            moved = np.abs(before[name] - base[name.replace("acre_", "")])
            bound = moved.max(axis=1, keepdims=True) / 254 * 1.0001 + 1e-7
        assert np.all(np.abs(widened(array, kind) - before[name]) <= bound)
    assert seen == set(own)
    half = (path / "bf16.safetensors").stat().st_size
    assert packed.stat().st_size < half
    close = trained_logits(opened(path / "model", packed))
    exact = trained_logits(opened(path / "model", path / f"{source}.safetensors"))
    assert np.abs(close - exact).max() < 0.02 * np.abs(exact).max()


def test_packed_and_unpacked(place, tmp_path):
    path, own, _ = place
    pack_adapter(path / "f32.safetensors", tmp_path / "a", path / "model")
    pack_adapter(tmp_path / "a", tmp_path / "b", path / "model", "f32")
    pack_adapter(tmp_path / "b", tmp_path / "c", storage="bf16")
    whole = load_names(tmp_path / "b")
    assert set(whole) == set(own) and SafetensorsFile(tmp_path / "c").metadata
    for name, array in own.items():
        assert np.abs(whole[name][1] - array).max() < 1e-3
    with pytest.raises(ModelFileError, match="open it with that"):
        pack_adapter(tmp_path / "a", tmp_path / "d", storage="bf16")
    with pytest.raises(ValueError, match="model: 'int8'"):
        pack_adapter(path / "f32.safetensors", tmp_path / "d")
    with pytest.raises(ValueError, match="storage"):
        pack_adapter(path / "f32.safetensors", tmp_path / "d", storage="int4")
    assert not (tmp_path / "d").exists()


def test_rows_that_did_not_move(tmp_path):
    base = np.float32([[1, 2], [3, 4]])
    rows, scale = writing.packed(base + np.float32([[0, 0], [0.5, -1]]), base)
    assert scale.tolist() == [0, np.float32(1 / 127)] and rows[0].tolist() == [0, 0]
    assert rows[1].tolist() == [64, -127]


# --------------------------------------------------------------------------- wrong base


def test_another_base_is_refused(place, tmp_path):
    path, _, _ = place
    pack_adapter(path / "f32.safetensors", tmp_path / "int8", path / "model")
    family = json.loads((path / "model" / "config.json").read_text())["model_type"]
    toy.directory(tmp_path / "other", family, rng=1)
    for adapter in (path / "f32.safetensors", tmp_path / "int8"):
        with pytest.raises(ModelFileError, match="was trained on 'model'.*is another:"):
            opened(tmp_path / "other", adapter)
        with pytest.raises(ModelFileError, match="was trained on 'model'"):
            merge_adapter(tmp_path / "other", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    odd = "llama" if family == "qwen2" else "qwen2"
    toy.directory(tmp_path / "odd", odd)
    with pytest.raises(ModelFileError):
        opened(tmp_path / "odd", path / "f32.safetensors")


def test_a_quantised_copy_shares_its_norms(tmp_path):
    """Whole parameters serve a model in every precision, differences only in one."""
    write_safetensors_model(tmp_path / "model", exact=True)
    write_safetensors_model(tmp_path / "half", exact=False)
    base = opened(tmp_path / "model", None)
    own = shifted(tiny.tensors(1))
    said = describe(base.prints, "model", **KEYS)
    write_adapter(tmp_path / "whole", own, said)
    pack_adapter(tmp_path / "whole", tmp_path / "int8", tmp_path / "model")
    assert opened(tmp_path / "half", tmp_path / "whole").core.has_l1
    with pytest.raises(ModelFileError, match="another precision"):
        opened(tmp_path / "half", tmp_path / "int8")
    write_gguf(tmp_path / "model.gguf")
    prints = Fingerprints({})
    for item in loaders.open_source(tmp_path / "model.gguf").tensors():
        prints.add(*item)
    loaders.open_adapter(tmp_path / "whole").check(prints.result())
    with pytest.raises(ModelFileError, match="another precision"):
        loaders.open_adapter(tmp_path / "int8").check(prints.result())


def write_safetensors_model(path: Path, exact: bool) -> None:
    """The tiny model, its matrices in float32 or bf16, its norms in float32."""
    from model_files import write_model

    tensors = write_model(path)
    if not exact:
        halved = {n: bf16_bits(a) if a.ndim == 2 else a for n, a in tensors.items()}
        write_safetensors(path / "model.safetensors", halved)


def test_files_of_others_are_taken_at_their_word(place, tmp_path):
    path, own, _ = place
    write_safetensors(tmp_path / "plain.safetensors", own)
    model = opened(path / "model", tmp_path / "plain.safetensors")
    expected = trained_logits(opened(path / "model", path / "f32.safetensors"))
    assert np.array_equal(trained_logits(model), expected)


# ------------------------------------------------------------------------------- damage


def test_cut_files_are_refused(place, tmp_path):
    path, _, _ = place
    pack_adapter(path / "f32.safetensors", tmp_path / "int8", path / "model")
    for name in (path / "bf16.safetensors", tmp_path / "int8"):
        data = name.read_bytes()
        for size in (0, 7, 100, len(data) // 2, len(data) - 1):
            (tmp_path / "cut").write_bytes(data[:size])
            with pytest.raises(ModelFileError, match="cut"):
                opened(path / "model", tmp_path / "cut")


def test_packed_files_without_their_parts(place, tmp_path):
    path, _, _ = place
    pack_adapter(path / "f32.safetensors", tmp_path / "int8", path / "model")
    file = SafetensorsFile(tmp_path / "int8")
    matrix = "model.layers.0.self_attn.acre_v_proj.weight"
    every = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}

    def rewritten(changed: dict) -> Path:
        with open(tmp_path / "odd", "wb") as out:
            arrays = [np.zeros(shape, {"I8": np.int8}.get(dtype, np.float32))
                      for dtype, shape in changed.values()]  # fmt: skip
            writing.write_tensors(out, changed, arrays, file.metadata)
        return tmp_path / "odd"

    without = {n: e for n, e in every.items() if n != matrix + "_scale"}
    with pytest.raises(ModelFileError, match="no F32 scales"):
        opened(path / "model", rewritten(without))
    with pytest.raises(ModelFileError, match="its base is"):
        opened(path / "model", rewritten({**every, matrix: ("I8", (4, 4))}))
    odd = "model.layers.9.self_attn.acre_v_proj.weight"
    more = {odd: ("I8", (4, 4)), odd + "_scale": ("F32", (4,))}
    with pytest.raises(ModelFileError, match="layers.9.*is not in"):
        opened(path / "model", rewritten({**every, **more}))


def test_full_disk_leaves_the_old_file(place, tmp_path, monkeypatch):
    path, own, _ = place
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_tensors", full)
    with pytest.raises(OSError, match=r"a\.safetensors"):
        write_adapter(target, own, {})
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------ merging


def sharded(path: Path, out: Path) -> Path:
    """The same model in two files with an index."""
    shutil.copytree(path, out)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(tensors)
    table = {}
    for number, some in enumerate((names[:9], names[9:]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(out / shard, {name: tensors[name] for name in some})
        table |= dict.fromkeys(some, shard)
    index = {"metadata": {}, "weight_map": table}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


@pytest.mark.parametrize("split", [False, True])
def test_merged_directories_open_by_themselves(place, tmp_path, split):
    path, own, base = place
    model = sharded(path / "model", tmp_path / "split") if split else path / "model"
    out = tmp_path / "merged"
    merge_adapter(model, path / "f32.safetensors", out, "f32")
    merged = opened(out, None)
    assert merged.core.has_l1 and merged.fingerprint == base.fingerprint
    adapted = opened(path / "model", path / "f32.safetensors")
    assert np.array_equal(trained_logits(merged), trained_logits(adapted))
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in KEYS} == KEYS
    assert loaders.open_source(out).acre == KEYS
    assert (out / "tokenizer.json").is_file()
    check_index(out, own)
    with pytest.raises(FileExistsError):
        merge_adapter(model, path / "f32.safetensors", out)


def check_index(out: Path, own: dict[str, np.ndarray]) -> None:
    """As loaders by index read it: every name in its file, no model.safetensors that
    would be preferred, and the size of what is named."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    table = index["weight_map"]
    assert not (out / "model.safetensors").exists() and set(own) <= set(table)
    size = 0
    for name, shard in table.items():
        size += load_file(out / shard)[name].nbytes
    assert index["metadata"]["total_size"] == size


def test_merging_replaces_what_was_merged(place, tmp_path):
    path, own, base = place
    merge_adapter(path / "model", path / "bf16.safetensors", tmp_path / "one")
    other = {name: array + 0.05 for name, array in own.items()}
    said = describe(base.prints, "model", **KEYS)
    write_adapter(tmp_path / "other", other, said, "f32")
    merge_adapter(tmp_path / "one", tmp_path / "other", tmp_path / "two", "f32")
    expected = trained_logits(from_arrays(path, other))
    assert np.array_equal(trained_logits(opened(tmp_path / "two", None)), expected)
    again = opened(tmp_path / "one", tmp_path / "other")
    assert np.array_equal(trained_logits(again), expected)
    pack_adapter(tmp_path / "other", tmp_path / "int8", path / "model")
    packed = opened(path / "model", tmp_path / "int8")
    over = opened(tmp_path / "one", tmp_path / "int8")
    assert np.array_equal(trained_logits(over), trained_logits(packed))


def test_merging_needs_room_and_a_directory(place, tmp_path, monkeypatch):
    path, _, _ = place
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="no space"):
        merge_adapter(path / "model", path / "bf16.safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write_gguf(tmp_path / "model.gguf")
    write_safetensors(tmp_path / "a.safetensors", shifted(tiny.tensors(1)))
    with pytest.raises(ModelFileError, match="Hugging Face directory"):
        merge_adapter(
            tmp_path / "model.gguf", tmp_path / "a.safetensors", tmp_path / "x"
        )


def test_transformers_reads_a_merged_directory(place, tmp_path):
    """By name: the base's tensors as they were, and ours left over."""
    transformers = pytest.importorskip("transformers")
    path, own, base = place
    merge_adapter(path / "model", path / "bf16.safetensors", tmp_path / "out")
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="float32"
    )
    assert set(own) == set(said["unexpected_keys"]) and not said["missing_keys"]
    weight = theirs.get_input_embeddings().weight.detach().numpy()
    tensors = dict((n, a) for n, a, _ in loaders.open_source(path / "model").tensors())
    assert np.array_equal(weight, tensors["model.embed_tokens.weight"])


# ----------------------------------------------------------------- proxies, the command


def test_trained_parameters_are_used_where_there_are_any(place):
    path, _, base = place
    text = toy.sentence(2, 40)
    assert base.build(text, **toy.BUILD).proxy == "pooled"
    adapted = opened(path / "model", path / "bf16.safetensors")
    assert adapted.build(text, **toy.BUILD).proxy == "trained"
    assert adapted.build(text, **toy.BUILD, proxy="pooled").proxy == "pooled"


def test_results_name_the_proxy_that_was_meant(place):
    from acre.eval.methods import Settings, make

    path, _, base = place
    method = make("acre", Settings())
    assert method.settings()["proxy"] == "auto"
    assert method.on(base).settings()["proxy"] == "pooled"
    adapted = opened(path / "model", path / "bf16.safetensors")
    assert method.on(adapted).settings()["proxy"] == "trained"


def test_commands(place, tmp_path, capsys):
    path, _, _ = place
    model, adapter = str(path / "model"), str(path / "bf16.safetensors")
    packed, out = str(tmp_path / "int8"), str(tmp_path / "out")
    assert cli.main(["adapter", "pack", adapter, "--model", model, "-o", packed]) == 0
    assert cli.main(["adapter", "merge", packed, "--model", model, "-o", out]) == 0
    assert opened(Path(out), None).core.has_l1
    assert cli.main(["adapter", "pack", adapter, "-o", packed]) == 1
    assert "acre: model: 'int8'" in capsys.readouterr().err


# ----------------------------------------------------------------------------- training


@pytest.fixture
def fake(monkeypatch):
    """The fake in the place of the extension's trainer."""
    trainer = fakes.Trainer()
    monkeypatch.setattr(_core, "Trainer", lambda model: trainer, raising=False)
    return trainer


def train(model, out, **changes) -> acre.Model:
    options = {"steps": 4, "batch_tokens": 20, "lr": 0.05, "progress": False}
    return acre.train(model, "stage1", fakes.Stream(), out, **{**options, **changes})


def test_train_leaves_an_adapter(fake, tmp_path):
    rows: list = []
    done = train(toy.model(), tmp_path, progress=rows.append, held_out=fakes.Stream(),
                 held_out_examples=3, evaluate_every=2)  # fmt: skip
    assert (done.step, done.tokens, done.ended_early) == (4, 80, False)
    assert [r["step"] for r in rows if "held_out" in r] == [0, 2, 4]
    file = SafetensorsFile(done.adapter)
    assert done.adapter == tmp_path / "adapter.safetensors"
    assert [*file.entries] == [name for name, _, _ in fakes.ENTRIES]
    assert file.metadata["steps"] == "4" and file.metadata["tokens"] == "80"
    values = widened(*file.read("model.acre_embed_tokens.weight"))
    assert np.abs(values.ravel() - fake.read("parameters")[:8]).max() < 0.01
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["steps"] == 4


def test_train_refuses_another_run(fake, tmp_path):
    start = fake.read("parameters")
    train(toy.model(), tmp_path)
    fake.write("parameters", start)
    with pytest.raises(ValueError, match="steps: 4, now 5"):
        train(toy.model(), tmp_path, steps=5)
    shutil.rmtree(tmp_path / "checkpoints")  # run.json says it, too
    with pytest.raises(ValueError, match="steps: 4, now 5"):
        train(toy.model(), tmp_path, steps=5)
    with pytest.raises(ValueError, match="holds a run already"):
        train(toy.model(), tmp_path, resume=False)
    with pytest.raises(ValueError, match="fingerprint"):
        train(toy.model(rng=3), tmp_path)
    with pytest.raises(ValueError, match="start"):
        fake.write("parameters", start + 1)
        train(toy.model(), tmp_path)
    with pytest.raises(ValueError, match="adapter: the model is open"):
        train(toy.model(), tmp_path / "b", adapter="x")
    with pytest.raises(ValueError, match="save_every"):
        train(toy.model(), tmp_path / "b", save_every=0)


def test_ctrl_c_is_130(fake, place, tmp_path, monkeypatch, capsys):
    path, _, _ = place

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "accumulate", stop)
    monkeypatch.setattr("acre.training.run._stream", lambda *_: fakes.Stream())
    command = ["train", "stage1", "--model", str(path / "model"), "--data", "x"]
    assert cli.main([*command, "--out", str(tmp_path / "o"), "--steps", "2"]) == 130
    assert (tmp_path / "o" / "checkpoints" / "step-00000000").is_dir()
    capsys.readouterr()


def test_the_choice_of_heads_travels(fake, place, tmp_path, monkeypatch):
    """Evidence trains some heads; the adapter says which, its model scores by them."""
    path, _, base = place
    seen: list = []
    learn = fake.accumulate

    def told(ids, **arguments):
        seen.append(arguments.get("heads"))
        return learn(ids, **arguments)

    class Known(fakes.Stream):
        def __next__(self):
            example = super().__next__()
            example.questions = (np.ones(len(example.ids), bool),)
            return example

    monkeypatch.setattr(fake, "accumulate", told)
    pairs = [(0, 1), (1, 0)]
    acre.train(base, "stage2", Known(), tmp_path / "run", steps=2, batch_tokens=20,
               evidence_heads=pairs, progress=False)  # fmt: skip
    assert seen and all(np.argwhere(mask).tolist() == [[0, 1], [1, 0]] for mask in seen)
    said = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert said["heads"] == [[0, 1], [1, 0]]
    metadata = SafetensorsFile(tmp_path / "run" / "adapter.safetensors").metadata
    for scoring, wanted in ((metadata["scoring"], [[0, 1], [1, 0]]), ("null", None)):
        kept = describe(base.prints, "model", **KEYS, scoring=scoring)
        write_adapter(tmp_path / "a.safetensors", place[1], kept)
        if wanted is None:
            with pytest.raises(ModelFileError, match="scoring"):
                opened(path / "model", tmp_path / "a.safetensors")
            continue
        model = opened(path / "model", tmp_path / "a.safetensors")
        assert np.argwhere(model.scoring["trained"].heads).tolist() == wanted
        assert model.scoring["pooled"].heads is None


@pytest.mark.parametrize("pairs", [[(0, 9)], [(5, 0)], [(-1, 0)], []])
def test_heads_that_the_model_has_not(fake, place, tmp_path, pairs):
    with pytest.raises(ValueError, match="heads"):
        acre.train(place[2], "stage2", fakes.Stream(), tmp_path, steps=1,
                   evidence_heads=pairs, progress=False)  # fmt: skip


@pytest.mark.skipif(not hasattr(_core, "Trainer"), reason="no trainer in this build")
def test_the_real_trainer(tmp_path):
    """Stopped and resumed it is the same run, and its adapter opens."""
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": toy.sentence(i, 200)}) for i in range(8)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    toy.directory(tmp_path / "model")
    options = {"steps": 6, "batch_tokens": 400, "lr": 0.01, "length": 200, "window": 64,
               "stride": 32, "intervals": (8, 16), "passes": 9, "save_every": 2,
               "progress": False}  # fmt: skip

    def run(out: str, **more):
        model = acre.Model.from_pretrained(tmp_path / "model", "f32", threads=1)
        return acre.train(model, "stage1", str(texts), tmp_path / out, **options | more)

    whole = run("whole")

    def stop(row: dict) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("again", progress=stop)
    again = run("again")
    assert whole.adapter.read_bytes() == again.adapter.read_bytes()
    assert opened(tmp_path / "model", whole.adapter).core.has_l1
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["loss"] < json.loads(log[0])["loss"]
