"""How a study's report begins: what came out in words, what to compare it with, every trial, settings and versions.

Data frames of `tracking.load_runs` in, Markdown out. A difference between two arms is taken seed by seed; its interval
is the t interval over training seeds of `intervals`. One seed has no interval, and the text says that it is one.
"""

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import polars as pl

from workbench.analysis.intervals import ENOUGH, seed_interval
from workbench.analysis.labels import labels, method
from workbench.analysis.paper import LABELS
from workbench.common.markdown import markdown_table, three_digits
from workbench.tracking.overview import Overview
from workbench.training.config import changed

MOST_ROWS = 60  #: trials that the table shows
#: Metrics in words; others go by their name alone.
WORDS = {
    "eval/win_rate": "win rate against the pretrained model",
    "eval/reward": "true reward",
    "eval/judge": "score by the independent judge",
    "validation/margin": "margin on the validation pairs",
    "divergence/policy": "divergence from the pretrained model",
}
#: Where nobody says what a study is for, the first of these that its runs have.
USUAL = ("eval/win_rate", "eval/reward", "validation/margin")

Objectives = Mapping[str, str]  # metric -> "maximize" or "minimize"


def usual_objectives(runs: pl.DataFrame) -> dict[str, str]:
    """What to judge runs by where no study says it; empty where they have none of the usual metrics."""
    found = next((metric for metric in USUAL if metric in runs.columns), None)
    return {found: "maximize"} if found else {}


def best_run(runs: pl.DataFrame, objectives: Objectives, constraints: Mapping[str, float]) -> dict[str, Any] | None:
    """The complete run with the best first objective within the constraints, as a row; None where there is none."""
    if not objectives:
        return None
    metric, direction = next(iter(objectives.items()))
    done = _complete(runs, metric)
    for bounded, bound in constraints.items():
        done = done.filter(pl.col(bounded) <= bound) if bounded in done.columns else done.clear()
    # Stable: of equals the one that began first, as `study status` has it.
    done = done.sort(metric, descending=direction == "maximize", maintain_order=True)
    return done.row(0, named=True) if len(done) else None


def name_of(run: Mapping[str, Any]) -> str:
    """What a run is called in a text: its trial's number where it has one."""
    return f"trial {run['trial']}" if run.get("trial") is not None else f"run {run['name']}"


def headline(runs: pl.DataFrame, objectives: Objectives, best: Mapping[str, Any] | None) -> str:
    """What came out, in a few sentences: the best arm against Diffusion-DPO, then the best single trial.

    Args:
        best: of `best_run`.
    """
    if not objectives:
        return "The runs have none of the metrics by which a study is usually judged."
    metric, direction = next(iter(objectives.items()))
    done = _complete(runs, metric)
    if done.is_empty():
        return f"No trial has come to its end with {_words(metric)} yet."
    sentences = [_arms(runs, done.filter(pl.col("arm") != "sampled"), metric, direction)]
    if best is None:
        sentences.append("No trial is within the constraints.")
    elif done["arm"].n_unique() < len(done) or "sampled" in done["arm"]:
        interval = _over_prompts(best, metric)
        luck = "" if len(done) == 1 else f" It is the best of {len(done)}, so its own number is optimistic."
        sentences.append(f"The best single trial is {name_of(best)}, with {_number(best[metric])}{interval}.{luck}")
    return " ".join(part for part in sentences if part)


def _arms(runs: pl.DataFrame, arms: pl.DataFrame, metric: str, direction: str) -> str:
    """The sentences about the best arm; empty where there are no arms."""
    if arms.is_empty():
        return ""
    means = arms.group_by("arm", maintain_order=True).agg(pl.col(metric).mean())
    ranked = means.sort(metric, descending=direction == "maximize", maintain_order=True)["arm"].to_list()
    called, base = labels(runs), _baseline(arms, ranked[0])
    if base is None or len(ranked) == 1:
        only = arms.filter(pl.col("arm") == ranked[0])[metric]
        what = "The best arm" if len(ranked) > 1 else "The only arm"
        count = _seeds(len(only))
        return f"{what}, **{called[ranked[0]]}**, ends with a {_words(metric)} of {_number(_mean(only))} ({count})."
    first = ranked[0] if ranked[0] != base else ranked[1]
    both = _by_seed(arms, first, metric).join(_by_seed(arms, base, metric), on="seed", suffix=" of base")
    ours, theirs = _by_seed(arms, first, metric)[metric], _by_seed(arms, base, metric)[metric]
    says = f"with a {_words(metric)} of {_number(_mean(ours))}, **{called[base]}** with {_number(_mean(theirs))}"
    if first == ranked[0]:
        start = f"The best arm, **{called[first]}**, ends {says}"
    else:
        start = f"No arm beats **{called[base]}**. The next best, **{called[first]}**, ends {says}"
    if both.is_empty():
        return f"{start}; they have no training seed in common, so there is no difference to give."
    return f"{start}: {_difference(both[metric] - both[f'{metric} of base'], direction)}"


