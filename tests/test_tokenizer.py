"""Tokenizers from directories and objects.

Oracles: the `tokenizers` package itself. The rule that matters most: text never becomes
a control token.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from model_files import DIGITS, END, SAMPLES, byte_level
from tokenizers import AddedToken, normalizers, processors

from acre.errors import ModelFileError
from acre.tokenizer import Tokenizer


def write_directory(path: Path, tok: tokenizers.Tokenizer, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    tok.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.wrap(byte_level())


# ------------------------------------------------------------------------------- coding


@pytest.mark.parametrize("text", SAMPLES + DIGITS)
def test_round_trip_and_offsets(tok: Tokenizer, text: str) -> None:
    ids, offsets = tok.encode_offsets(text)
    assert ids.dtype == np.int32 and offsets.dtype == np.int64
    assert offsets.shape == (len(ids), 2)
    assert np.array_equal(ids, tok.encode(text))
    assert tok.decode(ids) == text
    if not text:
        return
    assert offsets[0, 0] == 0 and offsets[-1, 1] == len(text)
    assert (offsets[:, 0] < offsets[:, 1]).all()
    assert (offsets[1:, 0] <= offsets[:-1, 1]).all(), "no character lies in a gap"
    assert (np.diff(offsets, axis=0) >= 0).all()


def test_offsets_point_at_the_token(tok: Tokenizer) -> None:
    text = "The river ran"
    ids, offsets = tok.encode_offsets(text)
    for token, (start, end) in zip(ids, offsets, strict=True):
        assert tok.decode([token]) == text[start:end]


def test_offsets_of_split_characters_overlap(tok: Tokenizer) -> None:
    ids, offsets = tok.encode_offsets("a🎉b")
    assert len(ids) == 6
    assert offsets.tolist() == [[0, 1], [1, 2], [1, 2], [1, 2], [1, 2], [2, 3]]


def test_normalizing_tokenizers_leave_no_gaps() -> None:
    raw = byte_level()
    raw.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFC()])
    tok = Tokenizer.wrap(raw)
    text = "  cafe\u0301 and cafe\u0301 "
    _, offsets = tok.encode_offsets(text)
    assert offsets[0, 0] == 0 and offsets[-1, 1] == len(text)
    assert (offsets[1:, 0] <= offsets[:-1, 1]).all()
    assert any(text[start:end].endswith("e\u0301") for start, end in offsets)
    assert Tokenizer.wrap(raw).encode_offsets("  ")[1].shape == (0, 2)


def test_text_never_becomes_a_control_token(tok: Tokenizer) -> None:
    end = tok.encode(END, special=True)
    assert end.shape == (1,) and end[0] in tok.eos_ids
    for text in (END, f"a{END}b", f" {END}\n<|im_start|>system", "<|endoftext|>"):
        ids, _ = tok.encode_offsets(text)
        assert not set(ids.tolist()) & {0, 1, 2}
        assert not set(tok.encode(text).tolist()) & {0, 1, 2}
        assert tok.decode(ids) == text
        assert set(tok.encode(text, special=True).tolist()) & {0, 1, 2}


def test_plain_added_tokens_are_recognised(tok: Tokenizer) -> None:
    assert len(tok.encode("<think>")) == 1


def test_end_of_text_that_is_not_marked_special(tmp_path: Path) -> None:
    """Some files add the end of turn as a plain token: text must not spell it."""
    raw = byte_level()
    raw.add_tokens([AddedToken("<|eot_id|>", normalized=False, special=False)])
    path = write_directory(tmp_path / "t", raw, eos_token="<|eot_id|>")
    tok = Tokenizer.from_hf_dir(path)
    eos = raw.token_to_id("<|eot_id|>")
    assert tok.eos_ids == (eos,)
    assert eos not in tok.encode("x<|eot_id|>y")
    assert eos in tok.encode("x<|eot_id|>y", special=True)


def test_refused_texts(tok: Tokenizer) -> None:
    for wrong in (b"bytes", None, 3, ["a"]):
        for call in (tok.encode, tok.encode_offsets):
            with pytest.raises(TypeError, match="expected str"):
                call(wrong)  # type: ignore[arg-type]
    for text, place in (("\ud800", 0), ("ab\udfffc", 2), ("é" * 5 + "\ud83d", 5)):
        for call in (tok.encode, tok.encode_offsets):
            with pytest.raises(ValueError, match=f"character {place} is a lone"):
                call(text)


def test_decode(tok: Tokenizer) -> None:
    assert tok.decode([]) == ""
    assert tok.decode(np.array([], dtype=np.int64)) == ""
    ids = tok.encode(f"x{END}", special=True)
    assert tok.decode(ids) == "x"
    assert tok.decode(ids, skip_special=False) == f"x{END}"
    assert tok.decode([10**9, *tok.encode("x")]) == "x"
    with pytest.raises(ValueError, match="got -1"):
        tok.decode([-1])
    with pytest.raises(TypeError, match="expected integers"):
        tok.decode([0.5])
    with pytest.raises(ValueError, match="one dimension"):
        tok.decode(np.zeros((2, 2), np.int32))
    assert "\ufffd" in tok.decode(tok.encode("🎉")[:2])


def test_threads_agree(tok: Tokenizer) -> None:
    """The trusted and the untrusted way at once, from several threads."""
    fresh = Tokenizer.wrap(byte_level())
    text = f"The river {END} ran"
    expected = {
        special: tok.encode(text, special).tolist() for special in (True, False)
    }
    wrong: list[bool] = []

    def work(special: bool) -> None:
        for _ in range(200):
            if fresh.encode(text, special).tolist() != expected[special]:
                wrong.append(special)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------------------ origins


def test_directory(tmp_path: Path) -> None:
    raw = byte_level()
    path = write_directory(
        tmp_path / "t",
        raw,
        bos_token={"content": "<|im_start|>"},
        eos_token=END,
        add_bos_token=True,
        chat_template="{{ messages }}",
    )
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (path / "config.json").write_text('{"eos_token_id": 2}')
    tok = Tokenizer.from_hf_dir(path)
    assert tok.eos_ids == (2, 0) and tok.bos_id == 1 and tok.adds_bos
    assert tok.chat_template == "{{ messages }}"
    assert tok.special_names == {"bos_token": "<|im_start|>", "eos_token": END}
    assert tok.vocab_size == raw.get_vocab_size()
    for text in SAMPLES:
        assert tok.encode(text).tolist() == raw.encode(text).ids
    assert tok.fingerprint == Tokenizer.from_hf_dir(path).fingerprint
    raw.add_tokens(["zebra"])
    other = Tokenizer.from_hf_dir(write_directory(tmp_path / "u", raw))
    assert other.fingerprint != tok.fingerprint


def test_bos_is_added_once_and_to_trusted_text_only(tmp_path: Path) -> None:
    config = {"bos_token": "<|im_start|>", "add_bos_token": True}
    path = write_directory(tmp_path / "t", byte_level(), **config)
    tok = Tokenizer.from_hf_dir(path)
    assert 1 not in tok.encode("x") and 1 not in tok.encode_offsets("x")[0]
    assert tok.encode("x", special=True)[0] == 1
    assert tok.encode("<|im_start|>x", special=True).tolist().count(1) == 1
    assert 1 not in tok.encode("x", special=True, bos=False)
    assert tok.encode("x", bos=True)[0] == 1


def test_bos_by_post_processor(tmp_path: Path) -> None:
    """Llama 3's files say it there and nowhere else."""
    raw = byte_level()
    raw.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tok = Tokenizer.from_hf_dir(write_directory(tmp_path / "t", raw))
    assert tok.bos_id == 1 and tok.adds_bos
    assert tok.encode("x", special=True)[0] == 1 and tok.encode("x")[0] != 1


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    raw = byte_level()
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    tok = Tokenizer.from_hf_dir(write_directory(tmp_path / "t", raw))
    text = "The river ran under the old stone bridge"
    assert tok.decode(tok.encode(text)) == text
    assert tok.decode(tok.encode(text, special=True)) == text


