"""Figures: data frames in, matplotlib figures out.

Intervals are over training seeds, as in `tables`; `style` has what all figures share.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workbench.analysis import fonts, paired, tables
from workbench.analysis.intervals import ENOUGH
from workbench.analysis.labels import labels
from workbench.analysis.style import MARKERS, name_buckets, points, say_few
from workbench.analysis.tables import PROMPT_SETS
from workbench.common.contact_sheet import evenly_spread
from workbench.common.errors import UserError
from workbench.common.outputs import output_file
from workbench.models.small.prompts import parse


def save(figure: Figure, folder: Path | str, name: str, formats: str = "png,svg") -> list[Path]:
    """Write a figure in each of the comma-separated formats.

    Args:
        folder: where; a relative one lies under $WORKBENCH_HOME, or the working folder.
    Raises:
        UserError: matplotlib cannot write a format.
    """
    folder = tables.report_folder(folder)
    paths = []
    for kind in tables.names(formats):
        if kind not in figure.canvas.get_supported_filetypes():
            raise UserError(f"formats = {formats!r}: {kind!r} is not one of png, svg, pdf, ...")
        # Without versions and dates, so that the same figure gives the same bytes.
        metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        paths.append(folder / f"{name}.{kind}")
        with output_file(paths[-1]) as path, fonts.lacking_named():
            figure.savefig(path, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
    return paths


# --- Fig. 1b: margin and divergence -------------------------------------------------------------------


def _draw(axes: Axes, table: pl.DataFrame, arms: Sequence[str], dashes: str, what: str, steps: bool = False) -> None:
    """A line an arm over steps, with the band of its runs.

    Args:
        table: of `tables.curves`.
        dashes: style of the lines.
        what: is drawn, for the legend.
        steps: whether a value holds until the next, in place of a straight line between the two.
    """
    for i, arm in enumerate(arms):
        part = table.filter(pl.col("arm") == arm)
        if part.is_empty():
            continue
        x, colour, count = part["step"].to_numpy(), f"C{i}", len(part)
        sparse = (int(count * (0.08 + 0.02 * i)), max(1, count // 6))  # a few marks an arm, not under each other
        axes.plot(
            x, part["mean"].to_numpy(), dashes, color=colour, label=f"{arm}: {what}", lw=2,
            marker=MARKERS[i % len(MARKERS)], markevery=sparse, ms=7, mec="white", mew=0.8,
            drawstyle="steps-post" if steps else "default",
        )  # fmt: skip
        if part["runs"].max() > 1 and count == 1:  # type: ignore[operator]
            axes.vlines(x, part["low"], part["high"], color=colour, alpha=0.5)  # a band of one step has no width
        elif part["runs"].max() > 1:  # type: ignore[operator]
            axes.fill_between(x, part["low"].to_numpy(), part["high"].to_numpy(), color=colour, alpha=0.13, lw=0,
                              step="post" if steps else None)  # fmt: skip


def _draw_divergences(axes: Axes, reference: pl.DataFrame, policy: pl.DataFrame, arms: Sequence[str]) -> None:
    """The reference's divergence in the arms that move it, in steps, and the policy's in the others."""
    _draw(axes, reference, arms, ":", "divergence of the reference", steps=True)
    _draw(axes, policy, arms, ":", "divergence of the policy")


#: Margins that Fig. 1b can show: metric -> of which pairs, and against which model.
MARGINS = {
    "rewards/margins": "of the training batches, against the reference as it is at the step",
    "validation/margin": "of validation pairs, against the pretrained model",
}


def margin_and_divergence(
    runs: pl.DataFrame, history: pl.DataFrame, *, margin: str = "rewards/margins", smoothing: int = 0
) -> Figure:
    """The paper's Fig. 1b: margin (left, solid, times beta/2) and divergence from the pretrained model (right, dotted).

    The divergence is the reference's where it moves and the policy's where it is frozen. Lines are means over an
    arm's runs, bands their range. The line below the figure says whose margin it is, against which model and how
    smoothed. A reference moves in steps. Where divergence goes far beyond delta, a small panel shows what is near it.

    Args:
        margin: metric; the paper's is that of the training batches. Known ones are in MARGINS.
        smoothing: logged points in the margin's running mean; 1 = none, 0 = a sixteenth of them.
    """
    arms = runs["arm"].unique(maintain_order=True).to_list()
    # Objectives without a beta, such as SFT, are drawn as they are.
    half_beta = pl.col("objective.beta").cast(pl.Float64) / 2 if "objective.beta" in runs.columns else pl.lit(1.0)
    scaled = history.join(runs.select("run_id", half_beta=half_beta.fill_null(1.0)), on="run_id")
    if margin in scaled.columns:
        scaled = scaled.with_columns(pl.col(margin) * pl.col("half_beta"))
        smoothing = smoothing or max(1, _points_of(scaled, margin) // 16)
    scaled = tables.curves(scaled, margin, smoothing)
    moving = runs.filter(pl.col("reference.policy") != "frozen")["arm"].unique().to_list()
    reference = tables.curves(history, "divergence/reference").filter(pl.col("arm").is_in(moving))
    policy = tables.curves(history, "divergence/policy").filter(~pl.col("arm").is_in(moving))
    deltas = deltas_of(runs)
    figure, left = plt.subplots(figsize=(8.6, 4.8))
    right = left.twinx()
    _draw(left, scaled, arms, "-", "margin")
    _draw_divergences(right, reference, policy, arms)
    for delta in deltas:
        right.axhline(delta, color="0.45", lw=1)
        at_left = right.get_yaxis_transform()  # x as a fraction of the axes, y as data
        right.text(0.01, delta, f"delta = {delta:g}", transform=at_left, va="bottom", color="0.3", fontsize="small")
    left.set(xlabel="training step", ylabel="margin x beta/2 (solid)")
    smoothed = f"; running mean of {smoothing} logged points" if smoothing > 1 else ""
    caption = f"Margin: {MARGINS.get(margin, margin)}{smoothed}."
    figure.text(0.5, -0.03, caption, ha="center", va="top", color="0.3", fontsize="small")
    right.set_ylabel("divergence, paper's Eq. 8 (dotted)")
    _share_zero(left, right)
    # Solid lines above dotted ones. The left axes, now on top, would hide the right ones by their background.
    left.set_zorder(right.get_zorder() + 1)
    left.patch.set_visible(False)
    if deltas and right.get_ylim()[1] > 4 * deltas[0]:
        near = figure.add_axes((1.06, 0.02, 0.3, 0.34))
        _draw_divergences(near, reference, policy, arms)
        near.axhline(deltas[0], color="0.45", lw=1)
        near.set_ylim(-0.25 * deltas[0], 2 * deltas[0])
        near.tick_params(labelsize="x-small")
        near.set_title("divergence near delta", fontsize="small")
    called = labels(runs)
    marks = [
        Line2D([], [], color=f"C{i}", lw=2, marker=MARKERS[i % len(MARKERS)], ms=7, mec="white", label=called[arm])
        for i, arm in enumerate(arms)
    ]
    kinds = [
        Line2D([], [], color="0.25", lw=2, ls=dashes, label=what)
        for dashes, what in (("-", "margin"), (":", "divergence of the reference,\nof the policy where that is frozen"))
    ]
    figure.legend(handles=marks + kinds, loc="upper left", bbox_to_anchor=(1.0, 0.95), frameon=False, fontsize="small")
    sns.despine(figure, right=False)
    return figure


def _share_zero(*panels: Axes) -> None:
    """Put the zeros of two vertical axes at one height, so that what is positive on one looks so beside the other."""
    limits = [(min(low, 0.0), max(high, 0.0)) for low, high in (axes.get_ylim() for axes in panels)]
    below = max(-low / (high - low) for low, high in limits)  # share of the height below zero
    for axes, (_, high) in zip(panels, limits, strict=True):
        if high > 0 and below < 1:
            axes.set_ylim(-high * below / (1 - below), high)


def _points_of(history: pl.DataFrame, metric: str) -> int:
    """How often a run logged a metric, the run that did so most often."""
    counts = history.drop_nulls(metric).group_by("run_id").len()["len"]
    return int(counts.max() or 0)  # type: ignore[arg-type]


def deltas_of(runs: pl.DataFrame) -> list[float]:
    """The threshold of a study's thresholded runs, where all of them have one; else none."""
    if "reference.delta" not in runs.columns:
        return []
    found = runs.filter(pl.col("reference.policy") == "threshold")["reference.delta"].drop_nulls().unique()
    return sorted(found.cast(pl.Float64).to_list()) if len(found) == 1 else []


