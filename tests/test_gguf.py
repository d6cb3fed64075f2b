"""Models from GGUF files: what is read, what is refused by name.

Oracles: the arrays that were written; the gguf package's reader; for SmolLM2's file
transformers' loader, bit for bit. Damaged files may raise two exceptions only.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from model_files import damage, interleaved, refused, smollm2, write_gguf

from acre import loaders
from acre.errors import ModelFileError
from acre.gguf_file import GgufFile
from acre.gguf_model import half_split, llama3_divisors


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_gives_what_was_written(tmp_path: Path, family: str, kind: str) -> None:
    path = tmp_path / "m.gguf"
    written = write_gguf(path, family, kind=GGMLQuantizationType[kind])
    source = loaders.open_source(path)
    expected = tiny.config(family)
    del expected["dtype"]
    assert source.config.pop("rms_eps") == pytest.approx(expected.pop("rms_eps"))
    assert source.config == expected and source.name == "tiny model"
    read = {name: (array, got) for name, array, got in source.tensors()}
    assert read.keys() == written.keys()
    for name, (array, got) in read.items():
        wide = array.astype(np.float32)
        if got == "bf16":
            wide = (array.astype(np.uint32) << 16).view(np.float32)
        loose = {"f16": 1e-3, "bf16": 1e-2, "f32": 0.0}[got]
        np.testing.assert_allclose(wide, written[name], rtol=loose, atol=loose)
        matrix = array.ndim == 2 and array.shape[1] % 32 == 0
        if kind in ("F16", "BF16") and matrix:
            assert got == kind.lower()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants(tmp_path: Path, kind: str) -> None:
    """Blocks of 256: bytes at random, but for finite scales, against `gguf`."""
    rng = np.random.default_rng(5)
    number = GGMLQuantizationType[kind]
    raw = rng.integers(0, 256, (4, {"Q4_K": 144, "Q6_K": 210}[kind]), dtype=np.uint8)
    scale = np.array([0.01, 0.02], np.float16).view(np.uint8)
    if kind == "Q4_K":
        raw[:, :4] = scale
    else:
        raw[:, -2:] = scale[:2]
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    array, got = GgufFile(tmp_path / "m.gguf").read("x")
    assert got == "f32" and array.shape == (4, 256)
    assert np.array_equal(array, dequantize(raw, number))


def test_gguf_header_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    lists = {"test.ints": [1, 2, 3], "test.words": ["a", "", "ü"], "test.f": [0.5]}
    write_gguf(path, **lists)
    compare_with_reader(path)


@pytest.mark.slow
def test_smollm2_header_as_the_gguf_package_reads_it() -> None:
    compare_with_reader(smollm2())


def compare_with_reader(path: Path) -> None:
    """Our header parser against GGUFReader: metadata, and every tensor's place."""
    mine, theirs = GgufFile(path), GGUFReader(path)
    own = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert mine.fields.keys() == own.keys()
    for key, field in own.items():
        assert mine.fields[key] == field.contents(), key
    assert len(mine.entries) == len(theirs.tensors)
    for tensor in theirs.tensors:
        entry = mine.entries[tensor.name]
        assert entry.begin == tensor.data_offset
        assert entry.end - entry.begin == tensor.n_bytes
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert entry.kind == tensor.tensor_type.name


