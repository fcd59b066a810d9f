"""Metrics of answers. Each takes outputs and references of one length.

A metric of single answers is a list, with None where there is no reference; a metric of all answers
together is a number. Words are what stands between spaces.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

Values: TypeAlias = float | list[float | None]
Metrics: TypeAlias = Mapping[str, Values]
Texts: TypeAlias = Sequence[str]
References: TypeAlias = Sequence[str | None]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(outputs: Texts, references: References) -> Metrics:
    """1 where the answer is the reference, but for spaces around both; else 0."""

    def equal(output: str, reference: str) -> float:
        return float(output.strip() == reference.strip())

    return {"exact_match": _each(equal, outputs, references)}


def token_f1(outputs: Texts, references: References) -> Metrics:
    """F1 of the words that answer and reference share, as SQuAD's evaluation script counts them.

    Letters in lower case, without punctuation and English articles (Rajpurkar et al., 2016).
    """
    return {"token_f1": _each(_f1, outputs, references)}


def rouge_l(outputs: Texts, references: References) -> Metrics:
    """F-measure of ROUGE-L (Lin, 2004), by the package rouge-score, without stemming."""
    if all(reference is None for reference in references):
        return {}
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])

    def measure(output: str, reference: str) -> float:
        return float(scorer.score(reference, output)["rougeL"].fmeasure)

    return {"rouge_l": _each(measure, outputs, references)}


def distinct(outputs: Texts, references: References) -> Metrics:
    """Different n-grams over all n-grams of all answers, for n = 1 and 2 (Li et al., 2016)."""
    found = {}
    for size in (1, 2):
        grams = [
            tuple(words[start : start + size])
            for words in map(str.split, outputs)
            for start in range(len(words) - size + 1)
        ]
        found[f"distinct_{size}"] = len(set(grams)) / len(grams) if grams else 0.0
    return found


BUILT_IN: tuple[Callable[[Texts, References], Metrics], ...] = (
    exact_match,
    token_f1,
    rouge_l,
    distinct,
)


def _each(
    measure: Callable[[str, str], float], outputs: Texts, references: References
) -> list[float | None]:
    return [
        None if reference is None else measure(output, reference)
        for output, reference in zip(outputs, references, strict=True)
    ]


def _f1(output: str, reference: str) -> float:
    found, wanted = _normalized(output), _normalized(reference)
    shared = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted:
        return float(found == wanted)
    if shared == 0:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _normalized(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
