"""The metrics of LongBench v1 and v2 (github.com/THUDM/LongBench).

Takes a prediction and a reference; gives a share in [0, 1]. UltraDomain is scored by
`qa_f1` too. The few-shot tasks (trec, triviaqa, samsum, lsht) look at the prediction's
first line only: the metrics named `*_first_line`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from acre.eval.metrics.metric import Metric, unusable
from acre.eval.metrics.text import chinese_words, f1, qa_f1, rouge_l, segments
from acre.optional import needs


def first_line(prediction: str) -> str:
    """The first line, empty ones before it left out."""
    return prediction.lstrip("\n").split("\n")[0]


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 over the words that jieba finds."""
    return f1(chinese_words(prediction), chinese_words(answer))


def rouge_zh(prediction: str, answer: str) -> float:
    """`rouge_l` over the words that jieba finds."""
    return rouge_l(" ".join(segments(prediction)), " ".join(segments(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / n where n classes are named in the prediction and the answer is among them.

    facts: "all_classes", every class. A class that is a proper part of the answer does
    not count, but the one named right after such a class is not looked at: the authors
    remove from the list that they walk, and so does this.
    """
    named = [one for one in classes if one in prediction]
    at = 0
    while at < len(named):
        if named[at] in answer and named[at] != answer:
            named.remove(named[at])
        at += 1
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """The share of the prediction's numbers that are the answer, digit by digit."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """`count` of the N in the answer's "Paragraph N"."""
    return count(prediction, _numbered("Paragraph ", answer))


def retrieval_zh(prediction: str, answer: str) -> float:
    """`count` of the N in the answer's "段落N"."""
    return count(prediction, _numbered("段落", answer))


def _numbered(word: str, answer: str) -> str:
    found = re.search(word + r"(\d+)", answer)
    if found is None:
        raise unusable(answer, f'"{word}N"')
    return found[1]


def code_sim(prediction: str, answer: str) -> float:
    """How like the answer the first line of code is, in whole percents.

    The ratio of the edit distance without substitutions, as fuzzywuzzy computes it
    beside python-Levenshtein. That line is the first without "`", "#" and "//".
    """
    indel = needs("rapidfuzz.distance.Indel", "eval")
    return _percent(indel.normalized_similarity(_code_line(prediction), answer))


def code_sim_difflib(prediction: str, answer: str) -> float:
    """`code_sim` as fuzzywuzzy computes it alone, by difflib: mostly lower."""
    matcher = difflib.SequenceMatcher(None, _code_line(prediction), answer)
    return _percent(matcher.ratio())


def _code_line(prediction: str) -> str:
    lines = prediction.lstrip("\n").split("\n")
    marks = ("`", "#", "//")
    return next((one for one in lines if not any(m in one for m in marks)), "")


def _percent(ratio: float) -> float:
    return round(100 * ratio) / 100


def choice(prediction: str, answer: str) -> float:
    """LongBench v2: 1 if "The correct answer is (X)" names the answer, A to D.

    The brackets may be missing and asterisks are left out; no other wording counts.
    """
    said = prediction.replace("*", "")
    for pattern in (r"\(([A-D])\)", "([A-D])"):
        if found := re.search("The correct answer is " + pattern, said):
            return float(found[1] == answer)
    return 0.0


METRICS = {
    "qa_f1": Metric(qa_f1),
    "qa_f1_first_line": Metric(qa_f1, prepare=first_line),
    "qa_f1_zh": Metric(qa_f1_zh),
    "rouge": Metric(rouge_l),
    "rouge_first_line": Metric(rouge_l, prepare=first_line),
    "rouge_zh": Metric(rouge_zh),
    "classification": Metric(classification, facts=("all_classes",)),
    "classification_first_line": Metric(
        classification, prepare=first_line, facts=("all_classes",)
    ),
    "retrieval": Metric(retrieval),
    "retrieval_zh": Metric(retrieval_zh),
    "count": Metric(count),
    "code_sim": Metric(code_sim),
    "code_sim_difflib": Metric(code_sim_difflib),
    "choice": Metric(choice),
}
