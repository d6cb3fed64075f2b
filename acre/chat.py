"""The frame of a conversation about a text, from the model's own chat template.

Takes a tokenizer; gives the ids before the text and, for a question, the ids after it:
user turn = instruction + text, assistant turn = a fixed acknowledgement, user turn =
the question, then the generation prompt. One idea: the template is rendered once, with
a sentinel in place of the text and of the question, and split there. What the template
and its author wrote may contain control tokens; text and question, encoded apart from
it, never can. Without a template the frame is "Question: ... Answer:". Refuses
templates that refuse the conversation, drop one of its turns, or do not keep the text
whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from acre.tokenizer import Tokenizer, check_text

INSTRUCTION = "You are given a long text. Read it carefully; questions about it follow."
ACKNOWLEDGEMENT = "I have read the text. Please ask your questions."
# Letters and digits only, so that no template filter (trim, escape) changes them.
ARTICLE_MARK = "ACREtextE4b1f60d79c2a"
QUESTION_MARK = "ACREquestionE83d5a07c19"
PROBE = "A"
JOINT = "\n\n"
PLAIN = ("", "\n\nQuestion: ", "\nAnswer:")


# ---------------------------------------------------------------------------- templates


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks answers for training; here it is
    its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    """raise_exception of the templates."""
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The tojson that templates expect: without jinja2's HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def render(
    template: str,
    messages: list[dict[str, str]],
    names: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """A chat template over messages [{"role", "content"}], as transformers renders it.

    names: bos_token, eos_token, ... for the template. The template is untrusted: it
    runs in jinja2's sandbox. ValueError when it is malformed or refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(names or {}),
        )
    except Exception as error:  # a template can fail in any way that Python can
        raise ValueError(f"chat template: cannot render it: {error}") from error


# -------------------------------------------------------------------------------- frame