# --- Fig. 2, 5: over timesteps --------------------------------------------------------------------------------


def imbalance(runs: pl.DataFrame, scales: pl.DataFrame) -> Figure:
    """The paper's Fig. 2: model loss, implicit reward scale, preference accuracy and lambda(t) over timestep intervals.

    Bars are means over runs, whiskers 95 % t intervals over runs (none with fewer than three, whose number then stands
    below). Those of accuracy begin at one half, which is chance.

    Args:
        runs: whose loss, reward scale and accuracy are shown.
        scales: whose lambda(t) are shown, one line for all arms that share it.
    """
    figure, panels = plt.subplots(1, 4, figsize=(17, 4.2))
    titles = {
        "loss": "(a) model loss",
        "reward_size": "(b) implicit reward, mean size",
        "accuracy": "(c) preference accuracy",
    }
    for axes, (quantity, title) in zip(panels, titles.items(), strict=False):
        table = tables.by_bucket(runs, quantity)
        x, mean = np.arange(len(table)), table["mean"].to_numpy()
        spread = np.abs(np.stack([table["low"].to_numpy(), table["high"].to_numpy()]) - mean)
        base, whiskers = 0.5 if quantity == "accuracy" else 0.0, spread if spread.any() else None
        axes.bar(x, mean - base, bottom=base, yerr=whiskers, color="C0", ecolor="0.25", capsize=2.5, width=0.75)
        axes.set(title=title)
        name_buckets(axes, table["bucket"])
    panels[0].set_ylabel("mean squared error")
    panels[1].set_ylabel("mean |implicit reward|")
    panels[2].axhline(0.5, color="0.3", ls="--", lw=1)
    panels[2].set_ylabel("share of pairs (1/2: chance)")
    count = len(runs.filter(pl.col("state") == "complete"))
    if count < ENOUGH:
        few = f"bars: {count} run{'s' if count > 1 else ''}, too few for whiskers"
        figure.text(0.5, -0.02, few, ha="center", va="top", color="0.3", fontsize="small")
    for i, (name, table) in enumerate(tables.distinct_scales(scales).items()):
        panels[3].plot(np.arange(len(table)), table["mean"], f"-{MARKERS[i % len(MARKERS)]}", label=name)
        name_buckets(panels[3], table["bucket"])
    panels[3].set(title="(d) reward scale lambda(t)")
    panels[3].legend(frameon=False, fontsize="small")
    for axes in panels:
        axes.set_xlabel("timestep (right: more noise, earlier)")
    sns.despine(figure)
    figure.tight_layout()
    return figure


