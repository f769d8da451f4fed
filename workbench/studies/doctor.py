"""What can be wrong with a study after machines have died, and how it is repaired.

Optuna is right about how trials ended; MLflow's runs follow. Every check only reads first, so that `dry_run` can show
what would be done.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from optuna import Study

from workbench import tracking
from workbench.studies import lifecycle, recovery
from workbench.studies.records import TrialRecord
from workbench.studies.storage import locked
from workbench.studies.trials import counts, states_of
from workbench.tracking import reconcile, study_runs


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        what: one line about it.
        mended: whether it has been repaired; None if it cannot be.
    """

    what: str
    mended: bool | None


Repair = Callable[[], object]


def examine(study: Study, client: tracking.Client, url: str, *, dry_run: bool) -> Iterator[Finding]:
    """Everything that is wrong with a study; each finding is repaired before it is returned, unless `dry_run`."""

    def repaired(problems: list[str], repair: Repair) -> Iterator[Finding]:
        if problems and not dry_run:
            repair()
        yield from (Finding(problem, not dry_run) for problem in problems)

    def recover() -> None:
        with locked(url):
            recovery.recover(study)

    yield from repaired(recovery.to_recover(study), recover)
    run = study_runs.find_study(client, study.study_name)
    if run is None:
        yield Finding(f"study {study.study_name} has no run in the tracking store", None)
        return
    parent = run.info.run_id
    for what in reconcile.reconcile_runs(client, parent, states_of(study), dry_run=dry_run):
        yield Finding(what, not dry_run)
    yield from _runs(study, client, parent, repaired)
    if run.info.status == "RUNNING" and "running" not in states_of(study).values():
        yield Finding("the study's run: is RUNNING, nobody works on it", not dry_run)
    yield from repaired(
        [f"snapshots of trial {int(path.name)}: no attempt will resume from them"
         for path in recovery.unused_snapshots(study)],
        lambda: recovery.remove_unused_snapshots(study),
    )  # fmt: skip
    if not dry_run:
        lifecycle.finish_study(study, client, parent, lifecycle.stored_experiment(study))


def _runs(
    study: Study, client: tracking.Client, parent: str, repaired: Callable[[list[str], Repair], Iterator[Finding]]
) -> Iterator[Finding]:
    """Trials without a run or with several, and runs without a history."""
    runs = reconcile.runs_of_trials(client, parent)
    for trial in study.get_trials(deepcopy=False):
        count = len(runs.get(trial.number, []))
        if trial.state.is_finished() and counts(trial) and not count and TrialRecord.of(trial).run_id:
            yield Finding(f"trial {trial.number}: its run is not in the tracking store", None)
        if count > 1:
            yield Finding(f"trial {trial.number}: {count} runs", None)
    for number, run in reconcile.without_history(client, runs):
        restore = partial(reconcile.restore_history, client, run)
        yield from repaired([f"run of trial {number}: no history.parquet"], restore)