class Frame:
    """What stands before and after the text. Immutable.

    prefix_ids: int32 [p], read-only, everything before the text. options: the arguments
    that make an equal frame (Frame(tokenizer, **options)). fingerprint: sha256 of all
    that decides how questions are framed; not of the date that some templates print.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        instruction: str = INSTRUCTION,
        acknowledgement: str = ACKNOWLEDGEMENT,
        template: str | None = None,
        system: str | None = None,
        joint: str = JOINT,
        plain: Sequence[str] = PLAIN,
    ) -> None:
        """template: Jinja source, default the tokenizer's; "" = none, whatever the
        tokenizer has. system: a system turn; None leaves it to the template. joint:
        between instruction and text. plain: what stands before the text, between text
        and question, and after it, where there is no template. ValueError for a
        template that cannot frame a text, TypeError for no str."""
        if isinstance(plain, str) or len(plain) != 3:
            raise ValueError(f"plain: got {plain!r}, expected three strings")
        self.options: dict[str, Any] = {
            "instruction": check_text(instruction),
            "acknowledgement": check_text(acknowledgement),
            "template": None if template is None else check_text(template),
            "system": None if system is None else check_text(system),
            "joint": check_text(joint),
            "plain": [check_text(part) for part in plain],
        }
        self._tokenizer = tokenizer
        source = tokenizer.chat_template if template is None else template
        if source:
            parts = _split(source, tokenizer.special_names, self.options)
        else:
            parts = tuple(self.options["plain"])
        self._plain = not source
        self._parts = tuple(
            self._fitted(part, i > 0, i < 2) for i, part in enumerate(parts)
        )
        self.fingerprint: str = self._fingerprint(source, parts)
        begin = self._before_text(self._parts[0], bos=self._plain)
        begin.flags.writeable = False
        self.prefix_ids: np.ndarray = begin
        self._middle = self._before_text(self._parts[1])
        self._suffix = tokenizer.encode(self._parts[2], special=True, bos=False)

    def _fitted(self, part: str, after_text: bool, before_text: bool) -> str:
        """A template part as it is encoded by itself. Tokenizers that put a space
        before every text they encode bring the one between the parts along."""
        if self._tokenizer.space_prefix and not self._plain:
            if after_text:
                part = part.removeprefix(" ")
            if before_text:
                part = part.removesuffix(" ")
        return part

    def _fingerprint(self, source: str | None, parts: tuple[str, ...]) -> str:
        facts = {**self.options, "template": source or "", "parts": parts[1:]}
        text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def _before_text(self, part: str, bos: bool = False) -> np.ndarray:
        """Ids of a template part, as they are when a word follows: some tokenizers
        split white space by what comes after it. Where the word does not stand apart
        from the part, the part's own ids."""
        encode = self._tokenizer.encode
        word = encode(PROBE)
        ids = encode(part + PROBE, special=True, bos=bos)
        if part and len(word) == 1 and len(ids) > 1 and ids[-1] == word[0]:
            return ids[:-1].copy()
        return encode(part, special=True, bos=bos)

    def __repr__(self) -> str:
        kind = "plain" if self._plain else "chat template"
        return f"acre.Frame({kind}, prefix={len(self.prefix_ids)} tokens)"

    def question_ids(
        self, question: str, query: str | None = None
    ) -> tuple[np.ndarray, int, int]:
        """(ids int32 [t], first, last): everything after the text, up to where the
        answer begins; [first, last) are the tokens of `query`, a part of the question
        (its last occurrence), None = of the whole question.

        TypeError for no str, ValueError for an empty question, invalid Unicode, or a
        query that the question does not contain.
        """
        if not check_text(question).strip():
            raise ValueError("question: got an empty text")
        query = question if query is None else check_text(query)
        at = question.rfind(query)
        if at < 0 or not query.strip():
            raise ValueError(f"query: got {query[:60]!r}, expected a part of question")
        if self._plain:
            return self._plain_question(question, query, at)
        own, offsets = self._tokenizer.encode_offsets(question)
        held = len(self._middle) + self._overlap(offsets, at, len(query))
        ids = np.concatenate([self._middle, own, self._suffix])
        return ids, int(held[0]), int(held[-1]) + 1

    def _plain_question(
        self, question: str, query: str, at: int
    ) -> tuple[np.ndarray, int, int]:
        """Encoded in one piece: the space before the question belongs to its first
        word, as in any running text."""
        before, after = self._parts[1:]
        ids, offsets = self._tokenizer.encode_offsets(before + question + after)
        own = self._overlap(offsets, len(before) + at, len(query))
        return ids, int(own[0]), int(own[-1]) + 1

    def answer_ids(self, answer: str) -> np.ndarray:
        """int32 [a]: an answer as it follows `question_ids`, then the token that ends
        it (none where the tokenizer names no end).

        That token is the one that ends the acknowledgement in the template. ValueError
        for an empty answer or invalid Unicode, TypeError for no str.
        """
        if not check_text(answer).strip():
            raise ValueError("answer: got an empty text")
        apart = self._plain and not self._tokenizer.space_prefix
        own = self._tokenizer.encode(f" {answer.lstrip()}" if apart else answer)
        return np.concatenate([own, self._ending()])

    def _ending(self) -> np.ndarray:
        """The end of an assistant turn, int32 [0 or 1]."""
        ends = self._tokenizer.eos_ids
        said = (self.options["acknowledgement"] or "").strip()
        if said and not self._plain:
            after = self._parts[1].rpartition(said)[2]
            ids = self._tokenizer.encode(after, special=True, bos=False)
            ends = [*(i for i in ids.tolist() if i in ends), *ends]
        return np.array(ends[:1], dtype=np.int32)

    @staticmethod
    def _overlap(offsets: np.ndarray, start: int, length: int) -> np.ndarray:
        """Indices of the tokens that hold characters [start, start + length)."""
        held = (offsets[:, 1] > start) & (offsets[:, 0] < start + length)
        if not held.any():
            raise ValueError("question: the tokenizer makes no tokens of it")
        return np.flatnonzero(held)


def _messages(options: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation, with the sentinels in place of text and question."""
    instruction = options["instruction"]
    joint = options["joint"] if instruction else ""
    first = f"{instruction}{joint}{ARTICLE_MARK}"
    turns = [
        ("user", first),
        ("assistant", options["acknowledgement"] or ""),
        ("user", QUESTION_MARK),
    ]
    if options["system"] is not None:
        turns.insert(0, ("system", options["system"]))
    return [{"role": role, "content": content} for role, content in turns]


def _split(
    template: str, names: Mapping[str, str], options: Mapping[str, Any]
) -> tuple[str, str, str]:
    """(before the text, between text and question, after the question), rendered."""
    text = render(template, _messages(options), names)
    for mark, what in ((ARTICLE_MARK, "first"), (QUESTION_MARK, "second")):
        if text.count(mark) != 1:
            raise ValueError(
                f"chat template: the {what} user turn occurs {text.count(mark)} times "
                "in what it renders, expected once"
            )
    prefix, _, rest = text.partition(ARTICLE_MARK)
    middle, mark, suffix = rest.partition(QUESTION_MARK)
    if not mark:
        raise ValueError("chat template: puts the question before the text")
    for what, content, where in (
        ("system turn", options["system"], prefix),
        ("instruction", options["instruction"], prefix),
        ("assistant turn", options["acknowledgement"], middle),
    ):
        if content and content.strip() not in where:
            raise ValueError(f"chat template: drops or changes the {what}")
    return prefix, middle, suffix
