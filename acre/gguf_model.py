"""A GGUF model in the core's terms.

Takes a GGUF file of the architectures llama and qwen2; gives the core's configuration
and the tensors by Hugging Face name. One idea: undo what the converter did. In the
llama architecture it reordered the rows of q and k (weights and biases) for RoPE over
adjacent pairs; the core rotates half-split pairs, so the rows go back. Refuses mixtures
of experts, per-layer head counts, partial RoPE, unknown RoPE scaling.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from acre.errors import ModelFileError
from acre.fields import INT32_MAX, Fields
from acre.gguf_file import GgufFile
from acre.hf import LAYERS_MAX, Tensor, check_heads

ARCHITECTURES = ("llama", "qwen2")
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"
UNUSED = ("rot_embd.weight", "rope_freqs.weight")  # tables, no parameters


def half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from adjacent pairs (2i, 2i + 1) to half-split ones (i, i + d/2).

    array: [heads * d] or [heads * d, columns], any dtype; a copy of the same shape.
    """
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


class GgufModel:
    """`config` (without dtype), `tensors` by Hugging Face name, `fields` (metadata),
    `bias` (q, k and v have one), `name`."""

    def __init__(self, path: Path) -> None:
        """FileNotFoundError, ModelFileError."""
        self.file = GgufFile(path)
        self.fields = self.file.fields
        meta = Fields(self.fields, str(path))
        self.arch = meta.string("general.architecture")
        if self.arch not in ARCHITECTURES:
            expected = " or ".join(ARCHITECTURES)
            raise meta.refuse("general.architecture", self.arch, expected)
        self.name = meta.string("general.name", None) or path.stem
        self.config = self._configuration(meta)
        self.bias = self.arch == "qwen2" or "blk.0.attn_q.bias" in self.file.entries
        self.tensors = self._named()

    # -------------------------------------------------------------------- configuration

    def _configuration(self, meta: Fields) -> dict[str, Any]:
        arch = self.arch
        if meta.integer(f"{arch}.expert_count", 0, low=0):
            count = meta.get(f"{arch}.expert_count")
            raise meta.refuse(f"{arch}.expert_count", count, "none (a dense model)")
        for name in ("token_embd.weight", "output_norm.weight"):
            if name not in self.file.entries:
                raise ModelFileError(f"{meta.where}: tensor {name} is missing")
        hidden = meta.integer(f"{arch}.embedding_length")
        heads = meta.integer(f"{arch}.attention.head_count")
        head_dim = self._head_dim(meta, hidden, heads)
        rope, w_max = self._rope(meta, head_dim)
        window = meta.integer(f"{arch}.attention.sliding_window", 0, low=0)
        if 0 < window < w_max:
            raise meta.refuse(f"{arch}.attention.sliding_window", window, "none")
        eos = meta.token_ids("tokenizer.ggml.eos_token_id")
        config = {
            "vocab_size": self.file.entries["token_embd.weight"].shape[0],
            "hidden": hidden,
            "layers": meta.integer(f"{arch}.block_count", high=LAYERS_MAX),
            "heads": heads,
            "kv_heads": meta.integer(f"{arch}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "ffn": meta.integer(f"{arch}.feed_forward_length"),
            "w_max": w_max,
            "rms_eps": meta.number(f"{arch}.attention.layer_norm_rms_epsilon"),
            "rope": rope,
            "tied_head": "output.weight" not in self.file.entries,
            "eos_id": eos[0] if eos else -1,
        }
        check_heads(config, meta.where)
        return config

    def _head_dim(self, meta: Fields, hidden: int, heads: int) -> int:
        head_dim = meta.integer(f"{self.arch}.attention.key_length", None)
        if head_dim is None:
            head_dim, rest = divmod(hidden, heads)
            if rest:
                key = f"{self.arch}.embedding_length"
                raise meta.refuse(key, hidden, f"a multiple of {heads} heads")
        for key in ("attention.value_length", "rope.dimension_count"):
            size = meta.integer(f"{self.arch}.{key}", head_dim)
            if size != head_dim:
                raise meta.refuse(f"{self.arch}.{key}", size, f"the head's {head_dim}")
        return head_dim

    def _rope(self, meta: Fields, head_dim: int) -> tuple[dict[str, Any], int]:
        """(rope dict of the core, w_max)."""
        at = f"{self.arch}.rope."
        positions = meta.integer(f"{self.arch}.context_length")
        theta = meta.number(at + "freq_base", 10000.0)
        kind = meta.string(at + "scaling.type", None)
        factor = meta.number(at + "scaling.factor", None)
        if kind is None:  # before the key existed, linear scaling had its own
            factor = factor or meta.number(at + "scale_linear", 1.0)
            kind = "none" if factor == 1.0 else "linear"
        if kind not in ("none", "linear", "yarn"):
            raise meta.refuse(at + "scaling.type", kind, "none, linear or yarn")
        rope: dict[str, Any] = {"kind": "default", "theta": theta}
        if ROPE_FACTORS in self.file.entries:
            if kind != "none":
                raise meta.refuse(
                    at + "scaling.type", kind, f"none beside {ROPE_FACTORS}"
                )
            return self._llama3(theta, head_dim), positions
        if kind == "none":
            return rope, positions
        if factor is None or factor < 1.0:
            raise meta.refuse(at + "scaling.factor", factor, "at least 1")
        rope |= {"kind": kind, "factor": factor}
        if kind == "yarn":
            original = meta.integer(at + "scaling.original_context_length", positions)
            rope |= self._yarn(meta, at + "scaling.", original, factor)
            if original == positions:
                positions = min(int(positions * factor), INT32_MAX)
        return rope, positions

    @staticmethod
    def _yarn(meta: Fields, at: str, original: int, factor: float) -> dict[str, Any]:
        """yarn's own parameters. The file's attn_factor multiplies the factor that
        follows from the scaling; the core's attention_factor replaces it."""
        attention = meta.number(at + "attn_factor", 1.0)
        if attention != 1.0:
            attention *= 0.1 * float(np.log(factor)) + 1.0
        return {
            "original_positions": original,
            "beta_fast": meta.number(at + "yarn_beta_fast", 32.0),
            "beta_slow": meta.number(at + "yarn_beta_slow", 1.0),
            "attention_factor": 0.0 if attention == 1.0 else attention,
            "truncate": True,
        }

    def _llama3(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The llama3 parameters behind the file's table of frequency divisors.

        The table does not state them. All published models use the frequency factors 1
        and 4 over 8192 positions, and the largest divisor is the factor; if these do
        not reproduce the table, the file is refused.
        """
        where = f"{self.file.path}: tensor {ROPE_FACTORS}"
        table = self.file.read(ROPE_FACTORS)[0].astype(np.float64).reshape(-1)
        if table.shape != (head_dim // 2,):
            raise ModelFileError(
                f"{where} has {table.size} elements, expected {head_dim // 2}"
            )
        if not np.isfinite(table).all() or table.min() < 1.0:
            raise ModelFileError(f"{where} has values that are no divisors >= 1")
        if table.max() == 1.0:
            return {"kind": "default", "theta": theta}
        rope = {
            "kind": "llama3",
            "theta": theta,
            "factor": float(table.max()),
            "original_positions": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        if not np.allclose(llama3_divisors(rope, head_dim), table, rtol=1e-4):
            raise ModelFileError(
                f"{where} is not the llama3 scaling by {table.max():g} from 8192 "
                "positions; other tables are not supported"
            )
        return rope

    # -------------------------------------------------------------------------- tensors

    def _named(self) -> dict[str, Tensor]:
        """The file's tensors by Hugging Face name; those without one keep theirs."""
        out: dict[str, Tensor] = {}
        for name, entry in self.file.entries.items():
            if name.endswith(UNUSED):
                continue
            match = _BLOCK.fullmatch(name)
            target = NAMES.get(name, name)
            if match:
                part = LAYER_NAMES.get(match[2], match[2])
                target = f"model.layers.{match[1]}.{part}.{match[3]}"
            if target != name:
                self.file.check_kind(name)
            read = partial(self.file.read, name)
            tensor = Tensor(str(self.file.path), entry.shape, read)
            if self.arch == "llama" and match and match[2] in ("attn_q", "attn_k"):
                tensor = self._unpermuted(tensor, match[2])
            out[target] = tensor
        return out

    def _unpermuted(self, tensor: Tensor, part: str) -> Tensor:
        heads = self.config["heads" if part == "attn_q" else "kv_heads"]

        def read() -> tuple[np.ndarray, str]:
            array, kind = tensor.read()
            return half_split(array, heads), kind

        return replace(tensor, read=read)


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What the llama3 scaling divides each of the d/2 frequencies by; float64."""
    inverse = rope["theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope["original_positions"] * inverse / (2 * np.pi)
    low, high, factor = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "factor")
    )
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
