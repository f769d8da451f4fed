"""The paper's Tables 1, 3 and 4: our numbers with intervals over training seeds, then what the paper printed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from workbench.analysis.intervals import ENOUGH, seed_interval
from workbench.analysis.labels import labels
from workbench.analysis.paired import gained, win_rates
from workbench.analysis.paper import SCORE_LABELS, SOURCE, TABLE_1, TUNED, Scores
from workbench.analysis.tables import PROMPT_SETS, names, of_arms


def estimate(mean: float, low: float, high: float, seeds: int, digits: int, signed: bool = False) -> str:
    """A mean over training seeds and the half-width of its 95 % t interval, such as "+0.370 ± 0.184".

    Where seeds are too few for an interval, their number stands in its place.
    """
    value = f"{mean:{'+' if signed else ''}.{digits}f}"
    if seeds < ENOUGH:
        return f"{value} ({seeds} seed{'s' if seeds > 1 else ''})"
    return f"{value} ± {(high - low) / 2:.{digits}f}"


def _estimate_of(values: Sequence[float] | np.ndarray, digits: int, signed: bool = False) -> str:
    """`estimate` of one value a training seed."""
    values = np.asarray(values, dtype=float)
    return estimate(float(values.mean()), *seed_interval(values), len(values), digits, signed)


def table_1(
    runs: pl.DataFrame,
    samples: pl.DataFrame,
    ours: str = "ours",
    against: str = "pretrained,kto,sft,frozen,dspo",
) -> pl.DataFrame:
    """The paper's Table 1: win rates of ours in per cent, by the true reward and, where tracked, the judge.

    What an interval tells from one half, or from no gain, in favour of ours is bold.

    Returns:
        A row a baseline and scorer; ours' gain over it, a column a prompt set, then the paper's averages over its five
        scorers.
    """
    scorers, called = {"true reward": "reward", "independent judge": "judge"}, labels(runs)
    rows = []
    for scorer, column in scorers.items():
        scored = samples.drop_nulls(column) if column in samples.columns else samples.clear()
        others = names(against)
        if column == "judge":  # older runs have none
            others = [arm for arm in others if arm == "pretrained" or arm in scored["arm"]]
            if ours not in scored["arm"]:
                continue
        rates = win_rates(runs, scored, ours, ",".join(others), column)
        for other in others:
            part = {row["prompts"]: row for row in rates.filter(pl.col("against") == other).to_dicts()}
            gains = gained(runs, scored, ours, other, column).to_numpy()
            clear = len(gains) >= ENOUGH and seed_interval(gains)[0] > 0
            row = {"ours against": called[other], "by": scorer, "seeds": part["all"]["seeds"]}
            row["gain, nats"] = _bold(_estimate_of(gains, 3, signed=True), clear)
            for prompts in PROMPT_SETS:
                if prompts in part:
                    mean, low, high = (100 * part[prompts][key] for key in ("mean", "low", "high"))
                    seeds = part[prompts]["seeds"]
                    text = _bold(estimate(mean, low, high, seeds, 1), seeds >= ENOUGH and low > 50)
                    row[f"{prompts}, %" if prompts == "all" else f"{prompts} style, %"] = text
            if column == "reward":  # the paper's averages stand once
                method = other.removeprefix(TUNED)
                printed = {name: by_arm[method] for name, by_arm in TABLE_1.items() if method in by_arm}
                row |= {f"{name} ({SOURCE}), %": f"{value:.1f}" for name, value in printed.items()}
            rows.append(row)
    return pl.DataFrame(rows)


#: Heading of a column of Tables 3 and 4 -> metric, digits, factor, what the pretrained model has, and whether the
#: largest is the best; left out where no run of the study has the metric.
MEASURES: dict[str, tuple[str, int, float, float, bool]] = {
    "gain in true reward": ("eval/reward_gain", 3, 1, 0, True),
    "gain by the judge": ("eval/judge_gain", 3, 1, 0, True),
    "win rate against pretrained, %": ("eval/win_rate", 1, 100, 50, True),
    "divergence of the policy": ("divergence/policy", 4, 1, 0, False),
}


def comparison(runs: pl.DataFrame, published: Mapping[str, Scores]) -> pl.DataFrame:
    """The paper's Table 3 or 4: a row a method, our final metrics with intervals, then the paper's five scores.

    The first row is the pretrained model, over which gains are. The largest mean of a gain or win rate is bold. Runs
    that were stopped because they had collapsed count with the divergence at which they were stopped; the other
    metrics are those of the runs that finished.

    Args:
        published: `paper.TABLE_3` or `paper.TABLE_4`; its keys are the arms.
    Raises:
        UserError: the study lacks an arm.
    """
    chosen = of_arms(runs, ",".join(published), stopped=True)
    called = labels(chosen)
    parts = {arm: chosen.filter(pl.col("arm") == arm).sort("seed") for arm in published}
    rows: list[dict[str, Any]] = [{"method": called["pretrained"], "arm": None, "seeds finished": None}]
    for arm, part in parts.items():
        finished = int((part["state"] == "complete").sum())
        count = str(finished) if finished == len(part) else f"{finished} of {len(part)}"
        rows.append({"method": called[arm], "arm": arm, "seeds finished": count})
    for heading, (metric, digits, factor, before, largest) in MEASURES.items():
        if metric not in runs.columns:
            continue
        values = {arm: part[metric].drop_nulls().to_numpy() * factor for arm, part in parts.items()}
        means = {arm: round(float(each.mean()), digits) for arm, each in values.items() if len(each)}
        best = max([before, *means.values()])
        rows[0][heading] = _bold(f"{before:g}", largest and best == before)
        for row, (arm, each) in zip(rows[1:], values.items(), strict=True):
            text = _estimate_of(each, digits, signed="gain" in heading) if len(each) else "none"
            row[heading] = _bold(text, largest and means.get(arm) == best)
    for row, scores in zip(rows[1:], published.values(), strict=True):
        row |= {f"{name} ({SOURCE})": f"{value:.2f}" for name, value in zip(SCORE_LABELS, scores, strict=True)}
    return pl.DataFrame(rows, infer_schema_length=None)


def _bold(text: str, is_so: bool) -> str:
    return f"**{text}**" if is_so else text
