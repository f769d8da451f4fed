"""What the tracking store says of a study as a whole, for reports and links."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from mlflow import MlflowClient
from mlflow.entities import Run

from workbench.tracking import tags
from workbench.tracking.store import experiment
from workbench.tracking.study_runs import require_study


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
        told = json.loads(parent.data.tags.get(tags.OBJECTIVE, ""))
        return dict(told.get("objectives", {})), dict(told.get("constraints", {}))
    return {}, {}


def _versions(client: MlflowClient, parent: Run) -> dict[str, str]:
    """Versions that a study's last run was made with; workers on several machines may have had others."""
    query = f"tags.`{tags.PARENT}` = '{parent.info.run_id}'"
    found = client.search_runs([experiment(client).experiment_id], query, max_results=1)
    about = found[0].data.tags if found else {}
    versions = {key.removeprefix("version."): value for key, value in about.items() if key.startswith("version.")}
    return versions | ({"git commit": about["git.commit"]} if "git.commit" in about else {})


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000) if milliseconds else None
