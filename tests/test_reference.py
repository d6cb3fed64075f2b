"""The oracle checked: `reference.py` against PyTorch, which shares no code with it.

Two second opinions. The models of transformers, cast to float64, for full attention and
for every kind of rotary embedding. And `WholeText`, the selective attention formulated
the other way round, in torch.float64: all nested tokens at once, an n x n mask and
relative positions for every pair, instead of windows and timelines.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
from parity import ROPES
from reference import Reference, Shape, choose, fits, round_bf16

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Tokens of a text, and w_max: transformers takes the text's length for "dynamic".
N = 96


def rope_parameters(rope: dict[str, Any]) -> dict[str, Any]:
    """Our rope fields by the names that transformers uses."""
    names = {
        "kind": "rope_type",
        "theta": "rope_theta",
        "original_positions": "original_max_position_embeddings",
    }
    out = {names.get(key, key): value for key, value in rope.items()}
    if out.get("attention_factor") == 0.0:
        del out["attention_factor"]
    return out


def hugging_face(settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    """The same model as a float64 module of transformers."""
    qwen = any(name.endswith("q_proj.bias") for name in tensors)
    kind = "Qwen2" if qwen else "Llama"
    rope = settings["rope"]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["ffn"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"],
        head_dim=settings["head_dim"],
        max_position_embeddings=rope.get("original_positions", settings["w_max"]),
        rms_norm_eps=settings["rms_eps"],
        rope_parameters=rope_parameters(rope),
        tie_word_embeddings=settings["tied_head"],
        attn_implementation="sdpa",
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    state = {name: torch.tensor(a, dtype=torch.float64) for name, a in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    return model


class ExactRotary(torch.nn.Module):
    """cos and sin in float64, where transformers computes them in float32."""

    def __init__(self, reference: Reference):
        super().__init__()
        self.frequency = torch.tensor(reference.frequency)
        self.gain = reference.gain

    def forward(self, x: Any, position_ids: Any, **_: Any) -> tuple[Any, Any]:
        angle = position_ids[..., None].double() * self.frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos() * self.gain, angle.sin() * self.gain


def make_exact(model: Any, reference: Reference) -> None:
    """Replaces the two places where transformers falls back to float32."""
    model.model.rotary_emb = ExactRotary(reference)

    def exact(old: Any) -> Any:
        new = torch.nn.RMSNorm(old.weight.shape, eps=old.variance_epsilon).double()
        new.weight = old.weight
        return new

    model.model.norm = exact(model.model.norm)
    for layer in model.model.layers:
        layer.input_layernorm = exact(layer.input_layernorm)
        layer.post_attention_layernorm = exact(layer.post_attention_layernorm)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_attention_is_that_of_transformers(family: str, rope: str) -> None:
    settings = tiny.config(family, w_max=N, rope=ROPES[rope])
    tensors = tiny.tensors(1, family)
    reference = Reference(settings, tensors)
    theirs = hugging_face(settings, tensors)
    ids = tiny.ids(2, N)
    ours = reference.logits(ids)
    with torch.no_grad():
        batch = torch.tensor(ids[None].astype(np.int64))
        # As it comes: its angles and norms are float32.
        np.testing.assert_allclose(ours, theirs(batch).logits[0].numpy(), atol=3e-5)
        make_exact(theirs, reference)
        np.testing.assert_allclose(ours, theirs(batch).logits[0].numpy(), atol=1e-10)


@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "default"])
def test_frequencies_are_those_of_transformers(rope: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = tiny.config(w_max=N, rope=ROPES[rope], head_dim=64)
    reference = Reference(settings, {"model.embed_tokens.weight": np.zeros((61, 32))})
    kind = ROPES[rope]["kind"]
    config = transformers.LlamaConfig(
        head_dim=64,
        max_position_embeddings=ROPES[rope].get("original_positions", N),
        rope_parameters=rope_parameters(ROPES[rope]),
    )
    inverse, gain = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=N)
    np.testing.assert_allclose(reference.frequency, inverse.numpy(), rtol=3e-6)
    assert reference.gain == pytest.approx(gain, rel=1e-12)


class WholeText:
    """Selective attention of a whole text and a question in one pass, torch.float64.

    Columns are every entry that exists (nested tokens, pooled entries, then the
    question's tokens). For each pair (row, column), `place` holds the column's position
    as that row's window counts it, or -1 where the row may not look. Rotation is
    relative: the query is turned by the difference of the two positions, the key not at
    all.
    """

    def __init__(self, reference: Reference, shape: Shape, ids: Any, question: Any):
        self.ref, self.shape = reference, shape
        self.weights = {k: torch.tensor(v) for k, v in reference.tensors.items()}
        self.rows = shape.nested(0, shape.n) + [("Q", i) for i in range(len(question))]
        self.columns = list(self.rows)
        if shape.proxy == "pooled":
            groups = range(shape.n // shape.interval)
            self.columns += [("L1", j) for j in groups]
        code = {"Q": question, "L2": ids}
        self.ids = torch.tensor(
            [reference.vocab if a == "L1" else int(code[a][i]) for a, i in self.rows]
        )

    def window_of(self, token: int) -> int:
        """The number of the window that holds a token, counted from its formula."""
        over = token - self.shape.window
        return 0 if over < 0 else 1 + over // self.shape.stride

    def starts(self, token: int) -> int:
        """The first token of the token's window."""
        number = self.window_of(token)
        return (
            0 if number == 0 else self.shape.window + (number - 1) * self.shape.stride
        )

    def sees(self, row: Any, column: Any, groups: Any) -> float | None:
        """A sort key of the column among all that the row sees, or None."""
        (a, i), (b, j), span = row, column, self.shape.interval
        ends = (j + 1) * span - 1 if b == "L1" else j  # the last token it speaks of
        if a == "Q":
            if b == "Q":
                return 1e6 + j if j <= i else None
            closed = self.shape.closed
            if b == "L1":
                pooled_later = self.shape.proxy == "pooled" and ends >= closed
                return None if pooled_later else ends + 0.5
            resident = ends // span >= closed // span
            return ends if resident or ends // span in groups else None
        if b == "Q":
            return None
        at = (i + 1) * span - 1 if a == "L1" else i
        first = self.starts(at)
        if ends >= first:
            if b == "L1" and self.shape.proxy == "pooled":
                return None
            later = ends > at or (ends == at and b == "L1" and a == "L2")
            return None if later else 1e6 + ends + (0.5 if b == "L1" else 0)
        if b == "L1":
            return ends
        return 1e5 + ends if ends >= first - self.shape.carry else None

    def places(self, groups: Any) -> tuple[Any, Any]:
        """(place [rows, columns], own place [rows])."""
        place = np.full((len(self.rows), len(self.columns)), -1)
        own = np.zeros(len(self.rows), int)
        for at, row in enumerate(self.rows):
            keys = {}
            for c, column in enumerate(self.columns):
                key = self.sees(row, column, groups)
                if key is not None:
                    keys[c] = key
            for position, c in enumerate(sorted(keys, key=keys.__getitem__)):
                place[at, c] = position
                if c == at:
                    own[at] = position
        return torch.tensor(place), torch.tensor(own)

    def turn(self, x: Any, steps: Any) -> Any:
        """x [..., d] rotated by steps [...]."""
        angle = steps[..., None].double() * torch.tensor(self.ref.frequency)
        pair = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([pair.real, pair.imag], dim=-1)

    def project(self, x: Any, layer: int, letter: str) -> Any:
        """[rows, heads, d], L1 rows by their own weights."""
        sides = []
        for prefix in ("", "acre_"):
            name = f"model.layers.{layer}.self_attn.{prefix}{letter}_proj."
            bias = self.weights.get(name + "bias")
            weight = self.weights[name + "weight"]
            sides.append(torch.nn.functional.linear(x, weight, bias))
        y = torch.where((self.ids == self.ref.vocab)[:, None], sides[1], sides[0])
        return y.reshape(len(x), -1, self.ref.d)

    def pooled(self, x: Any) -> Any:
        """x with the groups' means appended, where the proxy is pooled."""
        if self.shape.proxy != "pooled":
            return x
        span = self.shape.interval
        count = self.shape.n // span
        means = x[: count * span].unflatten(0, (count, span)).mean(dim=1)
        return torch.cat([x, means])

    def run(self, groups_by_layer: list[Any]) -> tuple[Any, list[Any], list[Any]]:
        """(logits [rows, vocab], keys by layer, values by layer) of all columns."""
        w, eps = self.weights, self.ref.config["rms_eps"]
        table = [w["model.embed_tokens.weight"], w["model.acre_embed_tokens.weight"]]
        x = torch.cat(table)[self.ids]
        pooled = self.shape.proxy == "pooled"
        weight = math.log(self.shape.interval) if pooled else 0.0
        is_l1 = torch.tensor([float(a == "L1") for a, _ in self.columns]).double()
        norm = torch.nn.functional.rms_norm
        all_keys, all_values = [], []
        for i, groups in enumerate(groups_by_layer):
            place, own = self.places({int(g) for g in groups})
            name = f"model.layers.{i}."
            y = norm(x, x.shape[-1:], w[name + "input_layernorm.weight"], eps)
            q, k, v = (self.project(y, i, z) for z in "qkv")
            k, v = self.pooled(k), self.pooled(v)
            all_keys.append(k)
            all_values.append(v)
            share = self.ref.h // self.ref.g
            k, v = (z.repeat_interleave(share, dim=1) for z in (k, v))
            turned = self.turn(
                q[:, None].expand(-1, len(k), -1, -1),
                (own[:, None] - place)[..., None].expand(-1, -1, self.ref.h),
            )
            logits = torch.einsum("ijhd,jhd->hij", turned, k) / math.sqrt(self.ref.d)
            logits = (logits + weight * is_l1).masked_fill(place < 0, -math.inf)
            y = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).flatten(1)
            x = x + y @ w[name + "self_attn.o_proj.weight"].T
            y = norm(x, x.shape[-1:], w[name + "post_attention_layernorm.weight"], eps)
            gate, up = (y @ w[f"{name}mlp.{z}_proj.weight"].T for z in ("gate", "up"))
            y = torch.nn.functional.silu(gate) * up
            x = x + y @ w[name + "mlp.down_proj.weight"].T
        x = norm(x, x.shape[-1:], w["model.norm.weight"], eps)
        tied = self.ref.config["tied_head"]
        head = w["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return x @ head.T, all_keys, all_values


CASES = [
    # n, l, W, s, carry
    (37, 4, 16, 8, 0),
    (37, 4, 16, 8, 5),
    (40, 4, 16, 8, 0),  # ends on a boundary
    (41, 5, 13, 7, 0),  # straddling groups, orphans
    (41, 5, 13, 7, 7),
    (10, 4, 16, 8, 0),  # shorter than a window
    (9, 1, 3, 2, 1),  # one token per group
    (11, 2, 1, 1, 1),  # one token per window
    (29, 9, 4, 3, 2),  # a group longer than a window
]


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
@pytest.mark.parametrize("proxy", ["pooled", "trained"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selective_attention_is_that_of_the_whole_text(
    case: tuple[int, ...], proxy: str, trained: bool
) -> None:
    n, interval, window, stride, carry = case
    family = tiny.FAMILIES[n % 2]
    reference = Reference(tiny.config(family), tiny.tensors(n, family, trained))
    ids, question = tiny.ids(3, n), tiny.ids(4, 5)
    cache = reference.build(ids, proxy, interval, window, stride, carry)
    m = cache.shape.m
    rng = np.random.default_rng(n)
    groups = [np.sort(rng.permutation(m)[: m // 2]) for _ in range(reference.layers)]
    whole = WholeText(reference, cache.shape, ids, question)
    logits, keys, values = whole.run(groups)
    where = {entry: row for row, entry in enumerate(whole.columns)}
    for i in range(reference.layers):
        for part, theirs in (("k", keys[i]), ("v", values[i])):
            entries = [("L2", t) for t in range(n)] + [("L1", j) for j in range(m)]
            rows = theirs.numpy()[[where[e] for e in entries]]
            np.testing.assert_allclose(cache.rows(i, part, entries), rows, atol=1e-10)
    ours = cache.logits(question, np.array(groups))
    theirs = logits.numpy()[whole.ids.shape[0] - len(question) :]
    np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_a_window_over_everything_is_full_attention() -> None:
    reference = Reference(tiny.config(), tiny.tensors(0))
    ids, question = tiny.ids(1, 30), tiny.ids(2, 4)
    cache = reference.build(ids, "pooled", 4, 31, 8)
    whole = reference.logits(np.concatenate([ids, question]))[-4:]
    np.testing.assert_allclose(cache.logits(question), whole, atol=1e-12)


def test_refilling_everything_names_every_token_once_in_order() -> None:
    for n, *sizes in CASES:
        shape = Shape(n, "trained", *sizes)
        entries = shape.refilled(np.arange(shape.m))
        assert [i for kind, i in entries if kind == "L2"] == list(range(n))
        assert entries == shape.nested(0, n)


def test_scores_sum_to_heads_times_tokens() -> None:
    reference = Reference(tiny.config(), tiny.tensors(0))
    cache = reference.build(tiny.ids(1, 40), "pooled", 4, 16, 8)
    query = cache.query(tiny.ids(2, 6))
    assert cache.score(query, 1, 5).sum() == pytest.approx(4 * 4)
    each = cache.score(query, 1, 5, select="per_layer")
    np.testing.assert_allclose(each.sum(axis=1), [16, 16])
    np.testing.assert_allclose(each[-1], cache.score(query, 1, 5))


def test_ties_go_to_the_lower_index() -> None:
    assert choose(np.array([1.0, 3, 3, 0, 3]), 2).tolist() == [1, 2]
    assert choose(np.zeros(4), 3).tolist() == [0, 1, 2]


def test_rounding_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(10000) * 10.0 ** rng.integers(-30, 30, 10000)
    theirs = torch.tensor(x, dtype=torch.float32).bfloat16().double().numpy()
    np.testing.assert_array_equal(round_bf16(x), theirs)


def test_fit_rule() -> None:
    shape = Shape(100, "pooled", 4, 40, 20, 0)  # closed 100, m 25, r 0
    assert fits(shape, 75, 16, 32)  # reading 25 + 40 + 10; asking 25 + 0 + 16 + 32
    assert not fits(shape, 74, 16, 32)
    assert not fits(shape, 75, 16, 35)
    assert fits(shape, 125, 1000, 0)  # no more than m * l tokens come back
