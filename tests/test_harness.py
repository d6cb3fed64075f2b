"""lm-evaluation-harness: full attention equals its own transformers model's, long
contexts are read once, and its command line knows `--model acre`."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import toy
from tokenizers import processors

import acre
from acre import _core
from acre.fingerprints import Prints
from acre.harness.contexts import Contexts, Reading, last_lines

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from acre.harness import AcreLM  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
LONG = {
    "full_below": 200,
    "question_tokens": 48,
    "window": 128,
    "stride": 64,
    "interval": 8,
    "eta": 64,
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def requests(*arguments: tuple) -> list[Instance]:
    """Requests as tasks make them."""
    return [Instance("generate_until", {}, args, i) for i, args in enumerate(arguments)]


def directory(path: pathlib.Path, family: str, bos: bool) -> str:
    """A model's directory; bos: its tokenizer begins texts with <|endoftext|>."""
    toy.directory(path, family)
    if bos:
        tok = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        name = "<|endoftext|>"
        tok.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", special_tokens=[(name, tok.token_to_id(name))]
        )
        tok.save(str(path / "tokenizer.json"))
        words = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(
            json.dumps(words | {"bos_token": name})
        )
    return str(path)


@pytest.fixture(scope="module", params=["llama", "llama with BOS", "qwen2"])
def pair(request, tmp_path_factory):
    """(the harness's model, ours) of the same files, in float32."""
    pytest.importorskip("accelerate")
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    family, _, bos = request.param.partition(" with ")
    path = directory(tmp_path_factory.mktemp("hf") / "model", family, bool(bos))
    theirs = HFLM(pretrained=path, device="cpu", dtype="float32")
    ours = AcreLM(path, dtype="f32", threads=1)
    assert (ours.tok_encode("a")[0] == ours.prefix_token_id) == bool(bos)
    return theirs, ours


@pytest.fixture
def lm(model) -> AcreLM:
    return AcreLM(model)


@pytest.fixture
def long(model) -> AcreLM:
    return AcreLM(model, **LONG)


# ------------------------------------------------------------- beside the harness's own


CHAT = "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"


def test_loglikelihood_equals_transformers(pair):
    theirs, ours = pair
    contexts = ["", "the", toy.sentence(1, 60), toy.sentence(1, 50) + " ", CHAT]
    asked = requests(
        *((c, x) for x in (" grey gulls", "a", " ", "<|im_end|>") for c in contexts),
        ("", ours.tokenizer.decode([ours.prefix_token_id], skip_special=False) + "a"),
    )
    wanted, got = theirs.loglikelihood(asked), ours.loglikelihood(asked)
    np.testing.assert_allclose(
        [sum_ for sum_, _ in got], [sum_ for sum_, _ in wanted], rtol=1e-5, atol=1e-5
    )
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]


def test_greedy_continuations_are_told(pair):
    theirs, ours = pair
    context = ours.tok_encode(toy.sentence(3, 30))
    best = ours.acre.generate_ids(context, max_new_tokens=6).tolist()
    other = [*best[:-1], (best[-1] + 1) % toy.VOCAB]
    asked = [
        (("", str(i)), context, ids)
        for i, ids in enumerate((best, other, best[:2], other[-1:], best[:1]))
    ]
    wanted = theirs._loglikelihood_tokens(asked)
    got = ours._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in wanted] == [True, False, True, False, True]
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    sums = [[a for a, _ in one] for one in (got, wanted)]
    np.testing.assert_allclose(*sums, rtol=1e-5, atol=1e-5)


def test_all_positions_are_used_before_a_cache_is(pair):
    theirs, ours = pair
    ids = ours.tok_encode(toy.sentence(4, 400))[: ours.max_length + 1]
    asked = [(("", ""), ids[:-9], ids[-9:])]
    (wanted,), (got,) = (lm._loglikelihood_tokens(asked) for lm in pair)
    assert got[0] == pytest.approx(wanted[0], abs=1e-4)
    assert not ours.contexts.is_full(len(ids) - 9, 9)


def test_rolling_equals_transformers(pair):
    theirs, ours = pair
    asked = requests((toy.sentence(4, 900),), ("x",), ("",), (toy.sentence(5, 20),))
    assert len(ours.tok_encode(asked[0].args[0])) > 2 * ours.max_length
    wanted, got = theirs.loglikelihood_rolling(asked), ours.loglikelihood_rolling(asked)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-4)


