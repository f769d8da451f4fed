"""What rounds of draw, score, pair and train gain: a table and a figure, measured from round 0, the pretrained model.

Gains are of the images that each round's model drew at its end, image by image against the pretrained model's of the
same prompt and noise. A folder of rounds is one training after another, so its intervals are over prompts and not over
training seeds: they say what other prompts would have shown, not what another training would have.
"""

from contextlib import suppress
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workbench import tracking
from workbench.analysis.intervals import cell
from workbench.common.errors import UserError
from workbench.common.stats import mean_interval

#: What is gained: column of `tracking.load_samples` -> heading. The pretrained model's column is `pretrained_COLUMN`.
SCORES = {"reward": "true reward", "judge": "independent judge"}
DIVERGENCE, MARGIN = "divergence/policy", "validation/margin"


def rounds_of(runs: pl.DataFrame) -> pl.DataFrame:
    """The complete runs that are rounds of the newest training, by their number in column `round`.

    Several folders of rounds may be tracked under one name. A round goes on from the one before it, so a run belongs to
    the newest training only if it began after the round before.

    Args:
        runs: of `tracking.load_runs`.
    Raises:
        UserError: there is none.
    """
    none = UserError("the study has no rounds; python -m workbench.rounds makes some")
    if "rounds.count" not in runs.columns:  # a setting that only the runs of rounds have
        raise none
    number = pl.col("name").str.extract(r"-round-(\d+)$", 1).cast(pl.Int64)
    whole = runs.with_columns(round=number).filter(
        pl.col("round").is_not_null() & pl.col("rounds.count").is_not_null() & (pl.col("state") == "complete")
    )
    if whole.is_empty():
        raise none
    chain: list[dict[str, Any]] = []
    for run in whole.to_dicts():  # in the order in which they began
        if run["round"] <= len(chain) + 1:
            # A round that is made anew ends what had gone on from the one in its place.
            chain = [*chain[: run["round"] - 1], run]
    if not chain:
        raise none
    return whole.filter(pl.col("run_id").is_in([run["run_id"] for run in chain])).sort("round")


def samples_of(runs: pl.DataFrame) -> pl.DataFrame:
    """`tracking.load_samples`, or no rows where no run has samples: rewards of real models are scored elsewhere."""
    with suppress(UserError):
        return tracking.load_samples(runs)
    return pl.DataFrame(schema={"run_id": pl.String, "caption": pl.String})


def by_round(rounds: pl.DataFrame, samples: pl.DataFrame) -> pl.DataFrame:
    """What each round's model has gained over round 0, and how far it has moved from it.

    Args:
        rounds: of `rounds_of`.
        samples: of `samples_of`.
    Returns:
        A row a round, the first of them round 0, whose gains and divergence are 0: round, prompts (that were drawn),
        divergence, margin (on the validation pairs), and for each score of SCORES its gain, SCORE_low and SCORE_high:
        the 95 % interval over prompts. Null is what was not measured.
    """
    rows: list[dict[str, Any]] = []
    for run in rounds.to_dicts():
        own = samples.filter(pl.col("run_id") == run["run_id"])
        row = {"round": run["round"], "prompts": own["caption"].n_unique()}
        row |= {"divergence": run.get(DIVERGENCE), "margin": run.get(MARGIN)}
        for score in SCORES:
            row |= _gain(own, score)
        rows.append(row)
    start = {name: None if name == "prompts" or rows[0][name] is None else 0.0 for name in rows[0]} | {"round": 0}
    return pl.DataFrame([start, *rows], infer_schema_length=None)


def _gain(samples: pl.DataFrame, score: str) -> dict[str, float | None]:
    """Mean gain of one score over the pretrained model with its interval; all null where it was not measured."""
    before = f"pretrained_{score}"
    known = samples.drop_nulls([score, before]) if {score, before} <= {*samples.columns} else samples.clear()
    if known.is_empty():
        return dict.fromkeys((score, f"{score}_low", f"{score}_high"))
    # By prompt, since images of one prompt are not independent; each prompt has as many.
    gains = known.group_by("caption", maintain_order=True).agg(gain=(pl.col(score) - pl.col(before)).mean())["gain"]
    low, high = mean_interval(gains.to_numpy())
    return {score: float(np.mean(gains.to_numpy())), f"{score}_low": low, f"{score}_high": high}


def in_words(table: pl.DataFrame) -> pl.DataFrame:
    """`by_round` as people read it: a column a score, with its interval; without columns that were not measured."""
    rows = []
    for row in table.to_dicts():
        cells: dict[str, Any] = {"round": row["round"]}
        for score, heading in SCORES.items():
            if table[score].null_count() < len(table):
                span = row[score], row[f"{score}_low"], row[f"{score}_high"]
                cells[f"gain in {heading}"] = "" if None in span else cell(*span)
        for name, heading in (("divergence", "divergence from round 0"), ("margin", "validation margin")):
            if table[name].null_count() < len(table):
                cells[heading] = "" if row[name] is None else f"{row[name]:.4g}"
        rows.append(cells)
    return pl.DataFrame(rows, infer_schema_length=None)


def gain_by_round(table: pl.DataFrame) -> Figure:
    """Gain over round 0 (left) and divergence from it (right), round by round.

    Whiskers are 95 % intervals over prompts. Where nothing was scored, the left panel has the margin on the validation
    pairs.

    Args:
        table: of `by_round`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0))
    scores = [score for score in SCORES if table[score].null_count() < len(table)]
    for i, score in enumerate(scores):
        _line(left, table, score, f"C{i}", "os"[i], SCORES[score])
    if scores:
        left.legend(frameon=False, fontsize="small")
        left.set_ylabel("gain over round 0")
    elif table["margin"].null_count() < len(table):
        _line(left, table, "margin", "C0", "o")
        left.set_ylabel("margin on the validation pairs")
    if table["divergence"].null_count() < len(table):
        _line(right, table, "divergence", "C2", "D")
    right.set_ylabel("divergence from round 0 (Eq. 8)")
    for axes in (left, right):
        axes.axhline(0, color="0.3", ls="--", lw=1, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
    sns.despine(figure)
    figure.tight_layout()
    return figure


def _line(axes: Axes, table: pl.DataFrame, column: str, colour: str, marker: str, name: str | None = None) -> None:
    """One column over rounds, with whiskers where the table has an interval of it."""
    part = table.drop_nulls(column)
    spans = None
    if f"{column}_low" in part.columns:
        mean = part[column].to_numpy()
        spans = np.abs(np.stack([mean - part[f"{column}_low"].to_numpy(), part[f"{column}_high"].to_numpy() - mean]))
    axes.errorbar(
        part["round"].to_numpy(), part[column].to_numpy(), yerr=spans, color=colour, marker=marker, ms=7, lw=2,
        mec="white", mew=0.8, elinewidth=1.2, capsize=3, label=name, zorder=3,
    )  # fmt: skip
