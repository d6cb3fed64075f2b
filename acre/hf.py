"""Hugging Face's config.json and tensor names, as the core takes them.

Takes the parsed config and, by name, the shapes of the tensors at hand; gives the
core's configuration dict and the list of tensors to bind. One idea: whatever would make
the model compute something else than the core does is refused by its name here, before
any tensor is read: other architectures, RoPE kinds, activations, sliding windows, extra
biases or norms, quantised weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from acre.errors import ModelFileError
from acre.fields import INT32_MAX, Fields, short

MODEL_TYPES = ("llama", "qwen2")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
LAYERS_MAX = 4096
ACRE_KEYS = (
    "acre_window",
    "acre_stride",
    "l1_l2_ratio",
    "acre_param",
    "acre_sink_size",
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


# ------------------------------------------------------------------------ configuration


def config_from_hf(config: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """The core's configuration (all keys but dtype) from the content of a config.json.

    `where` names the source in errors. eos_id: the first of eos_token_id, -1 if absent.
    w_max: see `rope_from_hf`. ModelFileError names the key that is missing, malformed
    or asks for something that the core does not compute.
    """
    fields = Fields(config, where)
    _refuse_others(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", None)
    if head_dim is None:
        head_dim, rest = divmod(hidden, heads)
        if rest:
            raise fields.refuse("hidden_size", hidden, f"a multiple of {heads} heads")
    rope, w_max = rope_from_hf(fields)
    _refuse_sliding_window(fields, w_max)
    eos = fields.token_ids("eos_token_id")
    out = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden": hidden,
        "layers": fields.integer("num_hidden_layers", high=LAYERS_MAX),
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "ffn": fields.integer("intermediate_size"),
        "w_max": w_max,
        "rms_eps": fields.number("rms_norm_eps", 1e-6),
        "rope": rope,
        "tied_head": fields.flag("tie_word_embeddings"),
        "eos_id": eos[0] if eos else -1,
    }
    check_heads(out, where)
    return out


def check_heads(config: Mapping[str, Any], where: str) -> None:
    """ModelFileError unless the head counts and the head dimension fit each other."""
    if config["heads"] % config["kv_heads"]:
        raise ModelFileError(
            f"{where}: {config['heads']} query heads do not divide among "
            f"{config['kv_heads']} key/value heads"
        )
    if config["head_dim"] % 2:
        raise ModelFileError(f"{where}: head_dim {config['head_dim']} is odd")


def _refuse_others(fields: Fields) -> None:
    """Refuses models of other kinds and parts that the core lacks."""
    if fields.string("model_type") not in MODEL_TYPES:
        kinds = " or ".join(MODEL_TYPES)
        raise fields.refuse("model_type", fields.values["model_type"], kinds)
    if fields.string("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.refuse("hidden_act", fields.values["hidden_act"], "silu")
    if fields.flag("mlp_bias"):
        raise fields.refuse("mlp_bias", True, "false")
    quantised = fields.mapping("quantization_config")
    if quantised is not None:
        method = short(quantised.get("quant_method"))
        raise ModelFileError(
            f"{fields.where}: quantization_config: weights quantised by {method}, "
            "expected f32, f16 or bf16 weights (or a GGUF file)"
        )


def _refuse_sliding_window(fields: Fields, w_max: int) -> None:
    """Refuses a sliding window that is in use and shorter than the position range."""
    window = fields.integer("sliding_window", None, low=0)
    kinds = fields.get("layer_types")
    if isinstance(kinds, (list, tuple)):
        used = any(kind != "full_attention" for kind in kinds)
    else:
        layers = fields.integer("num_hidden_layers", high=LAYERS_MAX)
        first = fields.integer("max_window_layers", 28, low=0)
        used = fields.flag("use_sliding_window") and first < layers
    if used and (window is None or window < w_max):
        raise fields.refuse("sliding_window", window, "full attention in every layer")


def has_qkv_bias(config: Mapping[str, Any]) -> bool:
    """Whether a config.json asks for q, k and v biases."""
    return config.get("model_type") == "qwen2" or bool(config.get("attention_bias"))


def acre_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that ACRE checkpoints add to config.json, as they are; {} in others."""
    return {key: config[key] for key in ACRE_KEYS if key in config}


# --------------------------------------------------------------------------------- RoPE


def rope_from_hf(fields: Fields) -> tuple[dict[str, Any], int]:
    """(rope dict of the core, w_max) from either spelling of the scaling parameters.

    As transformers reads them: rope_scaling before rope_parameters, rope_type before
    type, rope_theta inside before outside. w_max is max_position_embeddings; yarn's
    extended range is factor times that where max_position_embeddings still states the
    length of pre-training.
    """
    positions = fields.integer("max_position_embeddings")
    scaling = fields.mapping("rope_scaling") or fields.mapping("rope_parameters")
    scaling = scaling or Fields({}, f"{fields.where}: rope_scaling")
    kind = scaling.string("rope_type", None) or scaling.string("type", "default")
    if kind not in ROPE_KINDS:
        raise scaling.refuse("rope_type", kind, "one of " + ", ".join(ROPE_KINDS))
    for part in (scaling, fields):
        if part.number("partial_rotary_factor", 1.0) != 1.0:
            value = part.get("partial_rotary_factor")
            raise part.refuse("partial_rotary_factor", value, "1")
    theta = scaling.number("rope_theta", None) or fields.number("rope_theta", 10000.0)
    rope: dict[str, Any] = {"kind": kind, "theta": theta}
    if kind == "default":
        return rope, positions
    if kind == "dynamic":
        rope["original_positions"] = positions
    elif kind in ("llama3", "yarn"):
        rope["original_positions"] = fields.integer(
            "original_max_position_embeddings", None
        ) or scaling.integer("original_max_position_embeddings", positions)
    rope["factor"] = _factor(scaling, positions, rope)
    if kind == "llama3":
        rope["low_freq_factor"] = scaling.number("low_freq_factor")
        rope["high_freq_factor"] = scaling.number("high_freq_factor")
    if kind != "yarn":
        return rope, positions
    rope |= _yarn(scaling, rope["factor"])
    if rope["original_positions"] == positions:
        positions = min(int(positions * rope["factor"]), INT32_MAX)
    return rope, positions


