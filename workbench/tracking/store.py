"""The tracking store: the connection to it, its studies, and links into its UI."""

import gc
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from urllib.parse import quote, urlencode

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from workbench.common.command_line import this_python
from workbench.common.errors import Failure, UserError
from workbench.common.locks import exclusive
from workbench.common.secrets import hide_passwords

EXPERIMENT = "diffusion-dpo"
Client = MlflowClient  # by this name for rooms that do not know MLflow
STATUS = {"complete": "FINISHED", "failed": "FAILED"}  # of a run by its state; any other is KILLED

logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback for each try while it is away
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each try

#: A try that fails has to fail soon: who can wait tries again. And MLflow's links to a run show the server's password.
SOON = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "PGCONNECT_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, or mlflow.db in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def connect() -> MlflowClient:
    """A client of the tracking store, whose schema is made if need be.

    Raises:
        Failure: the store cannot be reached.
    """
    for name, value in SOON.items():
        os.environ.setdefault(name, value)
    uri, ready = tracking_uri(), True
    if uri.startswith("http"):  # ask once and plainly, where the client would retry
        import requests

        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
        except requests.RequestException as error:
            raise Failure(
                f"tracking server {hide_passwords(uri)} cannot be reached ({type(error).__name__}); start it, "
                "or unset MLFLOW_TRACKING_URI to use sqlite here"
            ) from None
    else:
        ready = _require_database(uri)
    try:
        mlflow.set_tracking_uri(uri)
        with nullcontext() if ready else exclusive(uri, "schema"):  # two that make the tables at once both fail
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
        return client
    except Exception as error:  # whatever the store's driver raises
        raise Failure(f"tracking store {hide_passwords(uri)} cannot be opened ({in_short(error)})") from None


def in_short(error: BaseException) -> str:
    """What an exception says, on one line and without passwords."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    # What a client that has tried several times buries under all that it went through.
    cause = re.search(r"\[Errno -?\d+\] [\w ]+|too many \d+ error responses", line)
    if cause and "Max retries exceeded" in line:
        line = f"{line.partition(' failed with')[0]}: {cause[0]}"
    return hide_passwords(line)[:300]


def experiment(client: MlflowClient) -> Experiment:
    """The workbench's experiment, made where it is missing."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # An absolute place for artifacts keeps them together whatever folder a later command runs in.
        place = None if tracking_uri().startswith("http") else Path("mlruns").resolve().as_uri()
        note = (
            "Preference optimisation of diffusion models. A study is a parent run, a trial its child. Sections: "
            "`rewards/` implicit rewards against the moving reference, `divergence/` paper's Eq. 8, `kl/` kernel KL, "
            "`reference/` what the reference did, `eval/` samples against the pretrained model's, `timestep_*/` by "
            "timestep bucket against the pretrained model."
        )
        with suppress(MlflowException):  # another process may have made it since
            client.create_experiment(EXPERIMENT, artifact_location=place, tags={"mlflow.note.content": note})
        found = client.get_experiment_by_name(EXPERIMENT)
        assert found is not None
    return found


def _require_database(uri: str) -> bool:
    """Ask the database once, where MLflow would retry for minutes, and whether MLflow's tables are there."""
    import sqlalchemy

    try:
        with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect() as connection:
            try:  # a row that MLflow adds when all else is made
                return connection.execute(sqlalchemy.text("SELECT 1 FROM experiments")).first() is not None
            except sqlalchemy.exc.SQLAlchemyError:
                return False
    except Exception as error:  # whatever its driver raises
        raise Failure(
            f"tracking store {hide_passwords(uri)} cannot be opened ({in_short(error)}); MLFLOW_TRACKING_URI takes "
            "sqlite:///PATH, postgresql://... or http://..."
        ) from None


def ui_command() -> str:
    """The command that serves the MLflow UI of this tracking store, on this machine only."""
    uri = tracking_uri()
    if uri.startswith("http"):
        return "(your tracking server)"
    return f"{this_python()} -m mlflow ui --backend-store-uri {hide_passwords(uri)} --host 127.0.0.1 --workers 1"


def ui_link(client: MlflowClient, study: str | None = None, port: int = 5000) -> str:
    """Direct link to a study's charts (or the experiment's) in a local MLflow UI.

    Sorted by win rate, since the UI hides child runs behind their parent only where it sorts by date.
    """
    return _charts(client, f"tags.`workbench.study` = '{_quoted(study)}'" if study else "", port)


def ui_evaluations(client: MlflowClient, port: int = 5000) -> str:
    """Direct link to the charts of all evaluations in a local MLflow UI."""
    return _charts(client, "tags.`workbench.kind` = 'evaluation'", port)


