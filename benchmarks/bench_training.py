"""Training throughput of acre beside the same objective in plain PyTorch.

    python benchmarks/bench_training.py [--lengths 2048 4096 8192 16384] [--threads 2]
        [--rounds 3] [--only acre|torch] [--torch-limit 16384] [--json FILE]

Takes SmolLM2-135M in bf16 from its package and Python's language reference as text;
every token's loss counts, intervals are drawn per window. One update (an example's
gradients, clipping, AdamW) is timed. One idea: the two alternate within one process,
figures are medians over rounds, ratios are taken within a round. PyTorch runs
`tests/torch_method.py`: attention by scaled_dot_product_attention, the loss in chunks
of the vocabulary, and layers recomputed only for texts of more than --keep tokens,
where keeping them would take too much memory. Refuses to print when the two losses
differ by more than a hundredth in the first timed round.

GFLOP/s are those of `Work`, its products alone (the formula is there), and are also
given as a share of the best rate of oneDNN's matrix products so far in this run. Memory
is the largest size while an update runs: of the process (with --only, of one engine),
and for acre what its engine holds, the model and the tapes it keeps included.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_cpu import commit, peak_mib, processor, reference_ids
from bench_gemm import SHAPES, onednn
from peer_models import SmolLM2, torch_tensors

import acre
from acre import _core, loaders

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from torch_method import TorchMethod, nested, spans  # noqa: E402

INTERVALS = (8, 16, 32, 64, 128)
LR, CLIP = 0.0, 1.0  # no step changes the parameters: losses stay comparable
LIMIT = 0.01  # largest relative difference of the losses of one example
REST = 0.05  # seconds for the other engine's idle threads to stop spinning
MIB = 1 / 2**20


class Example(NamedTuple):
    """What both engines differentiate."""

    ids: np.ndarray
    intervals: list[int]
    window: int
    stride: int


# -------------------------------------------------------------------------------- work


class Work(NamedTuple):
    """Floating-point operations of one example's products, 2 per multiply-add.

    With r nested rows in a window behind p entries, r p + r (r + 1) / 2 pairs are
    attended; a and b are the widths of the queries' and of the keys' heads together,
    f the feed-forward width, H hidden, L layers, V the vocabulary:

        forward    2 L rows (2 H a + 2 H b + 3 H f) + 4 L a pairs + 2 H V tokens
        backward   the products of layers and head once more, for the inputs'
                   gradients (the base learns nothing); attention twice (four products
                   for the forward's two); 2 L H (a + 2 b) per L1 token for its weights
        recompute  the layers' and the head's forward once more, where it is not kept
        again      what acre computes anew: the output projection, gate and up, and
                   the attention's logits
    """

    forward: float
    backward: float
    recompute: float
    again: float


def work(config: Mapping[str, Any], example: Example) -> Work:
    """The work of one example without a tail, every token's loss counted."""
    rows = l1 = pairs = 0
    for span in spans(len(example.ids), *example[1:]):
        is_l1 = nested(span).is_l1
        r = len(is_l1)
        pairs += r * l1 + r * (r + 1) // 2
        rows, l1 = rows + r, l1 + int(is_l1.sum())
    L, H, f = config["layers"], config["hidden"], config["ffn"]
    a, b = (config[name] * config["head_dim"] for name in ("heads", "kv_heads"))
    layers = 2.0 * L * rows * (2 * H * a + 2 * H * b + 3 * H * f)
    attention = 4.0 * L * a * pairs
    head = 2.0 * H * config["vocab_size"] * (len(example.ids) - 1)
    weights = 2.0 * L * H * (a + 2 * b) * l1
    forward = layers + attention + head
    again = 2.0 * L * rows * (H * a + 2 * H * f) + attention / 2
    return Work(forward, layers + 2 * attention + head + weights, forward, again)


def gemm_rate() -> float:
    """GFLOP/s of bf16 products, the median over the model's layer shapes."""
    return statistics.median(onednn("bf16", K, N) for K, N in SHAPES)


# ------------------------------------------------------------------------------ memory


def resident_mib(peak: bool = False) -> float:
    """The process's resident size, or the largest since `forget_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return peak_mib()


def forget_peak() -> None:
    """Makes the present size the largest so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


# ----------------------------------------------------------------------------- engines


class Acre:
    """acre's trainer."""

    name = "acre"

    def __init__(self, model: acre.Model):
        self.trainer, self.step = _core.Trainer(model.core), 0
        self.engine = model.core.engine

    def anew(self, made: Work, n: int) -> float:
        """Operations that are computed a second time."""
        return made.again

    def update(self, example: Example) -> float:
        """Learns from one example; its mean loss."""
        ids, *sizes = example
        names = ("intervals", "window", "stride")
        found = self.trainer.accumulate(ids, **dict(zip(names, sizes, strict=True)))
        self.step += 1
        self.trainer.update(step=self.step, lr=LR, divisor=found["weight"], clip=CLIP)
        return found["loss"] / found["weight"]

    def counted_mib(self, run: Callable[[], object]) -> float:
        """What the engine holds at most during `run`, the model included."""
        self.engine.reset_peak()
        run()
        return self.engine.peak_bytes * MIB


class Torch:
    """The same in PyTorch; layers are recomputed for texts longer than `keep`."""

    name = "torch"

    def __init__(self, source: loaders.Source, keep: int):
        tensors = torch_tensors(source, torch.bfloat16)
        self.method, self.keep = (
            TorchMethod(source.config, tensors, torch.bfloat16),
            keep,
        )
        self.leaves = list(self.method.parameters.values())
        self.optimizer = torch.optim.AdamW(self.leaves, LR, (0.9, 0.95), weight_decay=0)

    def anew(self, made: Work, n: int) -> float:
        return made.recompute if n > self.keep else 0.0

    def update(self, example: Example) -> float:
        """Learns from one example; its mean loss."""
        self.method.checkpoint = len(example.ids) > self.keep
        loss, weight, _ = self.method.example(*example)
        (loss / weight).backward()
        torch.nn.utils.clip_grad_norm_(self.leaves, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item() / weight

    def counted_mib(self, run: Callable[[], object]) -> None:
        """PyTorch does not count."""
        run()


# ---------------------------------------------------------------------------- measuring


@dataclass
class Figures:
    """One engine on one length."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)  # MiB
    counted: list[float] = field(default_factory=list)  # MiB

    def measure(self, engine: Acre | Torch, example: Example) -> None:
        """One update, entered."""
        gc.collect()
        time.sleep(REST)
        forget_peak()

        def run() -> None:
            start = time.perf_counter()
            self.losses.append(engine.update(example))
            self.seconds.append(time.perf_counter() - start)

        counted = engine.counted_mib(run)
        if counted is not None:
            self.counted.append(counted)
        self.resident.append(resident_mib(peak=True))


def draw(model: acre.Model, n: int, options: argparse.Namespace) -> Example:
    """n tokens of text and a random interval per window."""
    count = 1 + max(0, -(-(n - options.window) // options.stride))
    intervals = np.random.default_rng(n).choice(INTERVALS, count).tolist()
    ids = reference_ids(model, n)
    return Example(ids, intervals, options.window, options.stride)


def check(found: dict[str, Figures]) -> None:
    """Exits when the engines' losses of the first round are not alike."""
    losses = [figures.losses[0] for figures in found.values()]
    if max(losses) - min(losses) > LIMIT * min(losses):
        sys.exit(f"check failed: losses {dict(zip(found, losses, strict=True))}")


def measure(
    engines: list[Acre | Torch], example: Example, rounds: int
) -> dict[str, Figures]:
    """Engines in turn in every round, after an update each that is not timed: the
    first of a length touches new memory and chooses its products' kernels."""
    for engine in engines:
        engine.update(example)
    found = {engine.name: Figures() for engine in engines}
    for _ in range(rounds):
        for engine in engines:
            found[engine.name].measure(engine, example)
    check(found)
    return found


# ------------------------------------------------------------------------------- output


def records(
    engines: list[Acre | Torch],
    example: Example,
    found: dict[str, Figures],
    config: Mapping[str, Any],
    gemm: float,
) -> list[dict[str, Any]]:
    """A record per engine."""
    n, made, out = len(example.ids), work(config, example), []
    for engine in engines:
        figures = found[engine.name]
        seconds = statistics.median(figures.seconds)
        anew = engine.anew(made, n)
        rate = 1e-9 * (made.forward + made.backward + anew) / seconds
        own = found["acre"].seconds if "acre" in found else figures.seconds
        ratios = [a / b for a, b in zip(figures.seconds, own, strict=True)]
        out.append(
            {
                "engine": engine.name,
                "tokens": n,
                "tokens_per_s": n / seconds,
                "acre_times_as_fast": statistics.median(ratios),
                "recomputed": anew / made.forward,
                "gflops": rate,
                "gemm_gflops": gemm,
                "share_of_gemm": rate / gemm,
                "resident_mib": max(figures.resident),
                "counted_mib": max(figures.counted, default=None),
                "loss": figures.losses[0],
                "seconds": figures.seconds,
            }
        )
    return out


def line(row: dict[str, Any]) -> str:
    """One record as it is printed."""
    ratio = row["acre_times_as_fast"]
    counted = row["counted_mib"]
    cells = [
        f"{row['engine']:6s}{row['tokens']:7d}{row['tokens_per_s']:10.1f} tok/s",
        f"{row['gflops']:8.1f} GFLOP/s{100 * row['share_of_gemm']:6.1f}% of GEMM",
        f"{100 * row['recomputed']:4.0f}% of the forward anew",
        f"{row['resident_mib']:9.0f} MiB",
        "" if counted is None else f" ({counted:.0f} counted)",
        "" if ratio == 1 else f"  acre {ratio:.2f}x as fast",
    ]
    return "".join(cells)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    lengths = [2048, 4096, 8192, 16384]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--stride", type=int, default=2048)
    parser.add_argument("--only", choices=("acre", "torch"))
    parser.add_argument(
        "--torch-limit", type=int, default=16384, help="longest text for PyTorch"
    )
    parser.add_argument(
        "--keep", type=int, default=4096, help="longest without recomputation there"
    )
    parser.add_argument("--json", type=Path, help="append the records to this file")
    return parser.parse_args()


def opened(options: argparse.Namespace, model: acre.Model) -> list[Acre | Torch]:
    """The engines asked for."""
    engines: list[Acre | Torch] = []
    if options.only != "torch":
        engines.append(Acre(model))
    if options.only != "acre":
        engines.append(Torch(loaders.open_source(SmolLM2().path), options.keep))
    return engines


def main() -> None:
    """Measures and prints a line per length and engine."""
    options = arguments()
    torch.set_num_threads(options.threads)
    model = SmolLM2().open_acre(options.threads)
    gemm, config = gemm_rate(), model.core.config
    engines = opened(options, model)
    print(f"{options.threads} threads, acre {model.core.engine.isa}, torch "
          f"{torch.__version__}; bf16 products {gemm:.0f} GFLOP/s")  # fmt: skip
    facts = {"commit": commit(), "machine": processor(), "threads": options.threads}
    facts |= {"window": options.window, "stride": options.stride}
    for n in options.lengths:
        used = [e for e in engines if e.name == "acre" or n <= options.torch_limit]
        if not used:
            continue
        example = draw(model, n, options)
        found = measure(used, example, options.rounds)
        gemm = max(gemm, gemm_rate())
        for row in records(used, example, found, config, gemm):
            print(line(row), flush=True)
            if options.json:
                with options.json.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(facts | row) + "\n")


if __name__ == "__main__":
    main()
