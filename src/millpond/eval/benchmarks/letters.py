"""Which choice an answer names: one rule for each benchmark, as its own scorer reads letters. Knows nothing else about benchmarks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence


def before_bracket(answer: str) -> str:
    """The character in front of the first ")", else the whole answer.

    Source: MLVU, evaluation/multiple_choice_evaluation/choice_bench.py.
    """
    stripped = answer.strip()
    at = stripped.find(")")
    return stripped[max(0, at - 1) : at] if at >= 0 else stripped


def first_character(answer: str) -> str:
    """Source: StreamingBench, src/data/count.py."""
    return answer.strip()[:1]


# What the two scorers take away before they look, by their effect: a list in the first lacks commas, so that four of its phrases
# are never found.
_VIDEO_MME = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer", "Answer:", "Option:"),
    *("The correct answer", "The correct option"),
)
_LONG_VIDEO_BENCH = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is"),
    *("The correct option is", "Best answer:", "Best option:"),
)


def first_of_abcd(answer: str) -> str:
    """The first capital A to D behind the usual openings of a sentence; "" without one.

    Source: the scorer that Video-MME's README names, thanku-all/parse_answer, eval_your_results.py.
    """
    return _first(answer, _VIDEO_MME, "[ABCD]")


def first_of_abcde(answer: str, id: str, choices: Sequence[str]) -> tuple[str, bool]:
    """The first capital A to E behind the usual openings of a sentence, and whether there was one.

    Where there is none the authors draw a choice at random. Here `id` decides, evenly over all ids, so that a score can be had again.

    Source: lmms-eval, tasks/longvideobench/utils.py, by the benchmark's authors.
    """
    found = _first(answer, _LONG_VIDEO_BENCH, "[ABCDE]")
    return (found, True) if found else (drawn(id, choices), False)


def _first(answer: str, openings: Sequence[str], letters: str) -> str:
    rest = answer.strip()
    for opening in openings:
        rest = rest.replace(opening, "")
    found = re.search(letters, rest)
    return found[0] if found else ""


def named_choice(answer: str, id: str, options: Sequence[str]) -> tuple[str, bool]:
    """The choice that an answer names first, and whether it names one: "(A)", "A " or "A.", else an option word for word in a sentence.

    Of several ways to name one, each is looked for from the end and the one that ends up furthest to the left wins. Where none is
    named the rule draws a choice; here `id` decides, as in `first_of_abcde`.

    Source: lmms-eval, tasks/egoschema/utils.py, after the scorer of MMMU; EgoSchema's own takes numbers, not answers.
    """
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = [chr(ord("A") + index) for index in range(len(options))]
    ways = [(letter, way.format(letter)) for way in ("({})", "{} ", "{}.") for letter in letters]
    found = [(text.rfind(mark), letter) for letter, mark in ways if mark in text]
    if not found and len(text.split()) > 5:
        lower = text.lower()
        places = [(lower.rfind(option.lower()), letter) for letter, option in zip(letters, options, strict=True)]
        found = [place for place in places if place[0] >= 0]
    if not found:
        return drawn(id, letters), False
    return min(found, key=lambda place: place[0])[1], True


def drawn(id: str, choices: Sequence[str]) -> str:
    """One of the choices, the same for the same id."""
    return choices[int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]) % len(choices)]


def lettered(options: Sequence[str], way: str) -> list[str]:
    """Options with their letters in front: `way` is "({}) {}" or "{}. {}"."""
    return [way.format(chr(ord("A") + index), option) for index, option in enumerate(options)]
