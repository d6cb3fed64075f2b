"""`acre eval` and `acre sweep`: evaluation from the command line.

Takes the parsed arguments; prints the report as a table on standard output, all else on
standard error, and leaves the results in --output. One idea: the same command again
goes on where it was stopped. Refuses what `acre.evaluate` refuses.
"""

from __future__ import annotations

import argparse
from typing import Any

from acre.eval.methods import NAMES, Settings
from acre.scoring import PROXIES

SETTINGS = ("window", "stride", "carry", "eta", "passage")


def add_commands(commands: Any, model_options: Any) -> None:
    """Adds the two commands to the parser's."""
    run = commands.add_parser(
        "eval", help="score methods on benchmarks",
        description=f"Methods: {', '.join(NAMES)}; with settings as acre:eta=512,"
        "select=per_layer.",
    )  # fmt: skip
    _common(run, model_options)
    run.add_argument("--method", action="append", default=[], metavar="METHOD",
                     help="may be repeated; default acre and full")  # fmt: skip
    _setting_options(run)
    run.set_defaults(run=command_eval)

    sweep = commands.add_parser("sweep", help="score every combination of settings")
    _common(sweep, model_options)
    group = sweep.add_argument_group("axes (several values each)")
    for name in ("interval", "window", "stride", "carry", "eta"):
        group.add_argument(f"--{name}", nargs="+", metavar="N")
    group.add_argument("--select", nargs="+", choices=("shared", "per_layer"))
    group.add_argument("--proxy", nargs="+", choices=PROXIES)
    group.add_argument("--beside", nargs="+", default=[], metavar="METHOD",
                       help="methods to compare with, as full or bm25")  # fmt: skip
    sweep.set_defaults(run=command_sweep)


def _common(parser: argparse.ArgumentParser, model_options: Any) -> None:
    """What both commands take."""
    parser.add_argument("task", nargs="+", metavar="TASK",
                        help="task or benchmark, as hotpotqa or longbench")  # fmt: skip
    parser.add_argument("--data", metavar="PATH",
                        help="folder or file of the published JSONL; without it, by "
                        "name from the Hugging Face hub")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--seed", type=int, default=0)
    made = parser.add_argument_group("generated texts")
    made.add_argument("--lengths", type=int, nargs="+", default=[8192],
                      metavar="TOKENS")  # fmt: skip
    made.add_argument("--questions", type=int, default=10, help="per text")
    made.add_argument("--texts", type=int, default=1, help="per length")
    made.add_argument("--depths", type=float, nargs="+", metavar="SHARE",
                      help="places of a single needle, 0 to 1")  # fmt: skip
    spread = parser.add_argument_group("engine")
    spread.add_argument("--engine", default="local", choices=("local", "ray"))
    spread.add_argument("--workers", type=int, help="of Ray; default: all that fit")
    spread.add_argument("--address", help="of a Ray cluster; default: RAY_ADDRESS, or "
                        "one of this machine's own")  # fmt: skip
    model_options(parser)
    parser.add_argument("--w-max", type=int, help="usable positions of the model")


def _setting_options(parser: argparse.ArgumentParser) -> None:
    """The defaults of every method named."""
    default = Settings()
    group = parser.add_argument_group("settings of all methods")
    group.add_argument("--interval", default="auto", help="l, or auto")
    for name in SETTINGS:
        value = getattr(default, name)
        trained = name in ("window", "stride")
        told = f"as the L1 parameters were trained, or {value}" if trained else value
        group.add_argument(f"--{name}", type=int, default=None if trained else value,
                           help=f"default: {told}")  # fmt: skip
    group.add_argument("--select", default="shared", choices=("shared", "per_layer"))
    group.add_argument("--proxy", default="auto", choices=("auto", *PROXIES))
    group.add_argument("--budget", type=int,
                       help="entries of excerpts; default as many as acre")  # fmt: skip


def _spec(arguments: argparse.Namespace) -> Any:
    """How the model is opened, here and by workers."""
    from acre.cli import model_path
    from acre.eval.work import ModelSpec

    options = {
        "dtype": arguments.dtype,
        "weights": arguments.weights,
        "adapter": arguments.adapter,
        "threads": arguments.threads,
        "w_max": arguments.w_max,
    }
    return ModelSpec(str(model_path(arguments)), options)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that both `evaluate` and `sweep` take."""
    from acre.eval.engines import Ray

    engine: Any = arguments.engine
    if engine == "ray":
        threads = max(arguments.threads, 1)
        engine = Ray(arguments.workers, threads, address=arguments.address)
    return {
        "limit": arguments.limit, "seed": arguments.seed, "lengths": arguments.lengths,
        "questions": arguments.questions, "texts": arguments.texts,
        "depths": arguments.depths, "engine": engine,
    }  # fmt: skip


def command_eval(arguments: argparse.Namespace) -> None:
    """Evaluates and prints the table."""
    from acre.cli import say
    from acre.eval.run import evaluate

    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings |= {"select": arguments.select, "proxy": arguments.proxy}
    settings |= {"budget": arguments.budget}
    settings["interval"] = Settings.parse("interval", arguments.interval)
    report = evaluate(
        arguments.task, _spec(arguments), arguments.data,
        arguments.method or ("acre", "full"), arguments.output,
        **_options(arguments), **settings,
    )  # fmt: skip
    for record in report.bad[:5]:
        say(f"left out: {record}")
    print(report.markdown())
    say(f"results in {arguments.output}")


def command_sweep(arguments: argparse.Namespace) -> None:
    """Sweeps and prints the tables."""
    from acre.cli import CommandError, say
    from acre.eval.sweep import AXES, sweep

    axes = {}
    for name in AXES:
        values = getattr(arguments, name, None)
        if values:
            axes[name] = [Settings.parse(name, value) for value in values]
    if not axes:
        raise CommandError("give an axis, as --interval 8 16 32")
    done = sweep(
        arguments.task, _spec(arguments), axes, arguments.data, arguments.output,
        beside=arguments.beside, **_options(arguments),
    )  # fmt: skip
    print(done.markdown())
    say(f"results in {arguments.output}")
