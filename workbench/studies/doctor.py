"""What can be wrong with a study after machines have died, and how it is put right.

Optuna is believed: it says how trials ended, and MLflow's runs follow. Each check looks first, so that what it would do
can be shown without doing it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from optuna import Study

from workbench import tracking
from workbench.studies import lifecycle, recovery
from workbench.studies.storage import locked
from workbench.studies.trials import counts
from workbench.tracking import reconcile, study_runs
from workbench.training.config import resolve


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        what: it is, on one line.
        mended: None where nothing can be done about it.
    """

    what: str
    mended: bool | None


Remedy = Callable[[], object]


def examine(study: Study, client: tracking.Client, url: str, *, dry_run: bool) -> Iterator[Finding]:
    """Everything that is wrong with a study, put right as it is found unless one may only look."""

    def treat(found: list[str], remedy: Remedy) -> Iterator[Finding]:
        if found and not dry_run:
            remedy()
        yield from (Finding(what, not dry_run) for what in found)

    def mend() -> None:
        with locked(url):
            recovery.mend(study)

    yield from treat(recovery.orphans(study), mend)
    run = study_runs.find_study(client, study.study_name)
    if run is None:
        yield Finding(f"study {study.study_name} has no run in the tracking store", None)
        return
    parent = run.info.run_id
    for what in reconcile.reconcile_runs(client, parent, lifecycle.states_of(study), dry_run=dry_run):
        yield Finding(what, not dry_run)
    yield from _artifacts(study, client, parent, treat)
    states = lifecycle.states_of(study).values()
    if run.info.status == "RUNNING" and "running" not in states:
        yield Finding("the study's run: is RUNNING, nobody works on it", not dry_run)
    yield from treat(
        [f"snapshots of trial {int(path.name)}: nobody will go on from them" for path in recovery.leftovers(study)],
        lambda: recovery.clear(study),
    )
    if not dry_run:
        settings = study.user_attrs["settings"]
        lifecycle.conclude(study, client, parent, resolve(settings), study.user_attrs["asked"])


def _artifacts(
    study: Study, client: tracking.Client, parent: str, treat: Callable[[list[str], Remedy], Iterator[Finding]]
) -> Iterator[Finding]:
    runs = reconcile.runs_of_trials(client, parent)
    for trial in study.get_trials(deepcopy=False):
        found = len(runs.get(trial.number, []))
        if trial.state.is_finished() and counts(trial) and not found and "run_id" in trial.user_attrs:
            yield Finding(f"trial {trial.number}: its run is not in the tracking store", None)
        if found > 1:
            yield Finding(f"trial {trial.number}: {found} runs", None)
    for number, run in reconcile.without_history(client, runs):
        yield from treat(
            [f"run of trial {number}: no history.parquet"], partial(reconcile.restore_history, client, run)
        )
