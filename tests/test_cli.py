"""The command: output, exit codes, one-line errors, cache files, interruption."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy

import acre
from acre import cli, demo

QUESTION = "who wrote the ledger?"
FLAGS = ["--window", "64", "--stride", "32", "--eta", "64", "--dtype", "f32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory and a text file."""
    path = tmp_path_factory.mktemp("cli")
    toy.directory(path / "model")
    (path / "text.txt").write_text(toy.sentence(1, 100), encoding="utf-8")
    return path


def ask(folder: Path, *more: str, file: str | None = None) -> list[str]:
    name = file or str(folder / "text.txt")
    return ["ask", name, "--model", str(folder / "model"), *FLAGS, *more]


def test_ask_prints_answer_passages_and_figures(folder, capsys):
    assert cli.main(ask(folder, "-q", QUESTION, "--max-new-tokens", "8")) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n") and len(out) > 1
    assert "tokens built" in err and "refilled" in err and "score" in err
    assert "chars " in err and "tokens reused" in err and "100%" not in err


def test_ask_several_without_passages(folder, capsys):
    more = ["-q", "one?", "-q", "two?", "--no-show-passages", "--max-new-tokens", "4"]
    assert cli.main(ask(folder, *more)) == 0
    out, err = capsys.readouterr()
    assert "? one?" in err and "? two?" in err and "chars " not in err


def test_ask_leaves_a_page_per_answer(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    more = ["-q", "one?", "-q", "two?", "--max-new-tokens", "4", "--html", str(page)]
    assert cli.main(ask(folder, *more)) == 0
    assert f"page: {tmp_path / 'page-2.html'}" in capsys.readouterr().err
    assert "one?" in page.read_text("utf-8")
    assert "two?" in (tmp_path / "page-2.html").read_text("utf-8")


def test_ask_matches_the_library(folder, capsys):
    cli.main(ask(folder, "-q", QUESTION, "--max-new-tokens", "8"))
    model = acre.Model.from_pretrained(folder / "model", "f32")
    cache = model.build(
        (folder / "text.txt").read_text("utf-8"),
        window=64,
        stride=32,
        eta=64,
        progress=False,
    )
    answer = cache.ask(QUESTION, eta=64, max_new_tokens=8)
    assert capsys.readouterr().out == answer.text + "\n"


def test_cache_file_is_kept_loaded_and_extended(folder, tmp_path, capsys):
    path, text = str(tmp_path / "a.acre"), toy.sentence(1, 100)
    more = ["-q", QUESTION, "--max-new-tokens", "6", "--cache", path]
    assert cli.main(ask(folder, *more)) == 0
    first = capsys.readouterr()
    assert cli.main(ask(folder, *more)) == 0
    second = capsys.readouterr()
    assert "loaded, none built" in second.err and second.out == first.out
    longer = tmp_path / "longer.txt"
    longer.write_text(text + toy.sentence(2, 20), encoding="utf-8")
    assert cli.main(ask(folder, *more, file=str(longer))) == 0
    assert "reused" in capsys.readouterr().err
    assert cli.main(ask(folder, *more)) == 1
    assert "another text" in capsys.readouterr().err


def test_build_then_info_then_ask(folder, tmp_path, capsys):
    path = str(tmp_path / "b.acre")
    args = ["build", str(folder / "text.txt"), "-o", path]
    args += ["--model", str(folder / "model"), "--window", "64", "--stride", "32"]
    assert cli.main(args) == 0
    assert cli.main(["info", path]) == 0
    out = capsys.readouterr().out
    assert "interval: 8" in out and "window: 64" in out and "fingerprints: model" in out
    assert cli.main(["info", str(folder / "model")]) == 0
    assert "layers: 2" in capsys.readouterr().out
    assert cli.main(["info"]) == 0
    assert "isa: " in capsys.readouterr().out


class Input(io.StringIO):
    """Standard input of lines."""

    def isatty(self) -> bool:
        return False


def test_interactive(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Input("one?\n\n" + "why " * 900 + "\ntwo?\n"))
    assert cli.main(ask(folder, "--max-new-tokens", "4")) == 0
    out, err = capsys.readouterr()
    assert err.count("tokens reused") == 2 and "reserve" in err


def test_standard_input_is_the_text(folder, capsys, monkeypatch):
    class Bytes:
        buffer = io.BytesIO(toy.sentence(1, 90).encode())

    monkeypatch.setattr(sys, "stdin", Bytes())
    more = ["-q", QUESTION, "--max-new-tokens", "2"]
    assert cli.main(ask(folder, *more, file="-")) == 0
    assert cli.main(ask(folder, file="-")) == 1
    assert "give -q" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"good \xff bad", "byte 0xff at offset 5"),
        ("caf\u00e9".encode() + b"\xc3", "offset 5"),
        (b"", "empty"),
        (b" \n", "empty"),
    ],
)
def test_bad_texts(folder, tmp_path, capsys, content, words):
    (tmp_path / "bad.txt").write_bytes(content)
    assert cli.main(ask(folder, "-q", "x", file=str(tmp_path / "bad.txt"))) == 1
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and err.startswith("acre: ")


def test_errors_are_one_line(folder, tmp_path, capsys):
    missing = str(tmp_path / "nowhere.txt")
    assert cli.main(ask(folder, "-q", "x", file=missing)) == 1
    err = capsys.readouterr().err
    assert err == f"acre: {missing}: No such file or directory\n"
    wrong = ["ask", str(folder / "text.txt"), "-q", "x", "--model", str(tmp_path)]
    assert cli.main(wrong) == 1
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "c.acre").write_bytes(b"no cache")
    more = ["-q", "x", "--cache", str(tmp_path / "c.acre")]
    assert cli.main(ask(folder, *more)) == 1
    assert "c.acre" in capsys.readouterr().err
    assert cli.main(ask(folder, "-q", "x", "--eta", "3")) == 1
    assert "eta" in capsys.readouterr().err


def test_debug_shows_the_traceback(folder, monkeypatch):
    monkeypatch.setenv("ACRE_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(ask(folder, "-q", "x", file="/nowhere"))


@pytest.mark.parametrize("args", [[], ["nonsense"], ["ask"], ["build", "x"]])
def test_wrong_usage(args, capsys):
    assert cli.main(args) == 2
    assert "usage" in capsys.readouterr().err


def test_no_model(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli, "default_model", lambda: None)
    assert cli.main(["ask", str(folder / "text.txt"), "-q", "x"]) == 1
    assert "--model" in capsys.readouterr().err


def test_interrupted(folder, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(acre.Model, "build", interrupt)
    assert cli.main(ask(folder, "-q", "x")) == 130
    assert "interrupted" in capsys.readouterr().err


def test_module_and_sigint(folder, tmp_path):
    """As a process: Ctrl-C while it waits for a question ends it with 130."""
    root = str(Path(acre.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "acre", *ask(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        # A shell's background job is started with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "tokens built" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_demo(folder, monkeypatch, capsys):
    monkeypatch.setattr(demo, "reference_text", lambda: toy.sentence(1, 100))
    args = ["demo", "--model", str(folder / "model"), "--dtype", "f32"]
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert all(question in out for question in demo.QUESTIONS)
    assert "tokens built" in err


def test_the_reference_is_whole():
    text = demo.reference_text()
    assert len(text) > 300_000 and "nonlocal" in text


def test_excerpts():
    assert cli.excerpt("a  b\nc", 320) == "a b c"
    assert len(cli.excerpt("x" * 2000, 320)) < 340
    assert cli.bytes_text(999) == "999 B" and cli.bytes_text(2.5e9) == "2.5 GB"