def test_generation_equals_transformers(pair):
    theirs, ours = pair
    free = ours.generate_until(requests(("the", {"max_gen_toks": 24})))[0]
    middle = free[len(free) // 2]
    kwargs = (
        {"until": [], "max_gen_toks": 24},
        {"until": [middle], "max_gen_toks": 24, "do_sample": False},
        {"until": "\n", "max_new_tokens": 5, "temperature": 0.0},
    )
    asked = requests(*((c, k) for k in kwargs for c in ("the", toy.sentence(1, 60))))
    got = ours.generate_until(asked)
    assert got == theirs.generate_until(asked)
    assert got[0] == free and len(got[2]) < len(free) and middle not in got[2]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_chat_templates_equal_transformers(pair, turns):
    theirs, ours = pair
    talk = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": " hello  "},
        {"role": "assistant", "content": " The answer: "},
    ][-turns:]
    for ask in (True, False):
        wanted = theirs.apply_chat_template(talk, add_generation_prompt=ask)
        assert ours.apply_chat_template(talk, add_generation_prompt=ask) == wanted
    assert ours.chat_template(True) == theirs.chat_template(True) == toy.TEMPLATE


# ----------------------------------------------------------------------- long contexts


def test_a_question_is_the_last_lines():
    ends = {9}.__contains__
    ids = np.array([1, 9, 2, 3, 9, 4, 9])
    assert last_lines(ids, 100, ends) == 2
    assert last_lines(ids, 5, ends) == 2
    assert last_lines(ids, 4, ends) == 5
    assert last_lines(ids, 2, ends) == 5
    assert last_lines(ids, 1, ends) == 6  # no line begins in it
    assert last_lines(np.array([1, 2]), 7, ends) == 1


def test_a_long_context_that_fits_its_window_loses_nothing(model, lm):
    open_ = AcreLM(model, full_below=0, question_tokens=64)
    asked = requests(*((toy.sentence(6, 80), x) for x in (" grey", " stone bridges")))
    for (wanted, _), (got, _) in zip(
        lm.loglikelihood(asked), open_.loglikelihood(asked), strict=True
    ):
        assert got == pytest.approx(wanted, abs=1e-4)
    kwargs = {"max_gen_toks": 8}
    asked = requests((toy.sentence(6, 80), kwargs))
    assert open_.generate_until(asked) == lm.generate_until(asked)
    assert open_.contexts.caches_read > 0


def test_a_long_context_is_what_its_cache_answers(model, long):
    """Scores and texts are those of build, score, refill by hand."""
    context = toy.sentence(7, 160) + "Who kept the ledger?\nAnswer:"
    ids = np.array(long.tok_encode(context), dtype=np.int32)
    tail = len(long.tok_encode("Who kept the ledger?\nAnswer:"))
    options = {key: LONG[key] for key in ("window", "stride", "interval", "eta")}
    cache = model.build(ids[:-tail], reserve=128, progress=False, **options)
    question, new = ids[-tail:], long.tok_encode(" grey gulls")
    k = cache.core.refill_count(LONG["eta"])
    assert 0 < k < cache.plan["m"]
    groups = _core.select_groups(cache.score(question), k)
    session = _core.Session(model.core, cache.core, capacity=len(ids))
    session.refill(groups)
    rows = session.prefill(np.concatenate([question, new[:-1]]), logits=True)[
        tail - 1 :
    ]
    norm = np.log(np.exp(rows.astype(np.float64)).sum(axis=1))
    wanted = (rows[np.arange(len(new)), new] - norm).sum()
    got = long.loglikelihood(requests((context, " grey gulls")))[0][0]
    assert got == pytest.approx(wanted, abs=1e-5)
    full = AcreLM(model).loglikelihood(requests((context, " grey gulls")))[0][0]
    assert abs(full - wanted) > 1e-3
    text = cache.ask(question, eta=LONG["eta"], max_new_tokens=9).text
    assert long.generate_until(requests((context, {"max_gen_toks": 9}))) == [text]


def test_a_long_continuation_takes_a_context_to_a_cache(model):
    """It has positions of its own in the reserve of the cache."""
    lm = AcreLM(model, **(LONG | {"full_below": None}))
    context, more = toy.sentence(1, 260), toy.sentence(2, 120)
    n, t = len(lm.tok_encode(context)), len(lm.tok_encode(more))
    assert n < lm.max_length < n + t and t > lm.contexts.answer_room
    (total, _), *_ = lm.loglikelihood(requests((context, more), (context, " a")))
    assert np.isfinite(total) and total < 0


