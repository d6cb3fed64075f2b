"""Models and adapters from Hugging Face files: what is read, what is refused by name.

Oracles: the arrays that were written; transformers' RoPE functions where they are
installed. Damaged files may raise two exceptions only.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from model_files import (
    BASE,
    bf16_bits,
    damage,
    refused,
    write_model,
    write_safetensors,
)

from acre import loaders
from acre.errors import ModelFileError
from acre.gguf_model import llama3_divisors
from acre.safetensors_file import SafetensorsFile

# -------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_directory_gives_what_was_written(tmp_path: Path, family: str) -> None:
    written = write_model(tmp_path / "m", family)
    source = loaders.open_source(tmp_path / "m")
    expected = tiny.config(family)
    del expected["dtype"]
    assert source.config == expected
    assert source.name == "m" and source.acre == {} and source.tokenizer is None
    read = {name: (array, kind) for name, array, kind in source.tensors()}
    assert read.keys() == written.keys()
    for name, (array, kind) in read.items():
        assert kind == "f32" and np.array_equal(array, written[name])
        assert not array.flags.writeable


@pytest.mark.parametrize("odd", [0, 1])
def test_views_do_not_copy_and_dtypes_stay(tmp_path: Path, odd: int) -> None:
    one = np.arange(8, dtype=np.float32).reshape(2, 4)
    tensors = {"a": one, "b": one.astype(np.float16), "c": bf16_bits(one)}
    write_safetensors(tmp_path / "x.safetensors", tensors, odd)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, kind in (("a", "f32"), ("b", "f16"), ("c", "bf16")):
        array, got = file.read(name)
        assert got == kind and np.array_equal(array, tensors[name])
        assert array.flags.aligned and array.flags.owndata == bool(odd)


def test_files_of_the_safetensors_package(tmp_path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    tensors = tiny.tensors(3)
    path = tmp_path / "x.safetensors"
    numpy_io.save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.entries.keys() == tensors.keys()
    assert all(np.array_equal(file.read(n)[0], a) for n, a in tensors.items())
    assert all(not file.read(n)[0].flags.owndata for n in tensors)


def shard(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Splits a written model into two files with an index; the weight map."""
    names = list(tensors)
    table = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    for file in set(table.values()):
        part = {n: tensors[n] for n in names if table[n] == file}
        write_safetensors(path / file, part)
    (path / "model.safetensors").unlink(missing_ok=True)
    index = {"metadata": {}, "weight_map": table}
    (path / loaders.INDEX).write_text(json.dumps(index))
    return table


def test_shards(tmp_path: Path) -> None:
    written = write_model(tmp_path / "m")
    shard(tmp_path / "m", written)
    source = loaders.open_source(tmp_path / "m")
    read = {name: array for name, array, _ in source.tensors()}
    assert read.keys() == written.keys()
    assert all(np.array_equal(read[n], written[n]) for n in written)


def test_shard_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m"
    written = write_model(path)
    table = shard(path, written)
    index = path / loaders.INDEX

    def with_map(changes: dict) -> None:
        index.write_text(json.dumps({"weight_map": {**table, **changes}}))

    with_map({"model.norm.weight": "gone.safetensors"})
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        loaders.open_source(path)
    with_map({"model.norm.weight": "../m/model-0.safetensors"})
    with pytest.raises(ModelFileError, match="expected a file name"):
        loaders.open_source(path)
    with_map({"model.extra.weight": "model-0.safetensors"})
    with pytest.raises(ModelFileError, match="model.extra.weight.*missing"):
        loaders.open_source(path)
    index.write_text('{"weight_map": []}')
    with pytest.raises(ModelFileError, match="weight_map"):
        loaders.open_source(path)


def test_missing_extra_and_misshapen_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m"
    written = write_model(path)
    file = path / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    o_bias = "model.layers.0.self_attn.o_proj.bias"
    cases: list[tuple[dict, str]] = [
        ({name: None}, f"{name} is missing"),
        ({name: np.zeros((48, 31), np.float32)}, r"\[48, 31\].*\[48, 32\]"),
        ({o_bias: np.ones(32, np.float32)}, "o_proj.bias is not part"),
        (
            {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)},
            "q_norm.weight is not part",
        ),
        (
            {"model.layers.2.mlp.up_proj.weight": np.ones((48, 32), np.float32)},
            "layers.2",
        ),
    ]
    for changes, message in cases:
        tensors = {**written, **changes}
        tensors = {n: a for n, a in tensors.items() if a is not None}
        write_safetensors(file, tensors)
        with pytest.raises(ModelFileError, match=message):
            loaders.open_source(path)
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.rotary_emb.inv_freq": np.ones(4, np.float32),
        "position_ids": np.zeros(4, np.int64),
        o_bias: np.zeros(32, np.float32),
    }
    write_safetensors(file, {**written, **harmless})
    names = [name for name, _, _ in loaders.open_source(path).tensors()]
    assert set(names) == set(written)