def _difference(values: pl.Series, direction: str) -> str:
    """A paired difference over training seeds in words, with its interval where there are enough seeds."""
    mean = f"a difference of {_number(_mean(values), sign=True)}"
    if len(values) < ENOUGH:
        more = "no interval" if len(values) == 1 else "too few for an interval"
        return f"{mean} ({_seeds(len(values))}, {more})."
    low, high = seed_interval(values.to_numpy())
    text = f"{mean} (95 % t interval over {len(values)} training seeds: {_number(low, True)} to {_number(high, True)})"
    if low <= 0 <= high:
        return f"{text}. The interval holds 0: these seeds do not tell the two apart."
    better = (low > 0) == (direction == "maximize")
    return f"{text}, which is {'better' if better else 'worse'} beyond what seeds explain."


def _baseline(arms: pl.DataFrame, best: str) -> str | None:
    """The arm that is plain Diffusion-DPO; of several the one whose other settings are most like the best arm's."""
    settings = {arm: part.row(0, named=True) for (arm,), part in arms.group_by("arm", maintain_order=True)}
    plain = [arm for arm, own in settings.items() if method(own) == LABELS["frozen"]]
    if not any("." in name for name in arms.columns):  # runs without settings: the name has to do
        plain = [arm for arm in settings if arm == "frozen"]
    names = _settings(arms)
    return min(plain, key=lambda arm: sum(settings[arm][n] != settings[best][n] for n in names), default=None)


def _by_seed(arms: pl.DataFrame, arm: str, metric: str) -> pl.DataFrame:
    """An arm's metric by training seed; runs of one seed count once, by their mean."""
    own = arms.filter(pl.col("arm") == arm)
    own = own if "seed" in own.columns else own.with_columns(seed=pl.lit("0"))
    return own.group_by("seed", maintain_order=True).agg(pl.col(metric).mean())


def trial_table(runs: pl.DataFrame, objectives: Objectives, counts: Mapping[str, int]) -> str:
    """Every trial, the best first and pruned ones last, with why they were stopped.

    Args:
        counts: trials by state, of the study; says more than the rows, as failed trials have no row.
    """
    metrics = [name for name in dict.fromkeys([*objectives, "divergence/policy"]) if name in runs.columns]
    rows, called = runs.with_columns(ended=pl.col("state") == "complete"), labels(runs)
    if objectives and (first := next(iter(objectives))) in runs.columns:
        sign = -1 if objectives[first] == "maximize" else 1
        rows = rows.sort(~pl.col("ended"), sign * pl.col(first), maintain_order=True, nulls_last=True)
    sampled = runs.filter(pl.col("arm") == "sampled")
    varied = _varied(sampled if len(sampled) > 1 else runs)  # what the sampler chose, and not what its arms set
    several = runs["seed"].n_unique() > 1 if "seed" in runs.columns else False
    lines = []
    for row in rows.head(MOST_ROWS).to_dicts():
        chosen = [f"{name.split('.')[-1]}={_shortened(row[name])}" for name in varied if row[name] is not None]
        what = " ".join(chosen) if row["arm"] == "sampled" else called[row["arm"]]
        seed = f", seed {row['seed']}" if several and row["arm"] != "sampled" else ""
        why = f": {row['reason']}" if row["state"] == "pruned" and row.get("reason") else ""
        numbers = [_cell(row, metric) for metric in metrics]
        number = row["trial"] if row.get("trial") is not None else row["name"]
        lines.append((number, what + seed, *numbers, row["state"] + why))
    counted = counts or dict(runs["state"].value_counts().iter_rows())
    parts = ", ".join(f"{count} {state}" for state, count in counted.items())
    if (runs["state"] == "pruned").any():
        parts += " (in brackets: on the few prompts that were drawn before the trial was stopped)"
    cut = f" Shown are the first {MOST_ROWS}." if len(runs) > MOST_ROWS else ""
    head = f"{parts}; the best first, by {_words(next(iter(objectives)))}.{cut}" if objectives else f"{parts}.{cut}"
    return f"{head}\n\n{markdown_table(('trial', 'arm, or what was chosen', *metrics, 'state'), lines)}"