def test_one_text_is_read_once(model, long):
    """Choices share a context, questions a text; the order of requests is kept, and no
    answer depends on what was asked beside it."""
    lines = "".join(toy.sentence(i, 5) for i in range(40))
    other = "".join(toy.sentence(i, 5) for i in range(50, 90))
    questions = ("Who?\n", "Where did the keeper write it all?\n", "And why?\n")
    asked = [
        (text + question, choice)
        for choice in (" grey gulls", " stone", " a")
        for text in (other, lines)
        for question in questions
    ]
    got = long.loglikelihood(requests(*asked))
    contexts = long.contexts
    assert contexts.caches_read == 2
    assert 2 <= contexts.caches_extended <= 4  # where the text of a question is longer
    length = len(long.tok_encode(lines + other))
    assert contexts.tokens_read < length + 4 * LONG["question_tokens"]
    alone = [AcreLM(model, **LONG).loglikelihood(requests(one))[0] for one in asked]
    assert got == alone
    long.generate_until(requests((other + questions[0], {"max_gen_toks": 2})))
    assert contexts.caches_read == 3  # the last one read was of `lines`
    long.loglikelihood(requests((other + questions[0], " grey gulls")))
    assert contexts.caches_read == 3
    long.generate_until(
        requests(
            *((text + question, {"max_gen_toks": 1})
              for question in questions for text in (other, lines))
        )
    )  # fmt: skip
    assert contexts.caches_read == 4


def test_neighbours_do_not_change_an_answer(model):
    """Texts with a common beginning that is not to be shared: it ends inside a closed
    window, or the longer one takes another interval or another reserve."""
    lines = "".join(toy.sentence(i, 5) for i in range(80))
    half = lines[: len(lines) // 3]
    small = toy.model(w_max=448)
    for one, options, contexts in (
        (model, LONG, (half + toy.sentence(60, 40), half + toy.sentence(61, 40))),
        (small, LONG | {"interval": "auto"}, (lines, lines * 2)),
    ):
        asked = [(context, " grey gulls") for context in contexts]
        lm = AcreLM(one, **options)
        together = lm.loglikelihood(requests(*asked))
        assert lm.contexts.caches_read == 2
        alone = [AcreLM(one, **options).loglikelihood(requests(a))[0] for a in asked]
        assert together == alone


def test_full_contexts_share_their_beginning(lm):
    shots = toy.sentence(8, 100)
    asked = requests(
        *((shots + q, x) for q in ("Who?", "Why?") for x in (" a b", " c"))
    )
    together = lm.loglikelihood(asked)
    assert lm.contexts.caches_read == 1 and lm.contexts.caches_extended == 1
    assert lm.contexts.tokens_read < 1.1 * len(lm.tok_encode(shots))
    alone = [AcreLM(lm.acre).loglikelihood([one])[0] for one in asked]
    assert together == alone


def test_what_no_cache_holds_is_refused_before_any_work(model):
    small = AcreLM(model, full_below=100, window=128, stride=64, interval=8)
    large = toy.sentence(9, 3000)
    asked = requests((large[:9], " a"), (large, " a"))  # the first one sorts first
    with pytest.raises(acre.TooLongError, match="interval"):
        small.loglikelihood(asked)
    with pytest.raises(acre.TooLongError, match="interval"):
        small.generate_until(requests(*((r.args[0], {}) for r in asked)))
    assert small.contexts.tokens_read == 0
    low = AcreLM(model, **(LONG | {"eta": 7}))
    with pytest.raises(ValueError, match="eta: got 7"):
        low.loglikelihood(requests((toy.sentence(9, 100), " a")))


def test_logits_do_not_depend_on_the_pieces(model):
    ids = np.array(model.tokenizer.encode(toy.sentence(2, 40)), dtype=np.int32)
    opened = Contexts(model, Reading()).open(ids[:50], 60)
    whole = np.concatenate(opened.logits(ids[50:100]))
    pieces = opened.logits(ids[50:100], chunk=7)
    assert [len(piece) for piece in pieces] == [7] * 7 + [2]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)
    np.testing.assert_allclose(whole, model.logits(ids[:100])[49:], atol=1e-5)


# -------------------------------------------------------------------------- generation