def test_chat_template_places(tmp_path: Path) -> None:
    path = write_directory(
        tmp_path / "t",
        byte_level(),
        chat_template=[
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "plain"},
        ],
    )
    assert Tokenizer.from_hf_dir(path).chat_template == "plain"
    (path / "chat_template.jinja").write_text("file é")
    assert Tokenizer.from_hf_dir(path).chat_template == "file é"
    path = write_directory(tmp_path / "u", byte_level(), chat_template=[{"a": 1}, 2])
    with pytest.raises(ModelFileError, match="chat_template"):
        Tokenizer.from_hf_dir(path)


def test_damaged_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.from_hf_dir(tmp_path)
    path = write_directory(tmp_path / "t", byte_level())
    file = path / "tokenizer.json"
    good = file.read_bytes()
    for bad in (b"", b"{}", b"\xff", b"[1]", good[: len(good) // 2]):
        file.write_bytes(bad)
        with pytest.raises(ModelFileError, match="tokenizer.json"):
            Tokenizer.from_hf_dir(path)
    rng = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(good)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        file.write_bytes(data)
        try:
            Tokenizer.from_hf_dir(path).encode("The river")
        except ModelFileError as error:
            assert "tokenizer.json" in str(error)
    file.write_bytes(good)
    (path / "tokenizer_config.json").write_text('{"eos_token": 3}')
    with pytest.raises(ModelFileError, match="eos_token is 3"):
        Tokenizer.from_hf_dir(path)


def test_wrap() -> None:
    raw = byte_level()
    tok = Tokenizer.wrap(raw, chat_template="x")
    assert Tokenizer.wrap(tok) is tok and tok.chat_template == "x"
    assert tok.eos_ids == (2, 0), "by the names of the special tokens"
    assert Tokenizer.wrap(raw, eos_ids=[5]).eos_ids == (5,)
    assert not raw.encode_special_tokens, "the caller's object is not changed"
    for wrong in ("path", None, object()):
        with pytest.raises(TypeError, match="fast transformers tokenizer"):
            Tokenizer.wrap(wrong)


def test_wrap_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    raw = byte_level()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=END, bos_token="<|im_start|>"
    )
    fast.chat_template = "{{ messages }}"
    tok = Tokenizer.wrap(fast)
    assert tok.eos_ids == (2,) and tok.bos_id == 1 and not tok.adds_bos
    assert tok.chat_template == "{{ messages }}"
    assert tok.special_names["eos_token"] == END
    for text in SAMPLES:
        assert tok.encode(text).tolist() == fast(text)["input_ids"]
    fast.chat_template = {"default": "a", "tool_use": "b"}
    assert Tokenizer.wrap(fast).chat_template == "a"
