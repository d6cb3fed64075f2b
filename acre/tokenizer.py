"""Text to token ids and back, over the `tokenizers` package.

Takes a tokenizer.json directory, the metadata of a GGUF file or a tokenizer object;
gives int32 ids, character offsets and text. One idea: text is not trusted. A document
that spells out a control token such as <|im_end|> is encoded as the characters it is
made of; only `special=True`, meant for templates and raw prompts, recognises control
tokens. The two ways are two tokenizer objects, so that threads never see a switch half
thrown. Refuses anything but str, and text that is not valid Unicode.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from acre.errors import ModelFileError
from acre.fields import Fields, parse_json, read_json, read_text, short

# Control tokens that end a turn or a text, by name.
NAMED_EOS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
CONFIG = "tokenizer_config.json"


def check_text(text: Any) -> str:
    """`text` itself. TypeError unless a str; ValueError for a lone surrogate, naming
    its position."""
    if not isinstance(text, str):
        raise TypeError(f"text: got {type(text).__name__}, expected str")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text: character {error.start} is a lone surrogate "
                f"({text[error.start]!r}), no valid Unicode text"
            ) from None
    return text


def _parse(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises plain Exception
        raise ModelFileError(f"{where}: not a usable tokenizer ({error})") from None


class Tokenizer:
    """Immutable; may be used from several threads at once.

    eos_ids: ids that end an answer, the model's own first. bos_id: the beginning of
    text, or None; adds_bos: whether the tokenizer puts it before a text. chat_template:
    Jinja source, or None. vocab_size: ids the tokenizer knows, added tokens included
    (the model's embedding may have more rows). special_names: bos_token, eos_token, ...
    as text, for templates. fingerprint: sha256 of the tokenizer's JSON.
    """

    def __init__(
        self,
        json_text: str,
        *,
        where: str = "tokenizer",
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        adds_bos: bool | None = None,
        chat_template: str | None = None,
        special_names: Mapping[str, str] | None = None,
    ) -> None:
        """json_text: the content of a tokenizer.json. adds_bos None: as the JSON's
        post-processor does. ModelFileError when the JSON is unusable."""
        self._json = json_text
        self._where = where
        text = _parse(json_text, where)
        adds = text.num_special_tokens_to_add(False)
        first = text.encode("", add_special_tokens=True).ids[:1] if adds else []
        self.vocab_size: int = text.get_vocab_size(with_added_tokens=True)
        self.fingerprint: str = hashlib.sha256(json_text.encode("utf-8")).hexdigest()
        self.chat_template = chat_template
        self.special_names: dict[str, str] = dict(special_names or {})
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        if bos_id is None and first and first[0] not in self.eos_ids:
            bos_id = first[0]
        self.bos_id = bos_id
        if adds_bos is None:
            adds_bos = first == [bos_id]
        self.adds_bos: bool = adds_bos and bos_id is not None
        self._prepare(text)
        text.encode_special_tokens = True
        self._text = text
        self._trusted: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()
        probe = text.encode("a", add_special_tokens=False).tokens
        self.space_prefix: bool = bool(probe) and probe[0].startswith("\u2581")

    def _prepare(self, tok: tokenizers.Tokenizer) -> None:
        """Settings that a file may carry but that a long text must not meet."""
        tok.no_truncation()
        tok.no_padding()
        # BOS is ours to add, and its trimming would open gaps between the offsets.
        tok.post_processor = None
        ends = (*self.eos_ids, *([] if self.bos_id is None else [self.bos_id]))
        known = tok.get_added_tokens_decoder()
        plain = [known[i] for i in ends if i in known and not known[i].special]
        for token in plain:
            token.special = True
        if plain:
            tok.add_special_tokens(plain)

    def __repr__(self) -> str:
        return f"acre.Tokenizer(vocab_size={self.vocab_size}, eos_ids={self.eos_ids})"

    # -------------------------------------------------------------------------- origins

    @classmethod
    def from_hf_dir(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From tokenizer.json and, where present, tokenizer_config.json,
        special_tokens_map.json, chat_template.jinja, generation_config.json and
        config.json. FileNotFoundError, ModelFileError."""
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        text = read_text(file)
        parse_json(text, str(file))
        config = _optional_json(path / CONFIG)
        named = _special_names(config, _optional_json(path / "special_tokens_map.json"))
        vocab = _parse(text, str(file))
        ids = {key: vocab.token_to_id(name) for key, name in named.items()}
        eos: list[int] = []
        for name in ("config.json", "generation_config.json"):
            more = _optional_json(path / name).token_ids("eos_token_id")
            eos = [*eos, *more]
        if ids.get("eos_token") is not None:
            eos.append(ids["eos_token"])
        adds = config.get("add_bos_token")
        return cls(
            text,
            where=str(file),
            eos_ids=eos,
            bos_id=ids.get("bos_token"),
            adds_bos=adds if isinstance(adds, bool) else None,
            chat_template=_chat_template(path, config),
            special_names=named,
        )

    @classmethod
    def from_gguf_metadata(
        cls, fields: Mapping[str, Any], where: str = "GGUF metadata"
    ) -> Tokenizer:
        """From the metadata of a GGUF file, as plain Python values by key.

        Models "gpt2" (byte-level BPE) and "llama" (SentencePiece BPE). ModelFileError
        for others, and for a pre-tokenizer that is not known.
        """
        from acre import gguf_tokenizer

        return cls(where=where, **gguf_tokenizer.options(Fields(fields, where)))

    @classmethod
    def wrap(
        cls,
        obj: Any,
        eos_ids: Iterable[int] | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """From a `tokenizers.Tokenizer`, a fast transformers tokenizer or a Tokenizer.

        The object is copied, never changed. eos_ids, chat_template: override what it
        says. TypeError for other objects, slow transformers tokenizers among them.
        """
        if isinstance(obj, Tokenizer):
            return obj
        backend = getattr(obj, "backend_tokenizer", obj)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise TypeError(
                f"tokenizer: got {type(obj).__name__}, expected an acre.Tokenizer, a "
                "tokenizers.Tokenizer or a fast transformers tokenizer"
            )
        named = {
            key: str(value)
            for key in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (value := getattr(obj, key, None)) is not None
        }
        if eos_ids is None:
            eos = getattr(obj, "eos_token_id", None)
            eos_ids = _named_eos(backend) if eos is None else [int(eos)]
        if chat_template is None:
            chat_template = _pick_template(
                getattr(obj, "chat_template", None), "tokenizer"
            )
        bos = getattr(obj, "bos_token_id", None)
        return cls(
            backend.to_str(),
            eos_ids=eos_ids,
            bos_id=bos if isinstance(bos, int) else None,
            chat_template=chat_template,
            special_names=named,
        )

    # --------------------------------------------------------------------------- coding

    def encode(
        self, text: str, special: bool = False, bos: bool | None = None
    ) -> np.ndarray:
        """Token ids, int32 [n].

        special False: control tokens spelled in the text are plain characters. True:
        they become the control tokens, and the text begins as the tokenizer begins
        texts (BOS where it adds one and the text does not have it). bos: says the
        latter by itself. Added tokens that are not special (such as <think>) are
        recognised either way. TypeError, ValueError: see `check_text`.
        """
        check_text(text)
        tok = self._trusted_tokenizer() if special else self._text
        ids = tok.encode(text, add_special_tokens=False).ids
        begin = special if bos is None else bos
        if begin and self.adds_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return np.array(ids, dtype=np.int32)

    def encode_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], offsets int64 [n, 2]) of untrusted text, without BOS.

        offsets: half-open character ranges that cover `text`: the first begins at 0,
        the last ends with it, each begins no later than the one before ends. Tokens
        that split a character into bytes each have the whole character as their range:
        such ranges overlap. TypeError, ValueError: see `check_text`.
        """
        coding = self._text.encode(check_text(text), add_special_tokens=False)
        offsets = np.array(coding.offsets, dtype=np.int64).reshape(-1, 2)
        if len(offsets):
            # A normaliser may drop or join characters: they go with the token before.
            offsets[0, 0], offsets[-1, 1] = 0, len(text)
            np.maximum(offsets[:-1, 1], offsets[1:, 0], out=offsets[:-1, 1])
        return np.array(coding.ids, dtype=np.int32), offsets

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Text of token ids; ids beyond the vocabulary give nothing, bytes that are no
        UTF-8 give U+FFFD. TypeError for no integers, ValueError for negative ones."""
        array = np.asarray(ids)
        if array.size == 0:
            return ""
        if array.dtype.kind not in "iu":
            raise TypeError(f"ids: got {array.dtype}, expected integers")
        if array.ndim != 1:
            raise ValueError(f"ids: got shape {array.shape}, expected one dimension")
        if array.min() < 0:
            raise ValueError(f"ids: got {array.min()}, expected no negative id")
        known = array[array < self.vocab_size]
        return self._text.decode(known.tolist(), skip_special_tokens=skip_special)

    def _trusted_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that recognises control tokens; made at first use."""
        with self._lock:
            if self._trusted is None:
                trusted = _parse(self._json, self._where)
                self._prepare(trusted)
                self._trusted = trusted
            return self._trusted


# ----------------------------------------------------------------- parts of a directory


def _optional_json(path: Path) -> Fields:
    return Fields(read_json(path) if path.is_file() else {}, str(path))


def _special_names(config: Fields, special_map: Fields) -> dict[str, str]:
    """bos_token, eos_token, ...: plain strings, or objects with "content"."""
    out: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        source = config if config.get(key) is not None else special_map
        value = source.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise source.refuse(key, value, "a token as text")
        out[key] = value
    return out


def _chat_template(path: Path, config: Fields) -> str | None:
    """chat_template.jinja before tokenizer_config.json, as transformers reads them."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    return _pick_template(config.get("chat_template"), config.where)


def _pick_template(value: Any, where: str) -> str | None:
    """One template of: text, a list of {name, template}, or a dict by name."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if isinstance(value, Mapping) and value:
        chosen = value.get("default", next(iter(value.values())))
        if isinstance(chosen, str) and ("default" in value or len(value) == 1):
            return chosen
    raise ModelFileError(
        f"{where}: chat_template is {short(value)}, expected text or named templates "
        "with one named default"
    )


def _named_eos(tok: tokenizers.Tokenizer) -> list[int]:
    """Ends of text that are known by their names, among the special tokens."""
    added = tok.get_added_tokens_decoder().items()
    special = {token.content: i for i, token in added if token.special}
    return [special[name] for name in NAMED_EOS if name in special]