def test_sampling_is_seeded_and_repeats_differ(lm):
    kwargs = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    same = requests(*[("the quiet", kwargs)] * 3)
    first = lm.generate_until(same)
    assert len(set(first)) == 3 and lm.generate_until(same) == first
    other = lm.generate_until(requests(("the quiet", kwargs | {"seed": 1})))
    assert other == first[1:2]
    one = requests(("the quiet", kwargs | {"top_k": 1}))
    assert lm.generate_until(one) == lm.generate_until(
        requests(("the quiet", {"max_gen_toks": 12, "temperature": 0.0}))
    )


def test_batches_give_the_same_texts(model, monkeypatch):
    """Repeats, questions about one long text, and contexts that are read whole."""
    lines = "".join(toy.sentence(i, 5) for i in range(40))
    warm = {"max_gen_toks": 9, "do_sample": True, "temperature": 1.5}
    asked = requests(
        *[(lines + q, {"max_gen_toks": 9, "until": ["a"]}) for q in ("Who?", "Why?")],
        *[(lines + "Who?", warm)] * 3,
        *[(q, {"max_gen_toks": n}) for n, q in enumerate(("a", "the quiet", "or"), 4)],
    )
    rows, real = [], _core.sessions_next

    def counted(sessions, samplings):
        rows.append(len(sessions))
        return real(sessions, samplings)

    monkeypatch.setattr(_core, "sessions_next", counted)
    texts, most = [], []
    for size in (1, "4", "auto"):
        rows.clear()
        lm = AcreLM(model, **LONG, batch_size=size)
        texts.append(lm.generate_until(asked))
        most.append((lm.batch_size, max(rows)))
        assert lm.contexts.caches_read <= 5
    assert texts[0] == texts[1] == texts[2]
    assert most == [(1, 1), (4, 4), (8, 5)]
    for bad, named in (("many", TypeError), (0, ValueError)):
        with pytest.raises(named, match="batch_size"):
            AcreLM(model, batch_size=bad)


def test_unknown_generation_arguments_are_named_once(lm, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    asked = requests(*[("the", {"max_gen_toks": 1, "num_beams": 4})] * 2)
    with caplog.at_level(logging.WARNING):
        lm.generate_until(asked)
    assert caplog.text.count("without effect: num_beams") == 1
    with pytest.raises(ValueError, match="top_p"):
        lm.generate_until(requests(("the", {"top_p": 2, "do_sample": True})))


def test_new_tokens_yield_to_the_positions(lm, long, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    context = toy.sentence(1, 100)
    left = lm.max_length - len(lm.tok_encode(context))
    reserve = LONG["question_tokens"] + long.contexts.answer_room
    for one, rooms in ((lm, range(left, left + 1)), (long, range(128, reserve))):
        with caplog.at_level(logging.WARNING):
            text = one.generate_until(requests((context, {"max_gen_toks": 5000})))[0]
        (room,) = re.findall("5000 yield to the ([0-9]+)", caplog.text)
        assert text and int(room) in rooms
        caplog.clear()


def test_control_tokens_among_the_stops_end_an_answer(lm):
    assert lm._ends(["<|im_start|>", "the", "x"]) == {1, 2}
    assert lm._ends([]) == {2}


# --------------------------------------------------------------------------- arguments


def test_arguments_come_as_text_or_values(model):
    lm = AcreLM(
        model, eta="512", interval="auto", sink="True", full_below=7, batch_size="1",
        device="cuda:0", max_gen_toks="3", prefix_token_id="5", weight=None,
    )  # fmt: skip
    reading = lm.contexts.reading
    assert (reading.eta, reading.sink, reading.full_below) == (512, True, 7)
    assert (lm.max_gen_toks, lm.prefix_token_id, lm.batch_size) == (3, 5, 1)
    assert lm.get_model_info()["acre"]["eta"] == 512
    mute = toy.tokenizer()
    mute.bos_id = 0  # named, but not put before a text
    named = acre.Model(model.core, mute, "named", Prints("", "", ""))
    ids = lm.tok_encode("a")
    assert AcreLM(named, add_bos_token="true").tok_encode("a") == [0, *ids]
    assert AcreLM(named, add_bos_token="true").tok_encode("<|endoftext|>a") == [0, *ids]
    assert AcreLM(named).tok_encode("a") == ids
    assert AcreLM(named).prefix_token_id == 0
    assert AcreLM(model, add_bos_token=False).tok_encode("a") == lm.tok_encode("a")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eta": "many"}, "eta: got str 'many'"),
        ({"eta": -1}, "eta: got -1"),
        ({"interval": "best"}, "interval: got str 'best'"),
        ({"sink": "maybe"}, "sink: got 'maybe'"),
        ({"select": "all"}, "select: got 'all'"),
        ({"proxy": "mean"}, "proxy: got 'mean'"),
        ({"proxy": "trained"}, "proxy: 'trained' needs"),
        ({"question_tokens": 0}, "question_tokens: got 0"),
        ({"max_gen_toks": 0}, "max_gen_toks: got 0"),
        ({"prefix_token_id": 320}, "prefix_token_id: got 320"),
        ({"dtype": "f32"}, "dtype need a path"),
        ({"etta": 1}, "model_args: unknown etta; expected path or"),
        ({"pretrained": "x"}, "give path"),
    ],
)
def test_bad_arguments_are_named(model, options, named):
    with pytest.raises((TypeError, ValueError), match=named):
        AcreLM(model, **options)