def divergence_by_timestep(runs: pl.DataFrame, *, arms: str = "gamma-9,ours", base: str = "threshold") -> Figure:
    """The paper's Fig. 5: the policy's divergence by timestep interval, in per cent of the reference update's alone.

    Points are ratios of means over training seeds, whiskers 95 % bootstrap intervals over seeds; none below three.
    """
    table, called = paired.relative_divergence(runs, arms, base), labels(runs)
    figure, axes = plt.subplots(figsize=(7.6, 4.2))
    axes.axhline(100, color="0.35", ls="--", lw=1.2, label=f"reference update alone ({base})")
    shown = tables.names(arms)
    for i, arm in enumerate(shown):
        part = table.filter(pl.col("arm") == arm)
        at = np.arange(len(part)) + 0.14 * (i - (len(shown) - 1) / 2)
        points(axes, at, part, factor=100, colour=f"C{i}", marker=MARKERS[i], fmt="-", label=called[arm])
    name_buckets(axes, table["bucket"].unique(maintain_order=True))
    axes.set(xlabel="timestep (right: more noise, earlier)", ylabel="divergence of the policy, %")
    axes.set_title("the paper: lambda(t) lowers it where noise is high", fontsize="small", loc="right", pad=28)
    axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    say_few(figure, table["seeds"])
    sns.despine(figure)
    return figure


