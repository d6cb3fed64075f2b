"""The page of an answer: the whole text is there, once; nothing in it can act."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
import toy

import acre
from acre import page

QUESTION = "who wrote the ledger?"
VOID = {"meta", "br", "hr", "img", "link", "input"}
NASTY = (
    "<script>alert(1)</script></main></details><style>*{}</style>&lt;b&gt; \"'"
    "\x00\x1b[31m\x7f\x85\u202eabc\u2066 \ud800 a\r\nb\rc {{ 7 * 7 }} {% raw %}"
)


class Parsed(HTMLParser):
    """Elements with their attributes, and the text by the elements that it lies in."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[list[tuple[str, str]], str]] = []
        self._open: list[tuple[str, str]] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("class", "")))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((list(self._open), data))

    def tags(self, name: str) -> list[dict[str, str]]:
        return [attrs for tag, attrs in self.elements if tag == name]

    def inside(self, tag: str, css: str = "", but: Iterable[str] = ()) -> str:
        """Text within an element, without what lies in the classes or tags `but`."""
        out = []
        for parents, data in self.texts:
            names = {name for name, _ in parents} | {kind for _, kind in parents}
            if any(name == tag and css in kind for name, kind in parents):
                out.append("" if names & set(but) else data)
        return "".join(out)


def shown(html: str) -> str:
    """The text as the page holds it, without the labels between its parts."""
    return Parsed(html).inside("main", "text", ("tag", "summary", "note"))


def made(source: str | None, ranges, scores, **fields) -> acre.Answer:
    """An answer by hand: one group of 8 tokens per range of characters."""
    spans = [
        acre.Span(16 * i, 16 * i + 8, *where, score, (source or "")[slice(*where)], i)
        for i, (where, score) in enumerate(zip(ranges, scores, strict=True))
    ]
    groups = np.arange(len(spans), dtype=np.int32)
    given = {"groups": groups, "source": source} | fields
    return acre.Answer("yes", np.zeros(1, np.int32), spans, acre.Stats(), **given)


@pytest.fixture(scope="module")
def answer(cache):
    return cache.ask(QUESTION, eta=64, max_new_tokens=3)


@pytest.fixture(scope="module")
def parsed(answer):
    return Parsed(answer.to_html(QUESTION))


# ----------------------------------------------------------------------------- the text


def test_the_whole_text_is_shown_once(cache, answer, text):
    assert shown(answer.to_html(QUESTION)) == text
    every = cache.ask(QUESTION, groups=list(range(cache.plan["m"])), max_new_tokens=1)
    starts = np.array([span.char_start for span in every.spans[1:]])
    ends = np.array([span.char_end for span in every.spans[:-1]])
    assert (starts < ends).any(), "no character is split between two groups"
    assert shown(every.to_html()) == text


def test_characters_between_tokens_are_kept():
    """Some tokenizers leave white space out of the offsets."""
    spans = [
        acre.Span(0, 8, 4, 9, 0.1, "quiet", 0),
        acre.Span(8, 16, 10, 17, 0.2, "harbour", 1),
    ]
    html = replace(made("the quiet harbour", [], []), spans=spans).to_html()
    assert shown(html) == "the quiet harbour"
    assert Parsed(html).inside("span", "passage", ("tag",)) == "quiet harbour"


def test_passages_are_marked(answer, parsed):
    spans = sorted(answer.passages(), key=lambda span: span.token_start)
    marked = parsed.inside("span", "passage", ("tag",))
    assert marked == "".join(span.text.lstrip() for span in spans)
    assert len(parsed.tags("mark")) == len(answer.spans)


def test_ranks_are_those_of_the_passages(answer, parsed):
    best = answer.passages()
    ids = {attrs["id"]: attrs for attrs in parsed.tags("span") if "id" in attrs}
    rows = [attrs["id"] for attrs in parsed.tags("tr") if "id" in attrs]
    assert rows == [f"r{rank}" for rank in range(1, len(best) + 1)]
    order = sorted(best, key=lambda span: span.token_start)
    for rank, passage in enumerate(best, start=1):
        label = ids[f"p{order.index(passage) + 1}"]["aria-label"]
        assert label == f"Passage {rank} by score, {page.number(passage.score)}"


