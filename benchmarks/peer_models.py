"""The same weights for every engine of bench_peers.py.

Takes the name of a shape; gives `Weights`, which acre opens as it opens any model,
transformers as bf16 tensors by Hugging Face name, llama.cpp as a GGUF file in a type of
its own. One idea: everything is derived from one set of tensors, and llama.cpp's file
is converted apart from the path that feeds the other two, so that a mistake in either
path shows as disagreement. Two shapes: SmolLM2-135M, and Qwen2.5-0.5B with random
weights, whose text is SmolLM2's tokens (all below its vocabulary).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from bench_cpu import smollm2
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import dequantize, quantize

import acre
from acre import loaders

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SEED, STD = 0, 0.02
KINDS = {  # what the GGUF files hold their matrices in
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


class Weights(Protocol):
    """One model in each engine's format. trained: its greedy tokens mean something."""

    name: str
    trained: bool

    def open_acre(self, threads: int, kept: str = "same") -> acre.Model:
        """The model in bf16; kept: how acre holds the matrices."""
        ...

    def open_torch(self) -> Any:
        """The transformers model in bf16, attention by
        scaled_dot_product_attention."""
        ...

    def write_gguf(self, path: Path, kind: str) -> None:
        """Writes the GGUF file for llama.cpp; kind: one of KINDS."""
        ...


def bf16_bits(array: np.ndarray) -> np.ndarray:
    """float32 rounded to bf16, as uint16."""
    return quantize(array, GGMLQuantizationType.BF16).view(np.uint16)


def torch_model(config: Mapping[str, Any], bits: Mapping[str, np.ndarray]) -> Any:
    """A transformers model on these bf16 tensors, without copying them."""
    import torch

    state = {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        for name, array in bits.items()
    }
    return _torch_model(config, state, torch.bfloat16)


def torch_from_file(path: str | os.PathLike[str], dtype: str) -> Any:
    """The transformers model of any file that acre opens, from the tensors that acre's
    reader gives (transformers' own GGUF reader would need a further package).

    dtype: "bf16" or "f32", of weights and arithmetic. FileNotFoundError,
    ModelFileError; ValueError for scaled rotary positions.
    """
    import torch

    kind = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    source = loaders.open_source(path)
    state = torch_tensors(source, kind)
    biased = "model.layers.0.self_attn.q_proj.bias" in state
    return _torch_model(torch_config(source.config, biased), state, kind)


def torch_tensors(source: loaders.Source, dtype: Any) -> dict[str, Any]:
    """The base model's tensors by Hugging Face name, each in the torch dtype given."""
    return {
        name: _torch_tensor(array, held).to(dtype)
        for name, array, held in source.tensors()
        if "acre_" not in name
    }


def torch_config(core: Mapping[str, Any], biased: bool) -> dict[str, Any]:
    """The content of a config.json for a configuration of acre's core.

    biased: q, k and v have biases, as in Qwen2. ValueError for scaled positions.
    """
    if core["rope"]["kind"] != "default":
        kind = core["rope"]["kind"]
        raise ValueError(f"rope: got {kind!r}, the benchmarks run 'default' only")
    return {
        "model_type": "qwen2" if biased else "llama",
        "hidden_size": core["hidden"],
        "num_hidden_layers": core["layers"],
        "num_attention_heads": core["heads"],
        "num_key_value_heads": core["kv_heads"],
        "head_dim": core["head_dim"],
        "intermediate_size": core["ffn"],
        "vocab_size": core["vocab_size"],
        "max_position_embeddings": core["w_max"],
        "rms_norm_eps": core["rms_eps"],
        "rope_theta": core["rope"]["theta"],
        "tie_word_embeddings": core["tied_head"],
    }


def _torch_tensor(array: np.ndarray, held: str) -> Any:
    """A copy as a tensor; held "bf16": the array has its bits."""
    import torch

    if held == "bf16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _torch_model(config: Mapping[str, Any], state: dict[str, Any], dtype: Any) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    family = {"llama": "Llama", "qwen2": "Qwen2"}[config["model_type"]]
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind.from_pretrained(
        None,
        config=transformers.AutoConfig.for_model(**config),
        state_dict=state,
        dtype=dtype,
        attn_implementation="sdpa",
    )
    return model.eval()


# --------------------------------------------------------------------------------- GGUF