def _shortened(value: Any) -> str:
    """A setting of a run with three digits if it is a number that is not whole.

    The tracking store has all settings as text. Text in which Python would write a number counts as one, and no other:
    "2024.10" and "1_000.5" are names.
    """
    with suppress(ValueError):
        if isinstance(value, str) and str(float(value)) == value:
            return three_digits(float(value))
    return three_digits(value)


def made_with(runs: pl.DataFrame, about: Overview, study: str, now: datetime) -> str:
    """Settings that all runs share and that are no defaults, the command, versions and dates, as a list."""
    settings = {name: runs[name].drop_nulls() for name in _settings(runs)}
    shared = {name: values[0] for name, values in settings.items() if values.n_unique() == 1}
    shared = {name: value for name, value in changed(shared).items() if name not in _varied(runs)}
    listed = ", ".join(f"`{name} = {value}`" for name, value in shared.items()) or "none"
    lines = [f"Settings of all trials that differ from the defaults: {listed}"]
    if about.command:
        lines.append(f"Made by: `{about.command}`")
    if "trial" not in runs.columns or runs["trial"].null_count() < len(runs):  # single runs are not resumed so
        lines.append(f"To go on: `python -m workbench.study resume {study.partition('@')[0]}`")
    if about.versions:
        lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in about.versions.items()))
    times = [f"{what} {when:%Y-%m-%d %H:%M}" for what, when in (("begun", about.begun), ("ended", about.ended)) if when]
    lines.append("; ".join([f"Page of {now:%Y-%m-%d %H:%M}", *(f"study {time}" for time in times)]))
    return "\n".join(f"- {line}" for line in lines)


def _cell(run: Mapping[str, Any], metric: str) -> str:
    """A run's metric; where it was stopped before, in brackets what the pictures drawn until then came to."""
    before = run.get(f"samples/{metric.removeprefix('eval/')}")
    if run[metric] is not None:
        return _number(run[metric])
    return f"({_number(before)})" if run["state"] == "pruned" and before is not None else ""


def _settings(runs: pl.DataFrame) -> list[str]:
    """Columns that are settings: their names have a dot, those of metrics a slash."""
    return [name for name in runs.columns if "." in name and "/" not in name]


def _varied(runs: pl.DataFrame) -> list[str]:
    """Settings that are not the same in all runs that have them, or that only some have."""
    names = _settings(runs)
    return [name for name in names if runs[name].drop_nulls().n_unique() > 1 or 0 < runs[name].null_count() < len(runs)]


def _complete(runs: pl.DataFrame, metric: str) -> pl.DataFrame:
    done = runs.filter(pl.col("state") == "complete")
    return done.drop_nulls(metric) if metric in runs.columns else done.clear()


def _over_prompts(run: Mapping[str, Any], metric: str) -> str:
    """The interval of one run's win rate, which is over its prompts; empty for other metrics."""
    low, high = (run.get(f"{metric}_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return ""
    return f" (95 % interval over its prompts: {_number(low)} to {_number(high)}; one training seed)"


def _words(metric: str) -> str:
    return f"{WORDS[metric]} (`{metric}`)" if metric in WORDS else f"`{metric}`"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _mean(values: pl.Series) -> float:
    return float(values.to_numpy().mean())


def _number(value: float, sign: bool = False) -> str:
    """Three decimals, or three digits where they would be lost; with its sign for a difference."""
    return f"{value:{'+' if sign else ''}{'.3f' if abs(value) >= 0.1 or value == 0 else '.3g'}}"
