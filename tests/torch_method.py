"""The training objective of the method in plain PyTorch, differentiable by autograd.

Takes the model configuration (the dict of `acre._core.Model`), its tensors by Hugging
Face name and a dtype; gives `TorchMethod.example`, the loss of one example as
`acre._core.Trainer.accumulate` defines it: float64 is the oracle of the gradients,
bfloat16 the yardstick of speed. One idea: what was read is a table of `Entries`, raw
keys and values of every layer beside the names of the tokens they belong to, and a
window sees a selection of its rows. Only the L1 parameters require gradients. Refuses
numbers of intervals that are not the number of windows, little else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from reference import frequencies
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

EMBEDDING = "model.acre_embed_tokens.weight"
CHUNK = 512  # rows of logits held at once


# ------------------------------------------------------------------------- integers


class Span(NamedTuple):
    """One window: tokens [start, stop), its interval, and whether it is full."""

    start: int
    stop: int
    interval: int
    closed: bool


def spans(n: int, intervals: Sequence[int], window: int, stride: int) -> list[Span]:
    """The windows of n tokens; ValueError unless there is one interval for each."""
    stops = [*range(min(window, n), n, stride), n]
    if len(intervals) != len(stops):
        raise ValueError(f"intervals: got {len(intervals)}, expected {len(stops)}")
    out, start = [], 0
    for stop, interval in zip(stops, intervals, strict=True):
        closed = stop - start == (stride if start else window)
        out.append(Span(start, stop, int(interval), closed))
        start = stop
    return out


class Rows(NamedTuple):
    """Names of entries: a token, or the L1 token that comes directly after it."""

    token: np.ndarray  # [e]
    is_l1: np.ndarray  # [e], bool

    def targets(self, end: int) -> np.ndarray:
        """[e] the token that each row predicts, -1 for none; `end` tokens in all."""
        after = self.token[-1] + 1
        last = after if after < end else -1
        return np.append(np.where(self.is_l1[1:], -1, self.token[1:]), last)


def nested(span: Span) -> Rows:
    """The window's tokens, an L1 token after each one that ends a group."""
    token = np.arange(span.start, span.stop)
    ends = token[(token + 1) % span.interval == 0]
    where = ends - span.start + 1
    is_l1 = np.insert(np.zeros(len(token), bool), where, True)
    return Rows(np.insert(token, where, ends), is_l1)


def wanted(ends: np.ndarray, evidence: Any) -> np.ndarray:
    """[m] whether an L1 entry's tokens, the last ones at `ends`, hold evidence."""
    before = np.concatenate([[0], np.cumsum(np.asarray(evidence, bool))])
    return np.diff(before[np.concatenate([[0], ends + 1])]) > 0


class Entries(NamedTuple):
    """Entries and what each layer made of them."""

    rows: Rows
    layers: list[tuple[Tensor, Tensor]]  # keys before RoPE and values, [e, g, d]

    def take(self, index: np.ndarray) -> Entries:
        where = torch.from_numpy(index)
        layers = [(k[where], v[where]) for k, v in self.layers]
        return Entries(Rows(*(part[index] for part in self.rows)), layers)

    def join(self, other: Entries) -> Entries:
        rows = map(np.concatenate, zip(self.rows, other.rows, strict=True))
        pairs = zip(self.layers, other.layers, strict=True)
        layers = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in pairs]
        return Entries(Rows(*rows), layers)

    def compact(self, since: int) -> Entries:
        """All L1 entries, then the tokens from `since` on."""
        token, is_l1 = self.rows
        tokens = np.flatnonzero(~is_l1 & (token >= since))
        return self.take(np.concatenate([np.flatnonzero(is_l1), tokens]))

    def ends(self) -> np.ndarray:
        """[m] the last token of each group."""
        return self.rows.token[self.rows.is_l1]

    def orphans(self) -> int:
        """The first token that no L1 entry stands for."""
        return int(max(self.ends() + 1, default=0))


# ------------------------------------------------------------------------- model


class Place(NamedTuple):
    """What all layers of one pass share: t rows behind p entries."""

    l1_rows: Tensor  # indices of the L1 tokens among the rows
    cos: Tensor  # [p + t, 1, d]
    sin: Tensor
    visible: Tensor  # [t, p + t], bool


class Judge(NamedTuple):
    """The evidence term: which rows score which entries with which heads."""

    rows: slice
    wanted: Tensor  # [m], bool
    heads: Tensor  # [L, h], bool

    def mass(self, i: int, q: Tensor, keys: Tensor, wide: torch.dtype) -> Tensor:
        """[m] layer i's attention mass, summed over heads and rows."""
        q, keys = q[self.rows, self.heads[i]], keys[: len(self.wanted), self.heads[i]]
        logits = torch.einsum("ihd,jhd->hij", q, keys) / math.sqrt(q.shape[-1])
        return logits.to(wide).softmax(-1).sum((0, 1))