def test_links_lead_somewhere(parsed):
    ids = {attrs["id"] for _, attrs in parsed.elements if "id" in attrs}
    links = [attrs["href"] for attrs in parsed.tags("a")]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)


def test_recent_entries_are_told(cache, answer, text):
    token, char = (answer.settings[key] for key in ("recent_token", "recent_char"))
    assert token == cache.plan["m"] * cache.interval - cache.prefix_tokens
    assert char == cache.offsets[token, 0] and len(text) > char > 0
    parts = answer.to_html().split('<p class="note">')
    assert len(parts) == 2 and shown(parts[0] + "</main></body></html>") == text[:char]


def test_long_stretches_are_folded():
    source = "word " * 200_000
    ranges = [(250_000, 250_040), (700_000, 700_040)]
    html = made(source, ranges, [0.2, 0.1]).to_html()
    assert shown(html) == source
    parsed = Parsed(html)
    assert parsed.inside("details", "fold", ("summary",)).count("word") > 199_000
    assert len(html) < len(source) + 30_000 and len(parsed.elements) < 200
    assert f"{250_000 - 2 * page.EDGE:,}"[:4] in parsed.inside("summary")


@pytest.mark.parametrize("text", ["", "a" * 5000, "ab " * 2000, "\n" * 3000])
def test_folding_loses_nothing(text):
    head, middle, tail = page.folded(text)
    assert head + middle + tail == text and len(head + tail) <= 4 * page.EDGE


# ---------------------------------------------------------------- nothing in it can act


def test_text_is_data():
    answer = made(NASTY * 3, [(5, 90), (120, 150)], [0.2, float("inf")])
    answer = replace(answer, text=NASTY)
    html = answer.to_html(NASTY, title=NASTY)
    html.encode("utf-8")
    parsed = Parsed(html)
    assert len(parsed.tags("script")) == len(parsed.tags("style")) == 1
    assert shown(html) == page.visible(NASTY * 3)
    end = NASTY.index("\n")
    split = made(NASTY, [(end - 3, end), (end, end + 2)], [0.2, 0.1])
    assert shown(split.to_html()) == page.visible(NASTY)
    assert parsed.inside("title", but=("svg",)) == page.visible(NASTY)
    assert parsed.inside("p", "said").count("alert(1)") == 1
    assert not page.UNSEEN.search(html) and "{{ 7 * 7 }}" in html


def test_unseen_characters_are_written_out():
    assert page.visible("a\x00\x1b\tb\n") == "a\u2400\u241b\tb\n"
    assert page.visible("\x7f\u202e\ud800") == "[U+007F][U+202E][U+D800]"
    assert page.visible("a\r\nb\rc") == "a \nb\nc"
    assert page.visible("caf\u00e9 \U0001f40b \u200f") == "caf\u00e9 \U0001f40b \u200f"


