"""What `import workbench as wb` offers to a notebook: studies and runs as typed polars frames, and training.

Everything here calls what the commands call. Studies and runs are found where the commands find them: in the working
folder, or where WORKBENCH_STORAGE and MLFLOW_TRACKING_URI say.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from workbench import tracking
from workbench.analysis import paired
from workbench.analysis.intervals import seed_interval
from workbench.common.paths import shipped_where_missing, storage_url
from workbench.studies import best, lifecycle, storage
from workbench.studies.experiment import Experiment
from workbench.studies.records import TrialRecord
from workbench.studies.trials import label_of, state_of
from workbench.tracking import study_runs, tags
from workbench.tracking.store import missing
from workbench.training.config import Config, known_names, merge, resolve
from workbench.training.experiment_file import read as read_file
from workbench.training.listener import NullListener

Settings = str | Path | Mapping[str, Any]


class Best(NamedTuple):
    """The best trial of a study.

    Attributes:
        number: of the trial.
        name: its arm, or the settings that the sampler chose.
        values: of the study's objectives, by metric.
        settings: all of its settings, resolved, by dotted name.
        run_id: of its run in MLflow; empty where the result was copied from an equal trial.
    """

    number: int
    name: str
    values: dict[str, float]
    settings: dict[str, Any]
    run_id: str


class Trained(NamedTuple):
    """A run that was trained here and not tracked.

    Attributes:
        metrics: the last value of every metric.
        history: a row a step, a column a metric.
    """

    metrics: dict[str, float]
    history: pl.DataFrame


class Difference(NamedTuple):
    """How much more one arm has of a metric than another, over training seeds.

    Attributes:
        low, high: 95 % t interval of the mean; both are the mean where there are fewer than three seeds.
        seeds: that both arms have.
    """

    mean: float
    low: float
    high: float
    seeds: int


# --- what was tracked ---------------------------------------------------------------------------------------------


def list_studies() -> pl.DataFrame:
    """All studies of the tracking store, the one last worked on first.

    Returns:
        Columns study (what the other functions take), state, runs (that ended with a result). No rows where the store
        is a file that is not there, which is not made.
    """
    rows = []
    if not missing():
        client = tracking.connect()
        for name in study_runs.study_names(client):
            parent = study_runs.require_study(client, name)
            states = [run.data.tags.get(tags.STATE) for run in study_runs.children(client, parent)]
            ended = sum(state in ("complete", "pruned") for state in states)
            rows.append({"study": name, "state": parent.data.tags.get(tags.STATE, "running"), "runs": ended})
    return pl.DataFrame(rows, schema={"study": pl.String, "state": pl.String, "runs": pl.Int64})


def runs(study: str, only: str = "") -> pl.DataFrame:
    """The runs of a study that ended with a result, a row each.

    Args:
        study: a name, or NAME@TOKEN where several studies have it.
        only: names or arms, comma-separated; empty = all.
    Returns:
        run_id, name, arm, state, every setting by its dotted name (as integer, float, truth value or text), and every
        metric's last value as a float. What a run lacks is null.
    Raises:
        UserError: no such study, or no such run.
    """
    frame = tracking.load_runs(study, only).drop("artifacts")
    settings = [name for name in known_names() if name in frame.columns]
    return frame.with_columns(_typed(frame[name]) for name in settings)


def history(study: str, only: str = "") -> pl.DataFrame:
    """Every step of a study's runs: run_id, name, arm, step, and a column a metric.

    Args:
        study, only: as `runs` takes them.
    """
    first = ["run_id", "name", "arm", "step"]
    frame = tracking.load_history(tracking.load_runs(study, only))
    return frame.select(*first, pl.exclude(first))


def samples(study: str, only: str = "") -> pl.DataFrame:
    """Scores of the images that a study's runs drew at their end, a row an image.

    Args:
        study, only: as `runs` takes them.
    Returns:
        run_id, name, arm, caption, image_seed, reward, pretrained_reward, and the reward's parts where they were
        tracked.
    """
    return tracking.load_samples(tracking.load_runs(study, only))


def pictures(study: str, only: str = "", pretrained: bool = False) -> dict[str, NDArray[np.uint8]]:
    """The images that a study's runs drew at their end, as one sheet a run, by the run's name.

    A row of a sheet is an image seed, a column a prompt, in the order of `samples`.

    Args:
        study, only: as `runs` takes them.
        pretrained: those of the pretrained model, for the same prompts and seeds.
    """
    frame = tracking.load_runs(study, only)
    names = dict(frame.select("run_id", "name").iter_rows())
    return {names[run_id]: sheet for run_id, sheet in tracking.load_sheets(frame, pretrained).items()}


def compare(study: str, arm: str, other: str, metric: str = "eval/reward") -> Difference:
    """How much more of a metric an arm ends with than another, training seed by training seed.

    Raises:
        UserError: an arm has no ended run, or none with the metric.
    """
    from workbench.analysis.claims.evidence import Evidence, seedwise

    none = pl.DataFrame()
    evidence = Evidence(tracking.load_runs(study), none, none, none)
    values = seedwise(lambda a, b: a - b, evidence.final(arm, metric), evidence.final(other, metric))
    return Difference(float(values.mean()), *seed_interval(values), len(values))


def win_rate(study: str, arm: str, other: str = "pretrained") -> Difference:
    """Share of images on which an arm scores higher than another, of the same training seed, prompt and image seed.

    Ties count half. The mean over training seeds, with its interval, as `Difference` has it.

    Args:
        other: another arm, or "pretrained" for the pretrained model.
    """
    frame = tracking.load_runs(study)
    won = paired.won(frame, tracking.load_samples(frame), arm, other).filter(pl.col("prompts") == "all")["value"]
    return Difference(float(won.to_numpy().mean()), *seed_interval(won.to_numpy()), len(won))


# --- what was searched --------------------------------------------------------------------------------------------


def trials(study: str) -> pl.DataFrame:
    """Every trial of a study in this study database: number, name, state, each objective, each dimension of the space.

    Args:
        study: its name.
    Raises:
        UserError: there is none of that name here.
    """
    found = storage.require_study(study, storage_url())
    objectives = list(lifecycle.stored_experiment(found).sweep.objectives)
    rows = [
        {"trial": trial.number, "name": label_of(trial), "state": state_of(trial)}
        | dict(zip(objectives, trial.values or [None] * len(objectives), strict=True))
        | trial.params
        for trial in found.get_trials(deepcopy=False)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def best_trial(study: str, number: int | None = None) -> Best:
    """The best complete trial of a study within its constraints, or the one of that number.

    Raises:
        UserError: there is none; or several objectives have no single best, and no number was given.
    """
    found = storage.require_study(study, storage_url())
    experiment = lifecycle.stored_experiment(found)
    trial = best.chosen_trial(found, number)
    values = dict(zip(experiment.sweep.objectives, trial.values, strict=True))
    run_id = TrialRecord.of(trial).run_id or ""
    return Best(trial.number, label_of(trial), values, experiment.settings_of(trial), run_id)


# --- training -----------------------------------------------------------------------------------------------------


def config(experiment: Settings = "experiments/default.toml", **changes: Any) -> Config:
    """The checked settings of a run.

    Args:
        experiment: a TOML file, one of the workbench's own by its name, or settings by dotted name.
        changes: settings on top, with two underscores for the dot: `train__steps=64`.
    Raises:
        UserError: an unknown setting, or a value that is not accepted.
    """
    return resolve(_settings(experiment, changes))


def train_run(settings: Config | Settings, output: Path | str | None = None) -> Trained:
    """Train one run here, with a progress bar, without tracking it.

    Args:
        settings: from `config`, or as it takes them.
        output: an empty folder for the trained model, as a diffusers checkpoint.
    Raises:
        UserError: as `config`; or the data or the model are not there.
        FloatingPointError: a loss or a gradient was not finite.
    """
    from tqdm.auto import tqdm

    from workbench.common.validation import writable_folder
    from workbench.training.preparation import prepare
    from workbench.training.run import check, execute

    run = settings if isinstance(settings, Config) else config(settings)
    place = writable_folder("output", Path(output)) if output is not None else None
    prepared = prepare(run)
    check(run, prepared)
    rows = _Rows()
    with tqdm(total=run.train.steps, unit="step") as bar:
        final = execute(run, prepared, rows, on_step=lambda step, _: bar.update(step - bar.n), save_to=place)
    return Trained(final, tracking.history(rows.rows))


def run_study(experiment: Settings, study: str, workers: int = 1, **changes: Any) -> pl.DataFrame:
    """Run a study, or what it still lacks, tracked as `python -m workbench.sweep` does; returns its `trials`.

    In a script, call it below `if __name__ == "__main__":`, since workers are processes.

    Args:
        experiment, changes: as `config` takes them.
        study: its name.
    """
    lifecycle.run_study(Experiment.resolve(_settings(experiment, changes)), study, workers)
    return trials(study)


def _settings(experiment: Settings, changes: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(experiment, Mapping):
        base = merge({}, experiment)
    else:
        base = read_file(shipped_where_missing(Path(experiment), experiment))
    return merge(base, {name.replace("__", "."): value for name, value in changes.items()})


class _Rows(NullListener):
    """A listener that keeps the metrics and nothing else."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step; several calls for one step are merged."""
        self.rows.setdefault(step, {}).update(metrics)


def _typed(texts: pl.Series) -> pl.Series:
    """A column of texts as the narrowest of integers, floats and truth values that holds all of them; else as it is."""
    there = texts.drop_nulls()
    for kind in (pl.Int64, pl.Float64):
        if there.cast(kind, strict=False).null_count() == 0:
            return texts.cast(kind)
    if there.is_in(["True", "False"]).all():
        return (texts == "True").rename(texts.name)
    return texts
