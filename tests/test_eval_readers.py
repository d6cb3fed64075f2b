"""Readers: every form of file, every kind of bad record, the hub, limits, grouping."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import sys
import types
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acre.eval.readers import load
from acre.eval.tasks import TASKS

QASPER = TASKS["qasper"]
needs_data = pytest.mark.skipif(
    not os.environ.get("ACRE_DATA"), reason="ACRE_DATA names no folder"
)


def row(i: int, context: str = "", **more) -> dict:
    context = context or f"text {i}"
    fields = {"context": context, "input": f"q{i}?", "answers": [f"a{i}"]}
    return fields | {"_id": f"id{i}"} | more


def as_lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in rows)


def queries(loaded) -> list[str]:
    return [q.query for document in loaded.documents for q in document.questions]


ROWS = [row(i) for i in range(5)]
PACKED = {
    "qasper.jsonl": lambda raw: raw,
    "qasper.jsonl.xz": lzma.compress,
    "qasper.jsonl.gz": gzip.compress,
    "qasper.dev.jsonl.xz": lzma.compress,
    "qasper.json": lambda raw: json.dumps(ROWS, indent=1).encode(),
}


# ----------------------------------------------------------------------------- forms


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("direct", [True, False])
def test_every_form_of_file(tmp_path, name, direct):
    raw = PACKED[name](as_lines(ROWS))
    (tmp_path / name).write_bytes(raw)
    loaded = load(QASPER, tmp_path / name if direct else str(tmp_path))
    assert queries(loaded) == [f"q{i}?" for i in range(5)] and loaded.bad == []
    assert loaded.path == str(tmp_path / name)
    assert loaded.digest == hashlib.sha256(raw).hexdigest()


def test_json_lines_under_the_name_of_a_list(tmp_path):
    (tmp_path / "qasper.json").write_bytes(as_lines(ROWS))
    assert len(queries(load(QASPER, tmp_path))) == 5


@pytest.mark.parametrize("direct", [True, False])
def test_a_member_of_a_zip_is_read_in_place(tmp_path, direct):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", as_lines(ROWS))
    loaded = load(QASPER, tmp_path / "data.zip" if direct else tmp_path)
    assert len(queries(loaded)) == 5
    assert loaded.path == f"{tmp_path}/data.zip/data/qasper.jsonl"
    assert list(tmp_path.iterdir()) == [tmp_path / "data.zip"]
    with pytest.raises(ValueError, match=r"data.zip: no member data/qasper_e.jsonl"):
        load(TASKS["qasper_e"], tmp_path / "data.zip")


def test_a_folder_is_preferred_to_its_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", as_lines(ROWS))
    (tmp_path / "qasper.jsonl").write_bytes(as_lines(ROWS[:2]))
    assert len(queries(load(QASPER, tmp_path))) == 2


def test_rows_at_hand():
    loaded = load(QASPER, iter([*ROWS, "no row", row(9, answers=[])]))
    assert len(queries(loaded)) == 5 and loaded.path == "<rows>"
    assert [bad.line for bad in loaded.bad] == [6, 7]
    assert loaded.digest == load(QASPER, [*ROWS, "no row", row(9, answers=[])]).digest
    assert loaded.digest != load(QASPER, ROWS).digest
    with pytest.raises(TypeError, match=r"rows of one split, got \['test'\]"):
        load(QASPER, {"test": ROWS})


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name in ("qasper.jsonl", "qasper.json"):
        raw = b"\xef\xbb\xbf" + PACKED[name](as_lines(ROWS))
        (tmp_path / name).write_bytes(raw)
        loaded = load(QASPER, tmp_path / name)
        assert len(queries(loaded)) == 5 and not loaded.bad


# ----------------------------------------------------------------------- bad records


BAD = {
    b'{"context": "x"': "not JSON",
    b'{"context": "\xff"}': "not UTF-8: byte 13 is 0xff",
    b'{"context": "x", "input": "q"}': "no field 'answers'",
    b"[1, 2]": "expected an object, got list",
    b"null": "expected an object, got NoneType",
    b'{"context": 3, "input": "q", "answers": ["a"]}': "context: expected a string",
    b'{"context": " \\n", "input": "q", "answers": ["a"]}': "the text is empty",
    b'{"context": "x", "input": "q", "answers": []}': "no answers",
    b'{"context": "x", "input": "q", "answers": [" "]}': "no answers",
    b'{"context": "\\ud800", "input": "q", "answers": ["a"]}': "not Unicode text",
    b"[" * 100_000: "not JSON",
    b'{"a": ' + b"9" * 10_000 + b"}": "not JSON",
}


def test_every_kind_of_bad_record(tmp_path):
    path = tmp_path / "qasper.jsonl"
    good = as_lines(ROWS[:1])
    path.write_bytes(good + b"\n \r\n" + b"\n".join(BAD) + b"\n" + as_lines(ROWS[1:]))
    loaded = load(QASPER, path)
    assert len(queries(loaded)) == 5
    assert [bad.line for bad in loaded.bad] == list(range(4, 4 + len(BAD)))
    for bad, reason in zip(loaded.bad, BAD.values(), strict=True):
        assert reason in bad.reason and str(bad).startswith(f"{path}:{bad.line}: ")


def test_nothing_usable_is_an_error(tmp_path):
    path = tmp_path / "qasper.jsonl"
    path.write_bytes(b"\n{\n")
    with pytest.raises(ValueError, match=r"no usable record .*:2: not JSON"):
        load(QASPER, path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="qasper.jsonl: no usable record for qasper$"):
        load(QASPER, path)
    (tmp_path / "x.json").write_bytes(b"[1, ")
    with pytest.raises(ValueError, match=r"x.json: not JSON"):
        load(QASPER, tmp_path / "x.json")


@pytest.mark.parametrize("name", ["qasper.jsonl.xz", "qasper.jsonl.gz"])
def test_a_truncated_file_gives_what_it_has(tmp_path, name):
    rows = [row(i, hashlib.sha256(bytes([i])).hexdigest() * 20) for i in range(250)]
    raw = PACKED[name](as_lines(rows))
    (tmp_path / name).write_bytes(raw[: len(raw) // 2])
    loaded = load(QASPER, tmp_path)
    assert 0 < len(queries(loaded)) < 250
    assert "the file cannot be read on" in loaded.bad[-1].reason
    (tmp_path / name).write_bytes(b"neither xz nor gz")
    with pytest.raises(ValueError, match="the file cannot be read on"):
        load(QASPER, tmp_path)


def test_a_broken_zip_is_named(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="data.zip: File is not a zip file"):
        load(QASPER, tmp_path)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", as_lines(ROWS))
    raw = (tmp_path / "data.zip").read_bytes()
    (tmp_path / "data.zip").write_bytes(raw.replace(b"text 0", b"text X"))
    with pytest.raises(ValueError, match="Bad CRC-32"):
        load(QASPER, tmp_path)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.one_of(st.binary(max_size=40), st.sampled_from([as_lines(ROWS[:1]), *BAD])),
        max_size=6,
    ),
    st.sampled_from(["qasper.jsonl", "qasper.json", "qasper.jsonl.xz", "data.zip"]),
    st.booleans(),
)
def test_random_bytes_are_records_or_one_error(tmp_path, parts, name, packed):
    raw = b"\n".join(parts)
    if packed and name in PACKED and name != "qasper.json":
        raw = PACKED[name](raw)
    (tmp_path / name).write_bytes(raw)
    try:
        loaded = load(QASPER, tmp_path / name)
    except ValueError as error:
        assert str(error).startswith(str(tmp_path / name))
    else:
        assert loaded.documents and all(bad.reason for bad in loaded.bad)


# --------------------------------------------------------------- grouping and limits


def test_documents_of_one_text_are_one(tmp_path):
    rows = [row(0, "A"), row(1, "B"), row(2, "A"), row(2, "A")]
    loaded = load(QASPER, rows)
    assert [d.text for d in loaded.documents] == ["A", "B"]
    ids = [[q.id for q in d.questions] for d in loaded.documents]
    assert ids == [["id0", "id2", "id2@4"], ["id1"]]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_the_first_questions_of_the_file(limit):
    rows = [row(0, "A"), row(1, "B"), row(2, "A"), row(3, "C")]
    loaded = load(QASPER, rows, limit=limit)
    assert sorted(queries(loaded)) == [f"q{i}?" for i in range(min(limit, 4))]


def test_a_limit_cuts_a_document_and_ends_the_reading():
    def rows():
        for i in range(3):
            yield {
                "task": "multidoc_qa",
                "input": f"text {i}",
                "instructions": ["a?", "b?"],
                "outputs": ["a", "b"],
            }
        raise AssertionError("read on")

    loaded = load(TASKS["leval_sample"], rows(), limit=5)
    assert [len(d.questions) for d in loaded.documents] == [2, 2, 1]


def test_a_limit_keeps_all_passages_and_the_books():
    rows = [
        {"question": f"q{i}?", "answers": ["a"], "title": "t", "passage": f"p{i} a"}
        for i in range(40)
    ]
    [document] = load(TASKS["nq"], rows, limit=7).documents
    assert len(document.questions) == 7 and document.text.count("t\np") == 40
    books = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    assert len(load(TASKS["books"], books, limit=2).documents) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_are_checked(limit):
    with pytest.raises(ValueError, match=f"limit: expected at least 1, got {limit}"):
        load(QASPER, ROWS, limit=limit)


# ------------------------------------------------------------------------- the places


def hub(monkeypatch, fetch) -> None:
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = fetch
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_the_hub_is_asked_by_name(monkeypatch, tmp_path):
    asked = []

    def fetch(repo_id, filename, repo_type):
        asked.append((repo_id, filename, repo_type))
        with zipfile.ZipFile(tmp_path / "blob", "w") as archive:
            archive.writestr("data/qasper.jsonl", as_lines(ROWS))
        return str(tmp_path / "blob")

    hub(monkeypatch, fetch)
    assert len(queries(load(QASPER))) == 5
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]


@pytest.mark.parametrize(
    "name, repo, file, member",
    [
        ("qasper_e", "THUDM/LongBench", "data.zip", "data/qasper_e.jsonl"),
        ("longbench_v2", "THUDM/LongBench-v2", "data.json", ""),
        ("passkey", "xinrongzhang2022/InfiniteBench", "passkey.jsonl", ""),
        ("legal", "TommyChien/UltraDomain", "legal.jsonl", ""),
        ("coursera", "L4NLP/LEval", "LEval/Exam/coursera.jsonl", ""),
        ("multidoc_qa", "L4NLP/LEval", "LEval/Generation/multidoc_qa.jsonl", ""),
    ],
)
def test_where_it_is_published(name, repo, file, member):
    place = TASKS[name].hub
    assert (place.repo, place.filename, place.member) == (repo, file, member)


def test_offline_says_what_to_get_and_where_to_put_it(monkeypatch):
    def fetch(*args, **kwargs):
        raise RuntimeError("no network")

    hub(monkeypatch, fetch)
    with pytest.raises(FileNotFoundError) as error:
        load(QASPER)
    for word in ("RuntimeError", "THUDM/LongBench", "data.zip", "--data"):
        assert word in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r'pip install "acre\[eval\]"'):
        load(QASPER)


def test_missing_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(QASPER, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"expected qasper.jsonl .*data.zip"):
        load(QASPER, tmp_path)
    monkeypatch.delenv("ACRE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="nq: set ACRE_DATA"):
        load(TASKS["nq"])
    with pytest.raises(ValueError, match="probe_vt: is generated"):
        load(TASKS["probe_vt"])
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="nq is not published as a zip"):
        load(TASKS["nq"], tmp_path / "x.zip")


def test_samples_lie_where_acre_data_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ACRE_DATA", str(tmp_path))
    raw = lzma.compress(as_lines([{"text": "Once upon a time."}]))
    (tmp_path / "books.dev.jsonl.xz").write_bytes(raw)
    loaded = load(TASKS["books"])
    assert Path(loaded.path).name == "books.dev.jsonl.xz"
    assert loaded.documents[0].text == "Once upon a time."


@needs_data
@pytest.mark.parametrize(
    "name, questions",
    [("longbench_sample", 124), ("leval_sample", 330), ("nq", 200), ("books", 0)],
)
def test_the_samples_are_read_whole(name, questions):
    loaded = load(TASKS[name])
    assert len(queries(loaded)) == questions and not loaded.bad
    for document in loaded.documents:
        assert document.task in TASKS and TASKS[document.task].metric
