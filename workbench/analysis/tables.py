"""Tables: data frames of runs in, data frames of means and intervals out; `paper_tables` lays them out as the paper's.

Intervals are 95 % t intervals over *training seeds*, the only thing that repeats a run (`intervals`). `paired` compares
one arm with another.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from workbench.analysis.intervals import seed_interval
from workbench.analysis.paper import TUNED
from workbench.common.errors import UserError
from workbench.common.markdown import markdown_table
from workbench.common.outputs import output_file
from workbench.models.small.prompts import STYLES, parse

#: The prompt sets that stand for the paper's three: the styles, and all prompts together.
PROMPT_SETS = ("all", *STYLES)

# --- which runs ----------------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def of_arms(runs: pl.DataFrame, arms: str, stopped: bool = False) -> pl.DataFrame:
    """The finished runs of some arms, in the order in which they are asked for.

    Args:
        arms: comma-separated; "pretrained", which is no arm, is passed over.
        stopped: also the runs that were stopped early because they had collapsed.
    Raises:
        UserError: an arm has no such run; names the arms that have one.
    """
    wanted = [arm for arm in dict.fromkeys(names(arms)) if arm != "pretrained"]
    ended = pl.lit(True) if stopped else pl.col("state") == "complete"
    done = runs.filter(ended & (pl.col("arm") != "sampled"))
    there = done["arm"].unique(maintain_order=True).to_list()
    for arm in wanted:
        if arm not in there:
            raise UserError(f"arm {arm!r}: the study has no finished run of it, only of {', '.join(there) or 'none'}")
    return pl.concat([done.filter(pl.col("arm") == arm) for arm in wanted])


def paper_arms(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs of declared arms; all runs where the study declares none."""
    arms = runs.filter(pl.col("arm") != "sampled")
    return runs if arms.is_empty() else arms