def test_negative_zero_bf16_bias_is_zero(tmp_path: Path) -> None:
    written = write_model(tmp_path / "m")
    bias = np.full(32, 0x8000, np.uint16)
    tensors = {**written, "model.layers.0.self_attn.o_proj.bias": bias}
    write_safetensors(tmp_path / "m" / "model.safetensors", tensors)
    loaders.open_source(tmp_path / "m")


def test_tied_head(tmp_path: Path) -> None:
    """Tied: lm_head is skipped. Unsaid: tied where there is no lm_head."""
    path = tmp_path / "m"
    written = write_model(path)
    raw = json.loads((path / "config.json").read_text())
    raw["tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(raw))
    source = loaders.open_source(path)
    assert source.config["tied_head"]
    assert "lm_head.weight" not in [name for name, _, _ in source.tensors()]
    del raw["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(raw))
    assert not loaders.open_source(path).config["tied_head"]
    del written["lm_head.weight"]
    write_safetensors(path / "model.safetensors", written)
    assert loaders.open_source(path).config["tied_head"]


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        loaders.open_source(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        loaders.open_source(tmp_path)
    path = tmp_path / "m"
    write_model(path)
    with pytest.raises(ModelFileError, match="expected a .gguf"):
        loaders.open_source(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="pickled"):
        loaders.open_source(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        loaders.open_source(path)


def test_acre_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m"
    settings = {"acre_window": 4096, "l1_l2_ratio": [8, 16], "acre_param": "q-k-v"}
    write_model(path, **settings)
    write_safetensors(path / "model.safetensors", tiny.tensors(2, trained=True))
    source = loaders.open_source(path)
    assert source.acre == settings
    names = [name for name, _, _ in source.tensors()]
    assert "model.acre_embed_tokens.weight" in names
    assert "model.layers.1.self_attn.acre_q_proj.weight" in names


def test_adapter(tmp_path: Path) -> None:
    every = tiny.tensors(2, "qwen2", trained=True)
    own = {name: array for name, array in every.items() if "acre_" in name}
    write_safetensors(tmp_path / "a.safetensors", own)
    for path in (tmp_path, tmp_path / "a.safetensors"):
        read = {name: array for name, array, _ in loaders.open_adapter(path)}
        assert read.keys() == own.keys()
        assert all(np.array_equal(read[n], own[n]) for n in own)
    write_safetensors(tmp_path / "b.safetensors", every)
    with pytest.raises(ModelFileError, match="acre_"):
        loaders.open_adapter(tmp_path / "b.safetensors")
    with pytest.raises(ModelFileError, match="a.safetensors, b.safetensors"):
        loaders.open_adapter(tmp_path)
    with pytest.raises(FileNotFoundError):
        loaders.open_adapter(tmp_path / "c.safetensors")
    write_safetensors(tmp_path / "b.safetensors", {})
    with pytest.raises(ModelFileError, match="no tensors"):
        loaders.open_adapter(tmp_path / "b.safetensors")


# ------------------------------------------------------------------------ configuration


def test_defaults() -> None:
    raw = {key: BASE[key] for key in BASE if key not in ("num_key_value_heads",)}
    out = loaders.config_from_hf(raw)
    assert out["kv_heads"] == 4 and out["head_dim"] == 8
    assert out["rope"] == {"kind": "default", "theta": 10000.0}
    assert loaders.config_from_hf({**raw, "head_dim": 16})["head_dim"] == 16
    assert loaders.config_from_hf({**raw, "head_dim": None})["head_dim"] == 8
    assert loaders.config_from_hf({**raw, "eos_token_id": [5, 7]})["eos_id"] == 5
    assert loaders.config_from_hf({**raw, "eos_token_id": None})["eos_id"] == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 33}, "hidden_size is 33"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 64,
                "max_window_layers": 1,
            },
            "sliding_window is 64",
        ),
    ],
)
def test_refused_configurations(changes: dict, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        loaders.config_from_hf({**BASE, **changes})


def test_sliding_window_that_is_not_used() -> None:
    raw = {**BASE, "model_type": "qwen2", "sliding_window": 64}
    loaders.config_from_hf({**raw, "use_sliding_window": False})
    more = {"use_sliding_window": True, "max_window_layers": 2}
    loaders.config_from_hf({**raw, **more})
    loaders.config_from_hf({**raw, **more, "layer_types": ["full_attention"] * 2})


SCALINGS: list[dict[str, Any]] = [
    {"type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"type": "yarn", "factor": 4.0},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25},
]


def frequencies(rope: dict[str, Any], d: int, w_max: int) -> tuple[np.ndarray, float]:
    """(inverse frequencies float64 [d/2], attention factor) of a rope dict, by
    METHOD's formulas for each kind."""
    theta, kind = rope["theta"], rope["kind"]
    factor = rope.get("factor", 1.0)
    if kind == "dynamic":
        ratio = max(w_max, rope["original_positions"]) / rope["original_positions"]
        theta *= (factor * ratio - (factor - 1)) ** (d / (d - 2))
    inverse = theta ** (-np.arange(0, d, 2) / d)
    if kind == "linear":
        return inverse / factor, 1.0
    if kind == "llama3":
        return inverse / llama3_divisors(rope, d), 1.0
    if kind != "yarn":
        return inverse, 1.0
    attention = rope["attention_factor"] or 0.1 * np.log(factor) + 1.0

    def dimension(turns: float) -> float:
        length = rope["original_positions"] / (turns * 2 * np.pi)
        return d * np.log(length) / (2 * np.log(theta))

    low, high = dimension(rope["beta_fast"]), dimension(rope["beta_slow"])
    if rope["truncate"]:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = np.clip((np.arange(d // 2) - low) / max(high - low, 0.001), 0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), attention


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: str(len(s)))
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_as_transformers_reads_it(scaling: dict, key: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = {**BASE, "max_position_embeddings": 4096, key: {**scaling}}
    if key == "rope_parameters":
        raw[key]["rope_theta"] = 50000.0
    else:
        raw["rope_theta"] = 50000.0
    mine = loaders.config_from_hf(raw)
    theirs = transformers.LlamaConfig(**{**raw, key: {**raw[key]}})
    init = ROPE_INIT_FUNCTIONS[mine["rope"]["kind"]]
    inverse, attention = init(theirs, "cpu")
    own, factor = frequencies(mine["rope"], mine["head_dim"], 4096)
    np.testing.assert_allclose(own, inverse.numpy(), rtol=2e-6)
    assert factor == pytest.approx(attention, rel=1e-6)


def test_positions_with_yarn() -> None:
    def w_max(**scaling: Any) -> int:
        raw = {**BASE, "rope_scaling": {"type": "yarn", **scaling}}
        return loaders.config_from_hf(raw)["w_max"]

    assert w_max(factor=4.0) == 1024
    assert w_max(factor=4.0, original_max_position_embeddings=256) == 1024
    assert w_max(factor=4.0, original_max_position_embeddings=64) == 256
    assert w_max(original_max_position_embeddings=64) == 256


# ------------------------------------------------------------------------ damaged files


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_model(path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    count = 0
    for seed in range(600):
        file.write_bytes(damage(data, header, seed))
        count += refused(path)
    assert 300 < count < 600


def test_damaged_config(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_model(path, rope_scaling=SCALINGS[2])
    file = path / "config.json"
    data = file.read_bytes()
    count = 0
    for seed in range(600):
        file.write_bytes(damage(data, len(data), seed))
        count += refused(path)
    assert 150 < count < 600


def test_safetensors_that_lie_about_sizes(tmp_path: Path) -> None:
    tensors = tmp_path / "x.safetensors"
    for header in (
        b'{"a":{"dtype":"F32","shape":[1e9],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4611686018427387904]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"shape":[1]},"a":{}}',
        b'{"a":7}',
        b"[" * 100000,
        b"\xff\xfe",
        b"",
    ):
        data = struct.pack("<Q", len(header)) + header + b"\0\0\0\0"
        tensors.write_bytes(data)
        with pytest.raises(ModelFileError, match="x.safetensors"):
            SafetensorsFile(tensors)
    for data in (b"", b"\0", struct.pack("<Q", 2**63) + b"{}"):
        tensors.write_bytes(data)
        with pytest.raises(ModelFileError, match="x.safetensors"):
            SafetensorsFile(tensors)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(0, 8), (4, 12)], "overlaps"),
        ([(0, 8), (12, 20)], "leaves a hole"),
        ([(0, 8)], "end at byte"),
    ],
)
def test_safetensors_layout(tmp_path: Path, entries: list, message: str) -> None:
    header = {
        f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": list(span)}
        for i, span in enumerate(entries)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(20))
    with pytest.raises(ModelFileError, match=message):
        SafetensorsFile(path)
