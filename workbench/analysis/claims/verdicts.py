"""From effects to verdicts: when a claim holds, does not hold here, or is left open. Written before the runs.

An effect holds where the whole 95 % t interval of its mean over seeds lies above 0, and a claim where all of its
effects do. An effect does not hold here where the whole interval lies below 0, and a claim where one of its k effects
does so even at 1 - 0.05 / k: otherwise a claim of many parts would be refused by chance more often than one of few.
All else is inconclusive, always with fewer than 3 seeds, and wherever runs of the claim's arms were lost to numbers
that are not finite or to pruning: those that are left would speak for the better ones.
"""

from typing import Any

import numpy as np

from workbench.analysis.claims.evidence import Effect, Evidence, Values
from workbench.analysis.claims.rules import Claim
from workbench.analysis.intervals import CONFIDENCE, ENOUGH, detectable, seed_interval
from workbench.common.errors import UserError

HOLDS, FAILS, OPEN, ABSENT = "holds", "does not hold here", "inconclusive", "not measured"


def verdict_of(values: Values, parts: int = 1) -> str:
    """The verdict of one effect.

    Args:
        values: one a training seed, (S,).
        parts: deciding effects of the claim; it is refused where an interval at 1 - 0.05 / parts lies below 0.
    """
    if len(values) < ENOUGH:
        return OPEN
    if seed_interval(values)[0] > 0:
        return HOLDS
    return FAILS if seed_interval(values, 1 - (1 - CONFIDENCE) / parts)[1] < 0 else OPEN


def judge(claims: list[Claim], evidence: Evidence) -> list[dict[str, Any]]:
    """The claims with their effects and verdicts, as plain data.

    Returns:
        One dictionary a claim: number, title, where, arms, verdict, reason (why it was not measured, or not decided),
        and effects, each with statement, unit, mean, low, high, detectable (about the smallest mean that so many seeds
        would tell from 0, or None), seeds, decides and verdict.
    """
    rows = []
    for c in claims:
        row: dict[str, Any] = {"number": c.number, "title": c.title, "where": c.where, "arms": list(c.arms)}
        reason = _lost(c, evidence)
        try:
            measured = c.measure(evidence)
            parts = sum(effect.decides for effect in measured)
            effects = [_measured(effect, parts) for effect in measured]
            verdicts = {effect["verdict"] for effect in effects if effect["decides"]}
            overall = FAILS if FAILS in verdicts else HOLDS if verdicts == {HOLDS} else OPEN
            rows.append(row | {"verdict": OPEN if reason else overall, "reason": reason, "effects": effects})
        except UserError as error:
            reason = "; ".join(filter(None, (str(error), reason)))
            rows.append(row | {"verdict": ABSENT, "reason": reason, "effects": []})
    return rows


def _lost(c: Claim, evidence: Evidence) -> str:
    """Which of a claim's runs came to no proper end, as a remark; empty where none did."""
    lost = {arm: evidence.lost[arm] for arm in c.arms if evidence.lost.get(arm)}
    named = ", ".join(f"{arm} ({len(seeds)})" for arm, seeds in lost.items())
    return (
        f"runs that failed or were pruned: {named}; those that are left would speak for the better ones" if lost else ""
    )


def _measured(effect: Effect, parts: int) -> dict[str, Any]:
    """An effect with its mean, interval and verdict, as `judge` returns it."""
    low, high = seed_interval(effect.values)
    return {
        "statement": effect.statement,
        "unit": effect.unit,
        "mean": float(np.mean(effect.values)),
        "low": low,
        "high": high,
        "detectable": detectable(effect.values),
        "seeds": len(effect.values),
        "decides": effect.decides,
        "verdict": verdict_of(effect.values, parts) if effect.decides else "",
    }