def test_a_model_without_words_is_refused():
    with pytest.raises(ValueError, match="has no tokenizer"):
        AcreLM(toy.model(words=False))
    with pytest.raises(TypeError, match="give path"):
        AcreLM()
    with pytest.raises(FileNotFoundError):
        AcreLM("no/such/model")


# ------------------------------------------------------------------------ the harness


MULTIPLE_CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}\\nQuestion: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""
GENERATE = """
task: toy_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}\\nQuestion: {{question}}\\nAnswer:"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder: pathlib.Path, choices: list[list[str]]) -> None:
    """Two tasks over texts of which every other one is long."""
    records = [
        {
            "text": toy.sentence(i // 4, (10, 150)[i % 2]),
            "question": f"{toy.WORDS[i]}?",
            "choices": three,
            "gold": i % 3,
        }
        for i, three in enumerate(choices)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, task in (("choice", MULTIPLE_CHOICE), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(task.replace("FILE", str(data)))


def run_python(*arguments: str, **places: str) -> subprocess.CompletedProcess:
    """Another interpreter that imports this tree's acre, offline."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | OFFLINE | places | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_command_line_evaluates(tmp_path):
    """Results of the command are those of the requests asked one by one."""
    pytest.importorskip("datasets")
    path = directory(tmp_path / "model", "llama", False)
    choices = [[f" {w}" for w in toy.WORDS[i : i + 3]] for i in range(6)]
    write_tasks(tmp_path, choices)
    arguments = ",".join(
        f"{key}={value}"
        for key, value in ({"path": path, "dtype": "f32", "threads": 1} | LONG).items()
    )
    done = run_python(
        "-m", "acre.harness", "run", "--model", "acre",
        "--model_args", arguments, "--tasks", "toy_choice,toy_generate",
        "--include_path", str(tmp_path), "--batch_size", "1", "--log_samples",
        "--output_path", str(tmp_path / "out"), HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|toy_choice" in done.stdout and "|toy_generate" in done.stdout
    (samples,) = (tmp_path / "out").rglob("samples_toy_choice*.jsonl")
    lm = AcreLM(path, dtype="f32", threads=1, **LONG)
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        asked = [tuple(args.values()) for args in sample["arguments"].values()]
        wanted = [lm.loglikelihood(requests(one))[0][0] for one in asked]
        got = [float(answer[0][0]) for answer in sample["resps"]]
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    facts = json.loads(results.read_text())["config"]["acre"]
    assert facts["eta"] == LONG["eta"] and facts["tokens_shared"] > 0


def test_the_registry_knows_the_name():
    assert get_model("acre") is AcreLM
    text = (ROOT / "pyproject.toml").read_text()
    group, _, rest = text.partition('[project.entry-points."lm_eval.models"]\n')
    assert group != text and rest.startswith('acre = "acre.harness:AcreLM"\n')


def test_the_built_in_models_stay_known():
    """They are registered at the first look-up, and only while there is no other."""
    code = (
        "import acre.harness; from lm_eval.api.registry import get_model; "
        "print(get_model('dummy').__name__)"
    )
    assert run_python("-c", code).stdout == "DummyLM\n"


def test_a_missing_harness_is_explained():
    code = "import sys; sys.modules['lm_eval'] = None; import acre.harness"
    done = run_python("-c", code)
    assert done.returncode == 1 and 'pip install "acre[lm-eval]"' in done.stderr
