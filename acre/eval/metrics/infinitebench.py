"""The metrics of InfiniteBench (github.com/OpenBMB/InfiniteBench), named as its tasks.

Takes a prediction and the reference of the data file as text; gives a share in [0, 1].
Tasks with options take the text of the right one as the answer, and all of them in
facts["options"], in the order of their letters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from acre.eval.metrics.metric import Metric, unusable
from acre.eval.metrics.text import characters, f1, qa_f1, rouge_score

LETTERS = "ABCD"
_MARKS = re.compile(r"""[\n:"'.,?!{}]""")
_CHOICE_MARKS = re.compile(r"""[\n"'.,?!{} ]+""")
_DEBUG_MARKS = re.compile(r"""(?:[\n`'"\-* ]|[Oo]ption)+""")
_RUN_MARKS = re.compile(r"""[\n.`'":]""")
_CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
_DEBUG_PREFIXES = ("answer is:", "is:", "answer:", "correct option is:")


def first_number(prediction: str, answer: str) -> float:
    """passkey, number_string: 1 if the first run of digits is the answer."""
    found = re.search("[0-9]+", prediction)
    return float(found is not None and found[0] == answer)


def word(prediction: str, answer: str) -> float:
    """kv_retrieval: 1 if the answer is a word, punctuation being space."""
    return float(answer in _MARKS.sub(" ", prediction).split())


def speaker(prediction: str, answers: Sequence[str]) -> float:
    """longdialogue_qa_eng: 1 if the first reference is a word of the prediction.

    Only the prediction is put in capitals, and no other reference counts.
    """
    return word(prediction.upper(), answers[0])


def qa_chn(prediction: str, answer: str) -> float:
    """longbook_qa_chn: F1 over characters."""
    return f1(characters(prediction), characters(answer))


def summary(prediction: str, answer: str) -> float:
    """longbook_sum_eng: rougeLsum."""
    return rouge_score("rougeLsum", prediction, answer)


def choice(prediction: str, answer: str, options: Sequence[str]) -> float:
    """longbook_choice_eng: 1 if the right letter or text is chosen.

    facts: "options", at most four. In this order: a first character A to D decides, so
    the right text counts only where it starts otherwise; then the right text and
    nothing else; then what follows "answer is" and the like; then the first word that
    is a letter.
    """
    right = _right(answer, options)
    said = prediction.strip()
    if said[0] in LETTERS:
        return float(said[0] in right)
    if said in right:
        return 1.0
    said = _CHOICE_MARKS.sub(" ", said)
    if (chosen := _after(_CHOICE_PREFIXES, said)) is not None:
        return float(chosen.startswith(right))
    letters = (one for one in said.split() if one in LETTERS)
    return float(next(letters, None) in right)


def code_debug(prediction: str, answer: str, options: Sequence[str]) -> float:
    """1 if the right letter or function is chosen.

    facts: "options", at most four. The letter must start the prediction, followed by a
    full stop or colon, or the letter or name must follow "answer is:" and the like. The
    letter alone scores 0.
    """
    name, letter = _right(answer, options)
    said = prediction.strip()
    if said[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    chosen = _after(_DEBUG_PREFIXES, _DEBUG_MARKS.sub(" ", said))
    return float(chosen is not None and chosen.startswith((letter, name)))


def _right(answer: str, options: Sequence[str]) -> tuple[str, str]:
    """The right option: its text and its letter."""
    known = list(options[: len(LETTERS)])
    if answer not in known:
        raise unusable(answer, f"one of the options {known!r}")
    return answer, LETTERS[known.index(answer)]


def _after(prefixes: Sequence[str], text: str) -> str | None:
    """What follows the first prefix that occurs and one character; None without any."""
    for prefix in prefixes:
        at = text.find(prefix)
        if at >= 0:
            return text[at + len(prefix) + 1 :]
    return None


def math_find(prediction: str, answer: str) -> float:
    """1 if the first number, whole or decimal, equals the answer.

    The authors' scorer crashes where the answer is whole and the prediction decimal;
    here 8.0 equals 8.
    """
    expected = _number(answer, float)
    found = re.search(r"\d+\.\d+|\d+", prediction)
    return float(found is not None and float(found[0]) == expected)


def math_calc(prediction: str, answers: Sequence[str]) -> float:
    """The share of values that are right before the first that is not.

    answers: the values in order, as text. Signs in the prediction are not read.
    """
    expected = [str(_number(answer, int)) for answer in answers]
    # Compared as text: int() refuses the endless digits that a model may write.
    given = [one.lstrip("0") or "0" for one in re.findall("[0-9]+", prediction)]
    right = 0
    for one, other in zip(expected, given, strict=False):
        if one != other:
            break
        right += 1
    return right / len(expected)


def code_run(prediction: str, answer: str) -> float:
    """1 if the last word is the answer, a whole number."""
    expected = _number(answer, int)
    said = _RUN_MARKS.sub(" ", prediction).split()
    try:
        return float(int(said[-1]) == expected)
    except (ValueError, IndexError):
        return 0.0


def _number(answer: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(answer)
    except ValueError:
        raise unusable(answer, "a number") from None


METRICS = {
    "passkey": Metric(first_number),
    "number_string": Metric(first_number),
    "kv_retrieval": Metric(word),
    "longbook_qa_eng": Metric(qa_f1),
    "longbook_qa_chn": Metric(qa_chn),
    "longbook_choice_eng": Metric(choice, facts=("options",)),
    "longbook_sum_eng": Metric(summary),
    "longdialogue_qa_eng": Metric(speaker, over="all"),
    "math_find": Metric(math_find),
    "math_calc": Metric(math_calc, over="all"),
    "code_run": Metric(code_run),
    "code_debug": Metric(code_debug, facts=("options",)),
}
