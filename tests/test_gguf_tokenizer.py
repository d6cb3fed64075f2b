"""Tokenizers from GGUF metadata.

Oracles: the tokenizer that the metadata was made from; SentencePiece's definition
written out; hand-made splits; for SmolLM2's file transformers' conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from model_files import DIGITS, END, SAMPLES, byte_level, smollm2
from tokenizers import pre_tokenizers

from acre import gguf_tokenizer
from acre.errors import ModelFileError
from acre.fields import Fields
from acre.gguf_file import GgufFile
from acre.tokenizer import Tokenizer


def gguf_fields(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    """The metadata of the byte-level tokenizer, as a converter would write it."""
    model = json.loads(byte_level().to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*words, "<think>"],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(words) - 3) + [4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


def test_gguf_equals_the_tokenizer_it_came_from() -> None:
    tok, raw = Tokenizer.from_gguf_metadata(gguf_fields("gpt-2")), byte_level()
    assert tok.eos_ids == (2, 0) and tok.bos_id == 1 and not tok.adds_bos
    assert tok.vocab_size == raw.get_vocab_size()
    for text in SAMPLES + DIGITS:
        assert tok.encode(text).tolist() == raw.encode(text).ids
        assert tok.decode(tok.encode(text)) == text
    assert END not in tok.decode(tok.encode("x"), skip_special=False)
    assert tok.encode(END, special=True).tolist() == [2]
    assert len(tok.encode("<think>")) == 1


def pieces(family: str, text: str) -> list[str]:
    """The pre-tokens of a text, as text."""
    splits = gguf_tokenizer._pre_tokenizer(family).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in splits]


def test_pre_tokenizers() -> None:
    """By hand, from the published regular expressions."""
    text = "I'll pay 1234 now\n\n  x"
    assert pieces("gpt2", text) == [
        *("I", "'ll", " pay", " 1234", " now"),
        *("\n\n ", " x"),
    ]
    assert pieces("smollm", text) == [
        *("I", "'ll", " pay", " ", "1", "2", "3", "4", " now"),
        *("\n\n ", " x"),
    ]
    assert pieces("qwen2", text) == [
        *("I", "'ll", " pay", " ", "1", "2", "3", "4", " now"),
        *("\n\n", " ", " x"),
    ]
    assert pieces("llama3", text) == [
        *("I", "'ll", " pay", " ", "123", "4", " now"),
        *("\n\n", " ", " x"),
    ]
    assert pieces("qwen2", "DON'T x!!\n\ny") == ["DON", "'T", " x", "!!\n\n", "y"]
    assert pieces("gpt2", "DON'T") == ["DON", "'", "T"]


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])
def test_splits_as_transformers_has_them(name: str) -> None:
    pytest.importorskip("transformers")
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:
        pytest.skip("this release of transformers keeps them elsewhere")
    split = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS[name]
    digits = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}[name]
    assert gguf_tokenizer._split(digits) == split


def test_families_differ_where_they_should() -> None:
    qwen = Tokenizer.from_gguf_metadata(gguf_fields("qwen2"))
    composed, combining = "caf\u00e9", "cafe\u0301"
    assert qwen.encode(composed).tolist() == qwen.encode(combining).tolist()
    llama = Tokenizer.from_gguf_metadata(gguf_fields("llama-bpe"))
    assert llama.adds_bos and llama.encode("x", special=True)[0] == 1
    assert llama.encode(composed).tolist() != llama.encode(combining).tolist()


def test_gguf_bos_flag_and_template() -> None:
    fields = gguf_fields(
        **{
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_template": "t",
            "tokenizer.ggml.eot_token_id": 0,
        }
    )
    tok = Tokenizer.from_gguf_metadata(fields)
    assert tok.adds_bos and tok.chat_template == "t" and tok.eos_ids == (2, 0)
    assert tok.special_names["bos_token"] == "<|im_start|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "model is 'bert', expected gpt2 or llama"),
        ({"tokenizer.ggml.model": None}, "model is missing"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre is 'tekken'"),
        ({"tokenizer.ggml.tokens": []}, "tokens"),
        ({"tokenizer.ggml.tokens": [1]}, "list of strings"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type is '1 values'"),
        ({"tokenizer.ggml.merges": ["no such"]}, "'no such' does not join"),
        ({"tokenizer.ggml.merges": None}, "merges is missing"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token"),
        ({"tokenizer.chat_template": 1}, "chat_template"),
    ],
)
def test_refused_gguf_metadata(changes: dict, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_gguf_metadata(gguf_fields(**changes))


# ------------------------------------------------------------------------ SentencePiece


def sentencepiece_fields(**changes: Any) -> dict[str, Any]:
    """A small SentencePiece vocabulary with byte pieces: </s> could be merged from its
    characters, which must not happen."""
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    normal = [
        "▁t",
        "he",
        "▁the",
        "in",
        "er",
        "▁b",
        "▁boat",
        "oa",
        "oat",
        "▁▁",
        "</",
        "s>",
    ]
    normal += ["▁", *"abcdefghijklmnopqrstuvwxyzT</>é.,"]
    scores = [0.0] * len(words) + [-float(i) for i in range(len(normal))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(normal)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words + normal,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **changes,
    }


def greedy(text: str, fields: dict[str, Any]) -> list[str]:
    """SentencePiece BPE by its definition: the pair that makes the best piece first,
    leftmost among equals."""
    normal = {
        token: score
        for token, score, kind in zip(
            fields["tokenizer.ggml.tokens"],
            fields["tokenizer.ggml.scores"],
            fields["tokenizer.ggml.token_type"],
            strict=True,
        )
        if kind == 1
    }
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        known = [(-normal[p], i) for i, p in enumerate(pairs) if p in normal]
        if not known:
            break
        i = min(known)[1]
        parts[i : i + 2] = [pairs[i]]
    out: list[str] = []
    for part in parts:
        bytes_of = [f"<0x{byte:02X}>" for byte in part.encode()]
        out += [part] if part in normal else bytes_of
    return out


@pytest.mark.parametrize(
    "text",
    [
        "the boat",
        "the  boats, in there",
        " é 東京 x",
        "The\nend",
        "a</s>b",
        "<s>",
        "tthe",
    ],
)
def test_sentencepiece(text: str) -> None:
    fields = sentencepiece_fields()
    tok = Tokenizer.from_gguf_metadata(fields)
    names = fields["tokenizer.ggml.tokens"]
    ids, offsets = tok.encode_offsets(text)
    assert [names[i] for i in ids] == greedy(text, fields)
    assert tok.decode(ids) == text
    assert not set(ids.tolist()) & {0, 1, 2}
    assert offsets[0, 0] == 0 and offsets[-1, 1] == len(text)
    assert (offsets[1:, 0] <= offsets[:-1, 1]).all()


def test_sentencepiece_settings() -> None:
    tok = Tokenizer.from_gguf_metadata(sentencepiece_fields())
    assert tok.adds_bos and tok.space_prefix and tok.eos_ids == (2,)
    assert tok.encode("a</s>", special=True)[[0, -1]].tolist() == [1, 2]
    fields = sentencepiece_fields(**{"tokenizer.ggml.add_space_prefix": False})
    plain = Tokenizer.from_gguf_metadata(fields)
    assert not plain.space_prefix
    assert plain.decode(plain.encode(" the boat")) == " the boat"
    with pytest.raises(ModelFileError, match="scores is missing"):
        Tokenizer.from_gguf_metadata(
            sentencepiece_fields(**{"tokenizer.ggml.scores": None})
        )


def test_options_take_any_damaged_metadata() -> None:
    rng = np.random.default_rng(1)
    wrong = [None, 0, -1, 1.5, "x", [], ["x"], [0], [None], {}, True, 2**40, [[1]]]
    for fields in (gguf_fields(), sentencepiece_fields()):
        for key in fields:
            for value in wrong:
                try:
                    gguf_tokenizer.options(Fields({**fields, key: value}, "file"))
                except ModelFileError as error:
                    assert "file" in str(error)
        for _ in range(50):
            key = str(rng.choice(list(fields)))
            value = fields[key]
            if isinstance(value, list):
                value = list(value)
                value[int(rng.integers(len(value)))] = wrong[
                    int(rng.integers(len(wrong)))
                ]
            try:
                gguf_tokenizer.options(Fields({**fields, key: value}, "file"))
            except ModelFileError as error:
                assert "file" in str(error)


# ------------------------------------------------------------------------------ SmolLM2


@pytest.fixture(scope="module")
def real() -> tuple[Tokenizer, Path]:
    path = smollm2()
    return Tokenizer.from_gguf_metadata(GgufFile(path).fields, str(path)), path


def test_smollm2(real: tuple[Tokenizer, Path]) -> None:
    tok, _ = real
    assert tok.vocab_size == 49152 and tok.eos_ids == (2, 0) and tok.bos_id == 1
    assert not tok.adds_bos and "<|im_start|>" in (tok.chat_template or "")
    assert len(tok.encode("1234")) == 4
    assert not set(tok.encode(f"x{END}<|im_start|>").tolist()) & {0, 1, 2}
    for text in SAMPLES + DIGITS:
        ids, offsets = tok.encode_offsets(text)
        assert tok.decode(ids) == text
        assert not text or offsets[-1, 1] == len(text)


@pytest.mark.slow
def test_smollm2_equals_transformers(real: tuple[Tokenizer, Path]) -> None:
    """On 700 kB of text and the samples. transformers' loader does not split digits, as
    the model's own tokenizer does; given that split, it must agree on everything."""
    tok, path = real
    transformers = pytest.importorskip("transformers")
    import pydoc_data.topics as topics

    theirs = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )
    plain = [text for text in SAMPLES if not any(map(str.isnumeric, text))]
    for text in plain:
        assert tok.encode(text).tolist() == theirs(text)["input_ids"], text
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), behavior="isolated"),
            backend.pre_tokenizer,
        ]
    )
    for text in [*SAMPLES, *DIGITS, "\n".join(topics.topics.values())]:
        own = tok.encode(text).tolist()
        assert own == backend.encode(text, add_special_tokens=False).ids
        assert tok.decode(own) == text
