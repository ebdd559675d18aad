"""The official normal form of answers to visual questions, and their accuracy. Source: GT-Vision-Lab/VQA, vqaEval.py; Goyal et al. 2017."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTRACTIONS = re.findall(
    r"\S+",
    """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at
shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""",
)
_APOSTROPHE_LOST = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"}
_APOSTROPHE_LOST["somebody'd"] = "somebodyd"  # as the official table has it
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The official code hands re.UNICODE, which is 32, to a parameter that counts replacements."""
AGREEING = 3
"""People who make an answer wholly right."""


def normalise_answer(answer: str) -> str:
    """Bring an answer into the official form: no punctuation, lower case, digits for numbers to ten, no articles, apostrophes put back."""
    text = _plain(answer)
    changed = text
    for mark in _PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text) is not None
        changed = changed.replace(mark, "" if alone else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", changed, count=_MOST_PERIODS).lower().split()]
    return " ".join(_APOSTROPHE_LOST.get(word, word) for word in words if word not in _ARTICLES)


def answer_form(answer: str) -> str:
    """The form that answers are compared in: the official one, or plain lower case where that leaves nothing, as of the choice A."""
    return normalise_answer(answer) or _plain(answer).lower()


def answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score a prediction by the answers that people gave: the mean over people of min(1, others who agree with it / 3).

    Where all people agree, the official code compares letter by letter; else both sides are normalised. Of fewer than four answers, with
    which nobody could be wholly right, each is right: 1 for one of them as `answer_form` has it.

    Args:
        prediction: one answer.
        answers: at least one; VQA has ten.

    Returns:
        0 to 1.
    """
    if len(answers) <= AGREEING:
        return float(answer_form(prediction) in map(answer_form, answers))
    given, said = [_plain(answer) for answer in answers], _plain(prediction)
    if len(set(given)) > 1:
        given, said = [normalise_answer(answer) for answer in given], normalise_answer(said)
    hits = [answer == said for answer in given]
    return sum(min(1.0, (sum(hits) - hit) / AGREEING) for hit in hits) / len(hits)


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