class TorchMethod:
    """A frozen model and the L1 parameters that learn.

    parameters: Hugging Face name -> leaf tensor, initially `tensors`' or METHOD.md's.
    checkpoint: layers and losses are computed anew on the way back, not kept.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Any],
        dtype: torch.dtype = torch.float64,
        checkpoint: bool = False,
    ):
        self.config, self.dtype, self.checkpoint = config, dtype, checkpoint
        self.wide = torch.promote_types(dtype, torch.float32)  # of norms and losses
        self.layers, self.vocab = config["layers"], config["vocab_size"]
        self.h, self.g, self.d = config["heads"], config["kv_heads"], config["head_dim"]
        self.tensors = {n: torch.as_tensor(a).to(dtype) for n, a in tensors.items()}
        self.parameters = self._parameters()
        self.tensors |= self.parameters
        frequency, self.gain = frequencies(config["rope"], self.d, config["w_max"])
        self.frequency = torch.from_numpy(np.concatenate([frequency, frequency]))

    def _parameters(self) -> dict[str, Tensor]:
        """Leaves: what came, or else the EOS row and copies of q, k, v."""
        row = max(self.config.get("eos_id", -1), 0)
        values = {EMBEDDING: self.tensors["model.embed_tokens.weight"][row : row + 1]}
        for name, tensor in self.tensors.items():
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                values[name.replace("self_attn.", "self_attn.acre_")] = tensor
        for name in values:
            start = self.tensors.get(name, values[name])
            values[name] = start.detach().clone().requires_grad_()
        return values

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors[name + ".weight"].to(self.wide)
        y = functional.rms_norm(
            x.to(self.wide), weight.shape, weight, self.config["rms_eps"]
        )
        return y.to(self.dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.tensors.get(name + end) for end in (".weight", ".bias"))
        return functional.linear(x, weight, bias)

    def project(self, x: Tensor, i: int, letter: str, l1_rows: Tensor) -> Tensor:
        """[t, heads, d]: the L1 tokens pass the layer's own L1 projection."""
        name = f"model.layers.{i}.self_attn."
        y = self.linear(x, f"{name}{letter}_proj")
        own = self.linear(x[l1_rows], f"{name}acre_{letter}_proj")
        return y.index_copy(0, l1_rows, own).unflatten(1, (-1, self.d))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Any:
        """[t, h d]; keys and values have h heads."""
        q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))
        y = functional.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
        return y[0].transpose(0, 1).flatten(1)

    def layer(
        self, i: int, x: Tensor, place: Place, past: Any, judge: Judge | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(x after layer i, the rows' raw keys and values, the evidence's mass)."""
        name = f"model.layers.{i}."
        y = self.norm(x, name + "input_layernorm")
        q, k, v = (self.project(y, i, letter, place.l1_rows) for letter in "qkv")
        keys, values = torch.cat([past[0], k]), torch.cat([past[1], v])
        p, share = len(past[0]), self.h // self.g
        q = rotate(q, place.cos[p:], place.sin[p:])
        keys = rotate(keys, place.cos, place.sin).repeat_interleave(share, 1)
        y = self.attend(q, keys, values.repeat_interleave(share, 1), place.visible)
        x = x + self.linear(y, name + "self_attn.o_proj")
        y = self.norm(x, name + "post_attention_layernorm")
        gate, up = (self.linear(y, f"{name}mlp.{z}_proj") for z in ("gate", "up"))
        x = x + self.linear(functional.silu(gate) * up, name + "mlp.down_proj")
        return x, k, v, judge.mass(i, q, keys, self.wide) if judge else None

    def place(self, is_l1: np.ndarray, p: int) -> Place:
        """The place of rows behind p entries, at positions p, p + 1, ..."""
        count = p + len(is_l1)
        position = torch.arange(count)
        angle = torch.outer(position.double(), self.frequency)[:, None]
        turn = [(self.gain * f(angle)).to(self.dtype) for f in (torch.cos, torch.sin)]
        visible = position <= position[p:, None]
        return Place(torch.from_numpy(np.flatnonzero(is_l1)), *turn, visible)

    def run(
        self, rows: Rows, ids: Tensor, past: Entries, judge: Judge | None = None
    ) -> tuple[Tensor, Entries, Tensor | None]:
        """(hidden states [t, hidden], the rows' entries, the judge's mass [m])."""
        place = self.place(rows.is_l1, len(past.rows.token))
        table = self.tensors["model.embed_tokens.weight"]
        own = self.tensors[EMBEDDING].expand(len(place.l1_rows), -1)
        x = table[ids].index_copy(0, place.l1_rows, own)
        made, mass = [], []
        for i in range(self.layers):
            x, k, v, more = self.maybe(self.layer, i, x, place, past.layers[i], judge)
            made.append((k, v))
            mass.append(more)
        hidden = self.norm(x, "model.norm")
        return hidden, Entries(rows, made), sum(mass) if judge else None

    def maybe(self, function: Any, *arguments: Any) -> Any:
        """function(*arguments), recomputed on the way back where that is asked for."""
        if self.checkpoint and torch.is_grad_enabled():
            return recomputed(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def head(self, hidden: Tensor) -> Tensor:
        """[t, vocab_size], wide."""
        name = "model.embed_tokens" if self.config["tied_head"] else "lm_head"
        return self.linear(hidden, name).to(self.wide)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(hidden), targets, reduction="none")

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[t], nats."""
        pairs = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.cat([self.maybe(self.cross_entropy, *pair) for pair in pairs])

    def nothing(self) -> Entries:
        empty = torch.zeros(0, self.g, self.d, dtype=self.dtype)
        rows = Rows(np.zeros(0, int), np.zeros(0, bool))
        return Entries(rows, [(empty, empty)] * self.layers)

    # --------------------------------------------------------------------- example

    def example(
        self,
        ids: Any,
        intervals: Sequence[int],
        window: int,
        stride: int,
        carry: int = 0,
        weights: Any = None,
        questions: Sequence[tuple[Any, Any, Any, Any]] = (),
        heads: Any = None,
    ) -> tuple[Tensor, float, list[Tensor]]:
        """(sum of weight * nats, sum of weights, the shares of mass that each
        question's tokens put on each L1 entry of its evidence). A question is (ids,
        weights, query, evidence)."""
        text = Reader(self, ids, weights)
        past = text.read(spans(len(ids), intervals, window, stride), carry)
        loss, weight, shares = text.loss, text.weight, []
        for asked, own_weights, query, evidence in questions:
            judge = None
            if evidence is not None:
                judge = self.judge(past.entries.ends(), evidence, query, heads)
            reader = Reader(self, asked, own_weights)
            mass = reader.ask(past, judge)
            loss, weight = loss + reader.loss, weight + reader.weight
            if judge is not None and judge.wanted.any():
                shares.append(mass[judge.wanted] / mass.sum())
        return loss, weight, shares

    def judge(self, ends: Any, evidence: Any, query: Any, heads: Any) -> Judge:
        """The evidence term over the groups that end at `ends`."""
        use = np.zeros((self.layers, self.h), bool)
        use[-1] = True
        if heads is not None:
            use = np.asarray(heads, bool)
        mask = torch.from_numpy(wanted(ends, evidence))
        return Judge(slice(*query), mask, torch.from_numpy(use))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [t, heads, d]; pairs (i, i + d/2)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Past(NamedTuple):
    """The text when it is read: closed windows, and the partial one's entries."""

    entries: Entries
    recent: Entries


class Reader:
    """A text, or a question behind one, under way."""

    def __init__(self, method: TorchMethod, ids: Any, weights: Any):
        self.method = method
        self.text = torch.from_numpy(np.asarray(ids).astype(np.int64))
        weights = np.ones(len(self.text)) if weights is None else weights
        self.weights = torch.as_tensor(np.asarray(weights)).to(method.wide)
        self.weight = float(self.weights[1:].sum())
        self.loss: Tensor = torch.zeros((), dtype=method.wide)

    def measure(self, hidden: Tensor, rows: Rows) -> None:
        """Adds the losses of the tokens that the rows predict and that count."""
        targets = rows.targets(len(self.text))
        counts = self.weights[torch.from_numpy(targets)].numpy() > 0
        at = np.flatnonzero((targets >= 0) & counts)
        if len(at):
            where = torch.from_numpy(targets[at])
            nats = self.method.losses(hidden[torch.from_numpy(at)], self.text[where])
            self.loss = self.loss + (self.weights[where] * nats).sum()

    def window(self, span: Span, seen: Entries) -> Entries:
        """Reads one window over what it sees; gives its entries."""
        rows = nested(span)
        ids = self.text[torch.from_numpy(rows.token)]
        hidden, made, _ = self.method.run(rows, ids, seen)
        self.measure(hidden, rows)
        return made

    def read(self, windows: list[Span], carry: int) -> Past:
        """Reads the context; only entries that something may yet see are kept."""
        past = recent = self.method.nothing()
        for span in windows:
            made = self.window(span, past.compact(span.start - carry))
            if span.closed:
                past = past.join(made)
                past = past.compact(min(span.stop - carry, past.orphans()))
            else:
                recent = made
        return Past(past.compact(past.orphans()), recent)

    def ask(self, past: Past, judge: Judge | None) -> Tensor | None:
        """Reads the question; gives the mass that the judge finds on each L1 entry."""
        t = len(self.text)
        rows = Rows(np.arange(t), np.zeros(t, bool))
        seen = past.entries.join(past.recent)
        hidden, _, mass = self.method.run(rows, self.text, seen, judge)
        self.measure(hidden, rows)
        return mass
