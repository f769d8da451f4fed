"""Figures: data frames in, matplotlib figures out. Colours are safe for the colour-blind, dashes tell in grey."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.errors import UserError
from workbench.stats import mean_interval

mpl.rcParams["svg.hashsalt"] = "workbench"  # the same figure gives the same file
sns.set_theme(context="notebook", style="ticks", palette="colorblind")

MARKERS = "osD^vPX<>*"


def save(figure: Figure, folder: Path | str, name: str, formats: str = "png,svg") -> list[Path]:
    """Write a figure in each of the comma-separated formats.

    Args:
        folder: where; a relative one lies under $WORKBENCH_HOME, or the working folder.
    Raises:
        UserError: matplotlib cannot write a format.
    """
    folder = Path(os.environ.get("WORKBENCH_HOME", ".")) / folder
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in (f.strip() for f in formats.split(",")):
        if kind not in figure.canvas.get_supported_filetypes():
            raise UserError(f"formats = {formats!r}: {kind!r} is not one of png, svg, pdf, ...")
        metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        paths.append(folder / f"{name}.{kind}")
        figure.savefig(paths[-1], dpi=150, bbox_inches="tight", metadata=metadata)
    return paths


def paper_arms(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs of declared arms; all runs where the study declares none."""
    arms = runs.filter(pl.col("arm") != "sampled")
    return runs if arms.is_empty() else arms


