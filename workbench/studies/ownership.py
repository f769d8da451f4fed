"""Which runs in MLflow are a study's: its trials lie in Optuna's database, and the two have to belong together."""

import platform
from pathlib import Path

from optuna import Study
from tqdm import tqdm

from workbench import tracking
from workbench.common.command_line import this_command
from workbench.common.errors import UserError
from workbench.common.paths import storage_place
from workbench.studies.experiment import Experiment
from workbench.studies.records import StudyRecord, TrialRecord
from workbench.studies.storage import find_study, has_study, open_storage
from workbench.studies.trials import state_of
from workbench.tracking import reconcile, study_runs, tags
from workbench.tracking.overview import objective_tag
from workbench.tracking.reconcile import TrialStatus
from workbench.tracking.study_runs import StudyId
from workbench.training.config import distinguishing
from workbench.training.provenance import provenance


def study_id(study: Study, url: str) -> StudyId:
    """What tells a study from all others, of its name too."""
    return StudyId(study.study_name, StudyRecord.of(study).token, storage_place(url))


def require_no_orphans(client: tracking.Client, name: str, url: str) -> None:
    """Refuse to start a study anew whose runs are still there, and say which other studies have its name.

    Raises:
        UserError: this study database had the study before.
    """
    if find_study(name, open_storage(url)) is not None:
        return
    for parent in study_runs.parents(client, name):
        place, has_trials = parent.data.tags.get(tags.STORAGE), tags.TOKEN in parent.data.tags
        if study_runs.is_deleted(parent) or (place == storage_place(url) and not has_trials):
            continue  # single runs under this name become the study's
        if place == storage_place(url):
            raise UserError(
                f"study {name!r}: the tracking store has its runs, but {place} does not have the study any more; "
                f"`python -m workbench.study doctor {name}` sets these runs aside, or choose another --study name"
            )
        tqdm.write(
            f"Note: the tracking store has another study called {name!r} ({place or 'its study database is unknown'}). "
            f"They are kept apart: commands here mean this one by {name!r}, and the other one by "
            f"{study_runs.address_of(parent)!r}. For a name of its own: --study NAME."
        )


def open_parent(client: tracking.Client, study: Study, own: StudyId, experiment: Experiment) -> str:
    """The id of the study's run in MLflow, found or created.

    Raises:
        UserError: this is a copy of a study, or its runs are in another tracking store.
    """
    trials = statuses(study)
    found = reconcile.adopt(client, own, trials)
    if found is not None:
        require_original(found, own)
    elif any(trial.run_id for trial in trials.values()):
        raise UserError(
            f"study {own.name!r}: {own.storage} has its trials, but this tracking store does not have their runs; set "
            "MLFLOW_TRACKING_URI to the store that has, or go on without these runs after "
            f"`python -m workbench.study doctor {own.name}`"
        )
    about = provenance() | objective_tag(experiment.sweep.objectives, experiment.sweep.constraints)
    about |= {tags.SOURCE: this_command(), tags.SOURCE_TYPE: "LOCAL"}
    settings = distinguishing(experiment.config.flat())
    settings |= {f"sweep.{key}": getattr(experiment.sweep, key) for key in ("objective", "direction")}
    return study_runs.open_study(client, own, f"Study **{own.name}**, running.", about, settings)


def require_original(parent: tracking.Run, own: StudyId) -> None:
    """Refuse to work on a copy of a study database: both would write into the same runs.

    Raises:
        UserError: the database that the runs belong to still has the study.
    """
    place = parent.data.tags.get(tags.STORAGE, own.storage)
    host, _, path = place.partition(":")
    # A database on another machine cannot be looked into, so a copy from there is not noticed.
    if place != own.storage and host == platform.node() and has_study(Path(path), own.token):
        raise UserError(
            f"study {own.name!r} in {own.storage} is a copy; its runs in this tracking store belong to {place}. Go on "
            "there, or start a study of its own with --study NAME"
        )


def statuses(study: Study) -> dict[int, TrialStatus]:
    """Every trial by its number, as its run has to be; forgotten trials have no runs."""
    found = {}
    # Without copies, here and elsewhere: trials are only read, and Optuna would copy every one at each call.
    for trial in study.get_trials(deepcopy=False):
        record = TrialRecord.of(trial)
        if not record.forgotten:
            found[trial.number] = TrialStatus(state_of(trial), record.run_id, record.process)
    return found