def _add_tensor(writer: GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    """Adds float32 values as `kind`; vectors stay float32, as converters leave them."""
    own = GGMLQuantizationType.F32 if array.ndim == 1 else KINDS[kind][0]
    writer.add_tensor(name, quantize(array, own), raw_dtype=own)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter, kind: str) -> None:
    """All keys of the file but its type; the writer has the architecture already."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == Keys.General.ARCHITECTURE:
            continue
        main = field.types[0]
        sub = field.types[-1] if main is GGUFValueType.ARRAY else None
        value: Any = field.contents()
        if key == Keys.General.FILE_TYPE:
            value = int(KINDS[kind][1])
        writer.add_key_value(key, value, main, sub_type=sub)


def _add_tokenizer(writer: GGUFWriter, size: int) -> None:
    """The least that llama.cpp's loader accepts; the benchmark feeds token ids."""
    tokens = [f"<{i}>" for i in range(size - 3)] + ["a", "b", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)


# ------------------------------------------------------------------------------- models


class SmolLM2:
    """SmolLM2-135M from its package's GGUF file (Q4_1, embeddings Q8_0).

    transformers gets the tensors that acre's reader gives, llama.cpp those that the
    gguf package gives.
    """

    name, trained = "smollm2", True

    def __init__(self) -> None:
        self.path = smollm2()

    def open_acre(self, threads: int, kept: str = "same") -> acre.Model:
        return acre.Model.from_pretrained(self.path, threads=threads, weights=kept)

    def open_torch(self) -> Any:
        return torch_from_file(self.path, "bf16")

    def write_gguf(self, path: Path, kind: str) -> None:
        reader = GGUFReader(self.path)
        architecture = reader.get_field(Keys.General.ARCHITECTURE).contents()
        writer = GGUFWriter(path, architecture)
        _copy_metadata(reader, writer, kind)
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            _add_tensor(writer, tensor.name, values, kind)
        _finish(writer)


def _qwen_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face names and shapes of the Qwen2.5-0.5B tensors."""
    hidden, ffn = QWEN["hidden_size"], QWEN["intermediate_size"]
    kv = hidden // QWEN["num_attention_heads"] * QWEN["num_key_value_heads"]
    yield "model.embed_tokens.weight", (QWEN["vocab_size"], hidden)
    for layer in range(QWEN["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,)
        for part, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield at + f"self_attn.{part}_proj.weight", (rows, hidden)
            yield at + f"self_attn.{part}_proj.bias", (rows,)
        yield at + "self_attn.o_proj.weight", (hidden, hidden)
        yield at + "post_attention_layernorm.weight", (hidden,)
        yield at + "mlp.gate_proj.weight", (ffn, hidden)
        yield at + "mlp.up_proj.weight", (ffn, hidden)
        yield at + "mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)


class RandomQwen:
    """Qwen2.5-0.5B's shape with weights drawn from SEED: normal with deviation STD,
    norms 1."""

    name, trained = "qwen2.5-0.5b", False

    def __init__(self) -> None:
        rng = np.random.default_rng(SEED)
        self.bits = {}
        for name, shape in _qwen_shapes():
            if name.endswith("norm.weight"):
                array = np.ones(shape, dtype=np.float32)
            else:
                array = rng.standard_normal(shape, dtype=np.float32)
                array *= np.float32(STD)
            self.bits[name] = bf16_bits(array)

    def open_acre(self, threads: int, kept: str = "same") -> acre.Model:
        words = loaders.open_source(smollm2()).tokenizer
        return acre.Model.from_arrays(
            QWEN, self.bits, tokenizer=words, threads=threads, weights=kept
        )

    def open_torch(self) -> Any:
        return torch_model(QWEN, self.bits)

    def _add_sizes(self, writer: GGUFWriter) -> None:
        writer.add_name(self.name)
        writer.add_context_length(QWEN["max_position_embeddings"])
        writer.add_embedding_length(QWEN["hidden_size"])
        writer.add_block_count(QWEN["num_hidden_layers"])
        writer.add_feed_forward_length(QWEN["intermediate_size"])
        writer.add_head_count(QWEN["num_attention_heads"])
        writer.add_head_count_kv(QWEN["num_key_value_heads"])
        writer.add_rope_freq_base(QWEN["rope_theta"])
        writer.add_layer_norm_rms_eps(QWEN["rms_norm_eps"])

    def write_gguf(self, path: Path, kind: str) -> None:
        writer = GGUFWriter(path, MODEL_ARCH_NAMES[MODEL_ARCH.QWEN2])
        self._add_sizes(writer)
        writer.add_file_type(KINDS[kind][1])
        _add_tokenizer(writer, QWEN["vocab_size"])
        names = get_tensor_name_map(MODEL_ARCH.QWEN2, QWEN["num_hidden_layers"])
        for name, bits in self.bits.items():
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            values = dequantize(bits.view(np.uint8), GGMLQuantizationType.BF16)
            _add_tensor(writer, target, values, kind)
        _finish(writer)


SHAPES: dict[str, type[SmolLM2] | type[RandomQwen]] = {
    kind.name: kind for kind in (SmolLM2, RandomQwen)
}