def baseline(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs whose reference is frozen, plain Diffusion-DPO; all arms where there is none."""
    frozen = paper_arms(runs).filter(pl.col("reference.policy") == "frozen")
    return paper_arms(runs) if frozen.is_empty() else frozen


def curves(history: pl.DataFrame, metric: str, smoothing: int = 1) -> pl.DataFrame:
    """A metric over steps, by arm: mean, lowest and highest of its runs, each smoothed by a running mean.

    Args:
        smoothing: number of logged points in the running mean; 1 = none.
    Returns:
        Columns arm, step, mean, low, high, runs.
    Raises:
        UserError: no run logged the metric.
    """
    if metric not in history.columns:
        raise UserError(f"metric {metric!r}: no run of the study logged it")
    points = history.select("arm", "run_id", "step", value=metric).drop_nulls().sort("run_id", "step")
    smooth = pl.col("value").rolling_mean(smoothing, min_samples=1).over("run_id")
    return (
        points.with_columns(smooth)
        .group_by("arm", "step")
        .agg(mean=pl.col("value").mean(), low=pl.col("value").min(), high=pl.col("value").max(), runs=pl.len())
        .sort("arm", "step")
    )


def _draw(axes: Axes, table: pl.DataFrame, arms: Sequence[str], dashes: str, label: str) -> None:
    for i, arm in enumerate(arms):
        part = table.filter(pl.col("arm") == arm)
        if part.is_empty():
            continue
        x, colour = part["step"].to_numpy(), f"C{i}"
        axes.plot(
            x, part["mean"].to_numpy(), dashes, color=colour, label=f"{arm}: {label}", lw=2.2 if dashes == "-" else 2
        )
        if part["runs"].max() > 1:  # type: ignore[operator]
            axes.fill_between(x, part["low"].to_numpy(), part["high"].to_numpy(), color=colour, alpha=0.13, lw=0)


def margin_and_divergence(
    runs: pl.DataFrame, history: pl.DataFrame, *, margin: str = "validation/margin", smoothing: int = 1
) -> Figure:
    """The paper's Fig. 1b: margin (left, solid, times beta/2) and divergence from the pretrained model (right, dotted).

    The divergence is the reference's where it moves and the policy's where it is frozen. Lines are means over an
    arm's runs, bands their range.
    """
    arms = runs["arm"].unique(maintain_order=True).to_list()
    half_beta = pl.col("objective.beta").cast(pl.Float64) / 2 if "objective.beta" in runs.columns else pl.lit(1.0)
    scaled = history.join(runs.select("run_id", half_beta=half_beta.fill_null(1.0)), on="run_id")
    if margin in scaled.columns:
        scaled = scaled.with_columns(pl.col(margin) * pl.col("half_beta"))
    scaled = curves(scaled, margin, smoothing)
    moving = runs.filter(pl.col("reference.policy") != "frozen")["arm"].unique().to_list()
    reference = curves(history, "divergence/reference").filter(pl.col("arm").is_in(moving))
    policy = curves(history, "divergence/policy").filter(~pl.col("arm").is_in(moving))
    figure, left = plt.subplots(figsize=(8.6, 4.8))
    right = left.twinx()
    _draw(left, scaled, arms, "-", "margin")
    _draw(right, reference, arms, ":", "divergence of the reference")
    _draw(right, policy, arms, ":", "divergence of the policy")
    deltas = _deltas(runs)
    for delta in deltas:
        right.axhline(delta, color="0.45", lw=1)
        at_left = right.get_yaxis_transform()  # x as a fraction of the axes, y as data
        right.text(0.01, delta, f"delta = {delta:g}", transform=at_left, va="bottom", color="0.3", fontsize="small")
    left.set(xlabel="training step", ylabel="margin against the pretrained model x beta/2 (solid)")
    right.set_ylabel("divergence, paper's Eq. 8 (dotted)")
    left.set_zorder(right.get_zorder() + 1)
    left.patch.set_visible(False)
    handles = [h for axes in (left, right) for h in axes.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="upper left", frameon=False, fontsize="small")
    sns.despine(figure, right=False)
    return figure


def _deltas(runs: pl.DataFrame) -> list[float]:
    if "reference.delta" not in runs.columns:
        return []
    found = runs.filter(pl.col("reference.policy") == "threshold")["reference.delta"].drop_nulls().unique()
    return sorted(found.cast(pl.Float64).to_list()) if len(found) == 1 else []


def score_against_divergence(runs: pl.DataFrame, *, score: str = "eval/reward") -> Figure:
    """The paper's Fig. 1c: final score of every run against how far its policy has moved.

    The line is a running mean over neighbouring runs, drawn where there are enough.

    Raises:
        UserError: no finished run has both numbers.
    """
    needed = [score, "divergence/policy"]
    if any(name not in runs.columns for name in needed):
        raise UserError(f"metric {score!r}: no finished run of the study has it together with divergence/policy")
    done = runs.drop_nulls(needed).sort("divergence/policy")
    figure, axes = plt.subplots(figsize=(7.2, 4.4))
    for i, arm in enumerate(done["arm"].unique(maintain_order=True)):
        part = done.filter(pl.col("arm") == arm)
        axes.scatter(
            part["divergence/policy"], part[score], marker=MARKERS[i % len(MARKERS)], s=60, label=arm, zorder=3
        )
    if len(done) >= 8:
        window = max(3, len(done) // 4)
        smooth = done.select(pl.col(*needed).rolling_mean(window, center=True)).drop_nulls()
        axes.plot(
            smooth["divergence/policy"], smooth[score], color="0.6", lw=2, zorder=1, label=f"mean of {window} runs"
        )
    for delta in _deltas(done):
        axes.axvline(delta, color="0.45", lw=1)
        axes.annotate(
            f"delta = {delta:g}",
            (delta, 0.02),
            xycoords=("data", "axes fraction"),
            color="0.35",
            rotation=90,
            ha="right",
        )
    axes.set(xlabel="divergence of the policy from the pretrained model (Eq. 8)", ylabel=score)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def by_bucket(runs: pl.DataFrame, quantity: str) -> pl.DataFrame:
    """A tracked `timestep_*` quantity by bucket: its mean over runs with a bootstrap interval over runs.

    Returns:
        Columns bucket (such as "0-99"), mean, low, high; least noise first.
    """
    runs = runs.filter(pl.col("state") == "complete")
    columns = sorted(c for c in runs.columns if c.startswith(f"timestep_{quantity}/"))
    if not columns:
        raise UserError(f"metric timestep_{quantity}: no run of the study logged it")
    rows = []
    for column in columns:
        values = runs[column].drop_nulls().to_numpy()
        low, high = mean_interval(values)
        edges = column.split("/t")[1].split("-")
        rows.append(
            {"bucket": f"{int(edges[0])}-{int(edges[1])}", "mean": float(values.mean()), "low": low, "high": high}
        )
    return pl.DataFrame(rows)


def imbalance(runs: pl.DataFrame, scales: pl.DataFrame) -> Figure:
    """The paper's Fig. 2: model loss, implicit reward scale, preference accuracy and lambda(t) over timestep intervals.

    Bars are means over runs, whiskers 95 % bootstrap intervals over runs (none with one run).

    Args:
        runs: whose loss, reward scale and accuracy are shown.
        scales: whose lambda(t) are shown, one line an arm.
    """
    figure, panels = plt.subplots(1, 4, figsize=(17, 4.2))
    titles = {
        "loss": "(a) model loss",
        "reward_size": "(b) implicit reward, mean size",
        "accuracy": "(c) preference accuracy",
    }
    for axes, (quantity, title) in zip(panels, titles.items(), strict=False):
        table = by_bucket(runs, quantity)
        x, mean = np.arange(len(table)), table["mean"].to_numpy()
        spread = np.abs(np.stack([table["low"].to_numpy(), table["high"].to_numpy()]) - mean)
        axes.bar(x, mean, yerr=spread if spread.any() else None, color="C0", ecolor="0.25", capsize=2.5, width=0.75)
        axes.set(title=title)
        axes.set_xticks(x, table["bucket"], rotation=60, ha="right", fontsize="x-small")
    panels[0].set_ylabel("mean squared error")
    panels[1].set_ylabel("mean |implicit reward|")
    panels[2].axhline(0.5, color="0.3", ls="--", lw=1)
    panels[2].set_ylabel("share of pairs")
    panels[2].set_ylim(bottom=0.45)
    for i, arm in enumerate(scales["arm"].unique(maintain_order=True)):
        table = by_bucket(scales.filter(pl.col("arm") == arm), "lambda")
        panels[3].plot(np.arange(len(table)), table["mean"], f"-{MARKERS[i % len(MARKERS)]}", label=arm)
    panels[3].set_xticks(np.arange(len(table)), table["bucket"], rotation=60, ha="right", fontsize="x-small")
    panels[3].set(title="(d) reward scale lambda(t)")
    panels[3].legend(frameon=False, fontsize="small")
    for axes in panels:
        axes.set_xlabel("timestep interval (right: more noise, earlier)")
    sns.despine(figure)
    figure.tight_layout()
    return figure
