"""The metrics of L-Eval (github.com/OpenLMLab/LEval), `leval_` before its tasks' names.

Takes a prediction and the reference of the data file; gives a share in [0, 1]. Closed
tasks are scored by exact match after a clean-up of their own; `leval_exam` is the match
alone. Of ROUGE there is ROUGE-L only: the figure that the authors' script calls its
score is a geometric mean over a data set and has no value for one prediction.
"""

from __future__ import annotations

import re

from acre.eval.metrics.infinitebench import LETTERS
from acre.eval.metrics.metric import Metric, unusable
from acre.eval.metrics.text import plain, qa_f1, rouge_score

_FACT = "[fact:"
_NO_ANSWER = "<error>"
# In this order, and inside words too: "this" becomes "th".
_CODE_NOISE = (
    "will be",
    "of the code",
    "is",
    "would be",
    "the value of",
    "the result of",
    "printed",
)


def exact_match(prediction: str, answer: str) -> float:
    """1 for a match, 0.25 for some of the right letters.

    An answer of letters A to D: the same letters in the same order score 1, a subset
    (or another order) 0.25. Any other: equal numbers if both are numbers, else the
    answer somewhere in the prediction, case and spaces aside.
    """
    said, right = plain(prediction), plain(answer)
    if set(right) <= set(LETTERS):
        return 1.0 if said == right else 0.25 * (set(said) <= set(right))
    try:
        return float(float(prediction) == float(answer))
    except ValueError:
        return float(_dense(answer) in _dense(prediction))


def _dense(text: str) -> str:
    return text.lower().replace(" ", "")


def several_letters(prediction: str, answer: str) -> float:
    """coursera: the letters chosen, several being allowed."""
    return exact_match(chosen_letters(prediction), _right_letters(answer))


def one_letter(prediction: str, answer: str) -> float:
    """quality, tpo: the first capital A to D anywhere is the choice.

    So "An apple" chooses A, and a prediction without any counts as A too.
    """
    if prediction not in LETTERS:
        found = re.search(f"[{LETTERS}]", prediction)
        prediction = found[0] if found else LETTERS[0]
    return exact_match(prediction, _right_letters(answer))


def chosen_letters(prediction: str) -> str:
    """The letters of a prediction for coursera.

    Two or more at its start are taken alone. Else one at its start joins those before a
    space, full stop or bracket, up to the word "Question"; without any, the first run
    of letters anywhere, and "A" as a last resort: the authors guess so.
    """
    start = re.match(f"[{LETTERS}]*", prediction)[0]
    if len(start) > 1:
        return "".join(sorted(set(start)))
    rest = prediction[len(start) :].split("Question")[0]
    options = {*start, *re.findall(rf"[{LETTERS}](?=[\s.)])", rest)}
    if options:
        return "".join(sorted(options))
    found = re.search(f"[{LETTERS}]+", rest)
    return found[0] if found else LETTERS[0]


def _right_letters(answer: str) -> str:
    first = answer.split()[:1]
    if not first:
        raise unusable(answer, f"letters of {LETTERS}")
    return re.sub(f"[^{LETTERS}]", "", first[0]) or LETTERS[0]


def arithmetic(prediction: str, answer: str) -> float:
    """gsm100: the numbers of both, as `_result` finds them."""
    return exact_match(_result(prediction), _result(answer))


def _result(text: str) -> str:
    """The digits, up to a full stop, of the word after "The answer is".

    Without these words: of the first paragraph's last word with a digit, words being
    apart by spaces only. Signs and thousands separators fall away.
    """
    if found := re.search(r"The answer is (\S+)", text):
        word = found[1]
    else:
        parts = reversed(text.split("\n\n")[0].split(" "))
        word = next((one for one in parts if any(map(str.isdigit, one))), "")
    return "".join(filter(str.isdigit, word.split(".")[0]))


def code(prediction: str, answer: str) -> float:
    """codeU: the answer in the last words, or in the first after "the final output"."""
    length = len(answer.split()) + 3
    said = _code_text(prediction)
    for noise in _CODE_NOISE:
        said = said.replace(noise, "")
    before, mark, after = said.rpartition("the final output")
    words = re.split(r"\s+", after)
    part = words[:length] if mark else words[-length:]
    return exact_match(" ".join(part), _code_text(answer))


def _code_text(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    for mark in (",", "'", "\\", ".0"):
        text = text.replace(mark, "")
    return text.replace("] [", "][").replace("[ [", "[[").replace("] ]", "]]")


def sci_fi(prediction: str, answer: str) -> float:
    """The mean of two matches: what the story says, and "[fact: what is so]".

    The authors' scorer crashes on a prediction without "[fact:"; here its fact is wrong
    and its first part counts.
    """
    right = _judged(answer)
    if right is None:
        raise unusable(answer, f'"True {_FACT} False]"')
    said = _judged(prediction) or (prediction.lower(), "")
    pairs = zip(map(_verdict, said), right, strict=True)
    return sum(exact_match(*pair) for pair in pairs) / 2


def _judged(text: str) -> tuple[str, str] | None:
    """What is before and in "[fact: ...]", without the bracket that ends it."""
    parts = text.lower().split(_FACT)
    return (parts[0].strip(), parts[1][:-1].strip()) if len(parts) > 1 else None


def _verdict(text: str) -> str:
    found = (one for word in text.split() for one in ("true", "false") if one in word)
    return next(found, _NO_ANSWER)


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L.

    The authors split sentences into lines first, which rougeL does not see.
    """
    return rouge_score("rougeL", prediction, answer)


METRICS = {
    "leval_exam": Metric(exact_match),
    "leval_coursera": Metric(several_letters),
    "leval_quality": Metric(one_letter),
    "leval_tpo": Metric(one_letter),
    "leval_gsm100": Metric(arithmetic),
    "leval_codeU": Metric(code),
    "leval_sci_fi": Metric(sci_fi),
    "leval_topic_retrieval": Metric(exact_match),
    "leval_f1": Metric(qa_f1),
    "leval_rouge_l": Metric(rouge_l),
}
