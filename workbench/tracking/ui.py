"""Commands and links that open the MLflow UI."""

import shlex
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode

from mlflow import MlflowClient
from mlflow.entities import Run

from workbench.common.command_line import this_python
from workbench.common.secrets import hide_passwords
from workbench.tracking import tags
from workbench.tracking.overview import objective_of
from workbench.tracking.store import experiment, tracking_uri
from workbench.tracking.study_runs import children, literal, require_study

PORT = 5000  #: where `mlflow ui` listens unless it is given another port


def ui_command() -> str:
    """The command that serves the MLflow UI of this tracking store, on this machine only."""
    uri = tracking_uri()
    if uri.startswith("http"):
        return "(your tracking server)"
    store = shlex.quote(hide_passwords(uri))
    return f"{this_python()} -m mlflow ui --backend-store-uri {store} --host 127.0.0.1 --workers 1"


def ui_link(client: MlflowClient, study: str | None = None) -> str:
    """Direct link to a study's charts, the best first, or to the whole experiment's, in a local MLflow UI."""
    if not study:
        return _charts_link(client, "")
    parent = require_study(client, study)
    return _charts_link(client, _of_study(parent), *_order(parent))


def run_link(client: MlflowClient, run_id: str) -> str:
    """Direct link to a run's page in a local MLflow UI."""
    return f"http://127.0.0.1:{PORT}/#/experiments/{experiment(client).experiment_id}/runs/{run_id}"


def evaluations_link(client: MlflowClient) -> str:
    """Direct link to the charts of all evaluations in a local MLflow UI."""
    return _charts_link(client, f"tags.`{tags.KIND}` = 'evaluation'")


def claim_links(client: MlflowClient, study: str, claims: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """Direct links to the runs that each claim rests on, in a local MLflow UI.

    The UI cannot search for a list of arms, but it can search a tag for a word. So each run gets the numbers of its
    arm's claims, between blanks, as a tag.

    Args:
        claims: number -> arms.
    """
    numbers: dict[str, list[int]] = {}
    for number, arms in claims.items():
        for arm in arms:
            numbers.setdefault(arm, []).append(number)
    parent = require_study(client, study)
    for run in children(client, parent):
        of_arm = numbers.get(run.data.tags.get(tags.ARM, ""), [])
        wanted = f" {' '.join(map(str, of_arm))} "
        # A run of no claim would get "  ": one that never had the tag is left as it is.
        if run.data.tags.get(tags.CLAIMS, "  ") != wanted:
            client.set_tag(run.info.run_id, tags.CLAIMS, wanted)
    inside = f"{_of_study(parent)} AND tags.`{tags.CLAIMS}` LIKE"
    return {number: _charts_link(client, f"{inside} '% {number} %'", *_order(parent)) for number in claims}


def _order(parent: Run) -> tuple[str, str]:
    """By which metric a study's runs are sorted, and in which direction: its first objective; else the win rate."""
    objectives, _ = objective_of(parent)
    return next(iter(objectives.items()), ("eval/win_rate", "maximize"))


def _of_study(parent: Run) -> str:
    """A search for the runs of a study; by its token too, since others may have its name."""
    name, token = parent.data.tags[tags.STUDY], parent.data.tags.get(tags.TOKEN)
    return f"tags.`{tags.STUDY}` = '{literal(name)}'" + (f" AND tags.`{tags.TOKEN}` = '{token}'" if token else "")


def _charts_link(client: MlflowClient, where: str, metric: str = "eval/win_rate", direction: str = "maximize") -> str:
    """Link to the charts of the runs that a search finds; of all runs where `where` is empty.

    A search is sorted by a metric, since the UI hides child runs behind their parents only where it sorts by date.
    """
    number = experiment(client).experiment_id
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART"}
    if where:
        ascending = "true" if direction == "minimize" else "false"
        query |= {"orderByKey": f"metrics.`{metric}`", "orderByAsc": ascending, "searchFilter": where}
    return f"http://127.0.0.1:{PORT}/#/experiments/{number}/runs?{urlencode(query, quote_via=quote)}"