def _charts(client: MlflowClient, where: str, port: int) -> str:
    """Link to the charts of the runs that a search finds, or of all."""
    number = experiment(client).experiment_id
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART"}
    if where:
        query |= {"orderByKey": "metrics.`eval/win_rate`", "orderByAsc": "false", "searchFilter": where}
    return f"http://127.0.0.1:{port}/#/experiments/{number}/runs?{urlencode(query, quote_via=quote)}"


def link_claims(
    client: MlflowClient, study: str, claims: Mapping[int, Sequence[str]], port: int = 5000
) -> dict[int, str]:
    """Direct links to the runs that each claim rests on, in a local MLflow UI.

    A run's tag `workbench.claims` holds the numbers of its arm's claims between blanks: the UI can search for one of
    them, but not for a list of arms.

    Args:
        claims: number -> arms.
    """
    numbers: dict[str, list[int]] = {}
    for number, arms in claims.items():
        for arm in arms:
            numbers.setdefault(arm, []).append(number)
    for run in children(client, require_study(client, study)):
        told = numbers.get(run.data.tags.get("workbench.arm", ""), [])
        wanted = f" {' '.join(map(str, told))} "
        if run.data.tags.get("workbench.claims", "  ") != wanted:
            client.set_tag(run.info.run_id, "workbench.claims", wanted)
    inside = f"tags.`workbench.study` = '{_quoted(study)}' AND tags.`workbench.claims` LIKE"
    return {number: _charts(client, f"{inside} '% {number} %'", port) for number in claims}


def find_study(client: MlflowClient, study: str) -> Run | None:
    """The parent run of a study, if there is one."""
    runs = client.search_runs(
        [experiment(client).experiment_id],
        f"tags.`workbench.study` = '{_quoted(study)}' AND tags.`workbench.kind` = 'study'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    return runs[0] if runs else None


def require_study(client: MlflowClient, study: str) -> Run:
    """The parent run of a study.

    Raises:
        UserError: there is none of that name; names those there are.
    """
    run = find_study(client, study)
    if run is None:
        raise UserError(f"study {study!r}: not found; there are: {', '.join(studies(client)) or 'none yet'}")
    return run


def studies(client: MlflowClient) -> list[str]:
    """Names of all studies, the one last worked on first."""
    found = client.search_runs([experiment(client).experiment_id], "tags.`workbench.kind` = 'study'")
    runs = sorted(found, key=lambda run: float(run.data.tags.get("workbench.touched", 0)), reverse=True)
    return [run.data.tags["workbench.study"] for run in runs]


def children(client: MlflowClient, parent: Run) -> list[Run]:
    """All runs of a study, in the order in which they began."""
    query, order = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.info.run_id}'", ["attributes.start_time ASC"]
    runs: list[Run] = []
    token = None
    with _uncollected():
        while True:
            page = client.search_runs([parent.info.experiment_id], query, order_by=order, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs


@contextmanager
def _uncollected() -> Iterator[None]:
    """For what makes many objects at once: each collection meanwhile would go through all that a notebook holds."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def is_complete(client: MlflowClient, study: str) -> bool:
    """Whether a study's parent run says that the study came to its end."""
    run = find_study(client, study)
    return run is not None and run.info.status == "FINISHED" and run.data.tags.get("workbench.state") == "complete"


def _quoted(text: str) -> str:
    return text.replace("'", "")


def open_study(client: MlflowClient, study: str, note: str) -> str:
    """The id of a study's parent run, set to RUNNING; made where it is missing."""
    run = find_study(client, study)
    if run is None:
        tags = {"workbench.study": study, "workbench.kind": "study", "mlflow.note.content": note}
        run = client.create_run(experiment(client).experiment_id, run_name=study, tags=tags)
    client.update_run(run.info.run_id, status="RUNNING")
    client.set_tag(run.info.run_id, "workbench.touched", f"{time.time():.0f}")
    return run.info.run_id


def finish_study(client: MlflowClient, run_id: str, metrics: Mapping[str, float], note: str, state: str) -> None:
    """Write a study's summary onto its run and end it: "complete", "interrupted" or "failed"; "running" leaves it."""
    client.log_batch(
        run_id,
        metrics=[Metric(k, v, int(time.time() * 1000), 0) for k, v in metrics.items()],
        tags=[RunTag("mlflow.note.content", note), RunTag("workbench.state", state)],
    )
    if state != "running":
        client.set_terminated(run_id, STATUS.get(state, "KILLED"))


def attach(study: str, path: Path, where: str = "figures") -> None:
    """Attach a file, or a folder of figures, to a study's run."""
    client = connect()
    log = client.log_artifacts if path.is_dir() else client.log_artifact
    log(require_study(client, study).info.run_id, str(path), where)
