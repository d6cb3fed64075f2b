"""A tokenizer from the metadata of a GGUF file.

Takes the tokenizer.* keys; gives the arguments of `Tokenizer`. One idea: a GGUF file
has the vocabulary and merges but names the pre-tokenizer only, so the splits of the
known names are written out here, as the models' own tokenizer.json files have them.
Refuses other models than "gpt2" and "llama" and pre-tokenizers it does not know: text
split the wrong way gives tokens that the model never saw.
"""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from acre.errors import ModelFileError
from acre.fields import NEEDED, Fields, short
from acre.tokenizer import NAMED_EOS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
# Ends of turn that some files name beside eos_token_id.
EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def _split(digits: str) -> str:
    """The split of the Llama 3 and Qwen2 families; they differ in the run of digits."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?"
        r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# tokenizer.ggml.pre -> family; absent and "default" are read as gpt-2.
PRE = {
    **dict.fromkeys(("default", "gpt-2"), "gpt2"),
    "smollm": "smollm",
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), "qwen2"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), "llama3"),
}


def options(meta: Fields) -> dict[str, Any]:
    """The arguments of `Tokenizer`. ModelFileError."""
    model = meta.string("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise meta.refuse("tokenizer.ggml.model", model, "gpt2 or llama")
    tokens = _strings(meta, "tokenizer.ggml.tokens")
    kinds = _numbers(meta, "tokenizer.ggml.token_type", len(tokens), NORMAL)
    try:
        if model == "gpt2":
            tok = _byte_level(meta, tokens)
        else:
            tok = _sentencepiece(meta, tokens, kinds)
        _add_tokens(tok, tokens, kinds)
    except ModelFileError:
        raise
    except Exception as error:  # the package raises plain Exception
        raise ModelFileError(
            f"{meta.where}: tokenizer.ggml: not a usable tokenizer ({error})"
        ) from None
    named = _named(meta, tokens)
    return {
        "json_text": tok.to_str(),
        "eos_ids": _eos_ids(meta, tokens, kinds),
        "bos_id": meta.integer(
            "tokenizer.ggml.bos_token_id", None, low=0, high=len(tokens) - 1
        ),
        "adds_bos": meta.flag(
            "tokenizer.ggml.add_bos_token", _bos_default(meta, model)
        ),
        "chat_template": meta.string("tokenizer.chat_template", None),
        "special_names": named,
    }


def _bos_default(meta: Fields, model: str) -> bool:
    """Files without the flag: SentencePiece models and Llama 3 begin with BOS."""
    return model == "llama" or PRE.get(meta.get("tokenizer.ggml.pre")) == "llama3"


def _strings(meta: Fields, key: str) -> list[str]:
    value = meta.get(key, NEEDED)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise meta.refuse(key, value, "a list of strings")
    if not value:
        raise meta.refuse(key, value, "at least one")
    return value


def _numbers(meta: Fields, key: str, count: int, default: float | None) -> list[Any]:
    """A list of `count` numbers; where absent, all default (None: refused)."""
    value = meta.get(key, NEEDED if default is None else [default] * count)
    if not isinstance(value, list) or len(value) != count:
        size = f"{len(value)} values" if isinstance(value, list) else value
        raise meta.refuse(key, size, f"{count} numbers")
    if not all(type(item) in (int, float) and item == item for item in value):
        raise meta.refuse(key, "no list of numbers", f"{count} numbers")
    return value


def _named(meta: Fields, tokens: list[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for name, key in NAMES.items():
        key = f"tokenizer.ggml.{key}"
        token = meta.integer(key, None, low=0, high=len(tokens) - 1)
        if token is not None:
            out[name] = tokens[token]
    return out


def _eos_ids(meta: Fields, tokens: list[str], kinds: list[int]) -> list[int]:
    """The file's own, then control tokens that are known by name to end a text."""
    out: list[int] = []
    for key in EOS_KEYS:
        key = f"tokenizer.ggml.{key}"
        token = meta.integer(key, None, low=0, high=len(tokens) - 1)
        if token is not None:
            out.append(token)
    control = {t: i for i, t in enumerate(tokens) if kinds[i] == CONTROL}
    out += [control[name] for name in NAMED_EOS if name in control]
    return list(dict.fromkeys(out))


# --------------------------------------------------------------------------- byte level


def _byte_level(meta: Fields, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE with the pre-tokenizer that the file names."""
    pre = meta.string("tokenizer.ggml.pre", "default")
    if pre not in PRE:
        raise meta.refuse("tokenizer.ggml.pre", pre, "one of " + ", ".join(sorted(PRE)))
    family = PRE[pre]
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocab.setdefault(token, i)
    merges = []
    for merge in _strings(meta, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelFileError(
                f"{meta.where}: tokenizer.ggml.merges: {short(merge)} does not join "
                "two tokens to a third"
            )
        merges.append((left, right))
    # Llama 3's vocabulary has words that no chain of its merges leads to.
    tok = Tokenizer(models.BPE(vocab, merges, ignore_merges=family == "llama3"))
    if family == "qwen2":
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = _pre_tokenizer(family)
    tok.decoder = decoders.ByteLevel()
    return tok


def _pre_tokenizer(family: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if family == "gpt2":
        return gpt2
    if family == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, gpt2])
    split = Regex(_split(r"\p{N}" if family == "qwen2" else r"\p{N}{1,3}"))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# ------------------------------------------------------------------------ SentencePiece


def _sentencepiece(meta: Fields, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """SentencePiece BPE: a score per piece says which merges come first."""
    scores = _numbers(meta, "tokenizer.ggml.scores", len(tokens), None)
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocab.setdefault(token, i)
    normal = {t: i for t, i in vocab.items() if kinds[i] == NORMAL}
    unknown = [t for t, i in vocab.items() if kinds[i] == UNKNOWN]
    bytes_known = sum(kind == BYTE for kind in kinds) == 256
    tok = Tokenizer(
        models.BPE(
            vocab,
            _merges(normal, scores),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bytes_known,
        )
    )
    prefix = meta.flag("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tok.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence(
        [*back, decoders.Strip(" ", 1, 0)] if prefix else back
    )
    return tok


def _merges(normal: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, best third first.

    Control tokens take no part: no text may be merged into one.
    """
    found = []
    for piece, token in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                found.append((-scores[token], normal[left], normal[right], left, right))
    found.sort(key=lambda item: item[:3])
    return [(left, right) for *_, left, right in found]


def _add_tokens(tok: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Control tokens as special, user-defined ones as plain added tokens."""
    size = tok.get_vocab_size(with_added_tokens=False)
    for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        chosen = [
            AddedToken(token, normalized=False, special=special)
            for token, own in zip(tokens, kinds, strict=True)
            if own == kind and token
        ]
        if special:
            tok.add_special_tokens(chosen)
        else:
            tok.add_tokens(chosen)
    if tok.get_vocab_size(with_added_tokens=True) != size:
        raise ModelFileError("tokenizer.ggml.tokens: added tokens outside the list")
