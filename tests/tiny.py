"""A tiny random model for tests: every shape of the real ones, nothing of the size.

Gives `config` (the dict that `acre._core.Model` takes) and `tensors` (the float32
arrays by Hugging Face name that `Model.bind` takes). Two families: "llama" (no biases,
own output head) and "qwen2" (q/k/v biases, head tied to the embedding). All sizes
differ from each other where they may, so that a swapped axis fails instead of passing
by chance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = ("llama", "qwen2")


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """The model configuration; `changes` replace single keys (e.g. dtype="bf16")."""
    if family not in FAMILIES:
        raise ValueError(f"family: got {family!r}, expected one of {FAMILIES}")
    base: dict[str, Any] = {
        "vocab_size": 61,
        "hidden": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 48,
        "w_max": 256,
        "rms_eps": 1e-5,
        "rope": {"kind": "default", "theta": 10000.0},
        "tied_head": family == "qwen2",
        "dtype": "f32",
        "eos_id": 2,
    }
    return base | changes


def shapes(
    family: str = "llama",
    trained: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that the configuration asks for."""
    c = settings or config(family)
    hidden, ffn = c["hidden"], c["ffn"]
    rows = {
        "q": c["heads"] * c["head_dim"],
        "k": c["kv_heads"] * c["head_dim"],
        "v": c["kv_heads"] * c["head_dim"],
    }
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not c["tied_head"]:
        out["lm_head.weight"] = (c["vocab_size"], hidden)
    if trained:
        out["model.acre_embed_tokens.weight"] = (1, hidden)
    for i in range(c["layers"]):
        layer = f"model.layers.{i}."
        out[layer + "input_layernorm.weight"] = (hidden,)
        out[layer + "post_attention_layernorm.weight"] = (hidden,)
        for prefix in ("", "acre_") if trained else ("",):
            for letter, count in rows.items():
                name = f"{layer}self_attn.{prefix}{letter}_proj."
                out[name + "weight"] = (count, hidden)
                if family == "qwen2":
                    out[name + "bias"] = (count,)
        out[layer + "self_attn.o_proj.weight"] = (hidden, rows["q"])
        out[layer + "mlp.gate_proj.weight"] = (ffn, hidden)
        out[layer + "mlp.up_proj.weight"] = (ffn, hidden)
        out[layer + "mlp.down_proj.weight"] = (hidden, ffn)
    return out


def tensors(
    rng: np.random.Generator | int = 0,
    family: str = "llama",
    trained: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Random float32 tensors by Hugging Face name.

    Matrices have variance 1/inputs, embeddings 1, gains lie around 1: activations keep
    their size, so that attention and logits are neither flat nor saturated.
    """
    rng = np.random.default_rng(rng)
    out = {}
    for name, shape in shapes(family, trained, settings).items():
        values = rng.standard_normal(shape)
        if "norm" in name:
            values = 1.0 + 0.1 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif "embed_tokens" not in name:
            values = values / np.sqrt(shape[-1])
        out[name] = values.astype(np.float32)
    return out


def ids(rng: np.random.Generator | int, n: int, vocab_size: int = 61) -> np.ndarray:
    """n random token ids, int32 [n]."""
    rng = np.random.default_rng(rng)
    return rng.integers(0, vocab_size, n, dtype=np.int32)


def model(
    family: str = "llama",
    *,
    trained: bool = False,
    rng: np.random.Generator | int = 0,
    engine: Any = None,
    **changes: Any,
) -> Any:
    """A ready `acre._core.Model`; `changes` go to `config`."""
    from acre import _core

    settings = config(family, **changes)
    out = _core.Model(engine or _core.Engine(threads=1), settings)
    for name, array in tensors(rng, family, trained, settings).items():
        out.bind(name, array)
    out.ready()
    return out


# --------------------------------------------------------------- a cache and its file

N = 103
OPTIONS = {"interval": 4, "window": 32, "stride": 16, "eta": 16, "reserve": 32}
PARTS = ("l1_keys", "l1_values", "l2_keys", "l2_values", "recent_keys", "recent_values")


def finish(builder: Any) -> Any:
    """Runs a `_core.Builder` to its end; gives its Cache."""
    done, total = 0, 1
    while done < total:
        done, total = builder.step()
    return builder.freeze()


def build(model: Any, n: int = N, **options: Any) -> Any:
    """The Cache of ids(1, n) under OPTIONS, changed by `options`."""
    from acre import _core

    return finish(_core.Builder(model, ids(1, n), **(OPTIONS | options)))


def answer(model: Any, cache: Any = None) -> np.ndarray:
    """Logits float32 [5, vocab_size] of a fixed question."""
    from acre import _core

    session = _core.Session(model, cache, capacity=8)
    return session.prefill(ids(2, 5), logits=True)


def save(cache: Any, path: Path) -> dict[str, tuple[int, int]]:
    """Writes the tensors of a Cache as `_core.Cache.restore` maps them; its blocks."""
    blocks = {}
    with path.open("wb") as file:
        for part in PARTS:
            start = file.tell()
            for layer in range(cache.model.config["layers"]):
                for page in range(cache.pages if part.startswith("l2") else 1):
                    file.write(np.asarray(cache.view(part, layer, page)[0]).tobytes())
            blocks[part] = (start, file.tell() - start)
            file.write(b"\0" * (-file.tell() % 64))
    return blocks


def resolved(cache: Any) -> dict[str, Any]:
    """The options for `_core.Cache.restore` of a saved Cache."""
    keys = "interval window stride carry eta reserve weight sink".split()
    return {key: cache.plan[key] for key in keys} | {"proxy": cache.proxy}
