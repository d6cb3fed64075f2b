"""The tiny model with a toy tokenizer, as users meet them: files, arrays, a template.

Gives `model()` (acre.Model from arrays), `directory(path)` (a Hugging Face directory
of the same model) and texts. The tokenizer is byte-level BPE trained on a few words, so
that any text encodes and characters fall apart into several tokens.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCAB, EOS = 320, "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the quiet harbour kept its lanterns burning while grey gulls crossed "
    "seven stone bridges and a keeper wrote every arrival in his blue ledger"
).split()
BUILD: dict[str, Any] = {
    "interval": 8,
    "window": 64,
    "stride": 32,
    "eta": 64,
    "reserve": 320,
    "progress": False,
}


def sentence(rng: np.random.Generator | int, words: int) -> str:
    """`words` random words, the odd letter outside ASCII among them."""
    rng = np.random.default_rng(rng)
    out = [WORDS[i] for i in rng.integers(0, len(WORDS), words)]
    for i in range(3, words, 11):
        out[i] = ("caf\u00e9", "\u6e2f\u53e3", "\U0001f40b")[i % 3]
    return " ".join(out) + ".\n"


@functools.lru_cache
def tokenizer_json() -> str:
    """A tokenizer.json of VOCAB entries."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return tok.to_str()


def settings(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """The tiny configuration with the toy's vocabulary and room for its frame."""
    sizes = {"vocab_size": VOCAB, "w_max": 1024, "eos_id": 2}
    return tiny.config(family, **(sizes | changes))


def hf_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """The same as the content of a config.json."""
    c = settings(family, **changes)
    return {
        "model_type": family,
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden"],
        "num_hidden_layers": c["layers"],
        "num_attention_heads": c["heads"],
        "num_key_value_heads": c["kv_heads"],
        "head_dim": c["head_dim"],
        "intermediate_size": c["ffn"],
        "max_position_embeddings": c["w_max"],
        "rms_norm_eps": c["rms_eps"],
        "rope_theta": c["rope"]["theta"],
        "tie_word_embeddings": c["tied_head"],
        "eos_token_id": c["eos_id"],
    }


def arrays(
    family: str = "llama", rng: int = 0, trained: bool = False, **changes: Any
) -> dict[str, np.ndarray]:
    """Random tensors by Hugging Face name."""
    return tiny.tensors(rng, family, trained, settings(family, **changes))


def tokenizer() -> Any:
    """An acre.Tokenizer with a chat template."""
    import acre

    return acre.Tokenizer(
        tokenizer_json(),
        eos_ids=[2],
        chat_template=TEMPLATE,
        special_names={"eos_token": EOS},
    )


def model(
    family: str = "llama",
    *,
    rng: int = 0,
    trained: bool = False,
    words: bool = True,
    dtype: str = "f32",
    device: str = "cpu",
    **changes: Any,
) -> Any:
    """An acre.Model; words False leaves the tokenizer out."""
    import acre

    return acre.Model.from_arrays(
        hf_config(family, **changes),
        arrays(family, rng, trained, **changes),
        tokenizer() if words else None,
        dtype=dtype,
        device=device,
        threads=1,
    )


def adapter(family: str = "llama", rng: int = 5) -> dict[str, np.ndarray]:
    """Trained L1 parameters only."""
    every = arrays(family, rng, trained=True)
    return {name: array for name, array in every.items() if "acre_" in name}


def directory(path: Path, family: str = "llama", rng: int = 0) -> Path:
    """Writes a Hugging Face directory of the model; returns its path."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf_config(family)))
    (path / "tokenizer.json").write_text(tokenizer_json())
    words = {"eos_token": EOS, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(words))
    save_file(arrays(family, rng), path / "model.safetensors")
    return path
