"""`acre train` and `acre adapter`: training and its files from the command line.

Takes the parsed arguments; leaves the run's folder, or a file, and says so on standard
error. One idea: the same command again goes on where it was stopped. Refuses what
`acre.train` and `acre.training.adapter` refuse.
"""

from __future__ import annotations

import argparse
from typing import Any

NUMBERS: dict[str, tuple[Any, Any, str]] = {  # option: type, default, help
    "steps": (int, None, "updates in all"),
    "tokens": (int, None, "or: as many updates as so many tokens make"),
    "lr": (float, None, "peak rate; default 5e-5 in stage 1, 1e-5 in stage 2"),
    "warmup": (int, None, "steps; default 3 percent"),
    "batch-tokens": (int, 65536, "least tokens of an update"),
    "clip": (float, 1.0, "greatest norm of a gradient, 0 = any"),
    "weight-decay": (float, 0.0, ""),
    "beta1": (float, 0.9, ""),
    "beta2": (float, 0.95, ""),
    "window": (int, 4096, ""),
    "stride": (int, 2048, ""),
    "carry": (int, 0, ""),
    "questions": (int, 16, "that are asked of one context at most"),
    "context-weight": (float, 0.0, "of a token of a context, beside 1 of an answer's"),
    "evidence-weight": (float, 0.0, "tokens that the evidence term counts for"),
    "passes": (int, None, "over the files; default 1 in stage 1, 2 in stage 2"),
    "seed": (int, 0, ""),
    "save-every": (int, 100, "steps between checkpoints"),
    "keep": (int, 2, "checkpoints that stay"),
    "evaluate-every": (int, 100, "steps between held-out losses"),
    "held-out-examples": (int, 16, ""),
}


def add_commands(commands: Any, model_options: Any) -> None:
    """Adds the two commands to the parser's."""
    train = commands.add_parser(
        "train", help="train the L1 parameters of a model",
        description="Started by torchrun, srun or mpirun, the processes train as one; "
        "with --device cuda each takes a GPU of its own.",
    )  # fmt: skip
    train.add_argument("stage", choices=("stage1", "stage2"),
                       help="1: long texts; 2: questions about them")  # fmt: skip
    model_options(train)
    _train_options(train)
    train.set_defaults(run=command_train)

    adapter = commands.add_parser("adapter", help="pack or merge trained parameters")
    kinds = adapter.add_subparsers(dest="action", required=True)
    merge = kinds.add_parser("merge", help="a model directory that holds them")
    merge.add_argument("--storage", default="bf16", choices=("bf16", "f32"))
    merge.add_argument("--model", required=True, metavar="DIR")
    merge.set_defaults(run=command_merge)
    pack = kinds.add_parser("pack", help="the same adapter in another storage")
    pack.add_argument("--storage", default="int8", choices=("int8", "bf16", "f32"),
                      help="int8: differences from the base, half of bf16")  # fmt: skip
    pack.add_argument("--model", metavar="PATH", help="the base; int8 needs it")
    pack.add_argument("--scoring", metavar="JSON",
                      help="how groups are scored, instead of as it says")  # fmt: skip
    pack.set_defaults(run=command_pack)
    for parser in (merge, pack):
        parser.add_argument("adapter", metavar="ADAPTER", help="file or directory")
        parser.add_argument("-o", "--output", required=True, metavar="PATH")


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, action="append", metavar="SOURCE",
                        help="file, folder or builder; SOURCE=WEIGHT for its share; "
                        "may be repeated")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--held-out", action="append", metavar="SOURCE",
                        help="data whose loss is measured")  # fmt: skip
    group = parser.add_argument_group("training")
    group.add_argument("--length", type=int, nargs="+", default=[16384],
                       metavar="N", help="of an example, or a range")  # fmt: skip
    group.add_argument("--intervals", type=int, nargs="+",
                       default=[8, 16, 32, 64, 128], metavar="L")  # fmt: skip
    group.add_argument("--evidence-heads", type=_pair, nargs="+", metavar="LAYER.HEAD",
                       help="that the evidence term trains, and that then score; "
                       "default: the last layer's")  # fmt: skip
    for name, (kind, default, words) in NUMBERS.items():
        said = words if default is None else f"{words}; default {default}".strip("; ")
        group.add_argument(f"--{name}", type=kind, default=default, help=said)
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                       help="go on with the run that --out holds")  # fmt: skip


def _pair(text: str) -> tuple[int, int]:
    """(layer, head) of LAYER.HEAD; ValueError."""
    layer, head = text.split(".")
    return int(layer), int(head)


def mix(sources: list[str]) -> dict[str, float]:
    """{source: weight} of SOURCE or SOURCE=WEIGHT."""
    out = {}
    for source in sources:
        name, equals, weight = source.rpartition("=")
        try:
            out[name if equals else source] = float(weight) if equals else 1.0
        except ValueError:  # the sign is part of a file's name
            out[source] = 1.0
    return out


def command_train(arguments: argparse.Namespace) -> None:
    """Trains and says where the adapter is."""
    from acre.cli import open_model, say
    from acre.training.parallel import own_device
    from acre.training.run import train

    length = arguments.length
    if len(length) > 2:
        raise ValueError(f"length: got {len(length)} numbers, expected one or two")
    arguments.device = own_device(arguments.device)
    options = {name.replace("-", "_"): None for name in NUMBERS}
    options = {name: getattr(arguments, name) for name in options}
    done = train(
        open_model(arguments), arguments.stage, mix(arguments.data), arguments.out,
        length=length[0] if len(length) == 1 else tuple(length),
        intervals=arguments.intervals, evidence_heads=arguments.evidence_heads,
        resume=arguments.resume,
        held_out=mix(arguments.held_out) if arguments.held_out else None, **options,
    )  # fmt: skip
    if done.ended_early:
        say(f"the data ended after step {done.step}")
    if done.adapter is not None:
        loss = "" if done.loss is None else f", loss {done.loss:.4f}"
        say(f"{done.adapter}: {done.step} steps, {done.tokens} tokens{loss}")


def command_merge(arguments: argparse.Namespace) -> None:
    """A model directory of base and adapter."""
    from acre.cli import say
    from acre.training.adapter import merge_adapter

    merge_adapter(
        arguments.model, arguments.adapter, arguments.output, arguments.storage
    )
    say(arguments.output)


def command_pack(arguments: argparse.Namespace) -> None:
    """The adapter in another storage."""
    import json
    from pathlib import Path

    from acre.cli import say
    from acre.report import bytes_text
    from acre.training.adapter import pack_adapter

    scoring = arguments.scoring
    if scoring is not None:
        try:
            scoring = json.loads(Path(scoring).read_text())
        except ValueError as error:
            raise ValueError(f"{scoring}: not JSON: {error}") from error
    pack_adapter(
        arguments.adapter, arguments.output, arguments.model, arguments.storage, scoring
    )
    say(f"{arguments.output}: {bytes_text(Path(arguments.output).stat().st_size)}")
