"""A study's own page in the tracking store: what it says of the study as a whole, and files attached to it."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from workbench.common.outputs import written_in
from workbench.tracking import tags
from workbench.tracking.artifacts import check_artifacts
from workbench.tracking.store import connect, experiment
from workbench.tracking.study_runs import is_of_this_database, owner_of, require_study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overview:
    """A study as its parent run and one of its runs describe it.

    Attributes:
        run_id: of the parent run.
        command: that started it; empty for studies of earlier versions.
        objectives: metric -> "maximize" or "minimize"; empty for studies of earlier versions, and for single runs.
        constraints: metric -> the largest value that a trial may end with.
        versions: of the libraries that trained, by name, and the git commit.
        counts: trials by state.
        begun, ended: of the parent run, in local time; None = not yet.
    """

    run_id: str
    command: str = ""
    objectives: Mapping[str, str] = field(default_factory=dict)
    constraints: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    begun: datetime | None = None
    ended: datetime | None = None


def overview(client: MlflowClient, study: str) -> Overview:
    """What the tracking store says of a study.

    Args:
        study: a name, or NAME@TOKEN.
    Raises:
        UserError: there is no such study.
    """
    parent = require_study(client, study)
    objectives, constraints = objective_of(parent)
    states = ("complete", "pruned", "failed", "interrupted")
    counts = {state: parent.data.metrics.get(f"study/{state}", 0) for state in states}
    return Overview(
        parent.info.run_id,
        parent.data.tags.get(tags.SOURCE, ""),
        objectives,
        constraints,
        _versions(client, parent),
        {state: int(count) for state, count in counts.items() if count},
        _time(parent.info.start_time),
        _time(parent.info.end_time),
    )


def objective_of(parent: Run) -> tuple[dict[str, str], dict[str, float]]:
    """A study's objectives with their directions, and its constraints; empty where its parent run does not say."""
    with suppress(ValueError, AttributeError):  # no such tag, or one that somebody has edited
        stored = json.loads(parent.data.tags.get(tags.OBJECTIVE, ""))
        return dict(stored.get("objectives", {})), dict(stored.get("constraints", {}))
    return {}, {}


def objective_tag(objectives: Mapping[str, str], constraints: Mapping[str, float]) -> dict[str, str]:
    """The tag by which a study's parent run says what the study is for, as `objective_of` reads it."""
    return {tags.OBJECTIVE: json.dumps({"objectives": dict(objectives), "constraints": dict(constraints)})}


def _versions(client: MlflowClient, parent: Run) -> dict[str, str]:
    """Versions that a study's last run was made with; workers on several machines may have had others."""
    query = f"tags.`{tags.PARENT}` = '{parent.info.run_id}'"
    found = client.search_runs([experiment(client).experiment_id], query, max_results=1)
    about = found[0].data.tags if found else {}
    versions = {key.removeprefix("version."): value for key, value in about.items() if key.startswith("version.")}
    return versions | ({"git commit": about["git.commit"]} if "git.commit" in about else {})


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000) if milliseconds else None


def attach(study: str, path: Path, folder: str = "figures") -> bool:
    """Attach a file, or those that the workbench wrote in a folder, to a study's parent run, under an artifact folder.

    Returns:
        False, with a warning, for a study of another study database: its owner's files would be overwritten.
    """
    client = connect()
    parent = require_study(client, study)
    if not is_of_this_database(parent):
        log.warning("not attached: study %r has its trials in %s, so its run is left as it is", study, owner_of(parent))
        return False
    check_artifacts(client)
    for file in written_in(path) if path.is_dir() else [path]:
        client.log_artifact(parent.info.run_id, str(file), folder)
    return True