def test_policy_lets_run_what_is_in_the_page_and_no_more(answer, parsed):
    policy = next(
        attrs["content"]
        for attrs in parsed.tags("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    html = answer.to_html()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for tag in ("script", "style"):
        body = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == "'none'"
    for _, attrs in parsed.elements:
        assert not {"src", "style", "srcset", "action"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert "http:" not in html and "https:" not in html


# ---------------------------------------------------------------------- kinds of answer


def test_ids_give_decoded_spans(model):
    ids = model.tokenizer.encode(toy.sentence(3, 120))
    cache = model.build(ids, **toy.BUILD)
    answer = cache.ask(QUESTION, eta=32, max_new_tokens=1)
    parsed = Parsed(answer.to_html(QUESTION))
    spans = answer.spans
    marked = parsed.inside("span", "passage", ("tag",))
    assert len(parsed.tags("mark")) == 4 and spans[0].text.strip() in marked
    assert "tokens not refilled" in parsed.inside("p", "fold")


def test_no_tokenizer():
    cache = toy.model(words=False).build(np.arange(3, 300, dtype=np.int32), **toy.BUILD)
    answer = cache.ask(np.arange(5, 9), eta=16, max_new_tokens=2)
    parsed = Parsed(answer.to_html())
    assert parsed.inside("mark") == "(no text)" * 2
    assert parsed.inside("p", "said").split()[:2] == [str(i) for i in answer.ids]


def test_each_layers_choice_is_counted(cache):
    answer = cache.ask(QUESTION, eta=64, select="per_layer", max_new_tokens=1)
    parsed = Parsed(answer.to_html())
    notes = [attrs["title"] for attrs in parsed.tags("mark")]
    found = [re.search(r"group (\d+),.*by (\d) of 2 layers$", note) for note in notes]
    for match in found:
        assert (answer.groups == int(match[1])).sum() == int(match[2])
    shown = [span.group for span in answer.spans]
    assert [int(match[1]) for match in found] == shown


def test_groups_by_hand_have_no_colour(cache):
    parsed = Parsed(cache.ask(QUESTION, groups=[9, 20], max_new_tokens=1).to_html())
    assert [attrs["class"] for attrs in parsed.tags("mark")] == ["l0", "l0"]
    assert "no score" in parsed.inside("ul", "legend")


def test_nothing_refilled(cache, text):
    html = cache.ask(QUESTION, eta=0, max_new_tokens=1).to_html()
    assert "Nothing was refilled" in html and shown(html) == text


def test_figures_and_settings(answer, parsed):
    rows = parsed.inside("dd")
    count = len(answer.spans)
    tokens = sum(span.token_end - span.token_start for span in answer.spans)
    frame = f", and {8 - count} groups of the frame"
    assert f"{tokens} tokens in {count} groups{frame}" in rows and "pooled" in rows
    assert answer.settings["eta"] == 64 and answer.settings["max_new_tokens"] == 3
    assert answer.to_dict()["settings"]["interval"] == 8


def test_save(answer, tmp_path):
    answer.save_html(tmp_path / "a.html", QUESTION, "A title")
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert html == page.answer_page(answer, QUESTION, "A title")
    assert "<title>A title</title>" in html
    with pytest.raises(OSError):
        page.save(tmp_path / "none" / "a.html", answer)


def test_wrong_types(answer):
    with pytest.raises(TypeError, match="answer: got str"):
        page.answer_page("text")
    with pytest.raises(TypeError, match="question: got int"):
        page.answer_page(answer, 3)


# ------------------------------------------------------------------------------ colours


def test_levels_are_equal_steps():
    scale = page.Scale([2.0, 12.0, float("nan")])
    assert [scale.level(s) for s in (2, 3.9, 4.1, 9.9, 10.1, 12)] == [1, 1, 2, 4, 5, 5]
    assert scale.level(float("nan")) == 0
    assert scale.legend()[0] == (1, "2.00+") and scale.legend()[-1] == (5, "10.0+")
    assert page.Scale([3.0]).level(3.0) == page.LEVELS


def linear(colour: str) -> np.ndarray:
    """Linear sRGB of #rrggbb."""
    part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lightness(colour: str) -> float:
    """L of OKLab."""
    rows = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    return float(
        np.array([0.2104542553, 0.793617785, -0.0040720468])
        @ np.cbrt(np.array(rows) @ linear(colour))
    )


def contrast(a: str, b: str) -> float:
    """As WCAG defines it."""
    light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in (a, b))
    return light[1] / light[0]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_are_even_and_readable(mode):
    css = resources.files("acre").joinpath("page.css").read_text("utf-8")
    found = re.findall(r"--(\w+): (#[0-9a-f]{6})", css)
    colours = dict(found[mode * len(found) // 2 :][: len(found) // 2])
    steps = np.diff([lightness(colours[f"b{level}"]) for level in range(1, 6)])
    assert np.ptp(steps) < 0.01 and abs(steps.mean()) > 0.09
    far = [
        abs(lightness(colours[f"b{i}"]) - lightness(colours["page"])) for i in (1, 5)
    ]
    assert far[1] > far[0]
    for level in range(6):
        assert contrast(colours[f"b{level}"], colours[f"t{level}"]) >= 4.5
    for ink in ("ink", "soft", "link"):
        for ground in ("page", "side"):
            assert contrast(colours[ink], colours[ground]) >= 4.5