def reference_arms(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs that differ in their reference alone: arms `frozen`, `update` and `threshold`; else all arms.

    Studies made by earlier versions have them as `frozen` and `same-...`.
    """
    same = runs.filter(pl.col("arm").str.starts_with("same-"))
    if same.is_empty():
        same = runs.filter(pl.col("arm").is_in(["update", "threshold"]))
    return paper_arms(runs) if same.is_empty() else pl.concat([runs.filter(pl.col("arm") == "frozen"), same])


#: The arms of the paper's methods, weakest first.
METHODS = ("sft", "frozen", "kto", "dspo", "ours")


def methods(runs: pl.DataFrame) -> str:
    """The arms that stand for the paper's methods, comma-separated: where a method has a tuned arm, that one.

    Raises:
        UserError: the study has none of them.
    """
    there = set(runs["arm"])
    chosen = [next((arm for arm in (TUNED + method, method) if arm in there), None) for method in METHODS]
    if not any(chosen):
        raise UserError(f"the study has no arm of the paper's methods: {', '.join(METHODS)}")
    return ",".join(arm for arm in chosen if arm is not None)


def baseline(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs of plain Diffusion-DPO: arm `frozen`, else every arm with a frozen reference, else all arms."""
    arms = paper_arms(runs)
    for found in (pl.col("arm") == "frozen", pl.col("reference.policy") == "frozen"):
        if not arms.filter(found).is_empty():
            return arms.filter(found)
    return arms


# --- means and intervals -------------------------------------------------------------------------------------


def curves(history: pl.DataFrame, metric: str, smoothing: int = 1) -> pl.DataFrame:
    """A metric over steps, by arm: mean, lowest and highest of its runs, each smoothed by a running mean.

    Args:
        smoothing: number of logged points in the running mean, which is centred; at the ends at least half of them;
            1 = none.
    Returns:
        Columns arm, step, mean, low, high, runs.
    Raises:
        UserError: no run logged the metric.
    """
    if metric not in history.columns:
        raise UserError(f"metric {metric!r}: no run of the study logged it")
    points = history.select("arm", "run_id", "step", value=metric).drop_nulls().sort("run_id", "step")
    # Within a run, before runs are averaged: another run's points are no neighbours.
    smooth = pl.col("value").rolling_mean(smoothing, min_samples=(smoothing + 1) // 2, center=True).over("run_id")
    return (
        points.with_columns(smooth)
        .drop_nulls()
        .group_by("arm", "step")
        .agg(mean=pl.col("value").mean(), low=pl.col("value").min(), high=pl.col("value").max(), runs=pl.len())
        .sort("arm", "step")
    )


def by_bucket(runs: pl.DataFrame, quantity: str) -> pl.DataFrame:
    """A tracked `timestep_*` quantity by bucket: its mean over runs with a t interval over runs.

    Returns:
        Columns bucket (such as "0-99"), mean, low, high; least noise first.
    Raises:
        UserError: no finished run logged the quantity.
    """
    rows = []
    for bucket, column in bucket_columns(runs, quantity).items():
        values = runs.filter(pl.col("state") == "complete")[column].drop_nulls().to_numpy()
        if len(values):
            rows.append(_summary(values) | {"bucket": bucket})
    if not rows:
        raise UserError(f"metric timestep_{quantity}: no finished run of the study logged it")
    return pl.DataFrame(rows).select("bucket", "mean", "low", "high")


def front(runs: pl.DataFrame, score: str = "eval/reward") -> pl.DataFrame:
    """Each arm's final divergence and score, means over training seeds, and whether another arm beats it in both.

    Args:
        score: metric; more is better.
    Returns:
        A row an arm, by divergence: arm, divergence, divergence_low, divergence_high, score, score_low, score_high,
        seeds, on_front.
    Raises:
        UserError: no complete run has both numbers.
    """
    needed = {"divergence": "divergence/policy", "score": score}
    if any(name not in runs.columns for name in needed.values()):
        raise UserError(f"metric {score!r}: no finished run of the study has it together with divergence/policy")
    done = paper_arms(runs).filter(pl.col("state") == "complete").drop_nulls([*needed.values()])
    rows = []
    for (arm,), part in done.group_by("arm", maintain_order=True):
        row: dict[str, Any] = {"arm": arm, "seeds": len(part)}
        for name, metric in needed.items():
            values = part[metric].to_numpy()
            low, high = seed_interval(values)
            row |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    if not rows:
        raise UserError(f"metric {score!r}: no finished run of the study has it together with divergence/policy")
    # At the same divergence the higher score comes first, so that only it is on the front.
    table = pl.DataFrame(rows).sort("divergence", -pl.col("score"), maintain_order=True)
    best_before = pl.col("score").cum_max().shift(1)
    return table.with_columns(on_front=best_before.is_null() | (pl.col("score") > best_before))


def distinct_scales(runs: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """The distinct lambda(t) of arms, named by their shape; by their first arm too where a shape is not enough."""
    distinct: dict[tuple[float, ...], tuple[str, str, pl.DataFrame]] = {}
    done = runs.filter(pl.col("state") == "complete")
    for arm in done["arm"].unique(maintain_order=True):
        part = done.filter(pl.col("arm") == arm)
        table = by_bucket(part, "lambda")
        shape = part["reward_scale.shape"][0] if "reward_scale.shape" in part.columns else arm
        distinct.setdefault(tuple(table["mean"].round(6)), (shape, arm, table))
    shapes = [shape for shape, _, _ in distinct.values()]
    return {shape if shapes.count(shape) == 1 else f"{shape} ({arm})": table for shape, arm, table in distinct.values()}


def bucket_columns(runs: pl.DataFrame, quantity: str) -> dict[str, str]:
    """The columns of a `timestep_*` quantity by the bucket's name, least noise first."""
    # The edges in the names are padded with zeros: sorted as texts they are sorted as numbers.
    columns = sorted(c for c in runs.columns if c.startswith(f"timestep_{quantity}/t"))
    return {"-".join(str(int(edge)) for edge in c.split("/t")[1].split("-")): c for c in columns}


def _summary(values: np.ndarray) -> dict[str, Any]:
    low, high = seed_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high, "seeds": len(values)}


def over_seeds(values: pl.DataFrame, *by: str) -> pl.DataFrame:
    """Mean of column `value` with its interval over training seeds, for each group.

    Args:
        values: columns seed, value and those of `by`, one row a run and group.
    Returns:
        Columns of `by`, then mean, low, high, seeds.
    """
    rows: list[dict[str, Any]] = []
    for key, part in values.sort("seed").group_by(*by, maintain_order=True):
        rows.append(dict(zip(by, key, strict=True)) | _summary(part["value"].to_numpy()))
    return pl.DataFrame(rows)


def by_prompt_set(runs: pl.DataFrame, samples: pl.DataFrame, score: str = "reward") -> pl.DataFrame:
    """Each run's mean score on each prompt set.

    Args:
        samples: of `tracking.load_samples`; other runs' rows are passed over.
    Returns:
        Columns run_id, arm, seed (of training), prompts (a style, or "all"), value.
    """
    scored = with_prompt_sets(samples).join(runs.select("run_id", "seed"), on="run_id")
    return scored.group_by("run_id", "arm", "seed", "prompts", maintain_order=True).agg(value=pl.col(score).mean())


def gain_by_prompt_set(runs: pl.DataFrame, samples: pl.DataFrame) -> pl.DataFrame:
    """Each run's mean gain in true reward over the pretrained model's images, as `by_prompt_set` returns it."""
    gain = pl.col("reward") - pl.col("pretrained_reward")
    return by_prompt_set(runs, samples.with_columns(gain=gain), "gain")


def with_prompt_sets(samples: pl.DataFrame) -> pl.DataFrame:
    """Every row twice: once under its style, once under "all"."""
    style = {caption: parse(caption).style for caption in samples["caption"].unique()}
    styled = samples.with_columns(prompts=pl.col("caption").replace_strict(style, return_dtype=pl.String))
    return pl.concat([styled, styled.with_columns(prompts=pl.lit("all"))])


#: Settings that all arms of Fig. 4 share, where a run has them.
PLAIN: dict[str, tuple[str, ...]] = {
    "objective.loss": ("dpo",),
    "timesteps.density": ("uniform",),
    "reward_scale.shape": ("constant",),
    "reference.rate": ("1", "1.0"),
    "reference.on_exceed": ("freeze",),
}


def by_interval(runs: pl.DataFrame, samples: pl.DataFrame) -> pl.DataFrame:
    """Gain over the pretrained model by the reference's policy, its interval and prompt set (paper's Fig. 4).

    Returns:
        Columns policy, interval (null where the reference is frozen), prompts, mean, low, high, seeds.
    Raises:
        UserError: an arm differs from plain Diffusion-DPO in more than its reference's updates, or none updates it.
    """
    for setting, values in PLAIN.items():
        if setting in runs.columns:
            # Null: the run has no such setting, as a frozen reference has no rate.
            other = runs.filter(pl.col(setting).is_not_null() & ~pl.col(setting).is_in(values))
            for arm, value in other.select("arm", setting).rows():
                raise UserError(f"arm {arm!r}: {setting} = {value!r}, but arms of Fig. 4 have {values[0]!r}")
    moves = pl.col("reference.policy") != "frozen"
    if runs.filter(moves).is_empty():
        raise UserError("no arm with reference.policy 'update' or 'threshold' was chosen")
    about = runs.select(
        "run_id", policy="reference.policy", interval=pl.when(moves).then(pl.col("reference.interval").cast(pl.Int64))
    )
    each = gain_by_prompt_set(runs, samples).join(about, on="run_id")
    return over_seeds(each, "policy", "interval", "prompts").sort("policy", "interval", "prompts")


# --- tables as text ----------------------------------------------------------------------------------------------


def markdown(table: pl.DataFrame) -> str:
    """A table in Markdown; nothing where there is no value."""
    return markdown_table(table.columns, table.rows()) + "\n"


def show(table: pl.DataFrame) -> Any:
    """A table as a notebook shows it: whole, no column types."""
    from IPython.display import Markdown

    return Markdown(markdown(table))


def save(table: pl.DataFrame, folder: Path | str, name: str) -> Path:
    """Write a table as Markdown, into a folder as `report_folder` reads it."""
    path = report_folder(folder) / f"{name}.md"
    with output_file(path) as partial:
        partial.write_text(markdown(table), encoding="utf-8")
    return path


def report_folder(folder: Path | str) -> Path:
    """The folder, made if need be; a relative one lies under $WORKBENCH_HOME, or the working folder."""
    # Jupyter runs a notebook in the notebook's own folder; `make lab` names the project's in this variable.
    path = Path(os.environ.get("WORKBENCH_HOME", ".")) / folder
    path.mkdir(parents=True, exist_ok=True)
    return path