def _factor(scaling: Fields, positions: int, rope: Mapping[str, Any]) -> float:
    """The scaling factor, >= 1; yarn may leave it to the ratio of the two lengths."""
    default: Any = scaling.get("factor")
    if default is None and rope["kind"] == "yarn":
        return max(positions / rope["original_positions"], 1.0)
    factor = scaling.number("factor")
    if factor < 1.0:
        raise scaling.refuse("factor", factor, "at least 1")
    return factor


def _yarn(scaling: Fields, factor: float) -> dict[str, Any]:
    """yarn's own parameters. attention_factor 0 leaves it to the core."""
    attention = scaling.number("attention_factor", 0.0)
    mscale = scaling.number("mscale", 0.0, low=-1.0)
    all_dim = scaling.number("mscale_all_dim", 0.0, low=-1.0)
    if not attention and mscale and all_dim and factor > 1.0:
        log = 0.1 * math.log(factor)
        attention = (mscale * log + 1.0) / (all_dim * log + 1.0)
    return {
        "beta_fast": scaling.number("beta_fast", 32.0, low=-1.0) or 32.0,
        "beta_slow": scaling.number("beta_slow", 1.0, low=-1.0) or 1.0,
        "attention_factor": attention,
        "truncate": scaling.flag("truncate", True),
    }


# ------------------------------------------------------------------------------ tensors


@dataclass(frozen=True)
class Tensor:
    """A tensor that can be read: its place in words, its shape, and how to read it.

    read() gives (array, "f32" | "f16" | "bf16"), bf16 as uint16 bits.
    """

    where: str
    shape: tuple[int, ...]
    read: Callable[[], tuple[np.ndarray, str]]


def _shapes(config: Mapping[str, Any], bias: bool) -> Iterator[tuple[str, tuple]]:
    """Name and shape of every tensor that the base model needs."""
    hidden, ffn, vocab = config["hidden"], config["ffn"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("heads", "kv_heads"))
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    if not config["tied_head"]:
        yield "lm_head.weight", (vocab, hidden)
    for layer in range(config["layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,)
        yield at + "post_attention_layernorm.weight", (hidden,)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{part}_proj.weight", (rows, hidden)
            if bias:
                yield f"{at}self_attn.{part}_proj.bias", (rows,)
        yield at + "self_attn.o_proj.weight", (hidden, q)
        yield at + "mlp.gate_proj.weight", (ffn, hidden)
        yield at + "mlp.up_proj.weight", (ffn, hidden)
        yield at + "mlp.down_proj.weight", (hidden, ffn)


def _acre_shape(name: str, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shape of an L1 parameter of this model; None for any other name."""
    if name == "model.acre_embed_tokens.weight":
        return (1, config["hidden"])
    match = _LAYER.fullmatch(name)
    part = re.fullmatch(
        r"self_attn\.acre_([qkv])_proj\.(weight|bias)", match[2] if match else ""
    )
    if not match or not part or int(match[1]) >= config["layers"]:
        return None
    rows = config["heads" if part[1] == "q" else "kv_heads"] * config["head_dim"]
    return (rows, config["hidden"]) if part[2] == "weight" else (rows,)


def is_acre_name(name: str) -> bool:
    """Whether a tensor's name is that of an L1 parameter."""
    return name == "model.acre_embed_tokens.weight" or bool(
        re.fullmatch(
            r"model\.layers\.\d+\.self_attn\.acre_[qkv]_proj\.(weight|bias)", name
        )
    )


def select(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], bias: bool, where: str
) -> list[str]:
    """The names to bind, in the order of `tensors`.

    Checks that every tensor of the model is there with its shape, and that nothing else
    takes part in a layer: other tensors outside the layers and buffers (rotary
    inv_freq) are skipped, an o_proj bias only where it is all zero. ModelFileError.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in _shapes(config, bias):
        if name not in tensors:
            raise ModelFileError(f"{where}: tensor {name} is missing")
        wanted[name] = shape
    for name in tensors:
        shape = _acre_shape(name, config)
        if shape is not None:
            wanted[name] = shape
        elif name not in wanted:
            _refuse_extra(name, tensors[name], config)
    names = [name for name in tensors if name in wanted]
    for name in names:
        if tensors[name].shape != wanted[name]:
            raise ModelFileError(
                f"{tensors[name].where}: tensor {name} has shape "
                f"{list(tensors[name].shape)}, expected {list(wanted[name])}"
            )
    return names


def _refuse_extra(name: str, tensor: Tensor, config: Mapping[str, Any]) -> None:
    """Refuses a tensor that is not of the model but would change what it computes."""
    match = _LAYER.fullmatch(name)
    if not match or not name.endswith((".weight", ".bias")) or "rotary_emb" in name:
        return
    if match[2] == "self_attn.o_proj.bias" and tensor.shape == (config["hidden"],):
        array, _ = tensor.read()
        # bf16 comes as bits: a zero of either sign has no other bit set.
        bits = array & 0x7FFF if array.dtype.kind == "u" else array
        if not np.any(bits):
            return
    raise ModelFileError(
        f"{tensor.where}: tensor {name} is not part of a {'/'.join(MODEL_TYPES)} layer "
        f"(of {config['layers']}) that this library computes"
    )