# --- Fig. 1a, 3, 4: methods -----------------------------------------------------------------------------------


def _panels(width: float) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one panel of gains a prompt set, and its axes by prompt set; 0 is the pretrained model."""
    figure, panels = plt.subplots(1, len(PROMPT_SETS), figsize=(width, 3.8), sharey=True)
    for axes, prompts in zip(panels, PROMPT_SETS, strict=True):
        axes.set_title("all prompts" if prompts == "all" else f"{prompts} style", fontsize="medium")
        axes.axhline(0, color="0.25", lw=1.2, label="pretrained model")
    panels[0].set_ylabel("gain in true reward, nats")
    return figure, dict(zip(PROMPT_SETS, panels, strict=True))


def _legend_below(figure: Figure, axes: Axes, table: pl.DataFrame) -> None:
    """The legend of one panel below all, and what there is to say where an arm has too few seeds for an interval.

    Args:
        table: of `tables.over_seeds`.
    """
    figure.tight_layout()
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize="small", ncols=4, **place)
    say_few(figure, table["seeds"], -0.1)


def final_gain(runs: pl.DataFrame, samples: pl.DataFrame) -> Figure:
    """The paper's Fig. 1a: what each arm of `runs` gains over the pretrained model, by prompt set, in their order.

    The gain is the true reward of an arm's images minus that of the pretrained model's of the same prompts and noise.
    Points are means over training seeds, whiskers 95 % t intervals over seeds.
    """
    arms = runs["arm"].unique(maintain_order=True).to_list()
    called = labels(runs)
    table = tables.over_seeds(tables.gain_by_prompt_set(runs, samples), "arm", "prompts")
    figure, panels = _panels(3.4 + 0.6 * len(arms) * len(PROMPT_SETS))
    for prompts, axes in panels.items():
        for i, arm in enumerate(arms):
            part = table.filter((pl.col("arm") == arm) & (pl.col("prompts") == prompts))
            points(axes, np.full(len(part), i), part, colour=f"C{i}", marker=MARKERS[i % len(MARKERS)])
        axes.set_xticks(range(len(arms)), [called[arm] for arm in arms], rotation=35, ha="right", fontsize="small")
        axes.set_xlim(-0.6, len(arms) - 0.4)
    _legend_below(figure, panels["all"], table)
    sns.despine(figure)
    return figure


def gain_against_interval(runs: pl.DataFrame, samples: pl.DataFrame) -> Figure:
    """The paper's Fig. 4: gain over the pretrained model against the reference's interval, with and without threshold.

    The gain is that of Fig. 1a. Points are means over training seeds, whiskers 95 % t intervals over seeds; the band is
    the frozen reference's, and only its line where seeds are too few for an interval.

    Raises:
        UserError: an arm differs in more than its reference and its interval, or no arm moves its reference.
    """
    table = tables.by_interval(runs, samples)
    bands, lines = table.filter(pl.col("policy") == "frozen"), table.filter(pl.col("policy") != "frozen")
    intervals = lines["interval"].unique().sort().to_list()
    figure, panels = _panels(13)
    for prompts, axes in panels.items():
        for band in bands.filter(pl.col("prompts") == prompts).to_dicts():
            axes.axhspan(band["low"], band["high"], color="0.85", lw=0)
            axes.axhline(band["mean"], color="0.45", ls="--", lw=1.2, label="frozen reference (Diffusion-DPO)")
        for i, (policy, name) in enumerate((("update", "without threshold"), ("threshold", "with threshold"))):
            part = lines.filter((pl.col("policy") == policy) & (pl.col("prompts") == prompts))
            at = np.array([intervals.index(value) for value in part["interval"]]) + 0.1 * (2 * i - 1)
            points(axes, at, part, colour=f"C{1 - i}", marker="^s"[i], fmt=("--", "-")[i], label=name)
        axes.set_xticks(range(len(intervals)), [str(value) for value in intervals])
        axes.set(xlim=(-0.5, len(intervals) - 0.5), xlabel="interval, steps")
    _legend_below(figure, panels["all"], table)
    sns.despine(figure)
    return figure


def sample_grid(
    runs: pl.DataFrame,
    samples: pl.DataFrame,
    sheets: Mapping[str, np.ndarray],
    pretrained: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    prompts: int = 8,
) -> Figure:
    """The paper's Fig. 3: same prompts and image seed, the pretrained model and then a column an arm, in their order.

    Below each image stands its true reward; the best of a row has a frame.

    Args:
        sheets, pretrained: of `tracking.load_sheets`; without the latter there is no column of the pretrained model.
        seed: of training.
        prompts: how many rows, evenly spread over the test prompts: nobody chose them.
    Raises:
        UserError: an arm has no run of that training seed with samples.
    """
    arms = runs["arm"].unique(maintain_order=True).to_list()
    columns: list[tuple[str, np.ndarray]] = []
    scores: list[list[float]] = []
    called = labels(runs)
    for arm in arms:
        found = runs.filter((pl.col("arm") == arm) & (pl.col("seed") == str(seed)) & pl.col("run_id").is_in([*sheets]))
        if found.is_empty():
            raise UserError(f"arm {arm!r}: no finished run with training seed {seed} that kept its samples")
        run = found["run_id"][0]
        # A sheet begins with the first image seed, of every prompt; so do the rows of its samples.
        own = samples.filter(pl.col("run_id") == run)
        if not columns and run in pretrained:
            columns.append(("pretrained", pretrained[run]))
            scores.append(own["pretrained_reward"].to_list())
        columns.append((called[arm], sheets[run]))
        scores.append(own["reward"].to_list())
    captions = samples.filter(pl.col("run_id") == run)["caption"].unique(maintain_order=True).to_list()
    shown = evenly_spread(len(captions), prompts)
    figure, cells = plt.subplots(len(shown), len(columns), figsize=(1.2 * len(columns), 1.2 * len(shown)))
    cells = np.reshape(cells, (len(shown), len(columns)))
    for column, (title, sheet) in enumerate(columns):
        # A sheet has a column a prompt and a row an image seed: the first row is shown.
        size = sheet.shape[1] // len(captions)
        cells[0, column].set_title(textwrap.fill(title, 14), fontsize="small", pad=4)
        for row, place in enumerate(shown):
            axes = cells[row, column]
            axes.imshow(sheet[:size, place * size : (place + 1) * size], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{scores[column][place]:.2f}", fontsize="x-small", labelpad=2)
            best = scores[column][place] == max(each[place] for each in scores)
            axes.spines[:].set(visible=best, color="C2", linewidth=2.5)
    for row, place in enumerate(shown):
        asked = parse(captions[place])
        cells[row, 0].set_ylabel(
            f"{asked.concept}\non {asked.colour},\n{asked.style}", rotation=0, ha="right", va="center", fontsize="small"
        )
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.06, hspace=0.2)
    return figure