def test_half_split_undoes_the_converter() -> None:
    rng = np.random.default_rng(0)
    for shape in ((24, 5), (24,)):
        array = rng.standard_normal(shape)
        assert np.array_equal(half_split(interleaved(array, 3), 3), array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture"),
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv"),
        ({"llama.attention.head_count_kv": 3}, "do not divide"),
        ({"llama.block_count": 3}, "layers.2"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.context_length": 0}, "context_length is 0"),
        ({"llama.rope.dimension_count": 4}, "dimension_count is 4"),
        ({"llama.attention.value_length": 4}, "value_length is 4"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.scaling.type": "yarn"}, "scaling.factor is None"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base"),
        ({"llama.attention.sliding_window": 16}, "sliding_window is 16"),
        ({"split.count": 3}, "llama-gguf-split"),
        ({"extra": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "q_norm"),
        ({"extra": {"blk.0.attn_output.bias": np.ones(32, np.float32)}}, "o_proj.bias"),
    ],
)
def test_refused_gguf(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "m.gguf"
    arch = changes.get("general.architecture")
    rest = {key: changes[key] for key in changes if key != "general.architecture"}
    write_gguf(path, **rest)
    if arch:
        data = path.read_bytes()
        path.write_bytes(data.replace(b"llama", arch.encode(), 1))
    with pytest.raises(ModelFileError, match=message):
        loaders.open_source(path)


def test_gguf_rope_scaling(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    at = "llama.rope.scaling."
    write_gguf(path, **{at + "type": "linear", at + "factor": 4.0})
    rope = {"kind": "linear", "theta": 10000.0, "factor": 4.0}
    assert loaders.open_source(path).config["rope"] == rope
    write_gguf(path, **{"llama.rope.scale_linear": 4.0})
    assert loaders.open_source(path).config["rope"] == rope
    yarn = {at + "type": "yarn", at + "factor": 4.0}
    write_gguf(path, **yarn, **{at + "original_context_length": 64})
    config = loaders.open_source(path).config
    assert config["w_max"] == 256 and config["rope"]["original_positions"] == 64
    write_gguf(path, **yarn)
    config = loaders.open_source(path).config
    assert config["w_max"] == 1024 and config["rope"]["original_positions"] == 256
    write_gguf(path, **{at + "type": "none"})
    assert loaders.open_source(path).config["rope"]["kind"] == "default"


def test_gguf_llama3_table(tmp_path: Path) -> None:
    """rope_freqs as the converter writes it gives back the parameters."""
    path = tmp_path / "m.gguf"
    rope = {
        "kind": "llama3",
        "theta": 500000.0,
        "factor": 32.0,
        "original_positions": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    # A tiny head has no low frequencies beyond 8192 positions: check the full-size one.
    assert llama3_divisors(rope, 64).max() == 32.0
    table = llama3_divisors(rope, 64).astype(np.float32)
    base = {"llama.rope.freq_base": 500000.0, "llama.rope.dimension_count": 64}
    wide = {"llama.attention.key_length": 64, "llama.attention.value_length": 64}
    model = gguf_model_of(path, table, **base, **wide)
    assert model["rope"] == pytest.approx(rope)
    off = table.copy()
    off[20] *= 1.5
    with pytest.raises(ModelFileError, match="rope_freqs.weight is not the llama3"):
        gguf_model_of(path, off, **base, **wide)
    with pytest.raises(ModelFileError, match="4 elements, expected 32"):
        gguf_model_of(path, table[:4], **base, **wide)
    ones = np.ones(32, np.float32)
    kind = gguf_model_of(path, ones, **base, **wide)["rope"]["kind"]
    assert kind == "default"


def gguf_model_of(path: Path, table: np.ndarray, **changes: Any) -> dict:
    """The configuration of a file with a table of frequency divisors."""
    from acre.gguf_model import GgufModel

    write_gguf(path, **changes, extra={"rope_freqs.weight": table})
    return GgufModel(path).config


def test_gguf_directory(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    assert loaders.open_source(tmp_path).name == "tiny model"
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(ModelFileError, match="a.gguf, b.gguf"):
        loaders.open_source(tmp_path)


def test_gguf_types_that_are_not_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", kind=GGMLQuantizationType.Q5_0)
    with pytest.raises(ModelFileError, match="is Q5_0, expected one of F32"):
        loaders.open_source(tmp_path / "a.gguf")


@pytest.mark.slow
def test_smollm2_equals_transformers() -> None:
    """Every tensor of the real file, dequantised and reordered, bit for bit."""
    path = smollm2()
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    raw = load_gguf_checkpoint(str(path))["config"]
    raw = {key: value for key, value in raw.items() if key != "model_type"}
    with torch.device("meta"):  # only its names are used
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw))
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    source = loaders.open_source(path)
    names = set()
    for name, array, _ in source.tensors():
        names.add(name)
        assert np.array_equal(array, theirs["tensors"][name].numpy()), name
    assert names == theirs["tensors"].keys() and source.config["tied_head"]


@pytest.mark.slow
def test_smollm2_configuration() -> None:
    config = loaders.open_source(smollm2()).config
    assert config == {
        "vocab_size": 49152,
        "hidden": 576,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "ffn": 1536,
        "w_max": 8192,
        "rms_eps": pytest.approx(1e-5),
        "rope": {"kind": "default", "theta": 100000.0},
        "tied_head": True,
        "eos_id": 2,
    }


# ------------------------------------------------------------------------ damaged files


def test_damaged_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    words = ["<unk>", *(chr(0x21 + i) for i in range(59)), "!!"]
    write_gguf(
        path,
        **{
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": words,
            "tokenizer.ggml.token_type": [3] + [1] * 60,
            "tokenizer.ggml.merges": ["! !"],
        },
    )
    data = path.read_bytes()
    assert loaders.open_source(path).tokenizer is not None
    header = min(entry.begin for entry in GgufFile(path).entries.values())
    count = 0
    for seed in range(1200):
        path.write_bytes(damage(data, header, seed))
        count += refused(path)
    assert 600 < count < 1200


def test_gguf_that_lies_about_sizes(tmp_path: Path) -> None:
    """Lengths far beyond the file are refused before anything of that size is made."""
    gguf = tmp_path / "m.gguf"
    huge = struct.pack("<Q", 2**62)
    start = b"GGUF" + struct.pack("<I", 3)
    one = struct.pack("<Q", 1)
    key = one + b"k"
    for body in (
        huge + huge,
        one + huge,
        struct.pack("<QQ", 0, 1) + huge,
        struct.pack("<QQ", 0, 1) + key + struct.pack("<I", 8) + huge,
        struct.pack("<QQ", 0, 1) + key + struct.pack("<II", 9, 0) + huge,
        struct.pack("<QQ", 0, 1) + key + struct.pack("<II", 9, 8) + huge,
        struct.pack("<QQ", 0, 1) + key + struct.pack("<II", 9, 9) + one,
        struct.pack("<QQ", 1, 0) + key + struct.pack("<I", 2**31),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<I", 2) + huge + huge + one + one,
    ):
        gguf.write_bytes(start + body)
        with pytest.raises(ModelFileError, match="m.gguf"):
            loaders.open_source(gguf)
