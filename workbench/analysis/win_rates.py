"""Scores of samples in, the paper's Tables 1 to 3 out.

A frame of scores has a row an image: columns model, prompts (the prompt set's name), row (the prompt's place in it),
prompt, category, seed (the image's), and one a scorer. Intervals are 95 % bootstrap intervals over prompts: images of
one prompt are not independent. They do not hold the spread between training runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from workbench.analysis.intervals import cell
from workbench.analysis.labels import label
from workbench.common.stats import mean_interval, wins

AVERAGE = "average"
IMAGE = ["prompts", "row", "seed"]


def _over_prompts(values: pl.DataFrame, column: str) -> dict[str, Any]:
    # The seeded bootstrap draws by place, so the order of the prompts is part of the interval.
    each = values.group_by("row", maintain_order=True).agg(pl.col(column).mean()).sort("row")[column].to_numpy()
    low, high = mean_interval(each)
    return {"mean": float(each.mean()), "low": low, "high": high, "count": len(each)}


def _groups(scores: pl.DataFrame) -> Iterator[tuple[str, str, pl.DataFrame]]:
    """Prompt set, model and that model's scores there, prompt set by prompt set."""
    for (prompts,), whole in scores.group_by("prompts", maintain_order=True):
        for (model,), part in whole.group_by("model", maintain_order=True):
            yield str(prompts), str(model), part


def score_means(scores: pl.DataFrame, scorers: Sequence[str]) -> pl.DataFrame:
    """Each model's mean score by prompt set.

    Returns:
        Columns prompts, model, scorer, mean, low, high, count (of prompts).
    """
    rows = [
        {"prompts": prompts, "model": model, "scorer": scorer} | _over_prompts(part, scorer)
        for prompts, model, part in _groups(scores)
        for scorer in scorers
    ]
    return pl.DataFrame(rows)


def win_rates(scores: pl.DataFrame, ours: str, scorers: Sequence[str]) -> pl.DataFrame:
    """Share of images on which one model scores higher than another, by prompt set and scorer.

    Same prompt and image seed for both, ties half. Where there are several scorers, `average` is the mean over them
    (the paper's last column).

    Args:
        ours: the model whose wins are counted.
    Returns:
        Columns prompts, against, scorer, mean, low, high, count (of prompts); shares in 0..1.
    """
    mine = scores.filter(pl.col("model") == ours).select(*IMAGE, *scorers)
    others = scores.filter(pl.col("model") != ours)
    rows = []
    for prompts, against, part in _groups(others):
        both = part.join(mine, on=IMAGE, suffix=" of ours", maintain_order="left")
        won = both.with_columns(
            **{name: wins(both[f"{name} of ours"].to_numpy(), both[name].to_numpy()) for name in scorers}
        ).with_columns(pl.mean_horizontal(*scorers).alias(AVERAGE))
        for scorer in (*scorers, *([AVERAGE] if len(scorers) > 1 else [])):
            rows.append({"prompts": prompts, "against": against, "scorer": scorer} | _over_prompts(won, scorer))
    return pl.DataFrame(rows)


def win_table(
    rates: pl.DataFrame, headings: Mapping[str, str], printed: Mapping[str, Mapping[str, float]], source: str
) -> pl.DataFrame:
    """Win rates in the layout of the paper's Tables 1 and 2: a row a baseline, a column a scorer, then their average.

    Args:
        rates: of `win_rates`.
        headings: what each scorer is called.
        printed: the paper's averages in per cent by prompt set and arm, shown where names or labels are the same.
        source: what the column of the paper's averages is called by.
    """
    table = _wide(rates, "against", "ours against", {**headings, AVERAGE: "average"}, 100, 1, ", %")
    called = {(prompts, label(arm)): value for prompts, by_arm in printed.items() for arm, value in by_arm.items()}
    paper = [called.get((prompts, label(against))) for prompts, against in _keys(rates, "against")]
    if not any(paper):
        return table
    shown = [None if value is None else f"{value:.1f}" for value in paper]
    return table.with_columns(pl.Series(f"average ({source}), %", shown, dtype=pl.String))


def score_table(means: pl.DataFrame, headings: Mapping[str, str]) -> pl.DataFrame:
    """Mean scores in the layout of the paper's Tables 3 and 4: a row a model, a column a scorer."""
    return _wide(means, "model", "model", headings, 1, 3, "")


def _keys(table: pl.DataFrame, by: str) -> list[tuple[str, str]]:
    return table.select("prompts", by).unique(maintain_order=True).rows()


def _wide(
    table: pl.DataFrame, by: str, title: str, headings: Mapping[str, str], factor: float, digits: int, unit: str
) -> pl.DataFrame:
    rows = []
    for prompts, name in _keys(table, by):
        row: dict[str, Any] = {"prompts": prompts, title: label(name)}
        for one in table.filter((pl.col("prompts") == prompts) & (pl.col(by) == name)).to_dicts():
            mean, low, high = (factor * one[key] for key in ("mean", "low", "high"))
            row[headings[one["scorer"]] + unit] = cell(mean, low, high, digits)
        rows.append(row)
    return pl.DataFrame(rows)
