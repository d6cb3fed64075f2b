"""The whole method in float64 NumPy: the oracle that the C is tested against.

Takes the model configuration (the dict of `acre._core.Model`) and its tensors by
Hugging Face name; gives every stage's result: model, nested, select, cache, score,
refill, decode. One idea: the cache is a store of raw (unrotated) keys and values by
entry name, and all else is lists of entry names. A *timeline* is such a list; an
entry's position is its index in it. With dtype "bf16" the stored numbers are rounded
where the method says so, the arithmetic in between stays float64. Refuses nothing: it
trusts its caller.

Symbols: n context tokens, l interval, m L1 entries, W first window, s stride, eta
refill budget, k groups, t query tokens, h query heads, g KV heads, d head dim, L
layers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Entry = tuple[str, int]  # ("L1", group) or ("L2", token)


def round_bf16(x: Array) -> Array:
    """x rounded to float32, then to the nearest bfloat16, ties to even; as float64."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    even = (bits >> 16) & 1
    kept = (bits + (np.uint32(0x7FFF) + even)) & np.uint32(0xFFFF0000)
    return kept.view(np.float32).astype(np.float64)


def softmax(x: Array) -> Array:
    """Softmax over the last axis; -inf has no share."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ------------------------------------------------------------------ model: rotation


def frequencies(rope: dict[str, Any], d: int, w_max: int) -> tuple[Array, float]:
    """Radians per position of each of the d/2 pairs, and the factor of cos and sin."""
    kind, theta = rope["kind"], rope["theta"]
    pair = np.arange(d // 2, dtype=np.float64)
    base = theta ** (-2 * pair / d)
    if kind == "default":
        return base, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return base / factor, 1.0
    original = rope["original_positions"]
    if kind == "dynamic":
        if w_max <= original:
            return base, 1.0
        stretch = factor * w_max / original - (factor - 1)
        return (theta * stretch ** (d / (d - 2))) ** (-2 * pair / d), 1.0
    if kind == "llama3":
        # turns = rotations within the pre-training length: few turns are slowed down by
        # `factor`, many are left alone, in between the two are blended linearly.
        turns = original * base / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return base * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":
        return _yarn(rope, base, d)
    raise ValueError(f"rope kind: got {kind!r}")


def _yarn(rope: dict[str, Any], base: Array, d: int) -> tuple[Array, float]:
    """YaRN: pairs below `first` keep their speed, those above `last` are slowed."""
    factor = rope["factor"]

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes `turns` rotations in the original length."""
        length = rope["original_positions"] / (turns * 2 * math.pi)
        return d * math.log(length) / (2 * math.log(rope["theta"]))

    first = pair_with(rope.get("beta_fast", 32.0))
    last = pair_with(rope.get("beta_slow", 1.0))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    if first == last:
        last += 0.001
    slowed = np.clip((np.arange(d // 2) - first) / (last - first), 0, 1)
    gain = rope.get("attention_factor", 0.0)
    if gain <= 0:
        gain = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    return base * (1 - slowed) + base / factor * slowed, gain


# ------------------------------------------------------------------ model: forward


class Layer(NamedTuple):
    """What one layer made of t tokens."""

    q: Array  # [t, h, d] before RoPE
    q_rotated: Array  # [t, h, d]
    k: Array  # [t, g, d] before RoPE, as cached
    v: Array  # [t, g, d], as cached


class Resident(NamedTuple):
    """What one layer lets the new tokens attend to, besides themselves."""

    keys: Array  # [p, g, d] before RoPE; position of a key = its row
    values: Array  # [p, g, d]
    bias: Array  # [p], added to the logit


class Reference:
    """A model, and (by `build`) the caches that it makes."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Array]):
        self.config = config
        self.bf16 = config.get("dtype", "f32") == "bf16"
        self.layers, self.vocab = config["layers"], config["vocab_size"]
        self.h, self.g, self.d = config["heads"], config["kv_heads"], config["head_dim"]
        self.w_max = config["w_max"]
        self.frequency, self.gain = frequencies(config["rope"], self.d, self.w_max)
        self.tensors = {
            name: self.stored(a) if a.ndim == 2 else np.asarray(a, np.float64)
            for name, a in tensors.items()
        }
        self._untrained()

    def stored(self, x: Array) -> Array:
        """x in the model's dtype: weights, matmul inputs, cached keys and values."""
        return round_bf16(x) if self.bf16 else np.asarray(x, np.float64)

    def _untrained(self) -> None:
        """L1 parameters that did not come: the EOS row and copies of q, k, v."""
        t = self.tensors
        row = max(self.config.get("eos_id", -1), 0)
        eos = t["model.embed_tokens.weight"][row : row + 1]
        t.setdefault("model.acre_embed_tokens.weight", eos)
        for name in [n for n in t if ".self_attn." in n and ".acre_" not in n]:
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                t.setdefault(name.replace("self_attn.", "self_attn.acre_"), t[name])

    def linear(self, x: Array, name: str) -> Array:
        """x W^T + b."""
        y = self.stored(x) @ self.tensors[name + ".weight"].T
        return y + self.tensors.get(name + ".bias", 0.0)

    def norm(self, x: Array, name: str) -> Array:
        """RMSNorm over the last axis."""
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config["rms_eps"])
        return x / scale * self.tensors[name + ".weight"]

    def rotate(self, x: Array, start: int = 0) -> Array:
        """RoPE of x [t, heads, d], row i at position start + i; pairs (i, i + d/2)."""
        angle = np.outer(start + np.arange(len(x)), self.frequency)[:, None, :]
        cos, sin = self.gain * np.cos(angle), self.gain * np.sin(angle)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attend(
        self, q: Array, keys: Array, values: Array, bias: Array, visible: Array
    ) -> Array:
        """[t, h, d]: q [t, h, d] attends to keys [c, g, d] where visible [t, c]."""
        repeat = self.h // self.g
        keys, values = np.repeat(keys, repeat, 1), np.repeat(values, repeat, 1)
        logits = np.einsum("ihd,jhd->hij", self.stored(q), keys) / math.sqrt(self.d)
        weights = self.weights(np.where(visible, logits + bias, -np.inf))
        total = weights.sum(axis=-1).T[:, :, None]
        return np.einsum("hij,jhd->ihd", weights, values) / total

    def weights(self, logits: Array) -> Array:
        """exp(logits), up to a power of two per row, in the model's dtype."""
        exponents = logits * math.log2(math.e)
        origin = np.ceil(exponents.max(axis=-1, keepdims=True))
        return self.stored(np.exp2(exponents - origin))

    def embed(self, ids: Array) -> Array:
        """[t, hidden]; the id vocab_size is the L1 token."""
        table = self.tensors["model.embed_tokens.weight"]
        l1_row = self.tensors["model.acre_embed_tokens.weight"]
        return np.concatenate([table, l1_row])[ids]

    def project(self, x: Array, is_l1: Array, i: int, letter: str, heads: int) -> Array:
        """[t, heads, d]: L1 tokens pass the layer's own L1 projection."""
        name = f"model.layers.{i}.self_attn."
        y = np.where(
            is_l1[:, None],
            self.linear(x, f"{name}acre_{letter}_proj"),
            self.linear(x, f"{name}{letter}_proj"),
        )
        return y.reshape(len(x), heads, self.d)

    def forward(
        self, ids: Array, resident: list[Resident]
    ) -> tuple[Array, list[Layer]]:
        """Hidden states [t, hidden] after the last norm, and what each layer made.

        The tokens follow the resident entries: token i is at position p + i and sees
        all p of them and the tokens up to itself.
        """
        ids = np.asarray(ids)
        t, p = len(ids), len(resident[0].keys)
        visible = np.arange(p + t)[None, :] <= p + np.arange(t)[:, None]
        is_l1, x, made = ids == self.vocab, self.embed(ids), []
        for i, past in enumerate(resident):
            name = f"model.layers.{i}."
            y = self.norm(x, name + "input_layernorm")
            q = self.project(y, is_l1, i, "q", self.h)
            k = self.stored(self.project(y, is_l1, i, "k", self.g))
            v = self.stored(self.project(y, is_l1, i, "v", self.g))
            made.append(Layer(q, self.rotate(q, p), k, v))
            keys = self.stored(self.rotate(np.concatenate([past.keys, k])))
            values = np.concatenate([past.values, v])
            bias = np.concatenate([past.bias, np.zeros(t)])
            y = self.attend(made[-1].q_rotated, keys, values, bias, visible)
            x = x + self.linear(y.reshape(t, -1), name + "self_attn.o_proj")
            y = self.norm(x, name + "post_attention_layernorm")
            gate, up = (self.linear(y, f"{name}mlp.{z}_proj") for z in ("gate", "up"))
            y = gate / (1 + np.exp(-gate)) * up
            x = x + self.linear(y, name + "mlp.down_proj")
        return self.norm(x, "model.norm"), made

    def head(self, hidden: Array) -> Array:
        """[t, vocab_size]."""
        tied = self.config["tied_head"]
        return self.linear(hidden, "model.embed_tokens" if tied else "lm_head")

    def nothing(self) -> list[Resident]:
        """No resident entries."""
        none = np.zeros((0, self.g, self.d))
        return [Resident(none, none, np.zeros(0))] * self.layers

    def logits(self, ids: Array) -> Array:
        """[t, vocab_size] of plain causal attention."""
        return self.head(self.forward(ids, self.nothing())[0])

    def build(
        self,
        ids: Array,
        proxy: str = "pooled",
        interval: int = 8,
        window: int = 4096,
        stride: int = 2048,
        carry: int = 0,
        weight: int = 0,
        sink: int = 0,
    ) -> Cache:
        """Reads ids [n] window by window and freezes."""
        shape = Shape(len(ids), proxy, interval, window, stride, carry, weight, sink)
        cache = Cache(self, np.asarray(ids), shape)
        for start, stop in shape.windows():
            cache.read(shape.resident(start), shape.nested(start, stop))
            if stop <= shape.closed:
                cache.pool(stop)
        return cache


# ------------------------------------------------------------------ nested, select


@dataclass(frozen=True)
class Shape:
    """Integers only: which token lies where, and which entries a window may see."""

    n: int
    proxy: str  # "pooled" or "trained"
    interval: int
    window: int
    stride: int
    carry: int
    weight: int = 0  # tokens that a pooled entry counts for; 0 = interval
    sink: int = 0  # 1: pooled entry 0 is the first token

    @property
    def closed(self) -> int:
        """Tokens of full windows."""
        if self.n < self.window:
            return 0
        return self.n - (self.n - self.window) % self.stride

    @property
    def m(self) -> int:
        """Groups that end inside a full window."""
        return self.closed // self.interval

    @property
    def recent(self) -> list[Entry]:
        """Entries after the frozen cache's L1: orphans, then the partial window."""
        orphans = [("L2", i) for i in range(self.m * self.interval, self.closed)]
        return orphans + self.nested(self.closed, self.n)

    def windows(self) -> list[tuple[int, int]]:
        """Token ranges, the last one perhaps partial."""
        full = [0, *range(self.window, self.closed + 1, self.stride)]
        rest = [(self.closed, self.n)] if self.closed < self.n else []
        return list(itertools.pairwise(full)) + rest

    def nested(self, start: int, stop: int) -> list[Entry]:
        """Tokens [start, stop); if trained, with an L1 token after each group."""
        entries: list[Entry] = []
        for i in range(start, stop):
            entries.append(("L2", i))
            if self.proxy == "trained" and (i + 1) % self.interval == 0:
                entries.append(("L1", i // self.interval))
        return entries

    def resident(self, start: int) -> list[Entry]:
        """What the window that begins at token `start` sees besides itself."""
        l1: list[Entry] = [("L1", j) for j in range(start // self.interval)]
        return l1 + [("L2", i) for i in range(max(start - self.carry, 0), start)]

    def frozen(self) -> list[Entry]:
        """The timeline that a query is put after."""
        return [("L1", j) for j in range(self.m)] + self.recent

    def refilled(self, groups: Array) -> list[Entry]:
        """`frozen` with each chosen group's tokens just before its L1 entry."""
        entries: list[Entry] = []
        for j in range(self.m):
            if j in groups:
                first = j * self.interval
                entries += [("L2", i) for i in range(first, first + self.interval)]
            entries.append(("L1", j))
        return entries + self.recent


# ------------------------------------------------------------------ cache


@dataclass
class Cache:
    """Raw keys and values of every entry of the text, by layer and name."""

    model: Reference
    ids: Array
    shape: Shape
    store: list[dict[str, Array]] = field(default_factory=list)
    losses: Array = field(init=False)  # [n], -log p of each token; nan for the first

    def __post_init__(self) -> None:
        self.losses = np.full(self.shape.n, np.nan)
        rows = {"L1": self.shape.n // self.shape.interval, "L2": self.shape.n}
        for _ in range(self.model.layers):
            self.store.append(
                {
                    kind + part: np.zeros((count, self.model.g, self.model.d))
                    for kind, count in rows.items()
                    for part in ("k", "v")
                }
            )

    def rows(self, layer: int, part: str, entries: list[Entry]) -> Array:
        """[count, g, d]: keys ("k") or values ("v") of the named entries."""
        none = np.zeros((0, self.model.g, self.model.d))
        return np.array([self.store[layer][a + part][i] for a, i in entries] or none)

    def gather(self, layer: int, entries: list[Entry]) -> Resident:
        """The entries as what may be attended to in this layer."""
        pooled, sink = self.shape.proxy == "pooled", self.shape.sink
        weight = math.log(self.shape.weight or self.shape.interval) if pooled else 0.0
        bias = np.array(
            [weight if kind == "L1" and i >= sink else 0.0 for kind, i in entries]
        )
        keys, values = (self.rows(layer, part, entries) for part in "kv")
        return Resident(keys, values, bias)

    def read(self, resident: list[Entry], entries: list[Entry]) -> None:
        """Processes the entries over the resident ones; stores keys and values."""
        ids = [self.model.vocab if kind == "L1" else self.ids[i] for kind, i in entries]
        past = [self.gather(i, resident) for i in range(self.model.layers)]
        hidden, made = self.model.forward(np.array(ids), past)
        self.measure(self.model.head(hidden), entries)
        for store, layer in zip(self.store, made, strict=True):
            for row, (kind, i) in enumerate(entries):
                store[kind + "k"][i], store[kind + "v"][i] = layer.k[row], layer.v[row]

    def measure(self, logits: Array, entries: list[Entry]) -> None:
        """Losses of the tokens that entries' logits predict: the entry behind each."""
        after = ("L2", 1 + max(i for kind, i in entries if kind == "L2"))
        for row, (kind, i) in zip(logits, [*entries[1:], after], strict=True):
            if kind == "L2" and i < self.shape.n:
                self.losses[i] = -np.log(softmax(row)[self.ids[i]])

    def pool(self, stop: int) -> None:
        """The L1 entries of the groups before token `stop`: means, and the sink in the
        place of the first."""
        m = stop // self.shape.interval
        groups = (m, self.shape.interval, self.model.g, self.model.d)
        for store in self.store:
            for part in "kv":
                if self.shape.proxy == "pooled":
                    rows = store["L2" + part][: m * self.shape.interval].reshape(groups)
                    store["L1" + part][:m] = self.model.stored(rows.mean(axis=1))
                if m and self.shape.sink:
                    store["L1" + part][0] = store["L2" + part][0]

    def part(self, name: str, layer: int) -> Array:
        """A tensor by the name that `acre._core.Cache.view` knows, [rows, g, d]."""
        which, what = name.split("_")
        entries = {
            "l1": [("L1", j) for j in range(self.shape.m)],
            "l2": [("L2", i) for i in range(self.shape.closed)],
            "recent": self.shape.recent,
        }[which]
        return self.rows(layer, what[0], entries)

    # -------------------------------------------------------------- score

    def query(self, ids: Array) -> list[Layer]:
        """Runs the query's tokens over [L1 | recent]."""
        frozen = self.shape.frozen()
        past = [self.gather(i, frozen) for i in range(self.model.layers)]
        return self.model.forward(ids, past)[1]

    def score(
        self,
        query: list[Layer],
        first: int,
        last: int,
        select: str = "shared",
        rotated: bool = True,
        heads: Array | None = None,
    ) -> Array:
        """Attention mass of the L1 entries, [m], or per layer [L, m].

        query: what `query` gave; its tokens [first, last) count.
        heads: bool [L, h]. Default: the last layer's (shared), all (per layer).
        """
        model, m = self.model, self.shape.m
        use = np.zeros((model.layers, model.h), bool)
        if heads is not None:
            use |= np.asarray(heads, bool)
        elif select == "shared":
            use[-1] = True
        if select == "per_layer":
            use[~use.any(axis=1)] = True
        out = np.zeros((model.layers, m))
        for i, layer in enumerate(query if m else []):
            keys = self.part("l1_keys", i)
            keys = model.stored(model.rotate(keys)) if rotated else keys
            keys = np.repeat(keys, model.h // model.g, axis=1)
            q = (layer.q_rotated if rotated else layer.q)[first:last]
            q = model.stored(q) / math.sqrt(model.d)
            logits = np.einsum("ihd,jhd->hij", q, keys)
            out[i] = softmax(logits)[use[i]].sum(axis=(0, 1))
        return out if select == "per_layer" else out.sum(axis=0)

    def refill_count(self, eta: int, reserve: int) -> int:
        """k: how many groups the budget and the free positions allow."""
        interval, m, r = self.shape.interval, self.shape.m, len(self.shape.recent)
        room = max(self.model.w_max - m - r - reserve, 0)
        return min(eta // interval, room // interval, m)

    # -------------------------------------------------------------- refill

    def refill(self, groups: Array) -> list[list[Entry]]:
        """Each layer's timeline; groups [k] for every layer alike, or [L, k]."""
        groups = np.asarray(groups, dtype=np.int64)
        rows = np.broadcast_to(groups, (self.model.layers, groups.shape[-1]))
        return [self.shape.refilled(row) for row in rows]

    # -------------------------------------------------------------- decode

    def logits(self, ids: Array, groups: Array = ()) -> Array:
        """[t, vocab_size] of ids put after the refilled timeline."""
        timelines = self.refill(groups)
        past = [self.gather(i, entries) for i, entries in enumerate(timelines)]
        return self.model.head(self.model.forward(ids, past)[0])

    def answer(self, ids: Array, groups: Array, steps: int) -> tuple[list[int], Array]:
        """Greedy ids, and the logits [steps, vocab_size] each was chosen from."""
        said: list[int] = []
        rows = []
        for _ in range(steps):
            rows.append(
                self.logits(np.concatenate([ids, said]).astype(int), groups)[-1]
            )
            said.append(int(rows[-1].argmax()))
        return said, np.array(rows)


def choose(scores: Array, k: int) -> Array:
    """The k best groups, ties to the lower index, in text order."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    return np.sort(order[:k]).astype(np.int32)


# ------------------------------------------------------------------ plan


def fits(shape: Shape, w_max: int, eta: int, reserve: int) -> bool:
    """Whether building and asking keep every position below w_max."""
    m, longest = shape.m, max(shape.window, shape.stride)
    reading = m + longest + math.ceil(longest / shape.interval) + shape.carry
    asking = m + len(shape.recent) + min(eta, m * shape.interval) + reserve
    return (shape.n < shape.window or reading <= w_max) and asking <= w_max
