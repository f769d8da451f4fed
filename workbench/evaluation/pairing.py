"""Preference pairs from scores: which images of a prompt make a pair, and which of the two is preferred.

Pure functions. Images are numbered in the order in which they were planned, and every array of scores is (N,) over all
of them, higher being better. A pair's label is that of its first image: 1 where it is preferred, 0 where the second is,
0.5 for a tie.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
#: Numbers of two images.
Couple = tuple[int, int]


class Preference(NamedTuple):
    """A labelled pair.

    Attributes:
        first, second: numbers of the images.
        label: of the first image: 1, 0, or 0.5 for a tie.
    """

    first: int
    second: int
    label: float


class Counts(NamedTuple):
    """How the preferences of two raters go together.

    Attributes:
        one, other: a scorer's name, or "label".
        agree, disagree: pairs in which both prefer an image, the same or different ones.
        tied: pairs in which at least one of them prefers none.
    """

    one: str
    other: str
    agree: int
    disagree: int
    tied: int


@dataclass(frozen=True)
class Rule:
    """How pairs are made of scores.

    Attributes:
        pairs: a name in PAIRINGS.
        label: a name in LABELS.
        gap: least difference of a pair's two scores; in the scorer's unit, or standard deviations where there are
            several scorers.
        tie: smaller differences are ties, in the same unit; a vote does not look at it.
        slope: of the Bradley-Terry draw, per that unit.
    """

    pairs: str
    label: str
    gap: float
    tie: float
    slope: float


@dataclass(frozen=True)
class Pairs:
    """The pairs of a prompt set, and why others were left out.

    Attributes:
        identical: pairs left out because their two images are the same, or were a pair already.
        close: pairs left out because their scores differ by less than the gap.
    """

    made: list[Preference]
    identical: int
    close: int


# --- which images make a pair ------------------------------------------------------------------------------------


def best_worst(scores: Scores) -> list[Couple]:
    """The best image against the worst, of the scores (N,) of one prompt's images."""
    order = _by_score(scores)
    return [_in_order(order[0], order[-1])] if len(order) > 1 else []


def halves(scores: Scores) -> list[Couple]:
    """The better half against the other, rank by rank; each image in one pair, and the middle one in none."""
    order, half = _by_score(scores), len(scores) // 2
    return [_in_order(*couple) for couple in zip(order[:half], order[len(order) - half :], strict=True)]


def every(scores: Scores) -> list[Couple]:
    """Every two images."""
    return list(combinations(range(len(scores)), 2))


def fours(scores: Scores) -> list[Couple]:
    """Of each four images a, b, c, d in the order of the plan: (a, b), (d, c), (a, c), whatever their scores.

    Two images serve twice, and a file holds each once.
    """
    return [
        (start + i, start + j) for start in range(0, len(scores) - 3, 4) for i, j in ((0, 1), (3, 2), (0, 2))
    ]  # fmt: skip


#: Scores of one prompt's images (N,) -> couples of them.
PAIRINGS: dict[str, Callable[[Scores], list[Couple]]] = {
    "best-worst": best_worst,
    "halves": halves,
    "all": every,
    "fours": fours,
}


def _by_score(scores: Scores) -> list[int]:
    """Images from the best to the worst; equal ones in their own order."""
    return np.argsort(-scores, kind="stable").tolist()


def _in_order(i: int, j: int) -> Couple:
    # By their numbers and not by their scores: the place in a pair must not tell which is preferred.
    return (i, j) if i < j else (j, i)


# --- which of the two is preferred -------------------------------------------------------------------------------


def by_score(difference: float, tie: float) -> float:
    """Label of the first image where the better score wins; 0.5 where they are equal, or closer than `tie`."""
    return 0.5 if abs(difference) < tie or difference == 0 else float(difference > 0)


def by_vote(differences: Sequence[float]) -> float:
    """Label of the first image by the majority of scorers; one that sees no difference does not vote.

    Args:
        differences: each scorer's score of the first image minus the second's.
    """
    return by_score(float(sum(np.sign(differences))), 0.0)


def bradley_terry(difference: float, slope: float, tie: float, uniform: float) -> float:
    """Label of the first image, drawn: 1 with probability sigmoid(slope * difference), 0.5 for a tie.

    Args:
        difference: score of the first image minus the second's.
        slope: how sure the labeller is, per unit of the score.
        tie: differences smaller than this are ties.
        uniform: a draw from [0, 1).
    """
    if abs(difference) < tie:
        return 0.5
    # A sigmoid that does not overflow, however large the difference.
    return float(uniform < 0.5 * (1 + math.tanh(0.5 * slope * difference)))


LABELS = ("score", "vote", "bradley-terry")


# --- both together -----------------------------------------------------------------------------------------------


def combined(scores: Mapping[str, Scores]) -> Scores:
    """One score an image, (N,): that of the only scorer, or the mean of several, each standardised over all images."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    return np.mean([_standardised(values) for values in scores.values()], axis=0)


def _standardised(values: Scores) -> Scores:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def make_pairs(
    scores: Mapping[str, Scores], uids: Sequence[str], prompts: Sequence[Sequence[int]], rule: Rule, seed: int
) -> Pairs:
    """Choose and label the pairs of a prompt set.

    Args:
        scores: each scorer's, over all images.
        uids: what tells images apart: two with the same never make a pair.
        prompts: the numbers of each prompt's images.
        seed: of the Bradley-Terry draws.
    """
    total, uniform = combined(scores), random.Random(seed)
    made: list[Preference] = []
    identical = close = 0
    for images in prompts:
        known: set[frozenset[str]] = set()
        for i, j in PAIRINGS[rule.pairs](total[list(images)]):
            first, second = images[i], images[j]
            # A number is drawn for every couple, so that a label does not depend on what became of those before it.
            draw, difference = uniform.random(), float(total[first] - total[second])
            couple = frozenset((uids[first], uids[second]))
            if len(couple) < 2 or couple in known:
                identical += 1
            elif abs(difference) < rule.gap:
                close += 1
            else:
                known.add(couple)
                each = [float(values[first] - values[second]) for values in scores.values()]
                made.append(Preference(first, second, _label(rule, difference, each, draw)))
    return Pairs(made, identical, close)


def _label(rule: Rule, difference: float, each: Sequence[float], uniform: float) -> float:
    if rule.label == "vote":
        return by_vote(each)
    if rule.label == "score":
        return by_score(difference, rule.tie)
    return bradley_terry(difference, rule.slope, rule.tie, uniform)


def agreement(made: Sequence[Preference], scores: Mapping[str, Scores]) -> list[Counts]:
    """How often every two of the scorers, and each of them and the labels, prefer the same image of a pair."""
    raters = {
        name: np.array([np.sign(values[one.first] - values[one.second]) for one in made])
        for name, values in scores.items()
    }
    raters["label"] = np.array([np.sign(one.label - 0.5) for one in made])
    return [
        Counts(one, other, *(int((raters[one] * raters[other] == sign).sum()) for sign in (1, -1, 0)))
        for one, other in combinations(raters, 2)
    ]
